"""Test the plan: predicted against measured traffic, the search, and answers where nothing fits or is known."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from tests.distributed.processes import run_distributed
from tests.project.commands import ROOT
from trainer import plan
from trainer.benchmark import __main__ as benchmark
from trainer.config.loader import load_config
from trainer.config.run_config import FlamingoRunConfig

DEBUG = ROOT / "configs" / "debug.yaml"
NINE = str(ROOT / "configs" / "flamingo-9b.yaml")


@pytest.fixture(autouse=True)
def _in_the_clone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


def debug_config(overrides: list[str]) -> FlamingoRunConfig:
    return load_config(DEBUG, overrides, FlamingoRunConfig, check_files=False)


class Traffic(NamedTuple):
    """What a process sends in a step: bytes and collectives, measured and planned."""

    sent: float
    planned_sent: float
    collectives: float
    planned_collectives: float


def all_cases(world: Any) -> dict[str, Traffic]:
    """Measure all cases in the same processes, because starting processes takes most of the time."""
    return {name: measured_and_planned(world, overrides, name == RECOMPUTED) for name, overrides in CASES.items()}


def measured_and_planned(world: Any, overrides: list[str], together: bool = False) -> Traffic:
    """Run steps and plan them.

    Args:
        world: The processes.
        overrides: Settings of the run.
        together: Whether the parameters of a frozen block are gathered together, as on a GPU.
    """
    from trainer.benchmark.step_timings import time_steps
    from trainer.benchmark.synthetic_run import random_model, synthetic_step
    from trainer.deepspeed_engine.engine import Engine
    from trainer.deepspeed_engine.frozen_blocks import gather_frozen_blocks_together
    from trainer.planning.devices import DEVICES
    from trainer.planning.prediction import Cluster, predict
    from trainer.planning.random_weights import build_on_meta_device

    config = debug_config(overrides)
    device = replace(DEVICES["h100"], overlaps=together)
    planned = predict(config, build_on_meta_device(config.model, config.training.dtype), Cluster(device, 1, world.size))
    model, settings = random_model(config, world)
    if together:
        gather_frozen_blocks_together(model)
    replicated = config.deepspeed.replicates_frozen
    engine = Engine(model, config.optimizer, settings, world, replicate_frozen=replicated)
    made = synthetic_step(config, model, world)
    timings = time_steps(engine, iter(lambda: made, None), steps=3, warmup=1, trace=None)
    return Traffic(sum(timings.sent.values()), planned.sent, sum(timings.collectives.values()), planned.messages)


def raw(**zero: int) -> list[str]:
    return ["--deepspeed.raw", json.dumps({"zero_optimization": zero})]


NO_REUSE = {
    "stage3_param_persistence_threshold": 0,
    "stage3_max_reuse_distance": 0,
    "stage3_max_live_parameters": 0,
}
RECOMPUTED = "stage 3, recomputed, frozen blocks gathered together"
CASES = {
    "stage 3, all persistent": [],
    "stage 3, gathered once a micro-batch": raw(stage3_param_persistence_threshold=0),
    "stage 3, gathered for the backward again": [*raw(**NO_REUSE), "--training.dtype", "bfloat16"],
    RECOMPUTED: [
        *raw(**NO_REUSE),
        *("--training.dtype", "bfloat16"),
        *("--training.activation_checkpointing", "true"),
    ],
    "stage 3, hpZ": [*raw(**NO_REUSE), "--deepspeed.hpz_partition_size", "2"],
    "stage 3, frozen weights replicated": [
        *raw(stage3_param_persistence_threshold=0),
        *("--deepspeed.frozen", "replicated"),
    ],
    "stage 2": ["--deepspeed.zero_stage", "2", "--training.dtype", "bfloat16"],
    "stage 1": ["--deepspeed.zero_stage", "1"],
}


@pytest.mark.distributed
def test_two_processes_send_what_the_plan_predicts() -> None:
    for found in run_distributed(all_cases, 2):
        for case, traffic in found.items():
            assert traffic.sent > 0, case
            assert traffic.planned_sent == pytest.approx(traffic.sent, rel=0.02), case
            # The modules that the backward gathers again where nothing is gathered ahead are an estimate.
            assert traffic.planned_collectives == pytest.approx(traffic.collectives, rel=0.05), case


@pytest.mark.slow
def test_a_configuration_that_fits(capsys: pytest.CaptureFixture[str]) -> None:
    assert plan.main([NINE, "--nodes", "4", "--devices-per-node", "8", "--device", "h100"]) == 0
    printed = capsys.readouterr().out
    assert "parameters 9.376 G, of which 1.634 G train" in printed
    assert "0 of the language model's blocks are recomputed" in printed
    assert "CUDA context, NCCL, cuBLAS" in printed


@pytest.mark.slow
def test_a_node_reads_its_frozen_weights_at_the_speed_of_its_drives(capsys: pytest.CaptureFixture[str]) -> None:
    from model.parameters import num_weights
    from trainer.data.stream.step_plan import plan_step
    from trainer.planning.random_weights import build_on_meta_device

    drive = ["--deepspeed.offload_param", "{device: nvme, path: .}"]

    def planned(*options: str) -> dict[str, float]:
        assert plan.main([str(DEBUG), "--devices-per-node", "2", *drive, *options]) == 0
        lines = [line.split() for line in capsys.readouterr().out.splitlines()]
        return {line[1]: float(line[-2]) for line in lines if line[0] == "step" and line[1] != "total"}

    one, ten = planned("--drive-gbytes", "1e-5"), planned("--drive-gbytes", "1e-4")
    config = debug_config([])
    model = build_on_meta_device(config.model)
    frozen = sum(parameter.numel() for parameter in model.parameters() if not parameter.requires_grad)
    passes = 2 * sum(share.num_micro_batches for share in plan_step(config.data, 2))
    assert one["drive"] == pytest.approx(4 * frozen * passes / 1e4, rel=0.01)
    assert ten["drive"] == pytest.approx(one["drive"] / 10, rel=0.01)
    assert ten["optimizer"] == one["optimizer"]
    swapped = planned("--drive-gbytes", "1e-5", "--deepspeed.offload_optimizer", "{device: nvme, path: .}")
    assert swapped["optimizer"] == pytest.approx(2 * 12 * (num_weights(model.parameters()) - frozen) / 1e4, rel=0.01)


@pytest.mark.slow
def test_as_few_blocks_are_recomputed_as_the_budget_allows() -> None:
    from trainer.data.stream.step_plan import plan_step
    from trainer.planning.activation_memory import ActivationMemory, recomputed_blocks
    from trainer.planning.random_weights import build_on_meta_device
    from trainer.planning.workload import largest_micro_batch

    config = debug_config([])
    memory, plans = ActivationMemory(config, build_on_meta_device(config.model)), plan_step(config.data, 1)[:1]

    def peak(checkpointed: int) -> int:
        return max(memory.count(largest_micro_batch(each), checkpointed).peak for each in plans)

    def chosen(most: int) -> int:
        return recomputed_blocks(debug_config(["--training.activation_memory_gib", str(most / 2**30)]), memory, plans)

    assert peak(0) > peak(2) > peak(4)
    assert chosen(peak(0)) == 0
    assert chosen(peak(2)) == 2
    assert chosen(peak(2) - 1) == 3
    for number in range(5):
        estimated = max(memory.estimate(largest_micro_batch(each), number).peak for each in plans)
        assert estimated == pytest.approx(peak(number), rel=0.05)
    with pytest.raises(ValueError, match="with every block recomputed"):
        chosen(peak(4) - 1)


@pytest.mark.slow
def test_a_configuration_that_does_not_fit_names_settings_that_do(capsys: pytest.CaptureFixture[str]) -> None:
    many = ["--data.sources.1.batch_size", "16384", "--data.sources.1.micro_batch_size", "16384"]
    alone = ["--devices-per-node", "1", "--device", "rtx-4090"]
    assert plan.main([str(DEBUG), *alone, *many]) == 1
    message = capsys.readouterr().err
    assert "does NOT fit" in message
    change = message.partition("; set ")[2].strip().replace(",", "").split()
    overrides = [f"--{word}" if index % 2 == 0 else word for index, word in enumerate(change)]
    assert plan.main([str(DEBUG), *alone, *many, *overrides]) == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([NINE, "--nodes", "4", "--device", "h10"], "did you mean h100? Known: a100-40"),
        ([NINE, "--nodes", "5"], "possible numbers of processes"),
        ([str(ROOT / "configs" / "openflamingo-3b.yaml"), "--nodes", "8"], "the hub is not asked"),
        ([NINE, "--training.stepz", "1"], "did you mean"),
        ([NINE, "--nodes", "4", "--training.activation_checkpointing", "33"], "the language model has 32 blocks"),
        (
            [NINE, "--nodes", "4", "--training.activation_checkpointing", "4", "--training.activation_memory_gib", "9"],
            "leave training.activation_checkpointing out",
        ),
        ([NINE, "--nodes", "4", "--drive-gbytes", "0"], "--drive-gbytes 0 must be more than 0"),
        ([NINE, "--nodes", "4", "--write", "/no/such/folder/found.yaml"], "/no/such/folder"),
    ],
)
def test_wrong_arguments_are_refused(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert plan.main(arguments) == 2
    assert message in capsys.readouterr().err


def test_too_few_steps_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert benchmark.main(["step", str(DEBUG), "--steps", "2"]) == 2
    assert "--steps 3 or more" in capsys.readouterr().err


def step_rows(world: Any, folder: str) -> list[dict[str, Any]]:
    import argparse

    from trainer.benchmark import step

    trace = Path(folder) / "trace.json"
    options = argparse.Namespace(data="synthetic", steps=3, warmup=1, trace=trace, peak_tflops=2.0)
    return [row.as_json() for row in step.measure_run(debug_config([]), world, options)]


@pytest.mark.distributed
def test_step_benchmark_of_two_processes_with_a_trace(tmp_path: Path) -> None:
    rows, _ = run_distributed(step_rows, 2, str(tmp_path))
    found = {row["measure"]: row["value"] for row in rows}
    assert found["step, fastest"] <= found["step, median"] <= found["step, slowest"]
    assert found["tokens per second"] == pytest.approx(2 * found["tokens per second and device"])
    seconds = found["step, median"]
    # A step has 4 pairs of 32 tokens and an image, and 2 documents of 64 tokens and 5 images.
    assert found["tokens per second"] * seconds == pytest.approx(4 * 32 + 2 * 64)
    assert found["images per second"] * seconds == pytest.approx(4 + 10)
    assert found["samples per second"] * seconds == pytest.approx(6)
    assert 0 < found["MFU"] <= found["HFU"] * 1.001
    assert json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
