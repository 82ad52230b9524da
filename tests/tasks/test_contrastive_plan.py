"""Test the plan of contrastive pretraining: memory and traffic against DeepSpeed's, and the shipped configurations."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.distributed.processes import run_distributed
from tests.project.commands import ROOT
from tests.tasks.contrastive_plan_cases import CASES, DEBUG, all_cases, predicted, read
from trainer import plan
from trainer.benchmark import __main__ as benchmark
from trainer.benchmark.part_clock import CONTRASTIVE_PARTS
from trainer.planning.devices import DEVICES
from trainer.planning.prediction import Cluster
from trainer.runtime.distributed import World
from trainer.tasks.contrastive.prediction import ContrastivePredictor, random_towers

VISION = ROOT / "configs" / "vision"


@pytest.fixture(autouse=True)
def _in_the_clone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


def step_rows(world: World, name: str) -> list[dict[str, Any]]:
    from trainer.benchmark import step

    options = argparse.Namespace(data="synthetic", steps=3, warmup=1, trace=None, peak_tflops=1.0)
    return [row.as_json() for row in step.measure_run(read(name), world, options)]


@pytest.mark.distributed
def test_the_step_benchmark_measures_what_the_plan_predicts() -> None:
    planned = predicted(["stage 2"], processes=2)["stage 2"]
    found = {row["measure"]: row["value"] for row in run_distributed(step_rows, 2, "stage 2")[0]}
    assert planned.sent / 2**20 == pytest.approx(found["sent by a device"], rel=0.02)
    assert planned.total_memory / 2**20 == pytest.approx(found["peak memory of a device"], rel=0.06)
    assert found["samples per second"] * found["step, median"] == pytest.approx(64)
    assert sum(found[f"part: {name}"] for name in CONTRASTIVE_PARTS) == found["profiled step, sum of the parts"]
    assert found["part: vision"] > 0 and found["part: text tower"] > 0
    again = 1 + 1 / 2 / 3  # one of the two micro-batches runs its forward, a third of its work, twice
    assert found["HFU"] == pytest.approx(again * found["MFU"], rel=0.01)


@pytest.mark.distributed
@pytest.mark.long
def test_a_step_takes_and_sends_what_the_plan_predicts() -> None:
    names = list(CASES)
    planned = predicted(names, processes=2)
    for found in run_distributed(all_cases, 2, names):
        for name, (memory, sent) in found.items():
            assert planned[name].sent == pytest.approx(sent, rel=0.02), name
            assert planned[name].total_memory == pytest.approx(memory, rel=0.06), name


def test_micro_batches_that_run_twice_and_sources_in_turn() -> None:
    whole, parts = (read("stage 2", f"--data.sources.0.micro_batch_size={size}") for size in (64, 16))
    predictor, alone = ContrastivePredictor(whole, random_towers(whole, "meta")), Cluster(DEVICES["h100"], 1, 1)
    one, four = predictor(whole, alone), predictor(parts, alone)
    # The logits are no more work; these towers are small, so they count.
    assert 1.2 < four.seconds["compute"] / one.seconds["compute"] < 4 / 3
    assert four.total_memory < one.total_memory and one.sent == four.sent == 0
    source = parts.data.sources[0]
    two = replace(parts.data, sources=(source, replace(source, name="more")))
    combined: dict[str, Any] = {}
    for combine in ("accumulate", "round_robin", "merged"):
        training: Any = replace(parts.training, combine=combine)
        combined[combine] = predictor(replace(parts, data=two, training=training), alone)
    assert [found.samples for found in combined.values()] == [128, 64, 128]
    seconds = {name: found.seconds["compute"] for name, found in combined.items()}
    assert seconds["round_robin"] == pytest.approx(seconds["accumulate"] / 2)
    assert seconds["merged"] > seconds["accumulate"]  # more columns for each row


@pytest.mark.long
def test_the_plan_of_the_debug_run(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    written = tmp_path / "found.yaml"
    assert plan.main([str(DEBUG), "--devices-per-node", "2", "--search", "--write", str(written)]) == 0
    printed = capsys.readouterr().out
    assert "features" in printed and "the fastest of each kind:" in printed and "recomputed" not in printed
    assert plan.main([str(written), "--devices-per-node", "2", "--scale", "1,4"]) == 0


@pytest.mark.long
@pytest.mark.parametrize(("name", "cluster"), [("vit-l-14", (4, 8)), ("nfnet-f6-bert", (8, 8))])
def test_large_configurations_fit(name: str, cluster: tuple[int, int], capsys: pytest.CaptureFixture[str]) -> None:
    nodes, devices = map(str, cluster)
    assert plan.main([str(VISION / f"{name}.yaml"), "--nodes", nodes, "--devices-per-node", devices]) == 0
    assert "of a device, total" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([str(DEBUG), "--devices-per-node", "5"], "possible numbers of processes"),
        ([str(DEBUG), "--devices-per-node", "1", "--device", "h10"], "did you mean h100?"),
        ([str(DEBUG), "--devices-per-node", "1", "--architecture", "ViT-B-33"], "open_clip has no model 'ViT-B-33'"),
        ([str(DEBUG), "--loss.rows", "3"], "no such setting"),
    ],
)
def test_wrong_arguments_are_refused(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert plan.main(arguments) == 2
    assert message in capsys.readouterr().err


@pytest.mark.long
def test_the_step_benchmark_and_its_comparison_with_the_plan(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result = tmp_path / "step.json"
    assert benchmark.main(["step", str(DEBUG), "--steps", "3", "--warmup", "1", "--json", str(result)]) == 0
    capsys.readouterr()
    assert plan.main([str(DEBUG), "--devices-per-node", "1", "--measured", str(result)]) == 0
    line = next(line for line in capsys.readouterr().out.splitlines() if "memory of a device" in line)
    assert abs(float(line.split()[-2])) < 6
