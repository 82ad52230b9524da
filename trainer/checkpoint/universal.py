"""Convert a checkpoint to DeepSpeed's universal format, which any number of processes and any ZeRO stage can read.

ZeRO's shards fit one number of processes and one layout. In the universal format, every parameter has a folder with
its whole float32 weight and Adam moments (``zero/NAME/{fp32,exp_avg,exp_avg_sq,step}.pt``), from which each process
reads its own part.
The result stays beside the shards, so the conversion happens once. DeepSpeed's own converter
(``deepspeed.checkpoint.ds_to_universal``) runs on one machine and first writes every fragment to a temporary file. Here
each rank maps the shards into memory and writes every n-th parameter directly.
"""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from deepspeed.checkpoint.constants import (
    BASE_OPTIMIZER_STATE,
    BUFFER_NAMES,
    CAT_DIM,
    FP32_FLAT_GROUPS,
    OPTIMIZER_STATE_DICT,
    PARAM,
    PARAM_GROUPS,
    PARAM_SHAPES,
    PARAM_SLICE_MAPPINGS,
    SINGLE_PARTITION_OF_FP32_GROUPS,
)
from torch import Tensor

from trainer.checkpoint.background import BackgroundWork
from trainer.checkpoint.catalog import is_complete, problems_of, write_manifest
from trainer.checkpoint.errors import CheckpointError
from trainer.checkpoint.layout import UNIVERSAL
from trainer.checkpoint.shard_files import Entry, write_tensors
from trainer.runtime.distributed import World, broadcast, gather_objects
from trainer.runtime.files import sync_folder

_MOMENTS = ("exp_avg", "exp_avg_sq")
_BUILDING = ".universal.building"
_MODEL_FILES = ("mp_rank_00_model_states.pt", "zero_pp_rank_0_mp_rank_00_model_states.pt")  # ZeRO-1 and 2; ZeRO-3
# Entries of a shard's optimizer state that belong to its rank; all other entries are equal on all ranks.
_SHARDED = (BASE_OPTIMIZER_STATE, PARAM_SLICE_MAPPINGS, SINGLE_PARTITION_OF_FP32_GROUPS, FP32_FLAT_GROUPS)

_log = logging.getLogger(__name__)


def ensure_universal(checkpoint: Path, world: World) -> Path:
    """Return the universal form of a verified checkpoint; all ranks make it together if it is missing or damaged.

    A kill at any moment leaves the shards untouched, and the next start makes an incomplete form again.

    Raises:
        CheckpointError: A rank cannot write its part. All ranks raise it.
    """
    work = partial(
        BackgroundWork[Any],
        world=world,
        purpose=f"cannot convert {checkpoint} for {world.size} processes and this run's settings",
        remedy=f"The checkpoint is untouched; make {checkpoint} writable with as much free space as it takes now, and "
        "start again, or start as many processes as have written it, with its settings",
    )
    good = work(lambda: world.is_main and _is_good(checkpoint)).wait()
    if not broadcast(good, world):
        work(lambda: _begin(checkpoint) if world.is_main else None).wait()
        entries = work(lambda: _convert_part(checkpoint, world.rank, world.size)).wait()
        merged = {name: entry for part in gather_objects(entries, world) for name, entry in part.items()}
        work(lambda: _complete(checkpoint, merged) if world.is_main else None).wait()
    return checkpoint / UNIVERSAL


def convert(checkpoint: Path) -> bool:
    """Make the universal form in this process alone and return True; return False if it exists already.

    Raises:
        CheckpointError: The checkpoint is damaged.
        OSError: The form cannot be written.
    """
    problem = next(problems_of(checkpoint), None)
    if problem is not None:
        raise CheckpointError(f"{checkpoint} is not converted: {problem}")
    if _is_good(checkpoint):
        return False
    _begin(checkpoint)
    _complete(checkpoint, _convert_part(checkpoint, 0, 1))
    return True


def _is_good(checkpoint: Path) -> bool:
    folder = checkpoint / UNIVERSAL
    if not is_complete(folder):
        return False
    problem = next(problems_of(folder), None)
    if problem is not None:
        _log.warning("%s is made again from the checkpoint's shards: %s", folder, problem)
    return problem is None


def _begin(checkpoint: Path) -> None:
    for leftover in (checkpoint / _BUILDING, checkpoint / UNIVERSAL):
        if leftover.is_symlink():
            leftover.unlink()
        shutil.rmtree(leftover, ignore_errors=True)
    (checkpoint / _BUILDING / "zero").mkdir(parents=True)


def _complete(checkpoint: Path, entries: dict[str, Entry]) -> None:
    building = checkpoint / _BUILDING
    for folder in {(building / name).parent for name in entries}:
        sync_folder(folder)
    write_manifest(building, entries)
    os.rename(building, checkpoint / UNIVERSAL)
    sync_folder(checkpoint)


def _convert_part(checkpoint: Path, rank: int, ranks: int) -> dict[str, Entry]:
    """Write every ``ranks``-th parameter, and on rank 0 the state that all share; return the entries of the files."""
    building, entries = checkpoint / _BUILDING, {}

    def write(name: str, value: Any) -> None:
        path = building / name
        path.parent.mkdir(parents=True, exist_ok=True)
        entries[name] = write_tensors(path, value)

    model = _model_states(checkpoint)
    shards = _Shards(checkpoint, model[PARAM_SHAPES])
    for number, (group, name, shape) in enumerate(shards.parameters()):
        if number % ranks == rank:
            for key, whole in shards.whole(group, name, shape).items():
                write(f"zero/{name}/{key}.pt", whole)
    if rank == 0:
        write("zero/optimizer_state.pt", shards.common())
        buffers = set(model[BUFFER_NAMES])
        model["module"] = {name: value.clone() for name, value in model["module"].items() if name in buffers}
        for name in _MODEL_FILES:  # ZeRO-3 looks for another name than ZeRO-1 and 2
            write(name, model)
    return entries


def _model_states(checkpoint: Path) -> dict[str, Any]:
    [path] = [checkpoint / name for name in _MODEL_FILES if (checkpoint / name).exists()]
    return _read(path)


def _read(path: Path) -> dict[str, Any]:
    # Pickle is safe here: the trainer wrote these files itself, and their checksums were verified.
    state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=False, mmap=True)
    return state


class _Shards:
    """Read parameters and moments from the optimizer files of all ranks, mapped into memory."""

    def __init__(self, checkpoint: Path, shapes: list[dict[str, torch.Size]]) -> None:
        paths = list(checkpoint.glob("*_optim_states.pt"))
        paths.sort(key=lambda path: int(path.name.partition("pp_rank_")[2].partition("_")[0]))
        self._shards = [_read(path)[OPTIMIZER_STATE_DICT] for path in paths]
        self._shapes = shapes
        self._partitioned_parameters = FP32_FLAT_GROUPS in self._shards[0]  # ZeRO-3

    def parameters(self) -> Iterator[tuple[int, str, torch.Size]]:
        """Yield group, name and shape of every trained parameter."""
        for group, shapes in enumerate(self._shapes):
            for name, shape in shapes.items():
                yield group, name, shape

    def whole(self, group: int, name: str, shape: torch.Size) -> dict[str, Any]:
        """Merge the parts of all ranks into a parameter's weight, moments and step."""
        states = [self._optimizer(shard)["state"][group] for shard in self._shards]
        weights = [shard[self._weights][group] for shard in self._shards]
        flat = {"fp32": weights, **{key: [state[key] for state in states] for key in _MOMENTS}}
        result: dict[str, Any] = {}
        for key, ranks in flat.items():
            parts = [part.narrow(0, *place) for part, place in zip(ranks, self._places(group, name), strict=True)]
            result[key] = {PARAM: torch.cat(parts)[: shape.numel()].reshape(shape), CAT_DIM: 0}
        result["step"] = _own_storage(states[0]["step"])  # ZeRO-1 and 2 read it here, ZeRO-3 in optimizer_state.pt
        return result

    def common(self) -> dict[str, Any]:
        """Return the state that all parameters share: step, hyperparameters of groups, DeepSpeed's own settings."""
        first = self._shards[0]
        result = {key: value for key, value in first.items() if key not in (*_SHARDED, OPTIMIZER_STATE_DICT)}
        groups = self._optimizer(first)[PARAM_GROUPS]
        step = _own_storage(self._optimizer(first)["state"][0]["step"])
        return result | {
            PARAM_GROUPS: groups,
            OPTIMIZER_STATE_DICT: {"state": {0: {"step": step}}, PARAM_GROUPS: groups},
        }

    @property
    def _weights(self) -> str:
        return FP32_FLAT_GROUPS if self._partitioned_parameters else SINGLE_PARTITION_OF_FP32_GROUPS

    def _optimizer(self, shard: dict[str, Any]) -> dict[str, Any]:
        optimizer: dict[str, Any] = shard[
            OPTIMIZER_STATE_DICT if self._partitioned_parameters else BASE_OPTIMIZER_STATE
        ]
        return optimizer

    def _places(self, group: int, name: str) -> Iterable[tuple[int, int]]:
        """Yield the place of a parameter in its group, as (start, length), for each rank."""
        if not self._partitioned_parameters:
            for shard in self._shards:
                fragment = shard[PARAM_SLICE_MAPPINGS][group].get(name)
                yield (0, 0) if fragment is None else (fragment.start, fragment.numel)
            return
        start = 0
        for other, shape in self._shapes[group].items():
            length = -(-shape.numel() // len(self._shards))
            if other == name:
                yield from [(start, length)] * len(self._shards)
                return
            start += length


def _own_storage(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else value
