"""Which checkpoints a folder holds, what is wrong with them, and which is the newest good one. Needs no torch."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from trainer.checkpoint.training_state import (
    LATEST,
    MANIFEST,
    STATE,
    CheckpointError,
    TrainingState,
    entries_checksum,
    step_of,
    tag_of,
)
from trainer.runtime.files import canonical_json, checksum, write_json

_log = logging.getLogger(__name__)


def steps_in(folder: Path) -> list[int]:
    """The steps of all checkpoints in the folder, half-written ones included, in order; none where it is missing."""
    if not folder.is_dir():
        return []
    return sorted(step for path in folder.iterdir() if (step := step_of(path.name)) is not None)


def latest_step(folder: Path) -> int | None:
    """What ``latest`` names; None where there is none."""
    try:
        return step_of((folder / LATEST).read_text(encoding="utf-8").strip())
    except FileNotFoundError:
        return None


def is_complete(checkpoint: Path) -> bool:
    """Whether it was finished (not: whether it is still as it was)."""
    return (checkpoint / MANIFEST).is_file()


def find_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint whose every file is there with its checksum, or None in a new run.

    ``latest`` is looked at first, then older ones; one that is passed over is named in a warning with its reason.
    Raises: CheckpointError when there are checkpoints, but none is good: starting anew would silently lose the run.
    """
    steps = steps_in(folder)[::-1]
    newest = latest_step(folder)
    if newest is not None:  # what is newer than latest was never finished
        steps = [step for step in steps if step <= newest]
    elif not any(is_complete(folder / tag_of(step)) for step in steps):
        return None  # only leftovers of a run that died before its first checkpoint was complete
    for step in steps:
        candidate = folder / tag_of(step)
        problem = next(problems_of(candidate), None)
        if problem is None:
            return candidate
        _log.warning("checkpoint %s is not used: %s", candidate, problem)
    raise CheckpointError(
        f"no good checkpoint in {folder}: see the warnings above; restore one, or move the folder away to start anew"
    )


def problems_of(checkpoint: Path) -> Iterator[str]:
    """What is wrong with a checkpoint (or its universal form): each damaged file by name; nothing when all are good."""
    try:
        text = (checkpoint / MANIFEST).read_text(encoding="utf-8")
        manifest = json.loads(text)
        entries = manifest["files"]
    except FileNotFoundError:
        yield f"{MANIFEST} is missing: it was never finished"
        return
    except (ValueError, KeyError, TypeError) as error:
        yield f"{MANIFEST} is damaged: {error}"
        return
    if text != canonical_json(manifest) or manifest.get("sha256") != entries_checksum(entries):
        yield f"{MANIFEST} is damaged: it is not as it was written"
        return
    for name, entry in entries.items():
        path = checkpoint / name
        if not path.is_file():
            yield f"{name} is missing"
        elif path.stat().st_size != entry["bytes"]:
            yield f"{name} has {path.stat().st_size} bytes instead of {entry['bytes']}"
        elif checksum(path) != entry["sha256"]:
            yield f"{name} has another checksum than when it was written"


def write_manifest(checkpoint: Path, entries: Mapping[str, Any]) -> None:
    """Declare a checkpoint complete: ``entries`` has each file's size and sha256 (``bytes``, ``sha256``) by name.

    Raises: OSError when a file is not there with its size, as happens where processes do not share the folder.
    """
    for name, entry in entries.items():
        path = checkpoint / name
        if not path.is_file() or path.stat().st_size != entry["bytes"]:
            raise OSError(f"{path} was written by another process, and is not here: all nodes have to share run_dir")
    write_json(checkpoint / MANIFEST, {"files": dict(entries), "sha256": entries_checksum(entries)})


def read_state(checkpoint: Path) -> TrainingState:
    """The state of a checkpoint. Raises: CheckpointError for another format version."""
    return TrainingState.from_json(json.loads((checkpoint / STATE).read_text(encoding="utf-8")))
