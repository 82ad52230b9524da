"""Define the settings of ``trainer.study``."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trainer.config.types import FORBID_UNKNOWN_KEYS, NonNegative, Positive
from trainer.errors import Problem


@dataclass(frozen=True)
class StudyConfig:
    """Compare variants of one configuration over several seeds.

    Attributes:
        base: Configuration of a run, which every variant changes.
        output: Folder of the study: a run folder for each variant and seed, and the report.
        variants: Changed settings of each variant by dotted name, as on the command line of a run. A variant named like
            ``baseline`` usually changes nothing.
        baseline: Variant that the others are compared with.
        seeds: ``training.seed`` and ``data.seed`` of the runs of each variant.
        overrides: Settings by dotted name that all runs change.
        processes: Processes of each run.
        evaluation: Configuration of ``trainer.evaluate``, which scores the export of every run; None scores the loss
            alone.
        scores: Entries of the evaluation's report to compare, such as "tasks.digits.shots.0.score"; empty takes the
            score of every task and number of shots.
        last_steps: Steps at the end of a run whose mean loss is compared.
    """

    __pydantic_config__ = FORBID_UNKNOWN_KEYS

    base: Path
    output: Path
    variants: dict[str, dict[str, Any]]
    baseline: str
    seeds: tuple[NonNegative, ...] = (0, 1, 2)
    overrides: dict[str, Any] = field(default_factory=dict)
    processes: Positive = 1
    evaluation: Path | None = None
    scores: tuple[str, ...] = ()
    last_steps: Positive = 20


def study_problems(config: StudyConfig, check_files: bool) -> Iterator[Problem]:
    """Yield what is wrong with a study, but for the configurations of its runs.

    Args:
        config: Settings of the study.
        check_files: Whether the files that it names must exist.
    """
    if config.baseline not in config.variants:
        yield Problem("baseline", f"{config.baseline} is no variant; choose one of {', '.join(config.variants)}")
    for name in config.variants:
        if not re.fullmatch(r"\w[\w.-]*", name):
            yield Problem(f"variants.{name}", "becomes a folder: use letters, digits, ., - and _ only")
    if not config.seeds:
        yield Problem("seeds", "is empty; name at least one")
    if len(set(config.seeds)) < len(config.seeds):
        yield Problem("seeds", "has a seed twice")
    for name, path in (("base", config.base), ("evaluation", config.evaluation)):
        if check_files and path is not None and not path.is_file():
            yield Problem(name, f"no such file: {path}")
