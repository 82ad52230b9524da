"""Find the checkpoint to resume from, refuse one that does not fit the run, and restore it."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors.torch import load_file

from model.parameters import explain_difference
from trainer.checkpoint.background import BackgroundWork
from trainer.checkpoint.catalog import find_checkpoint, read_state
from trainer.checkpoint.errors import CheckpointError
from trainer.checkpoint.layout import OFFLOADED, rng_file
from trainer.checkpoint.training_state import TrainingState
from trainer.checkpoint.universal import ensure_universal
from trainer.runtime.distributed import World, broadcast

_log = logging.getLogger(__name__)

_DTYPE = "training.dtype"
# DeepSpeed keeps the state of these in files or fields of their own, which the universal form does not have.
_NOT_CONVERTIBLE = frozenset({"deepspeed.offload_optimizer.device", "optimizer.name"})


class ShardReader(Protocol):
    """Read tensors into a model and its optimizer; ``trainer.deepspeed_engine.engine.Engine`` fulfills this protocol.

    Attributes:
        layout: Settings that the layout of this run's shards depends on.
    """

    layout: Mapping[str, Any]

    def load(self, folder: Path, tag: str) -> None:
        """Read shards that the same number of processes wrote with the same layout."""

    def load_universal(self, folder: Path, tag: str) -> None:
        """Read the universal form."""


def resume_point(folder: Path, world: World) -> tuple[Path, TrainingState] | None:
    """Find the newest good checkpoint on rank 0 and return it on every rank; a collective.

    Raises:
        CheckpointError: As ``find_checkpoint``, on every rank.
    """

    def find() -> tuple[Path, TrainingState] | CheckpointError | None:
        try:
            checkpoint = find_checkpoint(folder) if world.is_main else None
            return None if checkpoint is None else (checkpoint, read_state(checkpoint))
        except CheckpointError as error:
            return error

    # The checksums of terabytes take longer than a collective may wait.
    search = BackgroundWork(find, world, purpose=f"cannot read {folder}", remedy="Make it readable, and start again")
    answer: tuple[Path, TrainingState] | CheckpointError | None = broadcast(search.wait(), world)
    if isinstance(answer, CheckpointError):
        raise answer
    return answer


def check_fits(
    state: TrainingState, *, model: Mapping[str, Any], frozen: Mapping[str, str], layout: Mapping[str, Any]
) -> None:
    """Refuse a checkpoint of another model or of other frozen weights, or one that cannot be converted for this run.

    Args:
        state: State of the checkpoint.
        model: Configuration of this run's model.
        frozen: Digests of this run's frozen tensors.
        layout: Settings that the layout of this run's shards depends on.

    Raises:
        CheckpointError: The checkpoint does not fit; the message names everything that differs.
    """
    problems = []
    changed = layout_changes(state, layout)
    for name in changed.keys() & _NOT_CONVERTIBLE:
        old, new = changed[name]
        problems.append(f"{name} is {new}, but the checkpoint was written with {old}, and cannot be converted")
    differing = sorted(_differences(state.model, model))
    if differing:
        problems.append("it belongs to another model; different settings: " + ", ".join(differing))
    elif state.frozen != frozen and _DTYPE in changed:
        old, new = changed[_DTYPE]
        problems.append(f"{_DTYPE} is {new}, but the checkpoint was trained with frozen weights in {old}")
    elif state.frozen != frozen:
        difference = explain_difference(state.frozen, frozen)
        problems.append(f"it was trained on other frozen weights (language model or vision tower): {difference}")
    if problems:
        raise CheckpointError(
            f"the checkpoint of step {state.step} does not fit this run: "
            + "; ".join(problems)
            + ". Restore the old settings, or choose another run_dir"
        )


def layout_changes(state: TrainingState, layout: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Return old and new value of each setting in which the layout of the checkpoint's shards differs from this run's.

    A checkpoint that does not tell its layout is taken to have this run's.
    """
    if not state.layout:
        return {}
    names = sorted(state.layout.keys() | layout.keys())
    pairs = {name: (state.layout.get(name), layout.get(name)) for name in names}
    return {name: (old, new) for name, (old, new) in pairs.items() if old != new}


def _differences(old: Any, new: Any, path: str = "model") -> set[str]:
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        return {
            found
            for key in old.keys() | new.keys()
            for found in _differences(old.get(key), new.get(key), f"{path}.{key}")
        }
    same = list(old) == list(new) if isinstance(old, (list, tuple)) and isinstance(new, (list, tuple)) else old == new
    return set() if same else {path}


def restore(checkpoint: Path, state: TrainingState, reader: ShardReader, world: World) -> None:
    """Restore tensors and random states; a collective.

    Args:
        checkpoint: Folder of the checkpoint.
        state: Its state.
        reader: Reads shards or the universal form (``Engine``).
        world: Processes of this run.

    Raises:
        CheckpointError: The number of processes or the layout changed, and the universal form cannot be written or
            cannot be made because the optimizer state was offloaded to NVMe. All ranks raise it.
    """
    changed = layout_changes(state, reader.layout)
    if state.world_size == world.size and not changed:
        reader.load(checkpoint.parent, checkpoint.name)
    else:
        if (checkpoint / OFFLOADED).is_dir():
            other = "".join(f"; set {name} to {old}" for name, (old, _) in changed.items())
            raise CheckpointError(
                f"{checkpoint} has optimizer state offloaded to NVMe, one folder for each of {state.world_size} "
                f"processes, which cannot be converted: start {state.world_size} processes{other}"
            )
        written = ", ".join([f"{state.world_size} processes", *(f"{name} {old}" for name, (old, _) in changed.items())])
        _log.info("%s was written with %s: converting it", checkpoint, written)
        universal = ensure_universal(checkpoint, world)
        reader.load_universal(universal.parent, universal.name)
    restore_random_states(checkpoint, state, world)


def restore_random_states(checkpoint: Path, state: TrainingState, world: World) -> None:
    """Restore this rank's random states, or seed a rank that did not exist when the checkpoint was written."""
    if world.rank < state.world_size:
        states = load_file(rng_file(checkpoint, world.rank))
        torch.set_rng_state(states["cpu"])
        if "cuda" in states and world.device.type == "cuda":
            torch.cuda.set_rng_state(states["cuda"], world.device)
    else:  # the seed depends on the checkpoint and the rank only, so every resume from here draws the same numbers
        first = rng_file(checkpoint, 0).read_bytes()
        seed = hashlib.sha256(first + world.rank.to_bytes(8, "big")).digest()[:8]
        torch.manual_seed(int.from_bytes(seed, "big", signed=True))
