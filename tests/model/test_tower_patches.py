"""Check that images of any shape do not affect one another, and that squares give the features of the plain tower."""

from __future__ import annotations

from dataclasses import replace

import open_clip
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from model.config import PerceiverResamplerConfig, VisionEncoderConfig
from model.media_index import preceding
from model.media_inputs import to_patches
from model.perceiver_resampler import PerceiverResampler
from model.tower_patches import Grid, PatchLayout, resize_positions
from model.vision_encoder import VisionEncoder, build_tower
from tests.model.builders import BEYOND, random_media, text_with_media, tiny_flamingo, tower_folder

PATCH = 8
CONFIG = VisionEncoderConfig(name=f"local-dir:{tower_folder()}")
SHAPES = [(1, 2, 2), (1, 3, 1), (2, 1, 5), (1, 4, 3), (1, 1, 1)]


def encoder(config: VisionEncoderConfig = CONFIG) -> VisionEncoder:
    return VisionEncoder(build_tower(config), config)


def media(shapes: list[Grid] = SHAPES) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(0, 256, (f, 3, r * PATCH, c * PATCH), generator=generator).byte() for f, r, c in shapes]


def patches(found: list[Tensor]) -> Tensor:
    return torch.cat([to_patches(one, PATCH) for one in found])


@pytest.mark.parametrize("changes", [{}, {"feature_block": 0, "feature_norm": False}])
def test_the_towers_own_square_gives_the_features_of_the_plain_tower(changes: dict[str, object]) -> None:
    tower, squares = encoder(replace(CONFIG, **changes)), random_media(3, num_frames=2)  # type: ignore[arg-type]
    found = tower(patches(list(squares)), [(2, 2, 2)] * 3)
    torch.testing.assert_close(found, tower(squares).flatten(0, 2), rtol=1e-5, atol=1e-5)


def test_an_image_has_the_same_features_alone_and_among_others() -> None:
    tower, images = encoder(), media()
    together = tower(patches(images), SHAPES).split([f * r * c for f, r, c in SHAPES])
    for image, shape, found in zip(images, SHAPES, together, strict=True):
        torch.testing.assert_close(tower(patches([image]), [shape]), found, rtol=1e-5, atol=1e-5)
    others = [images[0], *(255 - image for image in images[1:])]
    assert torch.equal(tower(patches(others), SHAPES)[:4], together[0])


def test_another_shape_equals_open_clip_loaded_at_that_size() -> None:
    ours = encoder()(patches(media([(1, 3, 3)])), [(1, 3, 3)])
    larger = encoder(replace(CONFIG, image_size=3 * PATCH))
    torch.testing.assert_close(ours, larger(media([(1, 3, 3)])[0][None]).flatten(0, 2), rtol=1e-4, atol=1e-4)


def test_positions_are_interpolated_in_both_directions() -> None:
    rows, columns = torch.meshgrid(torch.arange(4.0), torch.arange(4.0), indexing="ij")
    table = torch.stack([rows, columns], -1).flatten(0, 1)
    assert resize_positions(table, (4, 4), (4, 4)) is table
    wide = resize_positions(table.bfloat16(), (4, 4), (2, 8)).float().unflatten(0, (2, 8))
    assert wide[0, :, 0].unique().numel() == 1 and (wide[0, 1:, 1] > wide[0, :-1, 1]).all()
    expected = F.interpolate(table.T.view(1, 2, 4, 4), (2, 8), mode="bicubic", antialias=True)[0].permute(1, 2, 0)
    torch.testing.assert_close(wide, expected, rtol=1e-2, atol=1e-2)


def test_the_resampler_sees_no_padding() -> None:
    torch.manual_seed(0)
    resampler = PerceiverResampler(
        PerceiverResamplerConfig(num_layers=2, dim=20, num_heads=2, head_dim=8, num_latents=4), 24
    )
    tower, images = encoder(), media()
    layout = PatchLayout.of(SHAPES)
    together = resampler(tower(patches(images), SHAPES), layout.cu_media, layout.frame_of_patch)
    for number, (image, shape) in enumerate(zip(images, SHAPES, strict=True)):
        features = tower(patches([image]), [shape])
        alone = resampler(features.view(1, shape[0], -1, 24))
        torch.testing.assert_close(alone[0], together[number], rtol=1e-4, atol=1e-5)


def test_a_model_trains_on_patches_and_squares_give_the_same_loss_either_way() -> None:
    model = tiny_flamingo(gates=0.5)
    ids, squares = text_with_media()
    expected = model(ids, labels=ids, media=squares).loss
    index = preceding(ids, BEYOND.image_id)
    found = model(ids, labels=ids, media=patches(list(squares)), media_index=index, media_grids=[(1, 2, 2)] * 3).loss
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    shapes = SHAPES[:3]
    model(ids, labels=ids, media=patches(media(shapes)), media_grids=shapes).loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.resampler.parameters())


def test_half_precision_towers_take_padded_batches() -> None:
    tower = encoder().to(torch.bfloat16)
    found = tower(patches(media()), SHAPES)
    assert found.dtype is torch.bfloat16 and found.isfinite().all()


def test_patches_for_a_tower_that_takes_squares_only_are_an_error() -> None:
    config = VisionEncoderConfig(name="timm:test_vit")
    tower = encoder(config)
    assert tower.patch_size is None
    with pytest.raises(ValueError, match="squares only"):
        tower(torch.zeros(1, 3, 16, 16, dtype=torch.uint8), [(1, 1, 1)])
    visual = open_clip.transformer.VisionTransformer(16, 8, 24, 2, 2, 2.0, qk_norm=True)
    visual.preprocess_cfg = {"mean": (0.5,) * 3, "std": (0.5,) * 3}
    assert VisionEncoder(visual, CONFIG).patch_size is None
    with pytest.raises(ValueError, match="expected"):
        encoder()(torch.zeros(3, 3, 8, 8, dtype=torch.uint8), [(1, 2, 2)])
