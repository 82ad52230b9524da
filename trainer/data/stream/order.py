"""Decide which sample comes when: global batch t as a pure function of (samples per shard, settings, seed, t).

Every shard is cut into read blocks of consecutive samples. The order of an epoch is a permutation of the blocks, cut
into ``num_lanes`` lanes of equal length. Within a lane, windows of ``shuffle_window`` samples are permuted. A step
takes equally many samples from every lane, and each rank owns neighboring lanes. So the number of ranks never changes a
step.

Up to ``num_lanes - 1`` samples are left over and rest for an epoch. A random rotation makes them other ones each epoch.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from trainer.data.randomness import ORDER_VERSION, permutation, philox, stable_key
from trainer.data.stream.shared_arrays import SharedArrays

_CHUNK = 1 << 16  # shards looked at together: malloc would keep larger copies in every process


@dataclass(frozen=True, slots=True)
class Location:
    """Locate a sample: its epoch, its shard's place in the manifest and its place in the shard, counted from 0."""

    epoch: int
    shard: int
    index: int


class _Epoch(NamedTuple):
    blocks: NDArray[np.uint32]  # [num_blocks] in the order of the epoch
    ends: NDArray[np.int64]  # [num_blocks] samples up to the end of each block
    rotation: int


class _Window(NamedTuple):
    epoch: int
    number: int
    shards: NDArray[np.uint32]
    indices: NDArray[np.uint32]


def lanes_of(rank: int, world_size: int, num_lanes: int) -> range:
    """Return the neighboring lanes of a rank; ``world_size`` divides ``num_lanes`` (``trainer.config.batch_sizes``)."""
    assert num_lanes % world_size == 0, f"{num_lanes} lanes among {world_size} ranks"
    lanes_per_rank = num_lanes // world_size
    return range(rank * lanes_per_rank, (rank + 1) * lanes_per_rank)


class SourceOrder:
    """Give any sample of a source's order. Nothing but caches is kept between calls.

    Args:
        name: Name of the source, part of every random key.
        samples_per_shard: Samples of each shard of the manifest.
        seed: Part of every random key.
        num_lanes: Lanes that the order is cut into.
        samples_per_step: Samples of a step over all lanes, a multiple of ``num_lanes``.
        read_block: Consecutive samples of a shard that stay together.
        shuffle_window: Samples of a lane that are permuted together.
        shared: Store for large arrays that all processes of a node map; None keeps them in this process.
        share_from_blocks: Fewest read blocks of a source whose arrays are shared; 2^18 blocks take 3 MB an epoch.

    Raises:
        ValueError: The source has fewer samples than lanes.
    """

    def __init__(
        self,
        name: str,
        samples_per_shard: ArrayLike,
        *,
        seed: int,
        num_lanes: int,
        samples_per_step: int,
        read_block: int = 250,
        shuffle_window: int = 1000,
        shared: SharedArrays | None = None,
        share_from_blocks: int = 1 << 18,
    ) -> None:
        assert samples_per_step % num_lanes == 0, f"{samples_per_step} samples among {num_lanes} lanes"
        counts = np.asarray(samples_per_shard, np.int64)
        self.name, self.seed, self.num_lanes = name, seed, num_lanes
        self.read_block, self.shuffle_window = read_block, shuffle_window
        self.samples = int(counts.sum())
        self.samples_per_lane = self.samples // num_lanes
        if self.samples_per_lane == 0:
            raise ValueError(
                f"source {name!r} has {self.samples} samples, fewer than its {num_lanes} lanes: set data.num_lanes "
                f"to at most {max(1, self.samples)} (the default is the source's batch_size), or add samples"
            )
        self._per_lane = samples_per_step // num_lanes
        self._counts = counts
        self._num_blocks = sum(
            int((-(-counts[i : i + _CHUNK] // read_block)).sum()) for i in range(0, len(counts), _CHUNK)
        )
        self._shared = shared if self._num_blocks >= share_from_blocks else None
        self._epochs: OrderedDict[int, _Epoch] = OrderedDict()
        self._windows: dict[int, _Window] = {}
        self._far_window: tuple[int, _Window] | None = None  # lane and window of the last far replacement

    def __getstate__(self) -> dict[str, object]:
        # A spawned process makes, or maps, its own.
        kept = {name: value for name, value in self.__dict__.items() if name not in ("_first_block", "_content")}
        return {**kept, "_epochs": OrderedDict(), "_windows": {}, "_far_window": None}

    def samples_of(self, step: int, lanes: Sequence[int] | None = None) -> list[list[Location]]:
        """Return the samples of a step, a list for each of ``lanes`` (None: all)."""
        chosen = range(self.num_lanes) if lanes is None else lanes
        first = step * self._per_lane
        return [[self.at(lane, first + offset) for offset in range(self._per_lane)] for lane in chosen]

    def at(self, lane: int, position: int) -> Location:
        """Return the sample at a position of a lane; positions run on through the epochs."""
        window, offset = self._locate(lane, position)
        return Location(window.epoch, int(window.shards[offset]), int(window.indices[offset]))

    def substitute(self, lane: int, position: int, attempt: int) -> Location | None:
        """Return another sample of the same epoch, to replace one that cannot be used.

        The attempts go through the other samples of the window, then through the rest of the lane, then through the
        other lanes.

        Args:
            lane: Lane of the sample to replace.
            position: Position of the sample to replace.
            attempt: Number of earlier replacements; each attempt gives another sample.

        Returns:
            None when the epoch has no further sample.
        """
        window, offset = self._locate(lane, position)
        others = len(window.shards) - 1
        if attempt >= others:
            return self._far_substitute(lane, position, attempt - others)
        start = stable_key(self.seed, self.name, "substitute", lane, position) % others
        chosen = (offset + 1 + (start + attempt) % others) % (others + 1)
        return Location(window.epoch, int(window.shards[chosen]), int(window.indices[chosen]))

    def _far_substitute(self, lane: int, position: int, attempt: int) -> Location | None:
        """Return a sample of the same epoch outside the window of a position; ``attempt`` counts from there."""
        epoch, within = divmod(position, self.samples_per_lane)
        length = self.window_length(position)
        rest = self.samples_per_lane - length
        if attempt < rest:
            start = stable_key(self.seed, self.name, "substitute", "lane", lane, position) % rest
            after_window = within // self.shuffle_window * self.shuffle_window + length
            place = (after_window + (start + attempt) % rest) % self.samples_per_lane
        else:
            lanes_ahead, ahead = divmod(attempt - rest, self.samples_per_lane)
            if lanes_ahead >= self.num_lanes - 1:
                return None
            lane, place = (lane + 1 + lanes_ahead) % self.num_lanes, (within + ahead) % self.samples_per_lane
        number, offset = divmod(place, self.shuffle_window)
        far = self._far_window
        if far is None or (far[0], far[1].epoch, far[1].number) != (lane, epoch, number):
            far = self._far_window = (lane, self._make_window(epoch, lane, number))
        return Location(epoch, int(far[1].shards[offset]), int(far[1].indices[offset]))

    def window_length(self, position: int) -> int:
        """Return the number of samples in the window of a position; the last one of a lane may be short."""
        _, number = self.window_of(position)
        return min(self.shuffle_window, self.samples_per_lane - number * self.shuffle_window)

    def window_of(self, position: int) -> tuple[int, int]:
        """Return the epoch and the number of the window that a position lies in."""
        epoch, within = divmod(position, self.samples_per_lane)
        return epoch, within // self.shuffle_window

    def blocks_of(self, lane: int, position: int, ahead: int = 0) -> list[tuple[int, int]]:
        """Return the read blocks that a window of a lane needs, in the order of their first use.

        Args:
            lane: Lane of the window.
            position: Position of the lane that lies in the window.
            ahead: Windows after that one; 1 gives the next window.

        Returns:
            Shard and number of the block in the shard, for each block.
        """
        epoch, number = self.window_of(position)
        windows = -(-self.samples_per_lane // self.shuffle_window)
        epoch, number = epoch + (number + ahead) // windows, (number + ahead) % windows
        window = self._make_window(epoch, lane, number)
        return list(
            dict.fromkeys(zip(window.shards.tolist(), (window.indices // self.read_block).tolist(), strict=True))
        )

    def prepare(self, step: int) -> None:
        """Compute the order of a step's epoch, before loader processes are forked that share it."""
        self._epoch(step * self._per_lane // self.samples_per_lane)

    def _locate(self, lane: int, position: int) -> tuple[_Window, int]:
        if not 0 <= lane < self.num_lanes or position < 0:
            raise IndexError(f"source {self.name!r}: no lane {lane} of {self.num_lanes}, or position {position} < 0")
        epoch, within = divmod(position, self.samples_per_lane)
        number, offset = divmod(within, self.shuffle_window)
        window = self._windows.get(lane)
        if window is None or (window.epoch, window.number) != (epoch, number):
            window = self._windows[lane] = self._make_window(epoch, lane, number)
        return window, offset

    def _make_window(self, epoch: int, lane: int, number: int) -> _Window:
        order = self._epoch(epoch)
        first = lane * self.samples_per_lane + number * self.shuffle_window
        length = self.window_length(number * self.shuffle_window)
        shuffled = permutation(philox(self.seed, self.name, epoch, lane, number), length)
        positions = (first + order.rotation + shuffled) % self.samples
        place = np.searchsorted(order.ends, positions, side="right")
        blocks = order.blocks[place].astype(np.int64)
        shards = np.searchsorted(self._first_block, blocks, side="right") - 1
        block_in_shard = blocks - self._first_block[shards]
        sizes = np.minimum(self.read_block, self._counts[shards] - block_in_shard * self.read_block)
        in_block = positions - (order.ends[place] - sizes)
        indices = block_in_shard * self.read_block + in_block
        return _Window(epoch, number, shards.astype(np.uint32), indices.astype(np.uint32))

    def _epoch(self, epoch: int) -> _Epoch:
        order = self._epochs.get(epoch)
        if order is None:
            generator = philox(self.seed, self.name, epoch)
            rotation = int(generator.random_raw()) % self.samples
            key = ("epoch", ORDER_VERSION, self.seed, self.name, epoch)
            blocks = self._array((*key, "blocks"), lambda: permutation(generator, self._num_blocks).astype(np.uint32))
            first_block = self._first_block  # it takes the node's lock itself, so before ``ends`` takes it
            ends = self._array(
                (*key, "ends"), lambda: np.cumsum(self._block_sizes(first_block)[blocks], dtype=np.int64)
            )
            order = self._epochs[epoch] = _Epoch(blocks, ends, rotation)
            if len(self._epochs) > 2:  # a step may straddle two epochs
                self._epochs.popitem(last=False)
        return order

    def _array(self, key: tuple[object, ...], make: Callable[[], NDArray[Any]]) -> NDArray[Any]:
        """Return ``make()``, or the copy that all processes of the node share."""
        return make() if self._shared is None else self._shared.get((*key, self.read_block, self._content), make)

    @cached_property
    def _first_block(self) -> NDArray[np.int64]:
        """Count the blocks before each shard: [num_shards + 1]."""
        return self._array(
            ("first block",), lambda: np.concatenate([[0], np.cumsum(-(-self._counts // self.read_block))])
        )

    @cached_property
    def _content(self) -> str:
        """Digest the sizes of the shards, to tell them from others in the node's shared arrays."""
        digest = hashlib.blake2b(digest_size=16)
        for start in range(0, len(self._counts), _CHUNK):
            digest.update(self._counts[start : start + _CHUNK].tobytes())
        return digest.hexdigest()

    def _block_sizes(self, first_block: NDArray[np.int64]) -> NDArray[np.uint32]:
        sizes = np.full(self._num_blocks, self.read_block, np.uint32)
        used = np.flatnonzero(self._counts)
        sizes[first_block[used + 1] - 1] = (self._counts[used] - 1) % self.read_block + 1
        return sizes
