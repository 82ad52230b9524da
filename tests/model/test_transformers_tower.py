"""Towers of transformers give the features of transformers' own classes."""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch
from transformers import CLIPVisionConfig, CLIPVisionModel

from model.config import PerceiverResamplerConfig, VisionEncoderConfig
from model.factory import build_flamingo
from model.internals import FakeTensorMode
from model.tower_patches import PatchLayout
from model.vision_encoder import VisionEncoder, build_tower
from tests.model.builders import BEYOND, random_media, random_text, tiny_config
from tests.model.test_host_synchronisation import NoTensorOfHostValues

ARCHITECTURE = {
    "hidden_size": 24,
    "intermediate_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
TILED = {
    "model_type": "mllama_vision_model",
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_global_layers": 1,
    "attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
    "intermediate_layers_indices": [0],
    "vision_output_dim": 32,
}
STATISTICS = {"mean": (0.5, 0.4, 0.3), "std": (0.2, 0.25, 0.3)}


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> tuple[CLIPVisionModel, Path]:
    folder = tmp_path_factory.mktemp("clip")
    torch.manual_seed(0)
    model = CLIPVisionModel(CLIPVisionConfig(**ARCHITECTURE)).eval()
    model.save_pretrained(folder)
    return model, folder


@pytest.mark.parametrize("class_feature", [True, False])
@pytest.mark.parametrize(("block", "norm"), [(-1, False), (-1, True), (1, False), (-2, True)])
def test_features_of_clip(clip: tuple[CLIPVisionModel, Path], class_feature: bool, block: int, norm: bool) -> None:
    model, folder = clip
    config = VisionEncoderConfig(
        f"transformers:{folder}", feature_block=block, feature_norm=norm, class_feature=class_feature, **STATISTICS
    )
    encoder = VisionEncoder(build_tower(config), config)
    assert (encoder.num_features, encoder.dim, encoder.patch_size) == (4 + class_feature, 24, None)
    media = random_media(2, num_frames=3, size=28)
    pixels = encoder.normalize(media.flatten(0, 1))
    with torch.no_grad():
        states = model(pixel_values=pixels, output_hidden_states=True).hidden_states
        expected = states[block % 3 + 1]
        if norm:
            expected = getattr(model, "vision_model", model).post_layernorm(expected)
    expected = expected if class_feature else expected[:, 1:]
    torch.testing.assert_close(encoder(media).flatten(0, 1), expected)


def test_settings_that_do_not_fit(clip: tuple[CLIPVisionModel, Path], tmp_path: Path) -> None:
    config = VisionEncoderConfig(f"transformers:{clip[1]}", **STATISTICS)
    with pytest.raises(ValueError, match=r"vision.feature_block 3: the tower has 3 blocks; set -3 to -1"):
        build_tower(replace(config, feature_block=3))
    with pytest.raises(ValueError, match=r"vision.image_size 56: .* takes 28 pixels only"):
        build_tower(replace(config, image_size=56))
    with pytest.raises(ValueError, match=r"vision.mean, vision.std: .* has no preprocessor_config.json"):
        build_tower(replace(config, mean=None, std=None))
    (tmp_path / "config.json").write_text((clip[1] / "config.json").read_text())
    with pytest.raises(ValueError, match=r"has no .safetensors file; pickled weights are not read"):
        build_tower(replace(config, name=f"transformers:{tmp_path}"))
    with pytest.raises(ValueError, match=r"chooses its features itself"):
        build_tower(VisionEncoderConfig("transformers:", architecture=TILED, **STATISTICS))


def test_an_image_of_tiles_does_not_depend_on_others() -> None:
    config = VisionEncoderConfig("transformers:", architecture=TILED, feature_norm=False, **STATISTICS)
    torch.manual_seed(0)
    encoder = VisionEncoder(build_tower(config), config)
    assert (encoder.patch_size, encoder.features_per_patch, encoder.max_tiles, encoder.dim) == (28, 4, 4, 32)
    tiles = random_media(6, size=28)[:, 0]
    grids = [(1, 2, 2), (1, 1, 2)]
    together = encoder(tiles, grids)
    assert together.shape == (6 * 4, 32)
    torch.testing.assert_close(together[:16], encoder(tiles[:4], grids[:1]))
    torch.testing.assert_close(together[16:], encoder(tiles[4:], grids[1:]))
    alone = encoder(tiles[:1, None])
    torch.testing.assert_close(alone[0, 0], encoder(tiles[:1], [(1, 1, 1)]))
    with pytest.raises(ValueError, match=r"an image of 2 x 3 tiles: .* set image_tokens to 4 or less"):
        encoder(tiles, [(1, 2, 3)])


def test_tiles_make_no_host_wait_for_the_device() -> None:
    config = VisionEncoderConfig("transformers:", architecture=TILED, feature_norm=False, **STATISTICS)
    encoder = VisionEncoder(build_tower(config), config)
    grids = [(1, 2, 2), (1, 1, 2)]
    layout = PatchLayout.of(grids)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = PatchLayout(*(mode.from_tensor(getattr(layout, field.name)) for field in fields(layout)))
        with NoTensorOfHostValues():
            features = encoder(mode.from_tensor(random_media(6, size=28)[:, 0]), grids, fake)
            squares = encoder(mode.from_tensor(random_media(6, size=28)))
    assert features.shape == (6 * 4, 32)
    assert squares.shape == (6, 1, 4, 32)


@pytest.mark.parametrize("kind", ["perceiver", "linear"])
def test_tiles_go_through_either_resampler(kind: str) -> None:
    """A batch of tiles gives each image what it gives alone, and gradients reach the resampler."""
    config = tiny_config(
        vision=VisionEncoderConfig("transformers:", architecture=TILED, feature_norm=False, **STATISTICS),
        resampler=PerceiverResamplerConfig(
            kind=kind,  # type: ignore[arg-type]
            num_layers=1,
            dim=20,
            num_heads=2,
            head_dim=8,
            num_latents=4,
            num_frames=1,
        ),
    )
    model = build_flamingo(config, BEYOND)
    tiles = random_media(5, size=28)[:, 0]
    grids = [(1, 2, 2), (1, 1, 1)]
    ids = random_text(2, 8)
    ids[:, 1] = BEYOND.image_id
    for block in model.cross_attention:
        torch.nn.init.constant_(block.attention_gate, 0.5)
    together = model(ids, media=tiles, media_grids=grids).logits
    torch.testing.assert_close(together[:1], model(ids[:1], media=tiles[:4], media_grids=grids[:1]).logits)
    torch.testing.assert_close(together[1:], model(ids[1:], media=tiles[4:], media_grids=grids[1:]).logits)
    together.sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in model.resampler.parameters() if p.requires_grad)


def test_frames_of_a_video_through_a_projector() -> None:
    """Every frame is a block; a token sees all frames of its medium."""
    resampler = PerceiverResamplerConfig(kind="linear", dim=20)
    model = build_flamingo(tiny_config(resampler=resampler), BEYOND)
    for block in model.cross_attention:
        torch.nn.init.constant_(block.attention_gate, 0.5)
    media = random_media(1, num_frames=3)
    assert model.encode_media(media).shape == (3, 4, 20)
    ids = random_text(1, 8)
    ids[:, 1] = BEYOND.image_id
    with torch.no_grad():
        before = model(ids, media=media).logits
        for frame in range(3):
            other = media.clone()
            other[:, frame] = 255 - other[:, frame]
            changed = (model(ids, media=other).logits - before).abs()
            assert changed[:, 1:].max() > 0
            assert changed[:, :1].max() == 0
