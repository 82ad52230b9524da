"""Find the newest good checkpoint of a run, refuse what does not fit, and restore the rest."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from model.parameters import explain_difference
from trainer.checkpoint.background import BackgroundWork
from trainer.checkpoint.catalog import find_checkpoint, read_state
from trainer.checkpoint.training_state import OFFLOADED, CheckpointError, TrainingState, rng_file
from trainer.checkpoint.universal import ensure_universal
from trainer.runtime.distributed import World, broadcast

_log = logging.getLogger(__name__)

LoadShards = Callable[[Path, str], None]


def resume_point(folder: Path, world: World) -> tuple[Path, TrainingState] | None:
    """``find_checkpoint`` on rank 0, the answer on every rank. Raises: CheckpointError on every rank."""

    def find() -> tuple[Path, TrainingState] | CheckpointError | None:
        try:
            checkpoint = find_checkpoint(folder) if world.is_main else None
            return None if checkpoint is None else (checkpoint, read_state(checkpoint))
        except CheckpointError as error:
            return error

    # Reading terabytes for their checksums takes longer than a collective may.
    search = BackgroundWork(find, world, purpose=f"cannot read {folder}", remedy="Make it readable, and start again")
    answer: tuple[Path, TrainingState] | CheckpointError | None = broadcast(search.wait(), world)
    if isinstance(answer, CheckpointError):
        raise answer
    return answer


def check_fits(state: TrainingState, *, model: Mapping[str, Any], frozen: Mapping[str, str]) -> None:
    """Refuse a checkpoint of another model or of other frozen weights.

    Raises: CheckpointError with everything that differs.
    """
    problems = []
    differing = sorted(_differences(state.model, model))
    if differing:
        problems.append("it belongs to another model; different settings: " + ", ".join(differing))
    elif state.frozen != frozen:
        difference = explain_difference(state.frozen, frozen)
        problems.append(f"it was trained on other frozen weights (language model or vision tower): {difference}")
    if problems:
        raise CheckpointError(
            f"the checkpoint of step {state.step} does not fit this run: "
            + "; ".join(problems)
            + ". Restore the old settings, or choose another run_dir"
        )


def _differences(old: Any, new: Any, path: str = "model") -> set[str]:
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        return {
            found
            for key in old.keys() | new.keys()
            for found in _differences(old.get(key), new.get(key), f"{path}.{key}")
        }
    same = list(old) == list(new) if isinstance(old, (list, tuple)) and isinstance(new, (list, tuple)) else old == new
    return set() if same else {path}


def restore(
    checkpoint: Path, state: TrainingState, load_shards: LoadShards, load_universal: LoadShards, world: World
) -> None:
    """Put tensors and random states back; a collective.

    load_shards: reads shards that as many processes wrote (``Engine.load``).
    load_universal: reads the universal form (``Engine.load_universal``).
    Raises: CheckpointError on all ranks when there is no space for that form, or optimizer state on NVMe forbids it.
    """
    if state.world_size == world.size:
        load_shards(checkpoint.parent, checkpoint.name)
    else:
        if (checkpoint / OFFLOADED).is_dir():
            raise CheckpointError(
                f"{checkpoint} has its optimizer state from NVMe, a folder for each of {state.world_size} processes, "
                f"which cannot be put together for {world.size}: start {state.world_size} processes"
            )
        _log.info("%s was written by %d processes: converting it for %d", checkpoint, state.world_size, world.size)
        universal = ensure_universal(checkpoint, world)
        load_universal(universal.parent, universal.name)
    _restore_random_states(checkpoint, state, world)


def _restore_random_states(checkpoint: Path, state: TrainingState, world: World) -> None:
    if world.rank < state.world_size:
        states = load_file(rng_file(checkpoint, world.rank))
        torch.set_rng_state(states["cpu"])
        if "cuda" in states and world.device.type == "cuda":
            torch.cuda.set_rng_state(states["cuda"], world.device)
    else:  # a rank that did not exist: the same numbers whenever it resumes from here
        first = rng_file(checkpoint, 0).read_bytes()
        seed = hashlib.sha256(first + world.rank.to_bytes(8, "big")).digest()[:8]
        torch.manual_seed(int.from_bytes(seed, "big", signed=True))
