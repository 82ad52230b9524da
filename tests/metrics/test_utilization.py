"""MFU, memory and rates of an update, and traces of some."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.distributed.processes import run_distributed
from tests.distributed.small_run import make_assets, read_metrics, run_settings
from tests.distributed.test_training import train_run
from tests.metrics.test_metrics import step
from trainer.metrics.profiler_trace import ProfilerTrace
from trainer.metrics.sinks import console_line
from trainer.metrics.throughput import Throughput
from trainer.metrics.utilization import Operations, Utilization, UtilizationMeter
from trainer.runtime.distributed import World
from trainer.tasks.batch_flops import device_named


def meter(rank: int, peak: float | None) -> UtilizationMeter:
    return UtilizationMeter(World(rank, 2, rank, torch.device("cpu")), peak)


def added(peak: float | None, *operations: list[Operations]) -> Utilization:
    """What two ranks find whose updates took 3 and 5 seconds."""
    own = [meter(rank, peak).own(3.0 + 2 * rank, operations[rank]) for rank in (0, 1)]
    own[1][-1] = 2.0**50  # the other rank's host memory
    return meter(0, peak).unpack([sum(values) for values in zip(*own, strict=True)])


def test_utilisation_is_over_all_ranks_and_memory_of_the_worst() -> None:
    found = added(10.0, [Operations(2e12, 3e12), Operations(6e12, 9e12)], [Operations(8e12, 12e12)])
    assert found.step_seconds == 4
    assert found.tflops == pytest.approx(2)
    assert found.mfu == pytest.approx(0.2)
    assert found.hfu == pytest.approx(0.3)
    assert found.device_memory is None
    assert found.host_memory == 2.0**20


def test_what_is_not_known_is_left_out() -> None:
    assert added(None, [Operations(1, 1)], [Operations(1, 1)]).mfu is None
    nothing = added(10.0, [], [])
    assert (nothing.tflops, nothing.mfu, nothing.hfu) == (None, None, None)
    values = step(1, speed=nothing).to_json()
    assert "mfu" not in values and "device_memory_gib" not in values
    assert values["tokens_per_second"] == 2000
    assert values["images_per_second"] == 64
    assert values["samples_per_second"] == 48


def test_the_console_says_the_mfu_of_the_updates_that_were_trained_on() -> None:
    throughput = Throughput(10)
    throughput.update(step(1))
    used = Utilization(1.0, tflops=1.0, mfu=0.2, hfu=0.3, device_memory=None, host_memory=1.0)
    throughput.update(step(2, speed=used, step_seconds=3.0))
    throughput.update(step(3, step_seconds=100.0))
    rates = throughput.update(step(4, speed=Utilization(1.0, 1.0, 0.4, 0.5, None, 1.0), step_seconds=1.0))
    assert rates.mfu == pytest.approx(0.25)
    assert "MFU 25.0%" in console_line(step(4), rates, 10)
    assert "MFU" not in console_line(step(1), Throughput(10).update(step(1)), 10)


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
def test_peaks_of_devices(name: str, tflops: float | None) -> None:
    found = device_named(name)
    assert (found and found.tflops) == tflops


def names(path: Path) -> set[str]:
    return {event["name"] for event in json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]}


def run_steps(trace: ProfilerTrace, first: int, last: int) -> None:
    """Each update has an operation of its own."""
    operations = {1: torch.sin, 2: torch.cos, 3: torch.exp, 4: torch.sqrt}
    for number in range(first, last + 1):
        trace.begin(number)
        operations[number](torch.ones(1))
        trace.end(number)


def test_a_trace_holds_the_updates_that_were_asked_for(tmp_path: Path) -> None:
    run_steps(ProfilerTrace(tmp_path, (2, 3), is_main=True), 1, 4)
    (path,) = (tmp_path / "traces").iterdir()
    assert path.name == "updates-2-3.pt.trace.json.gz"
    found = names(path)
    assert {"aten::cos", "aten::exp"} <= found
    assert not {"aten::sin", "aten::sqrt"} & found


def test_a_run_that_ends_or_resumes_among_them_traces_its_part(tmp_path: Path) -> None:
    stopped = ProfilerTrace(tmp_path, (2, 4), is_main=True)
    run_steps(stopped, 1, 2)
    stopped.close()
    stopped.close()
    run_steps(ProfilerTrace(tmp_path, (2, 4), is_main=True), 3, 4)
    written = sorted(path.name for path in (tmp_path / "traces").iterdir())
    assert written == [f"updates-{which}.pt.trace.json.gz" for which in ("2-2", "3-4")]


@pytest.mark.parametrize(("steps", "is_main"), [(None, True), ((1, 4), False)])
def test_nothing_is_traced_otherwise(tmp_path: Path, steps: tuple[int, int] | None, is_main: bool) -> None:
    trace = ProfilerTrace(tmp_path, steps, is_main)
    run_steps(trace, 1, 4)
    trace.close()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.distributed
def test_a_run_says_how_fast_it_is_and_traces_what_it_is_asked_to(tmp_path: Path) -> None:
    make_assets(tmp_path)
    settings: dict[str, Any] = run_settings(tmp_path, tmp_path / "run", steps=4, activation_checkpointing=True)
    settings["logging"] = {"tensorboard": False, "peak_tflops": 0.5, "profile_steps": [2, 3]}
    run_distributed(train_run, 2, settings)
    lines = read_metrics(tmp_path / "run")
    assert len(lines) == 4
    for line in lines:
        assert line["mfu"] == pytest.approx(line["tflops"] / 0.5, rel=1e-3)
        assert line["mfu"] < line["hfu"], "padding, and what is computed again"
        assert line["tokens_per_second"] * line["step_seconds"] == pytest.approx(line["tokens"], rel=1e-3)
        assert line["samples_per_second"] * line["step_seconds"] == pytest.approx(16, rel=1e-3)
        assert line["images_per_second"] * line["step_seconds"] == pytest.approx(line["images"], rel=1e-3)
        assert 0.1 < line["host_memory_gib"] < 24
    assert "c10d::allreduce_" in names(tmp_path / "run" / "traces" / "updates-2-3.pt.trace.json.gz")
