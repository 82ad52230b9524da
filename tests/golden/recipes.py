"""Train the first steps of a recipe in a work folder, and return their losses, gradient norms and samples."""

from __future__ import annotations

import json
import os
import signal
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from tests.distributed.processes import run_distributed
from tests.golden.data import ROOT, prepare
from trainer.config.loader import load_config, schema_of
from trainer.config.run_config import ContrastiveRunConfig, FlamingoRunConfig, LanguageModelRunConfig
from trainer.config.yaml_file import read_yaml
from trainer.deepspeed_engine.engine import Engine
from trainer.entry import Recipe
from trainer.observers.step_observer import StepObserver
from trainer.runtime.distributed import World

STEPS = 20
WORLD_SIZES = (1, 2)
Line = dict[str, Any]


@dataclass(frozen=True)
class Trained:
    """Hold what a run has shown.

    Attributes:
        parameters: Number of all parameters, and of those that train.
        lines: One for each step.
    """

    parameters: dict[str, int]
    lines: list[Line]


@dataclass(frozen=True)
class GoldenRecipe:
    """Say what a recipe needs before it trains.

    Attributes:
        data: Data sets of ``tests.golden.data``.
        after: Recipes whose exports it takes; each is trained for ``STEPS`` steps only.
    """

    data: tuple[str, ...]
    after: tuple[str, ...] = ()


def _three_stages(name: str, *data: str) -> dict[str, GoldenRecipe]:
    """Return the three recipes of a folder of configs/, which train one after the other on data sets."""
    language_model, vision = f"{name}/language_model.yaml", f"{name}/vision.yaml"
    return {
        language_model: GoldenRecipe(data),
        vision: GoldenRecipe(data, (language_model,)),
        f"{name}/flamingo.yaml": GoldenRecipe(data, (language_model, vision)),
    }


_TOKENIZER = ("quickstart/language_model.yaml",)
# By path below configs/. A recipe comes after those that it needs.
RECIPES: dict[str, GoldenRecipe] = {
    **_three_stages("quickstart", "quickstart"),
    **_three_stages("easy_vqa", "easy_vqa"),
    **_three_stages("in_context", "in_context"),
    **_three_stages("own_data", "quickstart", "own"),
    "debug.yaml": GoldenRecipe(("quickstart",), _TOKENIZER),
    "vision/debug.yaml": GoldenRecipe(("quickstart",), _TOKENIZER),
    "vision/tiny.yaml": GoldenRecipe(("zero_shot",), _TOKENIZER),
    "continue/tiny.yaml": GoldenRecipe(("squares",)),
}


def with_needed(names: Sequence[str]) -> list[str]:
    """Return these recipes and those that they need, in the order of ``RECIPES``."""
    needed = {*names, *(other for name in names for other in RECIPES[name].after)}
    return [name for name in RECIPES if name in needed]


def train_recipes(names: Sequence[str], world_size: int) -> dict[str, Trained]:
    """Train these recipes on some processes; return what each has shown.

    They train in a temporary folder. Those that they need train first, and are returned too.
    """
    with tempfile.TemporaryDirectory(prefix="golden-") as folder:
        trained = {}
        for name in with_needed(names):
            for data in RECIPES[name].data:
                prepare(data, Path(folder))
            start = time.monotonic()
            trained[name] = run_distributed(train_first_steps, world_size, name, folder)[0]
            print(f"trained {name} on {world_size} processes: {time.monotonic() - start:.1f} s", flush=True)
        return trained


@dataclass(frozen=True)
class StopAtStep(StepObserver):
    """Ask the run to stop after a step, as a scheduler does, so that it saves a checkpoint."""

    step: int

    def begin(self, step: int, engine: Engine, skip_reason: str | None) -> None:
        if step == self.step:
            os.kill(os.getpid(), signal.SIGTERM)


def train_first_steps(world: World, name: str, folder: str) -> Trained:
    """Train the first steps of a recipe, and export it; rank 0 returns its lines too.

    Args:
        world: This process.
        name: Name in ``RECIPES``.
        folder: Work folder, to which paths in the recipe are relative.
    """
    from trainer.entry import quiet_libraries
    from trainer.loop import train
    from trainer.resilience.preemption import PreemptedError
    from trainer.runtime.distributed import failing_together
    from trainer.runtime.run_folder import RunFolder

    os.chdir(folder)
    quiet_libraries()
    path = ROOT / "configs" / name
    schema: type[Any] = schema_of(read_yaml(path).values)
    overrides = ["--data.ledger", "true", "--logging.tensorboard", "false"]
    config = load_config(path, overrides, schema)
    if config.training.steps < STEPS:
        config = load_config(path, [*overrides, "--training.steps", str(STEPS)], schema)
    recipe = _recipe_of(schema)
    task = recipe.build_task(config, world)
    sizes = [(getattr(weight, "ds_numel", weight.numel()), weight.requires_grad) for weight in task.module.parameters()]
    try:
        train(task, config, world, [StopAtStep(STEPS)])
    except PreemptedError:
        pass
    run = RunFolder(config.run_dir)
    with failing_together(world):
        if world.is_main and any(name in other.after for other in RECIPES.values()):
            recipe.export(config, run.export)
    parameters = {"all": sum(size for size, _ in sizes), "trained": sum(size for size, trains in sizes if trains)}
    return Trained(parameters, _lines(run.path, world.size) if world.is_main else [])


def _recipe_of(schema: type[Any]) -> Recipe[Any]:
    """Return what the entry point of a kind of run trains and exports."""
    from trainer import export
    from trainer.tasks.contrastive.task import build_contrastive_task
    from trainer.tasks.flamingo import build_flamingo_task
    from trainer.tasks.language_model import build_language_model_task

    recipes: dict[type[Any], Recipe[Any]] = {
        FlamingoRunConfig: Recipe(build_flamingo_task, export.export_flamingo),
        LanguageModelRunConfig: Recipe(build_language_model_task, export.export_language_model),
        ContrastiveRunConfig: Recipe(build_contrastive_task, export.export_contrastive),
    }
    return recipes[schema]


def _lines(run_dir: Path, world_size: int) -> list[Line]:
    """Return a line for each step, from metrics.jsonl and the ledgers of all ranks."""
    consumed: dict[int, list[tuple[Any, ...]]] = {}
    for path in (run_dir / "ledger").glob("rank-*.jsonl"):
        for sample in map(json.loads, path.read_text().splitlines()):
            shard = Path(sample["shard"]).name  # the folder differs from machine to machine
            consumed.setdefault(sample["step"], []).append((sample["source"], shard, sample["index"], sample["key"]))
    metrics = map(json.loads, (run_dir / "metrics.jsonl").read_text().splitlines())
    return [
        {
            "processes": world_size,
            "step": line["step"],
            "loss": line["loss"],
            "grad_norm": line["grad_norm"],
            "samples": len(consumed[line["step"]]),
            "samples_sha256": sha256(repr(sorted(consumed[line["step"]])).encode()).hexdigest()[:16],
        }
        for line in metrics
    ]
