"""Going back to an older checkpoint, so that a crash at any moment of it is a resume from that same older one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from trainer.checkpoint.background import BackgroundWork
from trainer.checkpoint.catalog import is_complete, problems_of, read_state, steps_in
from trainer.checkpoint.retention import remove
from trainer.checkpoint.training_state import LATEST, CheckpointError, TrainingState, tag_of
from trainer.runtime.distributed import World, broadcast, raise_together
from trainer.runtime.files import write_atomically


def has_checkpoint(folder: Path, at_most: int, world: World) -> bool:
    """Whether there is a good checkpoint of at most that step; a collective."""

    def search() -> bool:
        steps = [step for step in _finished(folder) if step <= at_most] if world.is_main else []
        return any(next(problems_of(folder / tag_of(step)), None) is None for step in reversed(steps))

    # Reading terabytes for their checksums takes longer than a collective may.
    reading = BackgroundWork(search, world, purpose=f"cannot read {folder}", remedy="Make it readable, and start again")
    return bool(broadcast(reading.wait(), world))


def drop_checkpoints(folder: Path, is_stale: Callable[[TrainingState], bool], world: World) -> None:
    """Move ``latest`` to the newest checkpoint that is not stale, then remove the stale ones; a collective.

    Raises: CheckpointError on all ranks when every checkpoint is stale; nothing is removed then.
    """
    error: Exception | None = None
    if world.is_main:
        try:
            _drop(folder, is_stale)
        except (OSError, CheckpointError) as caught:
            error = caught
    raise_together(error, world)


def _drop(folder: Path, is_stale: Callable[[TrainingState], bool]) -> None:
    states = {step: _readable_state(folder / tag_of(step)) for step in _finished(folder)}
    stale = [step for step, state in states.items() if state is not None and is_stale(state)]
    if not stale:
        return
    kept = [step for step, state in states.items() if state is not None and step not in stale]
    if not kept:
        raise CheckpointError(
            f"no checkpoint in {folder} is from before the updates that this run has to pass over; remove "
            "skipped_windows.json from the run folder to go on from the newest one with them, or choose another run_dir"
        )
    write_atomically(folder / LATEST, tag_of(max(kept)))
    for step in stale:
        remove(folder / tag_of(step))


def _readable_state(checkpoint: Path) -> TrainingState | None:
    """None for a damaged one, which ``find_checkpoint`` will pass over with a warning."""
    try:
        return read_state(checkpoint)
    except (ValueError, CheckpointError):
        return None


def _finished(folder: Path) -> list[int]:
    return [step for step in steps_in(folder) if is_complete(folder / tag_of(step))]
