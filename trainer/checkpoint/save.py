"""Write sharded checkpoints while training continues; a crash at any moment leaves the older ones untouched.

A save becomes durable in this order: the files of every rank, the manifest, ``latest``; last, retention removes expired
checkpoints. Training waits only for the copy of the tensors into host memory. Threads do the rest, and the ranks agree
on the progress at the end of each step.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save as safetensors_bytes

from trainer.checkpoint.background import BackgroundWork
from trainer.checkpoint.catalog import write_manifest
from trainer.checkpoint.host_copy import HostCopier
from trainer.checkpoint.layout import CONFIG, LATEST, STATE, rng_file, tag_of
from trainer.checkpoint.retention import expired, remove
from trainer.checkpoint.shard_files import Entry, write_bytes, write_tensors
from trainer.checkpoint.training_state import TrainingState
from trainer.config.run_config import CheckpointConfig
from trainer.runtime.distributed import World, gather_objects
from trainer.runtime.files import canonical_json, checksum, sync_folder, write_atomically

Entries = dict[str, Entry]
WriteTensors = Callable[[Any, Path], None]
SaveShards = Callable[[Path, str, WriteTensors], None]

_log = logging.getLogger(__name__)


class Checkpoints:
    """Save the checkpoints of a run; all ranks call the same methods at the same points of the program.

    Each method raises CheckpointError on all ranks when one of them cannot write (a full disk, a read-only folder).
    ``latest`` then still names the older checkpoint.

    Args:
        folder: ``checkpoints`` of the run folder.
        config: How often to save and what to keep.
        world: Processes of the run.
        expected: Type and length of the tensors that a save will copy (``Engine.shard_sizes``). Their memory is
            prepared in advance.
    """

    def __init__(
        self,
        folder: Path,
        config: CheckpointConfig,
        world: World,
        expected: Sequence[tuple[torch.dtype, int]] = (),
    ) -> None:
        self._folder, self._config, self._world = folder, config, world
        self._copier = HostCopier(world.device, expected)
        self._target = folder
        self._writing: BackgroundWork[Entries] | None = None
        self._finishing: BackgroundWork[None] | None = None
        self._settings = ""
        self._state: TrainingState

    def save(self, state: TrainingState, config: str, save_shards: SaveShards) -> None:
        """Begin to write ``step-N``; with ``asynchronous: false``, also finish it. A collective.

        Args:
            state: State of the run after step N.
            config: Settings of the run as YAML, stored in the checkpoint.
            save_shards: Hands over this rank's tensors for writing (``Engine.save``); itself a collective.
        """
        self.wait()
        self._copier.recycle()
        self._state, self._settings, self._target = state, config, self._folder / tag_of(state.step)
        self._in_background(self._prepare_folder).wait()
        tensors: dict[Path, Any] = {}

        def copy_tensors(value: Any, path: Path) -> None:
            tensors[path] = self._copier.copy(value)

        save_shards(self._folder, self._target.name, copy_tensors)
        random_states = safetensors_bytes(self._random_states())
        self._writing = self._in_background(lambda: self._write(tensors, random_states))
        if not self._config.asynchronous:
            self.wait()

    def poll(self) -> None:
        """Advance the checkpoint being written, if its current stage has finished on all ranks.

        A collective while a checkpoint is being written; otherwise returns at once.
        """
        if self._writing is not None and self._writing.finished_everywhere():
            entries = self._merged(self._writing.wait())
            self._writing = None
            self._finishing = self._in_background(lambda: self._finish(entries))
        if self._finishing is not None and self._finishing.finished_everywhere():
            self._finishing = None
            _log.info("saved %s", self._target)

    def wait(self) -> None:
        """Wait until the checkpoint being written is complete; a collective. Returns at once if there is none."""
        if self._writing is not None:
            self._writing.wait()
            self.poll()
        if self._finishing is not None:
            self._finishing.wait()
            self.poll()

    def _in_background(self, work: Callable[[], Any]) -> BackgroundWork[Any]:
        remedy = (
            f"Older checkpoints are untouched; make {self._folder} writable with space for another checkpoint, "
            "and start again"
        )
        return BackgroundWork(work, self._world, purpose=f"cannot write {self._target}", remedy=remedy)

    def _prepare_folder(self) -> None:
        if not self._world.is_main:
            return
        # A crash left it incomplete, or the run went back to a step before it.
        if self._target.exists() or self._target.is_symlink():
            remove(self._target)
        self._target.mkdir(parents=True)

    def _random_states(self) -> dict[str, torch.Tensor]:
        states = {"cpu": torch.get_rng_state()}
        if self._world.device.type == "cuda":
            states["cuda"] = torch.cuda.get_rng_state(self._world.device)
        return states

    def _write(self, tensors: Mapping[Path, Any], random_states: bytes) -> Entries:
        """Write this rank's files; runs in a thread of every rank."""
        entries = {path.name: write_tensors(path, value) for path, value in tensors.items()}
        path = rng_file(self._target, self._world.rank)
        return entries | {path.name: write_bytes(path, random_states)}

    def _merged(self, entries: Entries) -> Entries:
        return {name: entry for rank in gather_objects(entries, self._world) for name, entry in rank.items()}

    def _finish(self, entries: Entries) -> None:
        """Complete the checkpoint; runs in a thread of rank 0 when the files of all ranks are on the disk."""
        if not self._world.is_main:
            return
        target = self._target
        entries[STATE] = write_bytes(target / STATE, canonical_json(self._state.to_json()).encode())
        entries[CONFIG] = write_bytes(target / CONFIG, self._settings.encode())
        for path in sorted(path for path in target.rglob("*") if path.is_file()):
            # DeepSpeed writes some files itself: tensors that are offloaded to NVMe.
            name = path.relative_to(target).as_posix()
            if name not in entries:
                entries[name] = {"bytes": path.stat().st_size, "sha256": checksum(path)}
        sync_folder(target)
        write_manifest(target, entries)
        write_atomically(self._folder / LATEST, target.name)
        self._remove_expired()

    def _remove_expired(self) -> None:
        """Remove expired checkpoints; one that stays takes space and does no other harm, so training goes on."""
        try:
            for checkpoint in expired(self._folder, self._config):
                remove(checkpoint)
        except OSError as error:
            _log.warning("cannot remove an old checkpoint: %s; training goes on, and the next save tries again", error)
