"""Check the frozen tower: its features, its normalization, and the modules that remain."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import open_clip
import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from model.config import VisionEncoderConfig
from model.tower_statistics import OPENAI, Statistics, tower_statistics
from model.vision_encoder import VisionEncoder, build_tower
from tests.model.builders import IMAGE_SIZE, random_media, tower_folder, write_tower

CONFIG = VisionEncoderConfig(name=f"local-dir:{tower_folder()}")


def encoder(config: VisionEncoderConfig = CONFIG, dtype: torch.dtype = torch.float32) -> VisionEncoder:
    return VisionEncoder(build_tower(config).to(dtype), config)


def whole_clip() -> nn.Module:
    return open_clip.create_model(CONFIG.name).eval()


def normalized(media: Tensor) -> Tensor:
    mean, std = torch.tensor([0.5, 0.4, 0.3]), torch.tensor([0.2, 0.25, 0.3])
    return (media.flatten(0, 1) / 255 - mean[:, None, None]) / std[:, None, None]


def test_last_features_after_the_norm_are_open_clips_tokens() -> None:
    clip, media = whole_clip(), random_media(2, num_frames=3)
    clip.visual.output_tokens = True
    with torch.no_grad():
        _, tokens = clip.visual(normalized(media))
    found = encoder()(media)
    assert found.shape == (2, 3, 4, 24)
    torch.testing.assert_close(found, tokens.view(2, 3, 4, 24))
    assert not found.requires_grad


@pytest.mark.parametrize("block", [-1, -2, 0, 2])
def test_features_of_a_block_before_the_norm(block: int) -> None:
    clip, media = whole_clip(), random_media(2)
    outputs = []
    clip.visual.transformer.resblocks[block].register_forward_hook(lambda module, args, output: outputs.append(output))
    with torch.no_grad():
        clip.visual(normalized(media))
    found = encoder(replace(CONFIG, feature_block=block, feature_norm=False))(media)
    torch.testing.assert_close(found[:, 0], outputs[0][:, 1:])  # without the class token


def test_only_modules_that_lead_to_the_features_are_kept() -> None:
    whole = {name for name, _ in whole_clip().visual.named_parameters()}
    kept = {name.removeprefix("tower.") for name, _ in encoder().named_parameters()}
    assert whole - kept == {"proj"}
    early = encoder(replace(CONFIG, feature_block=-2, feature_norm=False))
    kept = {name.removeprefix("tower.") for name, _ in early.named_parameters()}
    gone = whole - kept
    assert {name.split(".")[0] for name in gone} == {"proj", "ln_post", "transformer"}
    assert {".".join(name.split(".")[1:3]) for name in gone if "transformer" in name} == {"resblocks.2"}
    assert all(parameter.ndim > 0 and not parameter.requires_grad for parameter in early.parameters())


def test_uint8_and_fractions_are_the_same_pixels() -> None:
    media = random_media(2)
    tower = encoder()
    torch.testing.assert_close(tower(media), tower(media / 255))


def test_casting_does_not_round_the_statistics() -> None:
    cast = encoder().to(torch.bfloat16)
    torch.testing.assert_close(cast.normalize(random_media(2).flatten(0, 1)), normalized(random_media(2)))
    assert cast(random_media(2)).dtype == torch.bfloat16
    assert "statistics_bits" not in cast.state_dict()


def test_the_tower_stays_in_evaluation_mode() -> None:
    tower = encoder()
    parent = nn.ModuleList([tower]).train()
    assert parent.training
    assert not any(module.training for module in tower.modules())


def test_dim_and_number_of_features_are_known_without_running() -> None:
    tower = encoder()
    assert (tower.dim, tower.num_features, tower.image_size) == (24, 4, IMAGE_SIZE)


def test_another_image_size_interpolates_the_position_embeddings() -> None:
    tower = encoder(replace(CONFIG, image_size=32))
    assert (tower.image_size, tower.num_features) == (32, 16)
    assert tower(random_media(1, size=32)).shape == (1, 1, 16, 24)


def test_a_timm_nfnet_gives_its_last_grid() -> None:
    """Take the paper's kind of tower, whose features are the grid after the last convolution, row by row."""
    config = VisionEncoderConfig(name="timm:test_nfnet", image_size=96, feature_norm=False)
    tower = encoder(config)
    media = random_media(2, num_frames=2, size=96)
    found = tower(media)
    trunk = timm.create_model("test_nfnet", num_classes=0).eval()
    missing, unexpected = trunk.load_state_dict(tower.tower.state_dict(), strict=False)
    assert not missing
    assert not unexpected
    grids = []
    trunk.final_conv.register_forward_hook(lambda module, args, output: grids.append(output))
    with torch.no_grad():
        trunk(tower.normalize(media.flatten(0, 1)))
    assert tower.mean == trunk.pretrained_cfg["mean"]
    grid = grids[0]
    assert found.shape == (2, 2, 9, tower.dim)
    torch.testing.assert_close(found[1, 0, 5], grid[2, :, 1, 2])
    assert encoder(replace(config, image_size=160)).num_features == 25


def test_a_timm_vision_transformer_gives_features() -> None:
    config = VisionEncoderConfig(name="timm:test_vit", feature_block=-2)
    tower = encoder(config)
    assert tower(random_media(1, size=tower.image_size)).shape == (1, 1, tower.num_features, tower.dim)


def test_timm_weights_come_from_safetensors(tmp_path: Path) -> None:
    torch.manual_seed(3)
    trunk = timm.create_model("test_nfnet", num_classes=0, global_pool="")
    save_file(trunk.state_dict(), tmp_path / "trunk.safetensors")
    config = VisionEncoderConfig(
        name="timm:test_nfnet", pretrained=str(tmp_path / "trunk.safetensors"), image_size=64, feature_norm=False
    )
    for name, tensor in encoder(config).tower.state_dict().items():
        assert torch.equal(tensor, trunk.state_dict()[name])


def test_open_clip_weights_come_from_a_safetensors_file(tmp_path: Path) -> None:
    write_tower(tmp_path, seed=5)
    weights = load_file(tmp_path / "open_clip_model.safetensors")
    tower = encoder(VisionEncoderConfig(name=f"local-dir:{tmp_path}"))
    assert torch.equal(tower.tower.conv1.weight, weights["visual.conv1.weight"])


def test_a_residual_network_of_open_clip_has_no_pooling_left() -> None:
    with torch.device("meta"):
        tower = encoder(VisionEncoderConfig(name="RN50", feature_norm=False))
    assert (tower.num_features, tower.dim) == (49, 2048)
    assert not any("attnpool" in name for name, _ in tower.named_parameters())


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (VisionEncoderConfig(name="local-dir:nowhere"), "no open_clip_config.json"),
        (VisionEncoderConfig(name="no-such-tower"), "no-such-tower"),
        (VisionEncoderConfig(name="ViT-B-32", pretrained="no-such-tag"), "no-such-tag"),
        (VisionEncoderConfig(name="timm:no_such_tower"), "no_such_tower"),
        (VisionEncoderConfig(name="timm:test_nfnet", pretrained="weights.pt"), "safetensors"),
        (replace(CONFIG, feature_block=7), "feature_block"),
    ],
)
def test_wrong_settings_of_a_tower_are_named(config: VisionEncoderConfig, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        encoder(config)


def test_a_pickled_file_is_refused(tmp_path: Path) -> None:
    torch.save({}, tmp_path / "weights.pt")
    with pytest.raises(ValueError, match="safetensors"):
        build_tower(VisionEncoderConfig(name="ViT-B-32", pretrained=str(tmp_path / "weights.pt")))


def test_media_of_a_wrong_shape_are_a_clear_error() -> None:
    with pytest.raises(ValueError, match="media, frames, 3"):
        encoder()(random_media(1)[0])
    with pytest.raises(ValueError, match=r"32 x 32 pixels.*built for 16.*vision\.image_size"):
        encoder()(random_media(1, size=32))


@pytest.mark.parametrize(
    "pixels",
    [
        random_media(1).float(),
        random_media(1).double(),
        random_media(1).bfloat16(),
        random_media(1).float() / 127.5 - 1,
        random_media(1).float() / 255 + torch.nan,
        random_media(1).int(),
        random_media(1) > 9,
    ],
    ids=["0..255", "double", "bfloat16", "normalized", "nan", "int32", "bool"],
)
def test_pixels_of_another_range_or_type_are_an_error(pixels: Tensor) -> None:
    with pytest.raises(ValueError, match=r"0\.\.1"):
        encoder()(pixels)


def test_patches_of_another_range_are_an_error() -> None:
    patches = random_media(1, size=8)[:, 0]
    with pytest.raises(ValueError, match=r"0 to 2\d\d.*0\.\.1"):
        encoder()(patches.float(), [(1, 1, 1)])
    assert encoder()(patches / 255, [(1, 1, 1)]).shape == (1, 24)


@pytest.mark.parametrize(
    ("name", "size", "message"),
    [
        ("ViT-B-32", 230, "image_size 230.*last 6.*224 or 256"),
        ("ViT-B-32", 31, "image_size 31.*"),
        ("timm:test_vit", 100, "image_size 100.*last 4.*96 or 112"),
        ("timm:convnext_atto", 226, "image_size 226.*last 2.*224 or 228"),
    ],
)
def test_a_size_whose_border_no_patch_sees_is_an_error(name: str, size: int, message: str) -> None:
    with torch.device("meta"), pytest.raises(ValueError, match=message):
        encoder(VisionEncoderConfig(name=name, image_size=size))


@pytest.mark.parametrize(
    ("name", "size"), [("ViT-SO400M-14-SigLIP-384", None), ("ViT-SO400M-14-SigLIP-384", 384), ("RN50", 250)]
)
def test_a_towers_own_size_and_padded_convolutions_are_fine(name: str, size: int | None) -> None:
    with torch.device("meta"):
        found = encoder(VisionEncoderConfig(name=name, image_size=size, feature_norm=False))
    assert found.image_size == (size or 384)


class Tower:
    """Stand for a tower to which open_clip attached OpenAI's statistics."""

    preprocess_cfg = {"mean": OPENAI[0], "std": OPENAI[1]}


def statistics(name: str, pretrained: str | None, **settings: Any) -> Statistics:
    return tower_statistics(VisionEncoderConfig(name=name, pretrained=pretrained, **settings), Tower())


@pytest.fixture
def weights(tmp_path: Path) -> str:
    save_file({}, tmp_path / "weights.safetensors")
    return str(tmp_path / "weights.safetensors")


def test_weights_from_a_file_get_the_statistics_of_every_tag(weights: str) -> None:
    """Compare all models and tags that open_clip knows; nothing is downloaded."""
    refused = set()
    for name in open_clip.list_models():
        settings = [open_clip.get_pretrained_cfg(name, tag) for tag in open_clip.list_pretrained_tags_by_model(name)]
        expected = {(tuple(one["mean"]), tuple(one["std"])) for one in settings}
        if len(expected) > 1:
            refused.add(name)
            with pytest.raises(ValueError, match=rf"vision\.mean, vision\.std.*'{name}'"):
                statistics(name, weights)
        else:
            assert expected <= {statistics(name, weights)}
    assert "ViT-L-14" in refused


@pytest.mark.parametrize(
    ("name", "mean"),
    [
        ("ViT-B-16-SigLIP", 0.5),
        ("ViT-B-16-SigLIP2", 0.5),
        ("PE-Core-B-16", 0.5),
        ("MobileCLIP-S1", 0.0),
        ("ViT-L-14-CLIPA", 0.485),
        ("ViT-B/32", OPENAI[0][0]),
        ("timm:vit_base_patch16_siglip_224", 0.5),
    ],
)
def test_families_keep_their_own_mean(weights: str, name: str, mean: float) -> None:
    assert statistics(name, weights)[0][0] == mean


def test_a_tag_has_its_statistics_also_without_weights() -> None:
    assert statistics("ViT-L-14", "laion2b_s32b_b82k")[0] == (0.5, 0.5, 0.5)
    assert statistics("ViT-L-14", "openai") == OPENAI


def test_an_architecture_without_published_weights_is_named(weights: str, caplog: pytest.LogCaptureFixture) -> None:
    assert statistics("ViT-L-16", weights) == OPENAI
    assert "'ViT-L-16'" in caplog.text and "vision.mean and vision.std" in caplog.text


def test_the_tags_of_a_timm_tower_disagree(weights: str) -> None:
    with pytest.raises(ValueError, match=r"vision\.mean, vision\.std.*'timm:resnet34'"):
        statistics("timm:resnet34", weights)
    assert statistics("timm:resnet34", weights, mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6))[0] == (0.1, 0.2, 0.3)


def test_statistics_can_be_set() -> None:
    tower = encoder(replace(CONFIG, mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6)))
    assert (tower.mean, tower.std) == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    expected = (random_media(1)[0, 0, 1].float() / 255 - 0.2) / 0.5
    torch.testing.assert_close(tower.normalize(random_media(1))[0, 0, 1], expected)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"mean": (0.5, 0.5, 0.5)}, r"vision\.std is not set"),
        ({"std": (0.5, 0.5, 0.5)}, r"vision\.mean is not set"),
        ({"mean": (123.7, 116.3, 103.5), "std": (58.4, 57.1, 57.4)}, r"vision\.mean.*divided by 255"),
        ({"mean": (0.5,), "std": (0.5, 0.5, 0.5)}, r"vision\.mean.*three numbers"),
        ({"mean": (0.5, 0.5, 0.5), "std": (0.0, 0.5, 0.5)}, r"vision\.std"),
    ],
)
def test_wrong_statistics_are_named(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        encoder(replace(CONFIG, **settings))
