"""Fetch read blocks of remote shards before samples of them are asked for.

All lanes of a source reach their next window at nearly the same step, and each window needs blocks of its own. If they
were fetched only when needed, training would wait there. So while a window is read, a few threads put the blocks of the
next one into the cache. This changes when a block is fetched, never what is read: a block that the threads fail to
fetch is fetched, or fails, when it is needed.
"""

from __future__ import annotations

import logging
import queue
import threading

from trainer.data.errors import ShardError
from trainer.data.shards.manifest import Manifest
from trainer.data.shards.open_shard import RemoteShard
from trainer.data.shards.reader import ShardReader
from trainer.data.shards.storage_settings import StorageSettings
from trainer.data.shards.urls import is_remote
from trainer.data.stream.order import SourceOrder

_THREADS = 4
_LOG = logging.getLogger(__name__)


class BlockPrefetcher:
    """Fetch the blocks of one source in one process. Local shards need none, and the first sample starts the threads.

    It has a reader of its own, because a reader may not be used by several threads.
    """

    def __init__(self, manifest: Manifest, order: SourceOrder, storage: StorageSettings) -> None:
        self._manifest, self._order, self._storage = manifest, order, storage
        self._remote = manifest.has_remote
        self._window_of_lane: dict[int, tuple[int, int]] = {}
        self._queue: queue.SimpleQueue[tuple[int, int]] | None = None

    def reading(self, lane: int, position: int) -> None:
        """Note that the sample at a position of a lane is read next."""
        if not self._remote:
            return
        window = self._order.window_of(position)
        if self._window_of_lane.get(lane) == window:
            return
        self._window_of_lane[lane] = window
        if self._queue is None:
            self._queue = self._start()
        for ahead in (0, 1):
            for block in self._order.blocks_of(lane, position, ahead):
                self._queue.put(block)

    def _start(self) -> queue.SimpleQueue[tuple[int, int]]:
        jobs: queue.SimpleQueue[tuple[int, int]] = queue.SimpleQueue()
        reader, lock = ShardReader(self._manifest, storage=self._storage), threading.Lock()
        for _ in range(_THREADS):
            # Daemons: a process that ends does not wait for downloads.
            threading.Thread(target=_fetch_blocks, args=(jobs, reader, lock), daemon=True, name="prefetch").start()
        return jobs

    def __reduce__(self) -> tuple[object, ...]:
        return BlockPrefetcher, (self._manifest, self._order, self._storage)


def _fetch_blocks(jobs: queue.SimpleQueue[tuple[int, int]], reader: ShardReader, lock: threading.Lock) -> None:
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
            _LOG.debug("not prefetched: %s", error)
