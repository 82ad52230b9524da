"""Pretrain an image tower contrastively.

``[deepspeed ... --module] trainer.pretrain_vision CONFIG.yaml [--section.key VALUE ...]``

It resumes by itself from the run folder's newest good checkpoint. The result is ``run_dir/export``:
a folder that open_clip, and ``model.vision.name``, take as ``local-dir:FOLDER``.
"""

from __future__ import annotations

from collections.abc import Sequence

from trainer.config.run_config import ContrastiveRunConfig
from trainer.entry import Tools, leave, run_training


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code (0 only when the run is complete)."""
    return run_training(ContrastiveRunConfig, argv, _tools)


def _tools() -> Tools[ContrastiveRunConfig]:
    # Imported only now: a wrong configuration is reported before torch and the libraries around it are loaded.
    from trainer.export import export_contrastive
    from trainer.tasks.contrastive import build_contrastive_task

    return Tools(build_contrastive_task, export_contrastive)


if __name__ == "__main__":
    leave(main())
