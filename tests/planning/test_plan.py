"""The plan against what really runs: what two processes send, and answers for what cannot fit or is not known."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

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


def all_cases(world: Any) -> dict[str, tuple[float, float]]:
    """In one pair of processes: starting them costs more than what they do."""
    return {name: measured_and_planned(world, overrides) for name, overrides in CASES.items()}


def measured_and_planned(world: Any, overrides: list[str]) -> tuple[float, float]:
    from trainer.benchmark import step
    from trainer.benchmark.synthetic import random_model, synthetic_batches
    from trainer.data.stream.step_plan import plan_step
    from trainer.deepspeed_engine.engine import Engine
    from trainer.planning.cost_model import DEVICES, build_without_weights
    from trainer.planning.prediction import Cluster, predict

    config = debug_config(overrides)
    planned = predict(config, build_without_weights(config.model), Cluster(DEVICES["h100"], 1, world.size)).sent
    plans = plan_step(config.data, world.size)
    model, settings = random_model(config, world, sum(each.micro_batches for each in plans))
    engine = Engine(model, config.optimizer, settings, world)
    size = model.vision_encoder.image_size
    made = [batch for each in plans for batch in synthetic_batches(each, model.tokens, size, world.rank)]
    timings = step.measure(engine, iter(lambda: made, None), steps=3, warmup=1, trace=None)
    return sum(timings.sent.values()), planned


def raw(**zero: int) -> list[str]:
    return ["--deepspeed.raw", json.dumps({"zero_optimization": zero})]


NO_REUSE = {
    "stage3_param_persistence_threshold": 0,
    "stage3_max_reuse_distance": 0,
    "stage3_max_live_parameters": 0,
}
CASES = {
    "stage 3, all persistent": [],
    "stage 3, gathered once a micro-batch": raw(stage3_param_persistence_threshold=0),
    "stage 3, gathered for the backward again": [*raw(**NO_REUSE), "--training.dtype", "bfloat16"],
    "stage 3, hpZ": [*raw(**NO_REUSE), "--deepspeed.hpz_partition_size", "2"],
    "stage 2": ["--deepspeed.zero_stage", "2", "--training.dtype", "bfloat16"],
    "stage 1": ["--deepspeed.zero_stage", "1"],
}


@pytest.mark.distributed
def test_what_two_processes_send_is_what_the_plan_says() -> None:
    for found in run_distributed(all_cases, 2):
        for case, (measured, planned) in found.items():
            assert measured > 0, case
            assert planned == pytest.approx(measured, rel=0.02), case


def test_a_configuration_that_fits(capsys: pytest.CaptureFixture[str]) -> None:
    assert plan.main([NINE, "--nodes", "4", "--devices-per-node", "8", "--device", "h100"]) == 0
    printed = capsys.readouterr().out
    assert "parameters 9.376 G, of them trained 1.634 G" in printed
    assert "32 of the language model's blocks are recomputed" in printed


def test_the_search_shows_the_fastest_that_fit(capsys: pytest.CaptureFixture[str]) -> None:
    assert plan.main([str(DEBUG), "--devices-per-node", "2", "--search"]) == 0
    found = capsys.readouterr().out.partition("the fastest that fit:\n")[2].splitlines()
    seconds = [float(line.split()[0]) for line in found]
    assert seconds and seconds == sorted(seconds)
    assert "training.activation_checkpointing false" in found[0]


def test_as_few_blocks_are_recomputed_as_the_budget_allows() -> None:
    from trainer.data.stream.step_plan import plan_step
    from trainer.planning.cost_model import ActivationMemory, build_without_weights, checkpointed_blocks, micro_batch

    config = debug_config([])
    memory, plans = ActivationMemory(config, build_without_weights(config.model)), plan_step(config.data, 1)[:1]

    def peak(checkpointed: int) -> int:
        return max(memory.count(micro_batch(each), checkpointed).peak for each in plans)

    def chosen(most: int) -> int:
        return checkpointed_blocks(debug_config(["--training.activation_memory_gib", str(most / 2**30)]), memory, plans)

    assert peak(0) > peak(2) > peak(4)
    assert chosen(peak(0)) == 0
    assert chosen(peak(2)) == 2
    assert chosen(peak(2) - 1) == 3
    for number in range(5):
        estimated = max(memory.estimate(micro_batch(each), number).peak for each in plans)
        assert estimated == pytest.approx(peak(number), rel=0.05)
    with pytest.raises(ValueError, match="with every block recomputed"):
        chosen(peak(4) - 1)


def test_one_that_does_not_says_what_to_change(capsys: pytest.CaptureFixture[str]) -> None:
    many = ["--data.sources.1.batch_size", "16384", "--data.sources.1.micro_batch_size", "16384"]
    alone = ["--devices-per-node", "1", "--device", "rtx-4090"]
    assert plan.main([str(DEBUG), *alone, *many]) == 1
    message = capsys.readouterr().err
    assert "does NOT fit" in message
    change = message.partition("; set ")[2].strip().replace(",", "").split()
    overrides = [f"--{word}" if index % 2 == 0 else word for index, word in enumerate(change)]
    assert plan.main([str(DEBUG), *alone, *many, *overrides]) == 0


def test_the_search_recomputes_no_more_blocks_than_it_must() -> None:
    from trainer.planning.cost_model import DEVICES, ActivationMemory, build_without_weights
    from trainer.planning.prediction import Cluster, Prediction, predict

    config = debug_config(["--data.sources.0.batch_size", "512"])
    model = build_without_weights(config.model)
    memory = ActivationMemory(config, model, interpolate=True)
    roomy = Cluster(DEVICES["h100"], 1, 1)

    def predicted(config: FlamingoRunConfig, cluster: Cluster = roomy) -> Prediction:
        return predict(config, model, cluster, memory)

    _, whole = next(plan.fitting(config, 4, roomy, predicted))
    assert whole.recomputed == 0
    tight = replace(roomy, device=replace(roomy.device, memory=whole.total_memory - 1))
    words, found = next(plan.fitting(config, 4, tight, partial(predicted, cluster=tight)))
    assert found.fits and 0 < found.recomputed < 4
    assert words.endswith(f"training.activation_checkpointing {found.recomputed}")
    fewer = replace(config.training, activation_checkpointing=found.recomputed - 1)
    assert not predicted(replace(config, training=fewer), tight).fits


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([NINE, "--nodes", "4", "--device", "h10"], "did you mean h100? Known: a100-40"),
        ([NINE, "--nodes", "5"], "possible numbers of processes"),
        ([str(ROOT / "configs" / "openflamingo-3b.yaml"), "--nodes", "8"], "the hub is not asked"),
        ([NINE, "--training.stepz", "1"], "did you mean"),
        ([NINE, "--nodes", "4", "--training.activation_checkpointing", "33"], "the language model has 32 blocks"),
        (
            [NINE, "--nodes", "4", "--training.activation_memory_gib", "9"],
            "leave training.activation_checkpointing out",
        ),
    ],
)
def test_what_cannot_be_planned(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
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
    return [row.as_json() for row in step._run(debug_config([]), world, options)]


@pytest.mark.distributed
def test_the_step_of_two_processes_with_a_trace(tmp_path: Path) -> None:
    rows, _ = run_distributed(step_rows, 2, str(tmp_path))
    found = {row["measure"]: row["value"] for row in rows}
    assert found["update, fastest"] <= found["update, median"] <= found["update, slowest"]
    assert found["tokens per second, all"] == pytest.approx(2 * found["tokens per second and device"])
    update = found["update, median"]
    # 4 pairs of 32 tokens and an image, 2 documents of 64 tokens and 5 images, in all
    assert found["tokens per second, all"] * update == pytest.approx(4 * 32 + 2 * 64)
    assert found["images per second, all"] * update == pytest.approx(4 + 10)
    assert found["samples per second, all"] * update == pytest.approx(6)
    assert 0 < found["MFU"] <= found["HFU"] * 1.001
    assert json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
