"""List the runs of a study. Each is a normal run with a folder of its own."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainer.config.loader import load_config, schema_of
from trainer.config.study_config import StudyConfig
from trainer.config.yaml_file import read_yaml
from trainer.errors import ConfigError, Problem
from trainer.runtime.run_folder import RunFolder

_TRAINERS = {
    "flamingo": "trainer.train",
    "language_model": "trainer.pretrain_lm",
    "contrastive": "trainer.pretrain_vision",
}


@dataclass(frozen=True)
class Cell:
    """Describe one run of a study.

    Attributes:
        variant: Name of the variant.
        seed: Seed of the run.
        module: Trainer to start.
        arguments: Its arguments: the base configuration and every changed setting.
        folder: Its run folder.
    """

    variant: str
    seed: int
    module: str
    arguments: tuple[str, ...]
    folder: RunFolder

    @property
    def evaluation(self) -> Path:
        """Folder of the evaluation of the run's export."""
        return self.folder.path / "evaluation"


def study_cells(config: StudyConfig) -> list[Cell]:
    """Return the runs of a study: all seeds of the first variant, then those of the next.

    Raises:
        ConfigError: The configuration of a run is wrong; the error lists the problems of all variants.
    """
    schema: Any = schema_of(read_yaml(config.base).values)
    if not hasattr(schema, "task"):
        raise ConfigError([Problem("base", f"{config.base} is no configuration of a run")], title="the study")
    module = _TRAINERS[schema.task]
    cells, problems = [], []
    for variant, changes in config.variants.items():
        for seed in config.seeds:
            folder = RunFolder(config.output / variant / f"seed-{seed}")
            settings = {**config.overrides, **changes, "training.seed": seed, "data.seed": seed}
            overrides = _command_line({**settings, "run_dir": str(folder.path)})
            cells.append(Cell(variant, seed, module, (str(config.base), *overrides), folder))
        try:
            load_config(config.base, overrides, schema)
        except ConfigError as error:
            problems += [Problem(problem.path, problem.message, f"variant {variant}") for problem in error.problems]
    if problems:
        raise ConfigError(problems, title=f"the study of {config.base}")
    return cells


def _command_line(settings: dict[str, Any]) -> Sequence[str]:
    return [f"--{name}={value if isinstance(value, str) else json.dumps(value)}" for name, value in settings.items()]
