"""Test that the baselines of the kernels benchmark compute the ops, and that its rows have the promised keys."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from model import ops
from model.ops import library
from trainer.benchmark import __main__ as benchmark
from trainer.benchmark import cuda_clock, kernels
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


def test_baselines_of_shared_heads_and_of_uneven_media_compute_the_same() -> None:
    shared, uneven = replace(CROSS, num_kv_heads=1), replace(CROSS, uneven=True)
    q = torch.randn(80, 2, 16)
    for shape, num_kv_heads in ((shared, 1), (uneven, 2)):
        if shape is shared and library.load_errors()["cpu"] is not None:
            continue
        k, v = torch.randn(2, 6, 4, num_kv_heads, 16).unbind(0)
        expected = ops.masked_cross_attention(q, k, v, shape.media_index("cpu"), backend="reference")
        for baseline in cross_baselines(shape, "cpu").values():
            torch.testing.assert_close(baseline(q, k, v), expected, rtol=1e-5, atol=1e-5)


def test_uneven_media_end_off_the_tiles() -> None:
    counts = CrossShape(1, 2048, 16, 16, 64, uneven=True).within_row("cpu").bincount()
    assert counts.sum() == 2048 and len(counts) == 16
    assert (counts[:4].float() / counts[0]).round().tolist() == [1, 2, 3, 4]
    ends = counts.cumsum(0)[:-1]
    assert (ends % 64 != 0).sum() >= 12
    leading = replace(CROSS, uneven=True).within_row("cpu")
    assert leading.tolist() == sorted(leading.tolist()) and set(leading.tolist()) == {-1, 0, 1, 2}


class FakeDevice:
    """Stand in for ``torch.cuda``: a call takes the host 2 s and the device 1 s, or the device alone in a graph."""

    def __init__(self) -> None:
        self.host = self.device = 0.0
        self.capturing = False

    def call(self) -> None:
        self.host += 0 if self.capturing else 2
        self.device = max(self.device, self.host) + 1

    def synchronize(self) -> None:
        self.host = max(self.host, self.device)

    def graph(self, graph: Any) -> Any:
        @contextmanager
        def capture() -> Iterator[None]:
            self.capturing = True
            before = self.device
            yield
            graph.seconds, self.device, self.capturing = self.device - before, before, False

        return capture()

    def patch(self, monkeypatch: pytest.MonkeyPatch) -> None:
        device = self

        class Event:
            def __init__(self, enable_timing: bool) -> None:
                assert enable_timing

            def record(self) -> None:
                self.time = max(device.device, device.host)

            def synchronize(self) -> None:
                device.synchronize()

            def elapsed_time(self, later: Event) -> float:
                return (later.time - self.time) * 1e3

        class CUDAGraph:
            seconds: float

            def replay(self) -> None:
                device.device = max(device.device, device.host) + self.seconds

        stream = SimpleNamespace(wait_stream=lambda _other: None)
        names = {"Event": Event, "CUDAGraph": CUDAGraph, "synchronize": self.synchronize, "graph": self.graph}
        names |= {"Stream": lambda: stream, "current_stream": lambda: stream, "stream": lambda _stream: nullcontext()}
        for name, value in names.items():
            monkeypatch.setattr(torch.cuda, name, value)
        monkeypatch.setattr("time.perf_counter", lambda: self.host)


def test_the_host_and_the_kernels_are_timed_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    device = FakeDevice()
    device.patch(monkeypatch)
    assert cuda_clock.event_seconds(device.call) == 3, "the device waits for the host"
    assert cuda_clock.host_seconds(device.call) == 2
    assert cuda_clock.event_seconds(cuda_clock.captured(device.call)) == 1


def test_the_rows_of_cuda_have_the_times_of_host_and_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    device = FakeDevice()
    device.patch(monkeypatch)
    monkeypatch.setattr(kernels, "_call", lambda measure, *_: lambda: [device.call() for _ in measure.split(" + ")])
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *_, **__: empty(0))  # the memory that flushes the cache
    rows = kernels._graph_rows("case", ops.masked_cross_attention, [], torch.zeros(1), {"forward": 4, "backward": 8}, 4)
    assert [(row.measure, row.unit) for row in rows[:2]] == [
        ("forward, CUDA graph", "ms"),
        ("forward, CUDA graph, share of H100's bandwidth", "1"),
    ]
    assert (rows[0].value, rows[2].value) == (1e3, 1e3), "forward, and the difference that is the backward"


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


def test_rows_that_are_made_one_by_one_are_printed_and_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def rows(_device: str) -> Iterator[Measurement]:
        for value, ratio in ((1.0, 3.0), (2.0, 1.5)):
            yield Measurement("kernels", "case", "forward", "ms", value, "baseline", ratio * value, ratio, target=2.0)

    monkeypatch.setattr(kernels, "run", rows)
    result = tmp_path / "rows.json"
    assert benchmark.main(["kernels", "--device", "cpu", "--check", "--json", str(result)]) == 1
    assert [row["met"] for row in json.loads(result.read_text())[1:]] == [True, False]
    assert capsys.readouterr().out.count("target 2") == 2


def test_every_shape_of_the_targets_is_measured_on_cuda() -> None:
    heads_and_media = {(*heads, media) for heads in ((16, 64), (32, 128)) for media in (5, 16, 32)}
    for uneven in (False, True):
        shapes = [x for x in kernels.CROSS_SHAPES["cuda"] if x.uneven == uneven and x.num_kv_heads is None]
        assert {(shape.num_heads, shape.head_dim, shape.num_media) for shape in shapes} == heads_and_media
    assert {6404} <= {shape.num_latents for shape in kernels.CROSS_SHAPES["cuda"] if shape.num_kv_heads == 8}
    resamplers = {(shape.num_media, shape.num_features) for shape in kernels.RESAMPLER_SHAPES["cuda"]}
    assert resamplers == {(40, 256), (160, 1024), (320, 1024)}


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_cuda_without_a_device_is_refused() -> None:
    assert benchmark.main(["kernels", "--device", "cuda"]) == 2
