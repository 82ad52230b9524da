"""Test that the baselines of the kernels benchmark compute the ops, and that its rows have the promised keys."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from model import ops
from model.ops import library
from trainer.benchmark import __main__ as benchmark
from trainer.benchmark import kernels
from trainer.benchmark.attention_baselines import CrossShape, ResamplerShape, cross_baselines, resampler_baselines
from trainer.benchmark.result_file import Measurement

CROSS, RESAMPLER = (
    CrossShape(2, 40, 3, 2, 16, num_latents=4, leading_text=True),
    ResamplerShape(2, 5, 2, 16, num_latents=4),
)
KEYS = {"benchmark", "case", "measure", "unit", "value", "baseline", "baseline_value", "ratio", "target", "met"}


def test_baselines_of_cross_attention_compute_the_same() -> None:
    q = torch.randn(80, 2, 16)
    k, v = torch.randn(2, 6, 4, 2, 16).unbind(0)
    expected = ops.masked_cross_attention(q, k, v, CROSS.media_index("cpu"), backend="reference")
    for baseline in cross_baselines(CROSS, "cpu").values():
        torch.testing.assert_close(baseline(q, k, v), expected, rtol=1e-5, atol=1e-5)


def test_baselines_of_the_resampler_compute_the_same() -> None:
    q, k_latents, v_latents = torch.randn(3, 2, 4, 2, 16).unbind(0)
    k_features, v_features = torch.randn(2, 10, 2, 16).unbind(0)
    cu_media = torch.tensor([0, 5, 10])
    inputs = (q, k_features, v_features, k_latents, v_latents)
    expected = ops.resampler_attention(*inputs, cu_media, backend="reference")
    for baseline in resampler_baselines(RESAMPLER, "cpu").values():
        torch.testing.assert_close(baseline(*inputs), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
@pytest.mark.skipif(library.load_errors()["cpu"] is not None, reason="the CPU kernels are not built")
def test_a_run_writes_rows_after_a_header(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(kernels.CROSS_SHAPES, "cpu", [CROSS])
    monkeypatch.setitem(kernels.RESAMPLER_SHAPES, "cpu", [RESAMPLER])
    target = tmp_path / "rows.json"
    threads = torch.get_num_threads()
    assert benchmark.main(["kernels", "--device", "cpu", "--json", str(target)]) == 0
    header, *rows = json.loads(target.read_text())
    assert {"device", "hardware", "versions", "commit", "benchmark"} <= header.keys()
    assert all(row.keys() == KEYS for row in rows)
    compared = [row for row in rows if row["baseline"] is not None]
    assert compared
    assert all(row["ratio"] == pytest.approx(row["baseline_value"] / row["value"]) for row in compared)
    assert torch.get_num_threads() == threads


def test_check_fails_exactly_when_a_target_is_missed(monkeypatch: pytest.MonkeyPatch) -> None:
    def rows(ratio: float) -> list[Measurement]:
        return [Measurement("kernels", "case", "forward", "ms", 1.0, "baseline", ratio, ratio, target=2.0)]

    for ratio, code in ((1.9, 1), (2.0, 0)):
        monkeypatch.setattr(kernels, "run", lambda _device, ratio=ratio: rows(ratio))
        assert benchmark.main(["kernels", "--device", "cpu", "--check"]) == code
        assert benchmark.main(["kernels", "--device", "cpu"]) == 0


def test_every_shape_of_the_targets_is_measured_on_cuda() -> None:
    crosses = {(shape.num_heads, shape.head_dim, shape.num_media) for shape in kernels.CROSS_SHAPES["cuda"]}
    assert crosses == {
        (num_heads, head_dim, media) for num_heads, head_dim in ((16, 64), (32, 128)) for media in (5, 16, 32)
    }
    resamplers = {(shape.num_media, shape.num_features) for shape in kernels.RESAMPLER_SHAPES["cuda"]}
    assert resamplers == {(40, 256), (160, 1024), (320, 1024)}


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_cuda_without_a_device_is_refused() -> None:
    assert benchmark.main(["kernels", "--device", "cuda"]) == 2
