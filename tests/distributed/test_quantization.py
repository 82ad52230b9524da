"""Train over a quantized language model under ZeRO 1, 2 and 3; resume such a run and evaluate it."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from model.config import QuantizationMethod
from model.flamingo import Flamingo
from tests.distributed.processes import run_distributed
from tests.distributed.small_run import losses as run_losses
from tests.distributed.small_run import make_assets, run_settings
from tests.distributed.test_evaluation import evaluate_on_rank
from tests.distributed.test_trainable_parts import STAGES, losses
from tests.distributed.train_in_process import train_run
from tests.evaluation import layouts
from tests.model.builders import tiny_config
from tests.planning.test_plan import CASES, measured_and_planned
from trainer.export import main as export

METHODS: tuple[QuantizationMethod, ...] = ("int8", "nf4")
SETTING = "--model.language_model.quantization"
TWICE = CASES["stage 3, gathered for the backward again"]
CODES = {"int8": torch.int8, "nf4": torch.uint8}
MOST_CHANGED, MOST_SENT = {"int8": 0.05, "nf4": 0.6}, {"int8": 0.9, "nf4": 0.85}


def results(world: Any) -> dict[str, Any]:
    """Train under every stage in the same processes, because starting processes takes most of the time."""
    found: dict[str, Any] = {}
    for method in METHODS:
        config = replace(tiny_config(), language_model=replace(tiny_config().language_model, quantization=method))
        for stage in STAGES:
            found[f"{method} {stage}"] = losses(world, config, stage, partial(look_at_codes, method=method))
    if world.size > 1:
        found["sent"] = [measured_and_planned(world, [*TWICE, SETTING, each]) for each in ("none", *METHODS)]
    return found


def look_at_codes(model: Flamingo, method: QuantizationMethod) -> None:
    assert model.language_model.quantization_error is not None
    assert 0 < model.language_model.quantization_error.relative < MOST_CHANGED[method]
    assert {p.dtype for name, p in model.named_parameters() if name.endswith(".codes")} == {CODES[method]}


@pytest.mark.distributed
def test_two_processes_train_over_codes_as_one_and_send_what_the_plan_predicts() -> None:
    [one], two = run_distributed(results, 1), run_distributed(results, 2)
    for method in METHODS:
        for stage in STAGES:
            losses_of_one = one[f"{method} {stage}"]
            assert losses_of_one[-1] < losses_of_one[0]
            for found in two:
                assert found[f"{method} {stage}"] == pytest.approx(losses_of_one, rel=1e-5), (method, stage)
        for stage in STAGES:
            assert one[f"{method} {stage}"] == pytest.approx(one[f"{method} 1"], rel=1e-5), (method, stage)
    for found in two:
        whole, *quantized = found["sent"]
        assert whole.planned_sent == pytest.approx(whole.sent, rel=0.01)
        for method, traffic in zip(METHODS, quantized, strict=True):
            assert traffic.planned_sent == pytest.approx(traffic.sent, rel=0.01), method
            assert traffic.sent < MOST_SENT[method] * whole.sent


def stopped_and_resumed(world: Any, settings: dict[str, dict[str, Any]]) -> None:
    """Train a run to its end, and another that is killed after three steps and started again."""
    train_run(world, settings["whole"])
    train_run(world, settings["killed"], stop_after=3)
    train_run(world, settings["killed"])


@pytest.mark.distributed
def test_a_run_over_codes_resumes_and_its_export_is_evaluated_on_any_number_of_ranks(tmp_path: Path) -> None:
    make_assets(tmp_path / "assets")
    settings = {name: run_settings(tmp_path / "assets", tmp_path / name, steps=5) for name in ("whole", "killed")}
    for each in settings.values():
        each["model"]["language_model"]["quantization"] = "nf4"
    run_distributed(stopped_and_resumed, 2, settings)
    assert run_losses(tmp_path / "killed") == run_losses(tmp_path / "whole")
    assert export([str(tmp_path / "killed")]) == 0
    manifest = str(tmp_path / "assets" / "data" / "pairs" / "manifest.npz")
    task = {"name": "pairs", "type": "shards", "manifest": manifest, "num_queries": 5, "support_manifest": manifest}
    reports = []
    for size in (1, 2):
        config = layouts.evaluation(tmp_path, tmp_path / "killed" / "export", [task], shots=[1], batch_size=2)
        deepspeed = replace(config.deepspeed, zero_stage=3)
        config = replace(config, output=tmp_path / f"on {size}", deepspeed=deepspeed)
        assert run_distributed(evaluate_on_rank, size, config, None) == [0] * size
        reports.append((config.output / "report.json").read_bytes())
    assert reports[0] == reports[1]
