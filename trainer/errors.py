"""Define the errors that a user's settings or data cause, as opposed to bugs.

Every message names the thing to change. Entry points print the message without a traceback and exit with ``exit_code``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


class TrainerError(Exception):
    """Report an error that a user can mend; the base of all others.

    Attributes:
        exit_code: Exit code of an entry point that ends with this error.
    """

    exit_code: int = 1


@dataclass(frozen=True)
class Problem:
    """Describe one wrong setting.

    Attributes:
        path: Dotted name, as on the command line ("data.sources.0.batch_size"); "" for the whole file.
        message: What is wrong and what to write instead.
        source: File and line ("configs/debug.yaml:12") or "command line"; "" if unknown.
        related: Other settings that the message depends on.
    """

    path: str
    message: str
    source: str = ""
    related: tuple[str, ...] = ()

    def __str__(self) -> str:
        place = ": ".join(part for part in (self.source, self.path) if part)
        return f"{place}: {self.message}" if place else self.message


class ConfigError(TrainerError, ValueError):
    """Report every wrong setting of a run at once.

    Attributes:
        problems: The wrong settings.
    """

    exit_code = 2

    def __init__(self, problems: Sequence[Problem], title: str = "the configuration") -> None:
        self.problems = tuple(problems)
        count = len(self.problems)
        heading = f"{title} has {count} problem{'s' if count != 1 else ''}:"
        super().__init__("\n".join([heading, *(f"  {problem}" for problem in self.problems)]))
