"""Read the command line of an entry point: ``CONFIG.yaml [--section.key VALUE ...]``."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

from trainer.config.help import print_help
from trainer.config.loader import load_config
from trainer.config.overrides import COMMAND_LINE
from trainer.errors import ConfigError, Problem

C = TypeVar("C")


def parse_arguments(schema: type[C], argv: Sequence[str] | None = None) -> C:
    """Return the settings that a command line names.

    ``--local_rank``, which the deepspeed launcher adds, is ignored: the variable LOCAL_RANK holds the same number.

    Args:
        schema: Dataclass of the settings.
        argv: Arguments after the program's name; None takes ``sys.argv``.

    Raises:
        SystemExit: With 0 after ``--help``; with 2 after printing every wrong setting.
    """
    arguments = without_local_rank(sys.argv[1:] if argv is None else argv)
    file = Path(arguments.pop(0)) if arguments and not arguments[0].startswith("-") else None
    if "--help" in arguments or "-h" in arguments:
        print_help(schema, file)
        raise SystemExit(0)
    try:
        if file is None:
            message = "the first argument must be the run's YAML file; --help lists all settings"
            raise ConfigError([Problem("", message, COMMAND_LINE)], title="the command line")
        return load_config(file, arguments, schema)
    except ConfigError as error:
        # One process of each node prints: files may be missing on some nodes only.
        if os.environ.get("LOCAL_RANK", "0") == "0":
            print(error, file=sys.stderr)
        raise SystemExit(error.exit_code) from None


def without_local_rank(argv: Sequence[str]) -> list[str]:
    """Return the arguments without ``--local_rank N``, ``--local-rank N`` and their ``=`` forms."""
    kept: list[str] = []
    is_value = False
    for word in argv:
        if is_value:
            is_value = False
        elif word in ("--local_rank", "--local-rank"):
            is_value = True
        elif not word.startswith(("--local_rank=", "--local-rank=")):
            kept.append(word)
    return kept
