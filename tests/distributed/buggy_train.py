"""``trainer.train`` with a bug: an error at update 4, on rank 1."""

from __future__ import annotations

import os
from typing import Any

from trainer.entry import leave


def main() -> int:
    """As ``trainer.train.main``."""
    from trainer import loop, train

    run_step = loop._run_step

    def buggy(engine: Any, update: Any, *rest: Any) -> Any:
        if update.step == 3 and os.environ["RANK"] == "1":
            raise ValueError("a bug at update 4")
        return run_step(engine, update, *rest)

    loop._run_step = buggy
    return train.main()


if __name__ == "__main__":
    leave(main())
