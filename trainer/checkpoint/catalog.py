"""List the checkpoints of a folder, verify them and find the newest good one, without torch."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from trainer.checkpoint.errors import CheckpointError
from trainer.checkpoint.layout import LATEST, MANIFEST, STATE, step_of, tag_of
from trainer.checkpoint.training_state import TrainingState
from trainer.runtime.files import canonical_json, checksum, write_json

_log = logging.getLogger(__name__)


def steps_in(folder: Path) -> list[int]:
    """Return the steps of all checkpoints in ascending order, incomplete ones included; none without the folder."""
    if not folder.is_dir():
        return []
    return sorted(step for path in folder.iterdir() if (step := step_of(path.name)) is not None)


def complete_steps(folder: Path) -> list[int]:
    """Return the steps of all complete checkpoints, in ascending order."""
    return [step for step in steps_in(folder) if is_complete(folder / tag_of(step))]


def latest_step(folder: Path) -> int | None:
    """Return the step that ``latest`` names; None without that file."""
    try:
        return step_of((folder / LATEST).read_text(encoding="utf-8").strip())
    except FileNotFoundError:
        return None


def is_complete(checkpoint: Path) -> bool:
    """Return whether a checkpoint was completed; ``problems_of`` tells whether it is still undamaged."""
    return (checkpoint / MANIFEST).is_file()


def find_checkpoint(folder: Path) -> Path | None:
    """Return the newest checkpoint whose files all have their checksums; None in a new run.

    Looks at the checkpoint that ``latest`` names first, then at older ones. A warning names each damaged checkpoint.

    Raises:
        CheckpointError: There are checkpoints, but none is good. A new start would silently lose the run.
    """
    steps = steps_in(folder)[::-1]
    newest = latest_step(folder)
    if newest is not None:  # a checkpoint newer than latest was never completed
        steps = [step for step in steps if step <= newest]
    elif not complete_steps(folder):
        return None  # the run died before its first checkpoint was complete
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
    """Yield a message for each damaged file of a checkpoint or of its universal form; reads all files."""
    try:
        text = (checkpoint / MANIFEST).read_text(encoding="utf-8")
        manifest = json.loads(text)
        entries = manifest["files"]
    except FileNotFoundError:
        yield f"{MANIFEST} is missing: the checkpoint was never completed"
        return
    except (ValueError, KeyError, TypeError) as error:
        yield f"{MANIFEST} is damaged: {error}"
        return
    if text != canonical_json(manifest) or manifest.get("sha256") != _entries_checksum(entries):
        yield f"{MANIFEST} is damaged: it differs from what was written"
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
    """Write the manifest, which makes a checkpoint complete.

    Args:
        checkpoint: Folder with the files.
        entries: Size (``bytes``) and ``sha256`` of each file by name.

    Raises:
        OSError: A file is missing or has another size, as happens when the nodes do not share the folder.
    """
    for name, entry in entries.items():
        path = checkpoint / name
        if not path.is_file() or path.stat().st_size != entry["bytes"]:
            raise OSError(
                f"{path} was written by another process and is not visible here: all nodes must share run_dir"
            )
    write_json(checkpoint / MANIFEST, {"files": dict(entries), "sha256": _entries_checksum(entries)})


def _entries_checksum(entries: Mapping[str, Any]) -> str:
    return hashlib.sha256(canonical_json(entries).encode()).hexdigest()


def read_state(checkpoint: Path) -> TrainingState:
    """Read the state of a checkpoint; errors as ``TrainingState.from_json``."""
    return TrainingState.from_json(json.loads((checkpoint / STATE).read_text(encoding="utf-8")))
