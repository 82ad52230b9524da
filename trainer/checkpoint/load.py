"""Find the newest good checkpoint of a run, refuse what does not fit, and restore the rest."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from model.parameters import explain_difference
from trainer.checkpoint.state import (
    LATEST,
    MANIFEST,
    STATE,
    CheckpointError,
    TrainingState,
    entries_checksum,
    rng_file,
    step_of,
    tag_of,
)
from trainer.distributed import World, from_main
from trainer.files import canonical_json, checksum

_log = logging.getLogger(__name__)

LoadShards = Callable[[Path, str], None]


def find_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint whose every file is there with its checksum, or None in a new run.

    ``latest`` is looked at first, then older ones; one that is passed over is named in a warning with its reason.
    Raises: CheckpointError when there are checkpoints, but none is good: starting anew would silently lose the run.
    """
    if not folder.is_dir():
        return None
    steps = sorted((step for path in folder.iterdir() if (step := step_of(path.name)) is not None), reverse=True)
    newest = _latest_step(folder)
    if newest is not None:  # what is newer than latest was never finished
        steps = [step for step in steps if step <= newest]
    elif not any((folder / tag_of(step) / MANIFEST).exists() for step in steps):
        return None  # only leftovers of a run that died before its first checkpoint was complete
    for step in steps:
        candidate = folder / tag_of(step)
        problem = verify_checkpoint(candidate)
        if problem is None:
            return candidate
        _log.warning("checkpoint %s is not used: %s", candidate, problem)
    raise CheckpointError(
        f"no good checkpoint in {folder}: see the warnings above; restore one, or move the folder away to start anew"
    )


def _latest_step(folder: Path) -> int | None:
    try:
        return step_of((folder / LATEST).read_text(encoding="utf-8").strip())
    except FileNotFoundError:
        return None


def verify_checkpoint(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint (the first thing found), or None when every file is as it was written."""
    try:
        text = (checkpoint / MANIFEST).read_text(encoding="utf-8")
        manifest = json.loads(text)
        entries = manifest["files"]
    except FileNotFoundError:
        return f"{MANIFEST} is missing: it was never finished"
    except (ValueError, KeyError, TypeError) as error:
        return f"{MANIFEST} is damaged: {error}"
    if text != canonical_json(manifest) or manifest.get("sha256") != entries_checksum(entries):
        return f"{MANIFEST} is damaged: it is not as it was written"
    for name, entry in entries.items():
        path = checkpoint / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != entry["bytes"]:
            return f"{name} has {path.stat().st_size} bytes instead of {entry['bytes']}"
        if checksum(path) != entry["sha256"]:
            return f"{name} has another checksum than when it was written"
    return None


def read_state(checkpoint: Path) -> TrainingState:
    """The state of a checkpoint. Raises: CheckpointError for another format version."""
    return TrainingState.from_json(json.loads((checkpoint / STATE).read_text(encoding="utf-8")))


def resume_point(folder: Path, world: World) -> tuple[Path, TrainingState] | None:
    """``find_checkpoint`` on rank 0, the answer on every rank. Raises: CheckpointError on every rank."""
    answer: tuple[Path, TrainingState] | str | None = None
    if world.is_main:
        try:
            checkpoint = find_checkpoint(folder)
            answer = None if checkpoint is None else (checkpoint, read_state(checkpoint))
        except CheckpointError as error:
            answer = str(error)
    answer = from_main(answer, world)
    if isinstance(answer, str):
        raise CheckpointError(answer)
    return answer


def check_fits(state: TrainingState, *, world_size: int, model: Mapping[str, Any], frozen: Mapping[str, str]) -> None:
    """Refuse a checkpoint of another model, of other frozen weights, or of another world size.

    Raises: CheckpointError with everything that differs.
    """
    problems = []
    differing = sorted(_differences(state.model, model))
    if differing:
        problems.append("it belongs to another model; different settings: " + ", ".join(differing))
    elif state.frozen != frozen:
        difference = explain_difference(state.frozen, frozen)
        problems.append(f"it was trained on other frozen weights (language model or vision tower): {difference}")
    if state.world_size != world_size:
        problems.append(
            f"it was written by {state.world_size} processes and this run has {world_size}: "
            f"start {state.world_size} processes"
        )
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


def restore(checkpoint: Path, load_shards: LoadShards, world: World) -> None:
    """Put tensors and random states back; a collective."""
    load_shards(checkpoint.parent, checkpoint.name)
    states = load_file(rng_file(checkpoint, world.rank))
    torch.set_rng_state(states["cpu"])
    if "cuda" in states and world.device.type == "cuda":
        torch.cuda.set_rng_state(states["cuda"], world.device)
