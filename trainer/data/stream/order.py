"""Which sample stands where: global batch t as a pure function of (samples per shard, settings, seed, t).

Every shard is cut into blocks of consecutive samples. An epoch's order is a permutation of the blocks, cut into V lanes
of equal length; inside a lane, windows of S samples are permuted. An update takes the same number of samples from every
lane, and a rank owns V / R neighboring lanes, so the number of ranks never changes what an update consists of. The
fewer than V samples that do not fill the lanes rest for an epoch; a random rotation makes them others each time.

All randomness is ``Philox`` keyed by a hash of (version, seed, source, epoch, ...), used through its raw stream: numpy
promises the stream of a bit generator for ever, but not that of ``Generator.permutation``.
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

from trainer.data.randomness import ORDER_VERSION, philox, stable_key
from trainer.data.stream.shared_arrays import SharedArrays

_FEW = 1 << 12  # keys that are sorted the plain way
_CHUNK = 1 << 16  # shards looked at together: malloc would keep large copies in each process
_MANY_BLOCKS = 1 << 18  # from here on (3 MB and more an epoch) the processes of a node share arrays


@dataclass(frozen=True, slots=True)
class Location:
    """A sample: ``shard`` counts in the manifest, ``index`` in the shard."""

    epoch: int
    shard: int
    index: int


class _Epoch(NamedTuple):
    blocks: NDArray[np.uint32]  # [blocks] in the epoch's order
    ends: NDArray[np.int64]  # [blocks] samples up to and with each of them
    rotation: int


class _Window(NamedTuple):
    epoch: int
    number: int
    shards: NDArray[np.uint32]
    indices: NDArray[np.uint32]


def allowed_world_sizes(lanes: int) -> list[int]:
    """The numbers of ranks that divide the lanes."""
    return [size for size in range(1, lanes + 1) if lanes % size == 0]


def lanes_of(rank: int, world_size: int, lanes: int) -> range:
    """The neighboring lanes of a rank. Raises ValueError when the world size does not divide the lanes."""
    if lanes % world_size:
        allowed = ", ".join(map(str, allowed_world_sizes(lanes)))
        raise ValueError(
            f"world size {world_size} does not divide data.num_lanes = {lanes} (it defaults to the source's batch_size); "
            f"possible world sizes: {allowed}"
        )
    each = lanes // world_size
    return range(rank * each, (rank + 1) * each)


class SourceOrder:
    """The order of one source. Random access in any order of asking; only caches are kept between calls.

    name, seed: part of every key. samples_per_shard: [shards]. lanes: V. samples_per_step: over all lanes (G), a
    multiple of V. block, window: samples. shared: where a source of very many blocks has its large arrays, so that
    they are in a node's memory once and not in each process'.
    Raises ValueError, which names the setting, when the source is too small or the numbers do not fit.
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
    ) -> None:
        counts = np.asarray(samples_per_shard, np.int64)
        self.name, self.seed, self.num_lanes = name, seed, num_lanes
        self.read_block, self.shuffle_window = read_block, shuffle_window
        self.samples = int(counts.sum())
        self.samples_per_lane = self.samples // num_lanes
        if samples_per_step % num_lanes:
            raise ValueError(
                f"source {name!r}: {samples_per_step} samples an update are not a multiple of data.num_lanes = {num_lanes}: "
                "choose a batch_size that is, or other lanes"
            )
        if self.samples_per_lane == 0:
            raise ValueError(
                f"source {name!r} has {self.samples} samples, fewer than its {num_lanes} lanes: set data.num_lanes to at most "
                f"{max(1, self.samples)} (it defaults to the source's batch_size), or give it more samples"
            )
        self.per_lane = samples_per_step // num_lanes
        self._counts = counts
        self._blocks = sum(int((-(-counts[i : i + _CHUNK] // read_block)).sum()) for i in range(0, len(counts), _CHUNK))
        self._shared = shared if self._blocks >= _MANY_BLOCKS else None
        self._epochs: OrderedDict[int, _Epoch] = OrderedDict()
        self._windows: dict[int, _Window] = {}

    def __getstate__(self) -> dict[str, object]:
        # A spawned process makes, or maps, its own.
        kept = {name: value for name, value in self.__dict__.items() if name not in ("_first_block", "_content")}
        return {**kept, "_epochs": OrderedDict(), "_windows": {}}

    def samples_of(self, update: int, lanes: Sequence[int] | None = None) -> list[list[Location]]:
        """The samples of an update, a list for each of ``lanes`` (all by default)."""
        chosen = range(self.num_lanes) if lanes is None else lanes
        first = update * self.per_lane
        return [[self.at(lane, first + offset) for offset in range(self.per_lane)] for lane in chosen]

    def at(self, lane: int, position: int) -> Location:
        """The ``position``-th sample that a lane ever gives; positions run on through the epochs."""
        window, offset = self._locate(lane, position)
        return Location(window.epoch, int(window.shards[offset]), int(window.indices[offset]))

    def substitute(self, lane: int, position: int, attempt: int) -> Location | None:
        """Another sample of the same window for one that cannot be used: a different one for each ``attempt``.

        Returns None when the window has no further one.
        """
        window, offset = self._locate(lane, position)
        others = len(window.shards) - 1
        if attempt >= others:
            return None
        start = stable_key(self.seed, self.name, "substitute", lane, position) % others
        chosen = (offset + 1 + (start + attempt) % others) % (others + 1)
        return Location(window.epoch, int(window.shards[chosen]), int(window.indices[chosen]))

    def window_of(self, position: int) -> tuple[int, int]:
        """(epoch, number) of the window that a lane's position is in."""
        epoch, within = divmod(position, self.samples_per_lane)
        return epoch, within // self.shuffle_window

    def blocks_of(self, lane: int, position: int, ahead: int = 0) -> list[tuple[int, int]]:
        """(shard, block in the shard) that a lane's window reads from, in the order in which it comes to them.

        ahead: 0 for the window that ``position`` is in, 1 for the next one.
        """
        epoch, number = self.window_of(position)
        windows = -(-self.samples_per_lane // self.shuffle_window)
        epoch, number = epoch + (number + ahead) // windows, (number + ahead) % windows
        window = self._make_window(epoch, lane, number)
        return list(
            dict.fromkeys(zip(window.shards.tolist(), (window.indices // self.read_block).tolist(), strict=True))
        )

    def prepare(self, update: int) -> None:
        """Makes what an update needs and what forked processes can share: the order of its epoch."""
        self._epoch(update * self.per_lane // self.samples_per_lane)

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
        length = min(self.shuffle_window, self.samples_per_lane - number * self.shuffle_window)
        shuffled = _permutation(philox(self.seed, self.name, epoch, lane, number), length)
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
            blocks = self._array((*key, "blocks"), lambda: _permutation(generator, self._blocks).astype(np.uint32))
            first_block = self._first_block  # before the node's lock is taken for what needs it
            ends = self._array(
                (*key, "ends"), lambda: np.cumsum(self._block_sizes(first_block)[blocks], dtype=np.int64)
            )
            order = self._epochs[epoch] = _Epoch(blocks, ends, rotation)
            if len(self._epochs) > 2:  # an update may straddle two epochs
                self._epochs.popitem(last=False)
        return order

    def _array(self, key: tuple[object, ...], make: Callable[[], NDArray[Any]]) -> NDArray[Any]:
        """``make()``, or the node's own copy of it."""
        return make() if self._shared is None else self._shared.get((*key, self.read_block, self._content), make)

    @cached_property
    def _first_block(self) -> NDArray[np.int64]:
        """[shards + 1] blocks before each shard."""
        return self._array(
            ("first block",), lambda: np.concatenate([[0], np.cumsum(-(-self._counts // self.read_block))])
        )

    @cached_property
    def _content(self) -> str:
        """What tells these shards from all others in the node's arrays."""
        digest = hashlib.blake2b(digest_size=16)
        for start in range(0, len(self._counts), _CHUNK):
            digest.update(self._counts[start : start + _CHUNK].tobytes())
        return digest.hexdigest()

    def _block_sizes(self, first_block: NDArray[np.int64]) -> NDArray[np.uint32]:
        sizes = np.full(self._blocks, self.read_block, np.uint32)
        used = np.flatnonzero(self._counts)
        sizes[first_block[used + 1] - 1] = (self._counts[used] - 1) % self.read_block + 1
        return sizes


def _permutation(generator: np.random.Philox, length: int) -> NDArray[np.int64]:
    """Sorting random keys: a pure function of the raw stream. Ties (2^-64 a pair) keep their order."""
    keys = generator.random_raw(length)
    if length < _FEW:
        return np.argsort(keys, kind="stable")
    # The same result, several times faster: each key's low bits give way to its position, and numbers are sorted
    # instead of being compared through an index. The few keys that agree in their high bits are put right afterwards.
    bits = np.uint64((length - 1).bit_length())
    low = (np.uint64(1) << bits) - np.uint64(1)
    packed = keys & ~low
    packed |= np.arange(length, dtype=np.uint64)
    packed.sort()
    tied = np.flatnonzero((packed[1:] ^ packed[:-1]) <= low)
    packed &= low
    order = packed.view(np.int64)
    for run in np.split(tied, np.flatnonzero(np.diff(tied) > 1) + 1) if len(tied) else []:
        span = slice(int(run[0]), int(run[-1]) + 2)
        order[span] = order[span][np.argsort(keys[order[span]], kind="stable")]
    return order
