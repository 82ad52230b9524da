"""Go back to an older checkpoint; a crash at any moment leads to a resume from that same checkpoint."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from trainer.checkpoint.background import BackgroundWork
from trainer.checkpoint.catalog import complete_steps, problems_of, read_state
from trainer.checkpoint.errors import CheckpointError
from trainer.checkpoint.layout import LATEST, tag_of
from trainer.checkpoint.retention import remove
from trainer.checkpoint.training_state import TrainingState
from trainer.runtime.distributed import World, broadcast, failing_together
from trainer.runtime.files import write_atomically


def has_checkpoint(folder: Path, at_most: int, world: World) -> bool:
    """Return whether there is an undamaged checkpoint of step ``at_most`` or an earlier one; a collective."""

    def search() -> bool:
        steps = [step for step in complete_steps(folder) if step <= at_most] if world.is_main else []
        return any(next(problems_of(folder / tag_of(step)), None) is None for step in reversed(steps))

    # The checksums of terabytes take longer than a collective may wait.
    reading = BackgroundWork(search, world, purpose=f"cannot read {folder}", remedy="Make it readable, and start again")
    return bool(broadcast(reading.wait(), world))


def drop_stale_checkpoints(folder: Path, is_stale: Callable[[TrainingState], bool], world: World) -> None:
    """Point ``latest`` to the newest checkpoint that is not stale, then remove the stale ones; a collective.

    Args:
        folder: ``checkpoints`` of a run folder.
        is_stale: Returns whether a checkpoint holds steps that the run must now skip.
        world: Processes of this run.

    Raises:
        CheckpointError: Every checkpoint is stale. Nothing is removed, and all ranks raise.
    """
    with failing_together(world):
        if world.is_main:
            _drop(folder, is_stale)


def _drop(folder: Path, is_stale: Callable[[TrainingState], bool]) -> None:
    states = {step: _readable_state(folder / tag_of(step)) for step in complete_steps(folder)}
    stale = [step for step, state in states.items() if state is not None and is_stale(state)]
    if not stale:
        return
    kept = [step for step, state in states.items() if state is not None and step not in stale]
    if not kept:
        raise CheckpointError(
            f"every checkpoint in {folder} already holds steps that this run must skip; remove skipped_windows.json "
            "from the run folder to continue from the newest checkpoint with these steps, or choose another run_dir"
        )
    write_atomically(folder / LATEST, tag_of(max(kept)))
    for step in stale:
        remove(folder / tag_of(step))


def _readable_state(checkpoint: Path) -> TrainingState | None:
    """Read the state; None for a damaged checkpoint, which ``find_checkpoint`` reports."""
    try:
        return read_state(checkpoint)
    except (ValueError, CheckpointError):
        return None
