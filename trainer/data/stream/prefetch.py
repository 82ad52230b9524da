"""Fetching blocks of remote shards before they are asked for.

All lanes of a source change to their next window at nearly the same step, and each window needs blocks of its own. If
they were only fetched when a sample of them is read, training would stand still there; so while a window is read, a few
threads put the blocks of the next one into the cache. They change when a block is fetched, never what is read: what
they fail to fetch is fetched, or fails, when it is needed.
"""

from __future__ import annotations

import logging
import queue
import threading

from trainer.data.errors import ShardError
from trainer.data.shards.manifest import Manifest
from trainer.data.shards.reader import ShardReader
from trainer.data.shards.storage import RemoteShard, StorageSettings
from trainer.data.shards.urls import is_remote
from trainer.data.stream.order import SourceOrder

_THREADS = 4
_LOG = logging.getLogger(__name__)


class BlockPrefetcher:
    """For one source in one process; it does nothing until the first sample, and nothing for local shards.

    It has a reader of its own, since readers are not made for threads.
    """

    def __init__(self, manifest: Manifest, order: SourceOrder, storage: StorageSettings) -> None:
        self._manifest, self._order, self._storage = manifest, order, storage
        self._remote = manifest.has_remote
        self._seen: dict[int, tuple[int, int]] = {}  # lane -> window
        self._queue: queue.SimpleQueue[tuple[int, int]] | None = None

    def reading(self, lane: int, position: int) -> None:
        """A lane's ``position``-th sample is about to be read."""
        if not self._remote:
            return
        window = self._order.window_of(position)
        if self._seen.get(lane) == window:
            return
        self._seen[lane] = window
        if self._queue is None:
            self._queue = self._start()
        for ahead in (0, 1):
            for block in self._order.blocks_of(lane, position, ahead):
                self._queue.put(block)

    def _start(self) -> queue.SimpleQueue[tuple[int, int]]:
        jobs: queue.SimpleQueue[tuple[int, int]] = queue.SimpleQueue()
        reader, lock = ShardReader(self._manifest, storage=self._storage), threading.Lock()
        for _ in range(_THREADS):
            # Daemons: a process that ends waits for no download.
            threading.Thread(target=_work, args=(jobs, reader, lock), daemon=True, name="prefetch").start()
        return jobs

    def __reduce__(self) -> tuple[object, ...]:
        return BlockPrefetcher, (self._manifest, self._order, self._storage)


def _work(jobs: queue.SimpleQueue[tuple[int, int]], reader: ShardReader, lock: threading.Lock) -> None:
    while True:
        shard, block = jobs.get()
        try:
            if not is_remote(reader.manifest.url(shard)):
                continue
            with lock:
                opened = reader.open(shard)
            if isinstance(opened, RemoteShard):
                opened.prefetch(block)
        except (ShardError, ValueError) as error:
            _LOG.debug("not fetched ahead: %s", error)
