"""Compare useful FLOPs with numbers worked out by hand and with torch's own counter."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from model.config import CrossAttentionConfig, PerceiverResamplerConfig, TrainableConfig, VisionEncoderConfig
from model.factory import build_flamingo
from model.flops import UsefulFlops, Workload, utilization
from model.presets import get_preset
from model.vision_encoder import VisionEncoder, build_tower
from tests.model.builders import BEYOND, random_media, tiny_flamingo
from tests.model.language_models import build

SIZES = UsefulFlops(
    lm_weights=1000, lm_attention=16, head_weights=500, cross_text=200, cross_media=60, cross_attention=8,
    num_latents=4, num_features=10, resampler_features=30, resampler_latents=70, resampler_attention=5, vision=12345,
    num_blocks=4,
)  # fmt: skip


def test_parts_worked_out_by_hand() -> None:
    parts = SIZES.parts(Workload(rows=1, tokens=100, media=3, num_frames=2))
    assert parts == {
        "language_model": 100 * (4 * 1000 + 6 * 100 * 16),
        "head": 100 * 4 * 500,
        "cross_attention_text": 100 * (6 * 200 + 12 * 4 * 8),
        "cross_attention_media": 3 * 6 * 4 * 60,
        "resampler": 3 * 3 * (2 * 20 * 30 + 2 * 4 * 70 + 4 * 4 * 24 * 5),
        "vision": 3 * 2 * 12345,
    }
    assert sum(parts.values()) == 1360000 + 200000 + 158400 + 4320 + 33120 + 74070


def test_a_step_is_the_sum_over_sources() -> None:
    pairs, documents = Workload(8, 32), Workload(4, 256, media=5)
    assert SIZES.step([pairs, documents]) == 8 * SIZES.row(pairs) + 4 * SIZES.row(documents)


def test_sizes_of_a_model() -> None:
    sizes = UsefulFlops.of(tiny_flamingo())
    assert sizes.lm_weights == 3 * (2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 48)
    assert sizes.lm_attention == 3 * 32
    assert sizes.head_weights == 48 * 32
    assert sizes.cross_text == 3 * (2 * 32 * 32 + 2 * 32 * 128)
    assert sizes.cross_media == 3 * 20 * 64
    assert sizes.cross_attention == 3 * 32
    assert (sizes.num_latents, sizes.num_features) == (4, 4)
    assert sizes.resampler_features == 24 * 20 + 2 * 20 * 32
    assert sizes.resampler_latents == 2 * (20 * 16 + 20 * 32 + 16 * 20 + 2 * 20 * 80)
    assert sizes.resampler_attention == 2 * 16


ATTENTION = 2 * 32 * 32 + 2 * 32 * 16  # weights of a block's attention: 4 heads of 8, 2 of keys and values


@pytest.mark.parametrize(
    ("family", "weights"),
    [
        ("mixtral", 4 * (ATTENTION + 4 * 32 + 2 * 3 * 32 * 48)),
        ("qwen2_moe", 4 * (ATTENTION + 4 * 32 + 2 * 3 * 32 * 16 + 3 * 32 * 16 + 32)),  # an expert that all tokens share
    ],
)
def test_a_mixture_counts_the_experts_that_a_token_meets(family: str, weights: int) -> None:
    assert UsefulFlops.of(build(family)).lm_weights == weights


@pytest.mark.parametrize(
    ("family", "width"),
    [
        ("mamba", 0),
        ("lfm2", 2 * 32),  # 2 of the 4 blocks are convolutions
        ("qwen3_next", 2 * 32),
        ("deepseek_v3", 4 * 4 * (4 + 8 + 8) / 2),  # keys have 12 numbers, values 8
    ],
)
def test_only_blocks_with_softmax_attention_cost_the_square_of_a_row(family: str, width: int) -> None:
    sizes = UsefulFlops.of(build(family))
    assert sizes.lm_attention == width
    assert sizes.lm_weights > 0


def test_the_resampler_against_torchs_counter() -> None:
    model = tiny_flamingo(gates=0.5)
    features = torch.randn(3, 2, 4, 24)
    with FlopCounterMode(display=False) as counter:
        model.resampler(features)
    forward = UsefulFlops.of(model).parts(Workload(1, 1, media=3, num_frames=2))["resampler"] / 3
    attention = counter.get_total_flops() - forward
    # torch does not count an attention that our fused op computes
    assert attention in (0, -3 * 4 * 4 * (8 + 4) * 2 * 16)


def test_a_tower_against_torchs_counter() -> None:
    config = VisionEncoderConfig(name="timm:test_nfnet", image_size=96, feature_norm=False)
    tower = VisionEncoder(build_tower(config), config)
    with FlopCounterMode(display=False) as counter:
        tower(random_media(1, size=96))
    assert tower.flops == counter.get_total_flops() > 0


@pytest.mark.slow
def test_the_9b_has_the_expected_shares() -> None:
    """Expect 5.25 PFLOP a step at the ablation's batch: LM 58 %, vision 13 %, resampler 5 %, head 1 %."""
    with torch.device("meta"):
        sizes = UsefulFlops.of(build_flamingo(get_preset("9b"), BEYOND))
    assert sizes.vision == pytest.approx(2 * 117e9, rel=0.01)  # the tower: 117 GMAC a frame at 320 px
    step = [Workload(256, 256, 5), Workload(512, 32), Workload(512, 64), Workload(64, 32, 1, 8)]
    total = sizes.step(step)
    assert total == pytest.approx(5.25e15, rel=0.02)
    share = {name: sum(w.rows * sizes.parts(w)[name] for w in step) / total for name in sizes.parts(step[0])}
    assert share["language_model"] == pytest.approx(0.58, abs=0.05)
    assert share["vision"] == pytest.approx(0.13, abs=0.01)
    assert share["resampler"] == pytest.approx(0.05, abs=0.01)
    assert share["head"] == pytest.approx(0.01, abs=0.005)


def test_a_projector_and_shared_heads() -> None:
    cross = CrossAttentionConfig(num_heads=4, num_kv_heads=2, head_dim=8, activation="swiglu", ff_dim=24)
    model = tiny_flamingo(cross_attention=cross, resampler=PerceiverResamplerConfig(kind="linear", dim=20))
    sizes = UsefulFlops.of(model)
    assert sizes.cross_text == 3 * (2 * 32 * 32 + 3 * 32 * 24), "gate, up and down"
    assert sizes.cross_media == 3 * 20 * 2 * 2 * 8
    assert (sizes.num_latents, sizes.latents_per_frame, sizes.resampler_features) == (0, 4, 24 * 20)
    parts = sizes.parts(Workload(rows=1, tokens=10, media=3, num_frames=2))
    keys = 2 * 4
    assert parts["cross_attention_text"] == 10 * (6 * sizes.cross_text + 12 * keys * 3 * 32)
    assert parts["cross_attention_media"] == 3 * 6 * keys * sizes.cross_media
    assert parts["resampler"] == 3 * 3 * 2 * keys * 24 * 20


def test_utilization() -> None:
    assert utilization(flops=4e15, seconds=2.0, devices=8, peak=1e15) == 0.25


def test_trained_parts_need_more_passes() -> None:
    workload = Workload(rows=1, tokens=10, media=2)
    frozen = UsefulFlops.of(tiny_flamingo()).parts(workload)
    trained = TrainableConfig(language_model="full", vision="full")
    whole = UsefulFlops.of(tiny_flamingo(trainable=trained)).parts(workload)
    assert whole["vision"] == 3 * frozen["vision"] and whole["head"] == 1.5 * frozen["head"]
    assert whole["resampler"] == frozen["resampler"]
