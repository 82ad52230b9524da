"""Check the CUDA kernels on a GPU: against float64, against their baselines, repeated, and with bad input."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from model import ops
from model.ops import self_check
from tests.ops.cases import (
    PACKED,
    UNORDERED,
    check_fused,
    cross_case,
    expect,
    resampler_case,
    run_cross,
    run_resampler,
)
from trainer.benchmark.attention_baselines import CrossShape, ResamplerShape, cross_baselines, resampler_baselines

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
TYPES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
HEAD_DIMS = pytest.mark.parametrize("head_dim", [64, 96, 128])


@TYPES
@HEAD_DIMS
@pytest.mark.parametrize("so_far", [False, True], ids=["one medium", "so far"])
def test_cross_attention(dtype: torch.dtype, head_dim: int, so_far: bool) -> None:
    inputs = ((64, PACKED * 4), (5, PACKED), (70, UNORDERED), (64, [-1] * 5), (64, [7]))
    for seed, (num_latents, index) in enumerate(inputs):
        options = {"num_latents": num_latents, "head_dim": head_dim, "dtype": dtype, "so_far": so_far}
        check_fused(expect(cross_case(index, num_media=8, num_heads=3, seed=seed, device="cuda", **options)))


@TYPES
@HEAD_DIMS
def test_resampler(dtype: torch.dtype, head_dim: int) -> None:
    cases = ((64, [300, 0, 63]), (7, [64, 65, 1]), (70, [30, 140]), (64, [0]), (70, [1500, 30]), (64, [2000]))
    for seed, (num_latents, lengths) in enumerate(cases):
        options = {
            "num_latents": num_latents,
            "head_dim": head_dim,
            "dtype": dtype,
            "num_heads": 3,
            "seed": seed,
            "device": "cuda",
        }
        check_fused(expect(resampler_case(lengths, **options)))


@TYPES
@HEAD_DIMS
def test_the_comparison_before_the_first_use_finds_nothing(dtype: torch.dtype, head_dim: int) -> None:
    assert self_check.compare(self_check.fused(), torch.device("cuda", 0), dtype, head_dim) is None


def test_cross_attention_at_training_sizes() -> None:
    index = [row * 5 + position // 410 for row in range(8) for position in range(2048)]
    check_fused(expect(cross_case(index, num_media=40, num_heads=4, dtype=torch.bfloat16, device="cuda")))


def test_repeated_runs_are_equal_bit_for_bit() -> None:
    case = cross_case(PACKED * 8, num_media=8, dtype=torch.bfloat16, so_far=True, device="cuda")
    media = resampler_case([5000, 20, 77], dtype=torch.bfloat16, device="cuda")  # several blocks share the keys
    first = run_cross(ops.masked_cross_attention, case), run_resampler(ops.resampler_attention, media)
    for _ in range(20):
        again = run_cross(ops.masked_cross_attention, case), run_resampler(ops.resampler_attention, media)
        assert all(torch.equal(x, y) for a, b in zip(first, again, strict=True) for x, y in zip(a, b, strict=True))


def test_strided_and_misaligned_inputs() -> None:
    case = cross_case(PACKED, num_media=8, dtype=torch.bfloat16, device="cuda")
    plain = run_cross(ops.masked_cross_attention, case)
    wide = torch.zeros(len(PACKED), 2, 67, dtype=torch.bfloat16, device="cuda")
    wide[..., 1:65] = case.q
    for x, y in zip(plain, run_cross(ops.masked_cross_attention, case._replace(q=wide[..., 1:65])), strict=True):
        assert torch.equal(x, y)


def test_float32_and_other_head_dims_fall_back() -> None:
    for options in ({"dtype": torch.float32}, {"dtype": torch.bfloat16, "head_dim": 80}):
        case = cross_case(PACKED, num_media=8, device="cuda", **options)
        assert run_cross(ops.masked_cross_attention, case)[0].shape == case.q.shape
        with pytest.raises(RuntimeError, match="no kernels for"):
            run_cross(ops.masked_cross_attention, case, backend="fused")


def test_opcheck() -> None:
    case = cross_case(PACKED, num_media=8, dtype=torch.bfloat16, device="cuda")
    inputs = [x.detach().clone().requires_grad_() for x in case[:3]]
    scale = torch.tensor([0.5], device="cuda", requires_grad=True)
    torch.library.opcheck(
        torch.ops.flamingo.masked_cross_attention.default, (*inputs, case.media_index, None, scale, 0.125)
    )
    media = resampler_case([20, 0, 70], dtype=torch.bfloat16, device="cuda")
    inputs = [x.detach().clone().requires_grad_() for x in media[:5]]
    torch.library.opcheck(torch.ops.flamingo.resampler_attention.default, (*inputs, media.cu_media, 0.125))


@pytest.mark.parametrize(
    "call",
    [
        "ops.masked_cross_attention(q, k, k, index, backend='fused')",
        "ops.find_token_ranges(index, None, 1, q)",
    ],
)
def test_a_media_index_out_of_range_stops_the_process(call: str) -> None:
    script = (
        "import torch; from model import ops\n"
        "q, k = (torch.zeros(s, device='cuda', dtype=torch.bfloat16) for s in ((2, 1, 64), (1, 64, 1, 64)))\n"
        f"index = torch.tensor([0, 1], device='cuda')\n{call}\ntorch.cuda.synchronize()\n"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert result.returncode != 0
    traps = "attention" in call and torch.cuda.get_device_capability()[0] == 9
    assert ("launch failure" if traps else "media_index is out of range") in result.stdout + result.stderr


def test_baselines_compute_the_same() -> None:
    shape = CrossShape(2, 256, 4, 2, 64)
    q, grid = torch.randn(512, 2, 64), torch.randn(2, 8, 64, 2, 64)
    q, k, v = (x.to("cuda", torch.bfloat16) for x in (q, *grid.unbind(0)))
    ours = ops.masked_cross_attention(q, k, v, shape.media_index("cuda"), backend="fused")
    for name, baseline in cross_baselines(shape, "cuda").items():
        torch.testing.assert_close(baseline(q, k, v), ours, rtol=2e-2, atol=2e-2, msg=name)
    media = ResamplerShape(3, 100, 2, 64)
    case = resampler_case([100] * 3, dtype=torch.bfloat16, device="cuda")
    resampled = ops.resampler_attention(*case[:6], backend="fused")
    for name, baseline in resampler_baselines(media, "cuda").items():
        if "features only" not in name:  # it leaves out the latents, and is a baseline for speed only
            torch.testing.assert_close(baseline(*case[:5]), resampled, rtol=2e-2, atol=2e-2, msg=name)
