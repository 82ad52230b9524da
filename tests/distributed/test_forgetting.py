"""Train small runs that measure and limit forgetting, with norms of parts and an early end: two processes and one."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.distributed.processes import run_distributed
from tests.distributed.small_run import losses, make_assets, read_events, read_metrics, run_settings
from tests.distributed.train_in_process import as_config
from trainer.checkpoint.retention import best_step
from trainer.config.loader import load_config
from trainer.config.run_config import CheckpointConfig, FlamingoRunConfig
from trainer.deepspeed_engine.engine import Engine, overwritten_parameters
from trainer.evaluation.forgetting import DIFFERENCES, forgetting_observers
from trainer.export import trained_weights
from trainer.loop import train
from trainer.observers.step_observer import StepObserver
from trainer.runtime.distributed import World
from trainer.tasks.flamingo import build_flamingo_task

pytestmark = pytest.mark.distributed
STEPS = 3
HAS_LM_EVAL = importlib.util.find_spec("lm_eval") is not None
TASK = """
task: words
dataset_path: json
dataset_kwargs: {{data_files: {{test: {assets}/words.jsonl}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{text}}}}"
doc_to_choice: [w3, w4]
doc_to_target: gold
metric_list: [{{metric: acc}}]
"""
LORA = {"language_model": "lora"}


@dataclass
class Damage(StepObserver):
    """Change a frozen weight on the way, as a broken device would."""

    before: int

    def begin(self, step: int, engine: Engine, skip_reason: str | None) -> None:
        if step == self.before:
            weight = engine.module.get_parameter("language_model.lm.lm_head.weight")
            with torch.no_grad(), overwritten_parameters([weight]):
                weight[3] += 0.1


@dataclass
class Scores(StepObserver):
    """Stand for an evaluation whose scores are known."""

    scores: Mapping[int, float]
    seen: list[int] = field(default_factory=list)

    def begin(self, step: int, engine: Engine, skip_reason: str | None) -> None:
        self.seen.append(step)

    def measures(self, step: int) -> bool:
        return step in self.scores

    def measure(self, step: int, engine: Engine) -> Mapping[str, float]:
        return {"eval/pairs/0": self.scores[step]}


def run(world: World, settings: dict[str, Any], *observers: StepObserver) -> None:
    config = as_config(settings)
    found = [*observers, *forgetting_observers(config, world)]
    train(build_flamingo_task(config, world), config, world, found)


def settings_of(assets: Path, folder: Path, name: str, **changes: Any) -> dict[str, Any]:
    """Return a short run whose text source may have a penalty, and which may measure forgetting."""
    settings = run_settings(assets, folder / name, steps=changes.pop("steps", STEPS))
    settings["schedule"] = {"warmup_steps": 1, "decay": "constant"}
    settings["model"]["trainable"] = changes.pop("trainable", {})
    settings["data"]["sources"][2] |= changes.pop("texts", {})
    settings["data"]["sources"][0] |= changes.pop("pairs", {})
    settings["deepspeed"] |= changes.pop("deepspeed", {})
    for section, values in changes.items():
        settings[section] = {**settings.get(section, {}), **values}
    return settings


def held_out(assets: Path) -> dict[str, Any]:
    """Return settings that measure forgetting at every step, with a task where lm_eval is installed."""
    manifest = str(assets / "data" / "held_out" / "manifest.npz")
    settings = {"manifest": manifest, "num_documents": 7, "every": 1, "max_tokens": 4, "batch_size": 2}
    if HAS_LM_EVAL:
        (assets / "words.jsonl").write_text("".join(f'{{"text": "w{i}", "gold": {i % 2}}}\n' for i in range(5)))
        (assets / "words.yaml").write_text(TASK.format(assets=assets))
        settings |= {"tasks": ["words"], "task_folder": str(assets)}
    return settings


def one_process(world: World, assets: Path, folder: Path) -> dict[str, Any]:
    """Train in one process what needs no second one."""

    def settings(name: str, **changes: Any) -> dict[str, Any]:
        return settings_of(assets, folder, name, **changes)

    run(world, settings("alone", trainable=LORA, texts={"kl_weight": 0.5}))
    measured = settings("measured", trainable=LORA, texts={"kl_weight": 0.5}, forgetting=held_out(assets), steps=2)
    run(world, measured)
    run(world, {**measured, "training": {**measured["training"], "steps": STEPS}})  # it resumes
    run(world, settings("frozen", forgetting=held_out(assets), steps=2), Damage(before=2))
    for stage in (1, 2):
        zero = {"zero_stage": stage, "offload_param": {"device": "none"}, "raw": None}
        run(world, settings(f"stage-{stage}", deepspeed=zero, logging={"part_grad_norms": True}, steps=1))
    task = {"name": "pairs", "type": "shards", "manifest": str(assets / "data" / "pairs" / "manifest.npz")}
    ending = settings("ending", steps=9, evaluation={"every": 1, "tasks": [task]})
    ending["checkpoint"] |= {"every": 1, "keep_best": 1, "best_metric": "eval/pairs/0", "patience": 2}
    scores, again = Scores({1: 0.5, 2: 0.5, 3: 0.4, 4: 0.9}), Scores({})
    run(world, ending, scores)
    run(world, ending, again)  # it was killed before its export
    return {"seen": scores.seen, "again": again.seen}


def two_processes(world: World, assets: Path, folder: Path) -> None:
    """Train with and without all that is measured."""
    micro = {"kl_weight": 0.5, "micro_batch_size": 1}
    run(world, settings_of(assets, folder, "two-plain", trainable=LORA, texts=micro, steps=2))
    norms = {"part_grad_norms": True}
    offloaded = {"offload_optimizer": {"device": "cpu"}}
    changes: dict[str, Any] = {"texts": micro, "forgetting": held_out(assets), "logging": norms}
    run(world, settings_of(assets, folder, "two", trainable=LORA, **changes))
    run(world, settings_of(assets, folder, "offloaded", deepspeed=offloaded, logging=norms, steps=1))


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("forgetting")
    make_assets(folder / "assets")
    make_assets(folder / "other", seed=1)
    (folder / "other" / "data" / "texts").rename(folder / "assets" / "data" / "held_out")
    [results] = run_distributed(one_process, 1, folder / "assets", folder)
    run_distributed(two_processes, 2, folder / "assets", folder)
    return folder, results


def test_a_penalty_depends_neither_on_processes_nor_on_micro_batches(found: tuple[Path, dict[str, Any]]) -> None:
    folder, _ = found
    assert losses(folder / "two") == pytest.approx(losses(folder / "alone"), rel=1e-5)
    divergences = [[line["kl/texts"] for line in read_metrics(folder / name)] for name in ("two", "alone")]
    assert divergences[0] == pytest.approx(divergences[1], rel=1e-4)
    assert divergences[0][0] == 0 and divergences[0][2] > 0
    for line in read_metrics(folder / "two"):
        weighted = {"pairs": 1.0, "documents": 0.5, "texts": 0.1}
        parts = sum(weight * line[f"loss/{name}"] for name, weight in weighted.items())
        assert line["loss"] == pytest.approx(parts + 0.1 * 0.5 * line["kl/texts"])


def test_measuring_does_not_disturb_the_run(found: tuple[Path, dict[str, Any]]) -> None:
    folder, _ = found
    assert losses(folder / "measured")[:2] == losses(folder / "alone")[:2]
    assert losses(folder / "two")[:2] == losses(folder / "two-plain")


@pytest.mark.parametrize("run_name", ["measured", "two"])
def test_forgetting_is_measured_from_the_start_of_the_run(found: tuple[Path, dict[str, Any]], run_name: str) -> None:
    folder, _ = found
    lines = read_metrics(folder / run_name)
    for name, difference in DIFFERENCES.items():
        starts = [line[f"forgetting/{name}"] - line[f"forgetting/{difference}"] for line in lines]
        assert max(starts) - min(starts) < 1e-12 and starts[0] > 0
    assert lines[1]["forgetting/difference"] != 0
    assert [line["forgetting/bits_per_byte"] for line in lines] == pytest.approx(
        [line["forgetting/bits_per_byte"] for line in read_metrics(folder / "two")], rel=1e-4
    )


@pytest.mark.skipif(not HAS_LM_EVAL, reason="the extra lm_eval is not installed")
@pytest.mark.parametrize("run_name", ["measured", "two", "frozen"])
def test_a_task_of_lm_eval_is_scored_in_the_run(found: tuple[Path, dict[str, Any]], run_name: str) -> None:
    folder, _ = found
    lines = read_metrics(folder / run_name)
    scores = [line["forgetting/words/acc"] for line in lines]
    assert all(score in (0, 0.2, 0.4, 0.6, 0.8, 1) for score in scores)
    starts = [line["forgetting/words/acc"] - line["forgetting/words/acc_difference"] for line in lines]
    assert max(starts) - min(starts) < 1e-12
    assert scores == pytest.approx(
        [line["forgetting/words/acc"] for line in read_metrics(folder / "two")][: len(scores)]
    )


def test_a_frozen_language_model_forgets_nothing_and_damage_is_seen(found: tuple[Path, dict[str, Any]]) -> None:
    folder, _ = found
    lines = read_metrics(folder / "frozen")
    assert lines[0]["forgetting/difference"] == 0
    assert lines[0]["forgetting/whole_model_difference"] != 0  # the feed-forwards act on text
    assert lines[1]["forgetting/difference"] != 0
    assert [event["step"] for event in read_events(folder / "frozen", "frozen_model_changed")] == [2]


@pytest.mark.parametrize("name", ["stage-1", "stage-2", "two", "offloaded"])
def test_norms_of_parts_make_up_the_norm(found: tuple[Path, dict[str, Any]], name: str) -> None:
    folder, _ = found
    expected = {"resampler", "cross_attention", "new_tokens"} | ({"language_model"} if name == "two" else set())
    for line in read_metrics(folder / name):
        parts = {key: value for key, value in line.items() if key.startswith("grad_norm/")}
        assert parts.keys() == {f"grad_norm/{part}" for part in expected}
        assert math.hypot(*parts.values()) == pytest.approx(line["grad_norm"], rel=1e-5)
    one, other = (read_metrics(folder / each)[0] for each in ("stage-1", "offloaded"))
    for part in ("resampler", "cross_attention", "new_tokens"):
        assert one[f"grad_norm/{part}"] == pytest.approx(other[f"grad_norm/{part}"], rel=1e-4)


def test_a_run_without_better_scores_ends_early_and_a_resume_ends_at_once(found: tuple[Path, dict[str, Any]]) -> None:
    folder, results = found
    assert results == {"seen": [1, 2, 3], "again": []}
    assert len(losses(folder / "ending")) == 3
    [event] = read_events(folder / "ending", "stopped_early")
    assert (event["step"], event["best"], event["metric"]) == (3, 0.5, "eval/pairs/0")
    settings = CheckpointConfig(best_metric="eval/pairs/0", patience=2)
    assert best_step(folder / "ending" / "checkpoints", settings) == 2  # the later one of equals
    config = load_config(folder / "ending" / "config.yaml", [], FlamingoRunConfig, check_files=False)
    assert trained_weights(config)[1].step == 2
