"""Going back to an older checkpoint, so that a crash at any moment of it is a resume from that same older one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from trainer.checkpoint.catalog import is_complete, read_state, steps_in
from trainer.checkpoint.retention import remove
from trainer.checkpoint.state import LATEST, CheckpointError, TrainingState, tag_of
from trainer.distributed import World, from_main, raise_together
from trainer.files import write_atomically


def has_checkpoint(folder: Path, at_most: int, world: World) -> bool:
    """Whether there is a finished checkpoint of at most that step (verified when it is read); a collective."""
    return bool(from_main(world.is_main and any(step <= at_most for step in _finished(folder)), world))


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
    finished = _finished(folder)
    stale = [step for step in finished if is_stale(read_state(folder / tag_of(step)))]
    if not stale:
        return
    kept = sorted(set(finished) - set(stale))
    if not kept:
        raise CheckpointError(
            f"no checkpoint in {folder} is from before the updates that this run has to pass over; remove "
            "skipped_windows.json from the run folder to go on from the newest one with them, or choose another run_dir"
        )
    write_atomically(folder / LATEST, tag_of(kept[-1]))
    for step in stale:
        remove(folder / tag_of(step))


def _finished(folder: Path) -> list[int]:
    return sorted(step for step in steps_in(folder) if is_complete(folder / tag_of(step)))
