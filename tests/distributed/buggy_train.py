"""``trainer.train`` with a bug: rank 1 raises an error at step 4."""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import partial
from typing import Any

from trainer.entry import exit_now


def main() -> int:
    """Train with the bug; return the exit code of ``trainer.train.main``."""
    from trainer import loop, train
    from trainer.observers.step_observer import StepObserver

    class Bug(StepObserver):
        def begin(self, step: int, engine: Any, skip_reason: str | None) -> None:
            if step == 4 and os.environ["RANK"] == "1":
                raise ValueError("a bug at step 4")

    loop.train = partial(_train_with, Bug(), loop.train)
    return train.main()


def _train_with(bug: Any, train: Any, task: Any, config: Any, world: Any, observers: Sequence[Any] = ()) -> None:
    train(task, config, world, [*observers, bug])


if __name__ == "__main__":
    exit_now(main())
