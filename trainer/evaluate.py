"""Score an exported model: ``python -m trainer.evaluate CONFIG.yaml [--key VALUE ...]``, also under ``deepspeed``.

Prints a table, writes ``report.json`` and ``predictions.jsonl``, and exits with 1 if a score misses its bound. After a
kill, the same command goes on where it was. docs/evaluation.md explains tasks, prompts and controls.

``python -m trainer.evaluate compare A B`` compares two evaluations.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from trainer.config.command_line import parse_arguments
from trainer.config.evaluation_config import EvaluationConfig
from trainer.entry import exit_now
from trainer.runtime.stop_signals import EXIT_STOPPED, StoppedError, handling, stop_at_once, write_to_terminal


def main(argv: Sequence[str] | None = None) -> int:
    """Score every task, or compare two evaluations, and return the exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments[:1] == ["compare"]:
        from trainer.evaluation.comparison import main as compare

        return compare(arguments[1:])
    with handling(stop_at_once):
        try:
            config = parse_arguments(EvaluationConfig, arguments)

            from trainer.evaluation.command import run

            return run(config)
        except StoppedError:
            write_to_terminal("asked to stop: every answered batch is saved; start the same command again")
            return EXIT_STOPPED


if __name__ == "__main__":
    exit_now(main())
