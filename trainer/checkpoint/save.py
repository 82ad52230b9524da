"""Write sharded checkpoints beside the training, so that a crash at any moment leaves the older ones as they were.

The order in which things become durable: every rank's files, then the manifest, then ``latest``, then what retention
removes. Training waits for the copy of the tensors into host memory; everything else happens in threads, and the ranks
agree on it at the ends of updates.
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
from trainer.checkpoint.host_copy import HostCopies
from trainer.checkpoint.retention import expired, remove
from trainer.checkpoint.shard_files import Entry, write_bytes, write_tensors
from trainer.checkpoint.training_state import CONFIG, LATEST, STATE, TrainingState, rng_file, tag_of
from trainer.config.run_config import CheckpointConfig
from trainer.runtime.distributed import World, gather_objects
from trainer.runtime.files import canonical_json, checksum, sync_folder, write_atomically

Entries = dict[str, Entry]
WriteTensors = Callable[[Any, Path], None]
SaveShards = Callable[[Path, str, WriteTensors], None]

_log = logging.getLogger(__name__)


class Checkpoints:
    """The checkpoints of a run, in ``folder``; every rank has one and calls the same methods at the same places.

    Each method raises CheckpointError on all ranks alike when one of them could not write (a full disk, a read-only
    folder); ``latest`` then still names the older checkpoint.

    expected: type and length of tensors that a save will copy (``Engine.shard_sizes``), to have their memory ready.
    """

    def __init__(
        self,
        folder: Path,
        config: CheckpointConfig,
        world: World,
        expected: Sequence[tuple[torch.dtype, int]] = (),
    ) -> None:
        self._folder, self._config, self._world = folder, config, world
        self._copies = HostCopies(world.device, expected)
        self._target = folder
        self._writing: BackgroundWork[Entries] | None = None
        self._finishing: BackgroundWork[None] | None = None
        self._settings = ""
        self._state: TrainingState

    def save(self, state: TrainingState, config: str, save_shards: SaveShards) -> None:
        """Begin ``folder/step-N``; with ``asynchronous: false``, also finish it. A collective.

        config: the run's settings as YAML, kept beside.
        save_shards: hands this rank's tensors over for writing (``Engine.save``); a collective itself.
        """
        self.wait()
        self._copies.recycle()
        self._state, self._settings, self._target = state, config, self._folder / tag_of(state.step)
        self._in_background(self._start).wait()
        tensors: dict[Path, Any] = {}

        def copy_tensors(value: Any, path: Path) -> None:
            tensors[path] = self._copies.copy(value)

        save_shards(self._folder, self._target.name, copy_tensors)
        random_states = safetensors_bytes(self._random_states())
        self._writing = self._in_background(lambda: self._write(tensors, random_states))
        if not self._config.asynchronous:
            self.wait()

    def poll(self) -> None:
        """Take a checkpoint that is being written on, if it can. A collective while there is one, else free."""
        if self._writing is not None and self._writing.finished_everywhere():
            entries = self._merged(self._writing.wait())
            self._writing = None
            self._finishing = self._in_background(lambda: self._finish(entries))
        if self._finishing is not None and self._finishing.finished_everywhere():
            self._finishing = None
            _log.info("saved %s", self._target)

    def wait(self) -> None:
        """Until the checkpoint that is being written is complete; at once if there is none. A collective."""
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

    def _start(self) -> None:
        if not self._world.is_main:
            return
        if self._target.exists():  # left half-written by a crash, or from a run that went back behind it
            remove(self._target)
        self._target.mkdir(parents=True)

    def _random_states(self) -> dict[str, torch.Tensor]:
        states = {"cpu": torch.get_rng_state()}
        if self._world.device.type == "cuda":
            states["cuda"] = torch.cuda.get_rng_state(self._world.device)
        return states

    def _write(self, tensors: Mapping[Path, Any], random_states: bytes) -> Entries:
        """In the thread of every rank: its own files."""
        entries = {path.name: write_tensors(path, value) for path, value in tensors.items()}
        path = rng_file(self._target, self._world.rank)
        return entries | {path.name: write_bytes(path, random_states)}

    def _merged(self, entries: Entries) -> Entries:
        return {name: entry for rank in gather_objects(entries, self._world) for name, entry in rank.items()}

    def _finish(self, entries: Entries) -> None:
        """In rank 0's thread, when every rank's files are on the disk."""
        if not self._world.is_main:
            return
        target = self._target
        entries[STATE] = write_bytes(target / STATE, canonical_json(self._state.to_json()).encode())
        entries[CONFIG] = write_bytes(target / CONFIG, self._settings.encode())
        for path in sorted(path for path in target.rglob("*") if path.is_file()):
            # What DeepSpeed puts there itself: tensors that are offloaded to NVMe.
            name = path.relative_to(target).as_posix()
            if name not in entries:
                entries[name] = {"bytes": path.stat().st_size, "sha256": checksum(path)}
        sync_folder(target)
        write_manifest(target, entries)
        write_atomically(self._folder / LATEST, target.name)
        for checkpoint in expired(self._folder, self._config):
            remove(checkpoint)
