"""Write a sharded checkpoint so that a crash at any moment leaves the older ones, and ``latest``, as they were."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import save_file

from trainer.checkpoint.state import (
    CONFIG,
    LATEST,
    MANIFEST,
    STATE,
    TrainingState,
    entries_checksum,
    rng_file,
    step_of,
    tag_of,
)
from trainer.config.schema import CheckpointConfig
from trainer.distributed import World, barrier, raise_together
from trainer.files import checksum, sync_folder, write_atomically, write_json

SaveShards = Callable[[Path, str], None]


def save_checkpoint(folder: Path, state: TrainingState, config: str, save_shards: SaveShards, world: World) -> Path:
    """Write ``folder/step-N`` and move ``latest`` to it. A collective; returns the checkpoint's folder.

    config: the run's settings as YAML, kept beside.
    save_shards: writes this rank's tensors (``Engine.save``); a collective itself.
    Raises: OSError (a full disk, a read-only folder) on all ranks alike; ``latest`` then still names the older one.
    """
    tag = tag_of(state.step)
    target = folder / tag
    _together(world, lambda: _start(target) if world.is_main else None)
    save_shards(folder, tag)
    _together(world, lambda: _save_rng(target, world))
    _together(world, lambda: _finish(target, state, config) if world.is_main else None)
    return target


def _together(world: World, work: Callable[[], None]) -> None:
    error: Exception | None = None
    try:
        work()
    except OSError as caught:
        error = caught
    raise_together(error, world)


def _start(target: Path) -> None:
    if target.exists():  # left half-written by a crash, or from a run that went back behind it
        shutil.rmtree(target)
    target.mkdir(parents=True)


def _save_rng(target: Path, world: World) -> None:
    states = {"cpu": torch.get_rng_state()}
    if world.device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(world.device)
    save_file(states, rng_file(target, world.rank))


def _finish(target: Path, state: TrainingState, config: str) -> None:
    write_atomically(target / CONFIG, config)
    write_json(target / STATE, state.to_json())
    files = sorted(path for path in target.rglob("*") if path.is_file())
    entries = {
        path.relative_to(target).as_posix(): {"bytes": path.stat().st_size, "sha256": checksum(path)} for path in files
    }
    sync_folder(target)
    write_json(target / MANIFEST, {"files": entries, "sha256": entries_checksum(entries)})
    write_atomically(target.parent / LATEST, target.name)


def prune_checkpoints(folder: Path, config: CheckpointConfig, world: World) -> None:
    """Remove what retention does not keep: all but the last ``keep_last``, every ``keep_every``-th, and ``latest``."""
    if world.is_main:
        steps = sorted(step for path in folder.iterdir() if (step := step_of(path.name)) is not None)
        kept = set(steps[-config.keep_last :])
        if config.keep_every is not None:
            kept |= {step for step in steps if step % config.keep_every == 0}
        for step in steps:
            if step not in kept:
                # Without its manifest a checkpoint does not exist: a crash in mid-removal leaves no half-good one.
                (folder / tag_of(step) / MANIFEST).unlink(missing_ok=True)
                shutil.rmtree(folder / tag_of(step), ignore_errors=True)
    barrier()
