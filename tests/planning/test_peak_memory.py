"""Test the predicted memory against the tensors at the peak of a step, and the comparison with a result."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch

from tests.distributed.processes import run_distributed
from tests.project.commands import ROOT
from trainer import plan
from trainer.benchmark.part_clock import PARTS
from trainer.benchmark.result_file import Measurement
from trainer.config.loader import load_config, to_plain
from trainer.config.run_config import FlamingoRunConfig

DEBUG = ROOT / "configs" / "debug.yaml"


def settings(stage: int, dtype: str, bucket: int, *more: str) -> list[str]:
    """Return overrides. ``bucket`` parameters are reduced or prefetched at once, of 0.3 million that train."""
    zero = {
        "reduce_bucket_size": bucket,
        "stage3_prefetch_bucket_size": bucket,
        "stage3_param_persistence_threshold": 0,
    }
    raw = ["--deepspeed.raw", json.dumps({"zero_optimization": zero})]
    return ["--deepspeed.zero_stage", str(stage), "--training.dtype", dtype, *raw, *more]


ONE_ROW = [f"--data.sources.{source}.micro_batch_size=1" for source in (0, 1)]
SHORT = ["--data.sources.0.max_tokens=16", "--data.sources.1.max_tokens=16", "--data.sources.1.max_images=1"]
CASES = {
    "stage 1": settings(1, "float32", 100_000),
    "stage 1, large bucket": settings(1, "bfloat16", 2_000_000),
    "stage 2, little to compute": settings(2, "float32", 500_000, *ONE_ROW, *SHORT),
    "stage 3, everything gathered": settings(3, "bfloat16", 500_000, *ONE_ROW),
    "stage 3, much gathered ahead of the last block": settings(
        3, "float32", 600_000, "--data.sources.1.max_tokens=288", "--data.sources.1.micro_batch_size=1"
    ),
    "stage 3, frozen weights replicated": settings(3, "bfloat16", 500_000, *ONE_ROW, "--deepspeed.frozen=replicated"),
}


def all_cases(world: Any) -> dict[str, tuple[str, float, float]]:
    """Measure all cases in the same processes, because starting processes takes most of the time."""
    with patch.object(torch.distributed, "all_reduce", reduce_and_wait):
        return {name: predicted_and_measured(world, overrides) for name, overrides in CASES.items()}


def reduce_and_wait(*arguments: Any, all_reduce: Any = torch.distributed.all_reduce, **keywords: Any) -> Any:
    """Reduce, then wait until gloo's thread has released the tensor, which it can hold for a moment longer."""
    work = all_reduce(*arguments, **keywords)
    time.sleep(0.02)
    return work


def predicted_and_measured(world: Any, overrides: list[str]) -> tuple[str, float, float]:
    from trainer.benchmark.step_memory import tensor_memory
    from trainer.benchmark.step_timings import time_steps
    from trainer.benchmark.synthetic_run import random_model, synthetic_step
    from trainer.deepspeed_engine.engine import Engine
    from trainer.planning.devices import DEVICES
    from trainer.planning.prediction import Cluster, predict
    from trainer.planning.random_weights import build_on_meta_device

    config = load_config(DEBUG, overrides, FlamingoRunConfig, check_files=False)
    predicted = predict(
        config, build_on_meta_device(config.model, config.training.dtype), Cluster(DEVICES["h100"], 1, world.size)
    )
    before = tensor_memory().current  # left by earlier cases in this process
    model, json_settings = random_model(config, world)
    replicated = config.deepspeed.replicates_frozen
    engine = Engine(model, config.optimizer, json_settings, world, replicate_frozen=replicated)
    made = synthetic_step(config, model, world)
    timings = time_steps(engine, iter(lambda: made, None), steps=1, warmup=1, trace=None)
    return predicted.memory.moment, predicted.total_memory, timings.device_memory - before


@pytest.mark.distributed
@pytest.mark.parametrize("processes", [1, 2])
def test_the_peak_is_what_the_plan_predicts(processes: int) -> None:
    for found in run_distributed(all_cases, processes):
        for case, (_, predicted, measured) in found.items():
            assert predicted == pytest.approx(measured, rel=0.03), case
        moments = {moment for moment, _, _ in found.values()}
        expected = {"the loss of documents", "the reduction of pairs"}
        # A single rank gathers nothing, so nothing gathered is left in the tower and the last block.
        gathering = {"the vision tower of documents", "the last block of documents"}
        assert moments == expected | (gathering if processes > 1 else set())


def step_result(path: Path, **changes: Any) -> str:
    """Write a result of configs/debug.yaml on one process, as ``trainer.benchmark step`` writes it."""
    config = to_plain(load_config(DEBUG, [], FlamingoRunConfig, check_files=False))
    head = {"benchmark": "step", "hardware": "CPU", "versions": {}, "device": "cpu"}
    head |= {"data": "synthetic", "processes": 1, "config": config, **changes}
    values = {"peak memory of a device": 10.0, "sent by a device": 0.0, "step, median": 2.0}
    values |= {f"part: {part}": 0.25 for part in PARTS}
    rows = [Measurement("step", "case", measure, "", value).as_json() for measure, value in values.items()]
    path.write_text(json.dumps([head, *rows]))
    return str(path)


def plan_of(result: str, *overrides: str) -> int:
    return plan.main([str(DEBUG), "--devices-per-node", "1", "--measured", result, *overrides])


def test_the_plan_prints_predicted_beside_measured_values(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert plan_of(step_result(tmp_path / "a.json")) == 0
    found = {line[:30].strip(): line.split()[-5:] for line in capsys.readouterr().out.splitlines()}
    predicted, measured, unit, off, _ = found["memory of a device"]
    assert (float(measured), unit) == (10.0, "MiB")
    assert float(off) == pytest.approx(100 * (float(predicted) / 10 - 1), abs=0.1)


def test_a_result_from_before_newer_settings_is_compared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = to_plain(load_config(DEBUG, [], FlamingoRunConfig, check_files=False))
    del config["forgetting"], config["model"]["language_model"]["quantization"], config["data"]["sources"][0]["packing"]
    assert plan_of(step_result(tmp_path / "a.json", config=config)) == 0
    assert "waiting for the network" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize(
    ("changes", "overrides", "message"),
    [
        ({"processes": 2}, [], "different processes (2 and 1)"),
        ({}, ["--training.dtype", "bfloat16"], "different training.dtype"),
        ({"data": "real"}, [], "not a result of trainer.benchmark step with synthetic batches"),
        ({"benchmark": "openflamingo"}, [], "not a result of trainer.benchmark step"),
    ],
)
def test_a_result_of_another_run_is_refused(
    tmp_path: Path, changes: dict[str, Any], overrides: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert plan_of(step_result(tmp_path / "a.json", **changes), *overrides) == 2
    assert message in capsys.readouterr().err
