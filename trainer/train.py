"""Train a Flamingo.

``[deepspeed ... --module] trainer.train CONFIG.yaml [--section.key VALUE ...]``

It resumes from the newest good checkpoint in the run folder. The result is ``run_dir/export``:
an export that ``trainer.generate`` and ``trainer.evaluate`` take.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from trainer.config.run_config import FlamingoRunConfig
from trainer.entry import Recipe, exit_now, run_training

if TYPE_CHECKING:
    from trainer.observers.step_observer import StepObserver
    from trainer.runtime.distributed import World


def main(argv: Sequence[str] | None = None) -> int:
    """Train and return the exit code, which is 0 only when the run is complete."""
    return run_training(FlamingoRunConfig, argv, _recipe)


def _recipe() -> Recipe[FlamingoRunConfig]:
    # Imported here, so that a wrong configuration is reported before torch is loaded.
    from trainer.evaluation.forgetting import forgetting_observers
    from trainer.evaluation.live import evaluation_observers
    from trainer.export import export_flamingo
    from trainer.tasks.flamingo import build_flamingo_task

    def observers(config: FlamingoRunConfig, world: World) -> Sequence[StepObserver]:
        return [*evaluation_observers(config, world), *forgetting_observers(config, world)]

    return Recipe(build_flamingo_task, export_flamingo, observers)


if __name__ == "__main__":
    exit_now(main())
