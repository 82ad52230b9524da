"""Train a Flamingo.

``[deepspeed ... --module] trainer.train CONFIG.yaml [--section.key VALUE ...]``

It resumes by itself from the run folder's newest good checkpoint. The result is ``run_dir/export``:
an export that ``trainer.generate`` and ``trainer.evaluate`` take.
"""

from __future__ import annotations

from collections.abc import Sequence

from trainer.config.run_config import FlamingoRunConfig
from trainer.entry import Tools, leave, run_training


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code (0 only when the run is complete)."""
    return run_training(FlamingoRunConfig, argv, _tools)


def _tools() -> Tools[FlamingoRunConfig]:
    # Imported only now: a wrong configuration is reported before torch and the libraries around it are loaded.
    from trainer.export import export_flamingo
    from trainer.tasks.flamingo import build_flamingo_task

    return Tools(build_flamingo_task, export_flamingo)


if __name__ == "__main__":
    leave(main())
