"""What can go wrong by somebody's choice or somebody's data, as opposed to a bug.

Everything here is raised with a message that names what to change. Entry points print the message without a traceback
and exit with ``exit_code``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


class TrainerError(Exception):
    """The base of every error that a user can do something about."""

    exit_code: int = 1


@dataclass(frozen=True)
class Problem:
    """One wrong setting.

    path: where it is, dotted as on the command line ("data.sources.0.batch_size"); "" for the whole file.
    message: what is wrong and what to write instead.
    source: the file and line ("configs/debug.yaml:12") or "command line", where known.
    related: other settings that the message depends on.
    """

    path: str
    message: str
    source: str = ""
    related: tuple[str, ...] = ()

    def __str__(self) -> str:
        where = ": ".join(part for part in (self.source, self.path) if part)
        return f"{where}: {self.message}" if where else self.message


class ConfigError(TrainerError, ValueError):
    """Every wrong setting of a run at once (``problems``); entry points exit with 2."""

    exit_code = 2

    def __init__(self, problems: Sequence[Problem], title: str = "the configuration") -> None:
        self.problems = tuple(problems)
        count = len(self.problems)
        heading = f"{title} has {count} problem{'s' if count != 1 else ''}:"
        super().__init__("\n".join([heading, *(f"  {problem}" for problem in self.problems)]))
