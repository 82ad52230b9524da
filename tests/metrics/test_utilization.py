"""Test MFU, memory, rates and profiler traces of steps."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.distributed.processes import run_distributed
from tests.distributed.small_run import make_assets, read_metrics, run_settings
from tests.distributed.train_in_process import train_run
from tests.metrics.test_metrics import step
from trainer.metrics.profiler_trace import ProfilerTrace
from trainer.metrics.sinks import console_line
from trainer.metrics.throughput import Throughput
from trainer.metrics.utilization import Operations, Utilization, UtilizationMeter
from trainer.runtime.distributed import World
from trainer.runtime.run_folder import RunFolder
from trainer.tasks.batch_flops import device_named


def meter(rank: int, peak: float | None) -> UtilizationMeter:
    """Build the meter of one of two ranks."""
    return UtilizationMeter(World(rank, 2, rank, torch.device("cpu")), peak)


def combined(peak: float | None, *operations: list[Operations]) -> Utilization:
    """Combine the measurements of two ranks whose steps took 3 and 5 seconds."""
    packed = [meter(rank, peak).pack(3.0 + 2 * rank, operations[rank]) for rank in (0, 1)]
    packed[1]["host_memory/1"] = 2.0**50  # bytes of the other rank
    return meter(0, peak).unpack({name: sum(each[name] for each in packed) for name in packed[0]})


def test_utilization_is_over_all_ranks_and_memory_is_that_of_the_worst() -> None:
    found = combined(10.0, [Operations(2e12, 3e12), Operations(6e12, 9e12)], [Operations(8e12, 12e12)])
    assert found.step_seconds == 4
    assert found.tflops == pytest.approx(2)
    assert found.mfu == pytest.approx(0.2)
    assert found.hfu == pytest.approx(0.3)
    assert found.device_memory_gib is None
    assert found.host_memory_gib == 2.0**20


def test_unknown_metrics_are_left_out() -> None:
    assert combined(None, [Operations(1, 1)], [Operations(1, 1)]).mfu is None
    nothing = combined(10.0, [], [])
    assert (nothing.tflops, nothing.mfu, nothing.hfu) == (None, None, None)
    values = step(1, utilization=nothing).to_json()
    assert "mfu" not in values and "device_memory_gib" not in values
    assert values["tokens_per_second"] == 2000
    assert values["images_per_second"] == 64
    assert values["samples_per_second"] == 48


def test_the_console_averages_the_mfu_of_steps_that_were_trained_on() -> None:
    throughput = Throughput(10)
    throughput.add(step(1))
    used = Utilization(1.0, tflops=1.0, mfu=0.2, hfu=0.3, device_memory_gib=None, host_memory_gib=1.0)
    throughput.add(step(2, utilization=used, step_seconds=3.0))
    throughput.add(step(3, step_seconds=100.0))
    rates = throughput.add(step(4, utilization=Utilization(1.0, 1.0, 0.4, 0.5, None, 1.0), step_seconds=1.0))
    assert rates.mfu == pytest.approx(0.25)
    assert "MFU 25.0%" in console_line(step(4), rates, 10)
    assert "MFU" not in console_line(step(1), Throughput(10).add(step(1)), 10)


@pytest.mark.parametrize(
    ("name", "tflops"),
    [
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA A100-PCIE-40GB", 312),
        ("NVIDIA GeForce RTX 4090", 165),
        ("NVIDIA H100 PCIe", None),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("Tesla V100-SXM2-16GB", None),
    ],
)
def test_known_devices_have_a_peak(name: str, tflops: float | None) -> None:
    found = device_named(name)
    assert (found and found.tflops) == tflops


def names(path: Path) -> set[str]:
    """Return the names of all events in a trace."""
    return {event["name"] for event in json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]}


def run_steps(trace: ProfilerTrace, first: int, last: int) -> None:
    """Run steps that each call their own operation."""
    operations = {1: torch.sin, 2: torch.cos, 3: torch.exp, 4: torch.sqrt}
    for number in range(first, last + 1):
        trace.begin(number)
        operations[number](torch.ones(1))
        trace.end(number)


def test_a_trace_holds_the_requested_steps(tmp_path: Path) -> None:
    run_steps(ProfilerTrace(RunFolder(tmp_path), (2, 3), is_main=True), 1, 4)
    (path,) = (tmp_path / "traces").iterdir()
    assert path.name == "steps-2-3.pt.trace.json.gz"
    found = names(path)
    assert {"aten::cos", "aten::exp"} <= found
    assert not {"aten::sin", "aten::sqrt"} & found


def test_a_run_that_ends_or_resumes_within_these_steps_traces_its_part(tmp_path: Path) -> None:
    stopped = ProfilerTrace(RunFolder(tmp_path), (2, 4), is_main=True)
    run_steps(stopped, 1, 2)
    stopped.close()
    stopped.close()
    run_steps(ProfilerTrace(RunFolder(tmp_path), (2, 4), is_main=True), 3, 4)
    written = sorted(path.name for path in (tmp_path / "traces").iterdir())
    assert written == [f"steps-{which}.pt.trace.json.gz" for which in ("2-2", "3-4")]


@pytest.mark.parametrize(("steps", "is_main"), [(None, True), ((1, 4), False)])
def test_nothing_is_traced_without_steps_or_on_other_ranks(
    tmp_path: Path, steps: tuple[int, int] | None, is_main: bool
) -> None:
    trace = ProfilerTrace(RunFolder(tmp_path), steps, is_main=is_main)
    run_steps(trace, 1, 4)
    trace.close()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.distributed
def test_a_run_reports_its_speed_and_traces_the_requested_steps(tmp_path: Path) -> None:
    make_assets(tmp_path)
    settings: dict[str, Any] = run_settings(tmp_path, tmp_path / "run", steps=4, activation_checkpointing=True)
    settings["logging"] = {"tensorboard": False, "peak_tflops": 0.5, "profile_steps": [2, 3]}
    run_distributed(train_run, 2, settings)
    lines = read_metrics(tmp_path / "run")
    assert len(lines) == 4
    for line in lines:
        assert line["mfu"] == pytest.approx(line["tflops"] / 0.5, rel=1e-3)
        assert line["mfu"] < line["hfu"], "padding and recomputation count as executed only"
        assert line["tokens_per_second"] * line["step_seconds"] == pytest.approx(line["tokens"], rel=1e-3)
        assert line["samples_per_second"] * line["step_seconds"] == pytest.approx(16, rel=1e-3)
        assert line["images_per_second"] * line["step_seconds"] == pytest.approx(line["images"], rel=1e-3)
        assert 0.1 < line["host_memory_gib"] < 24
    assert "c10d::allreduce_" in names(tmp_path / "run" / "traces" / "steps-2-3.pt.trace.json.gz")
