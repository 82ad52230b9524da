"""``--help``: every setting with its type, its documentation and the value the given file gives it (tyro's layout)."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any, TypeVar

import tyro

from trainer.config.data_config import DataConfig, ImageTextSource, InterleavedSource, TextSource
from trainer.config.evaluation_config import EvaluationConfig, EvaluationTask
from trainer.config.loader import load_config
from trainer.config.run_config import ContrastiveRunConfig, FlamingoRunConfig, TrainingConfig
from trainer.errors import ConfigError

C = TypeVar("C")


def print_help(schema: type[C], file: Path | None) -> None:
    """Print all settings of ``schema``; the defaults shown are those of ``file``, or an example's without one."""
    program = _program_name()
    print(f"usage: {program} CONFIG.yaml [--section.key VALUE ...]\n")
    print("Settings come from the YAML file; those below change one for this run (- and _ are the same in names).")
    print("Elements of a list go by number or name: --data.sources.0.weight 0.5, --data.sources.mmc4.weight 0.5.\n")
    default = _example(schema)
    if file is not None:
        try:
            default = load_config(file, [], schema, check_files=False)
        except ConfigError as error:
            print(f"{error}\n\nThe values below are an example's.\n", file=sys.stderr)
    try:
        tyro.cli(schema, default=default, args=["--help"], prog=program, config=(tyro.conf.AvoidSubcommands,))
    except SystemExit:
        return  # argparse's way to end after its help


def _program_name() -> str:
    module = sys.modules["__main__"].__spec__
    return f"python -m {module.name}" if module is not None else Path(sys.argv[0]).name


def _example(schema: type[C]) -> C:
    manifest = Path("data/example/manifest.npz")
    settings: dict[str, Any]
    if schema is EvaluationConfig:
        tasks = (EvaluationTask(name="held_out", manifest=manifest),)
        settings = {"model": Path("runs/example/export"), "report": Path("runs/example/report.json"), "tasks": tasks}
    else:
        common: dict[str, Any] = {"batch_size": 64, "manifest": manifest}
        pairs, documents = ImageTextSource(name="pairs", **common), InterleavedSource(name="documents", **common)
        texts = TextSource(name="texts", **common)
        sources = {FlamingoRunConfig: (pairs, documents), ContrastiveRunConfig: (pairs,)}.get(schema, (texts,))
        training = TrainingConfig(steps=1000)
        settings = {"run_dir": Path("runs/example"), "data": DataConfig(sources=sources), "training": training}
    return schema(**settings)
