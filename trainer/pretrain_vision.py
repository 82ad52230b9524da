"""Pretrain an image tower contrastively.

``[deepspeed ... --module] trainer.pretrain_vision CONFIG.yaml [--section.key VALUE ...]``

It resumes from the newest good checkpoint in the run folder. The result is ``run_dir/export``:
a folder that open_clip, and ``model.vision.name``, take as ``local-dir:FOLDER``.
"""

from __future__ import annotations

from collections.abc import Sequence

from trainer.config.run_config import ContrastiveRunConfig
from trainer.entry import Recipe, exit_now, run_training


def main(argv: Sequence[str] | None = None) -> int:
    """Train and return the exit code, which is 0 only when the run is complete."""
    return run_training(ContrastiveRunConfig, argv, _recipe)


def _recipe() -> Recipe[ContrastiveRunConfig]:
    # Imported here, so that a wrong configuration is reported before torch is loaded.
    from trainer.export import export_contrastive
    from trainer.tasks.contrastive.task import build_contrastive_task
    from trainer.tasks.contrastive.zero_shot_observer import zero_shot_observers

    return Recipe(build_contrastive_task, export_contrastive, zero_shot_observers)


if __name__ == "__main__":
    exit_now(main())
