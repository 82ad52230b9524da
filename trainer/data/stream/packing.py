"""Packing: which samples of a lane fill a row, and where the lane stands after it.

A lane's samples come in its order. A row takes each that fits into what is left of it (first fit), looking no further
than a window after the lane's first sample that is still waiting; that one always starts the row, so none waits for
ever. Where a lane stands is the ordinal of its first waiting sample, and which of those in the window after it are
consumed already. Both depend on nothing but the lane, so neither ranks nor workers change what a row holds; they follow
from the lengths of texts alone, so that finding them again costs no decoding.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field
from typing import NamedTuple

_TOKENS_PER_LOOK = 4  # a shorter sample than <BOS><image>word<EOC> hardly exists
_LEAST_WINDOW = 32
_SHORTEST = 3  # tokens: what is left of a row when looking on would find nothing


class LanePosition(NamedTuple):
    """ordinal: a lane's first sample that is not consumed. taken: bit i says whether sample ordinal + i is."""

    ordinal: int = 0
    taken: int = 0

    def to_json(self) -> list[int | str]:
        """Short in a checkpoint, and exact in any reader of JSON: the bits as hexadecimal digits."""
        return [self.ordinal, f"{self.taken:x}"]

    @classmethod
    def from_json(cls, value: SequenceOf[int | str]) -> LanePosition:
        """What ``to_json`` gave."""
        ordinal, taken = value
        return cls(int(ordinal), int(str(taken), 16))


LanePositions = Mapping[int, LanePosition]


def pack_window(max_tokens: int) -> int:
    """How many samples, from the first waiting one on, a row of max_tokens is filled from."""
    return max(_LEAST_WINDOW, max_tokens // _TOKENS_PER_LOOK)


def first_fit(
    start: LanePosition, length_of: Callable[[int], int], max_tokens: int
) -> tuple[tuple[int, ...], LanePosition]:
    """The ordinals of the samples in the next row, in their order, and where the lane stands then.

    length_of: tokens of the sample of an ordinal, from 1 to max_tokens.
    """
    chosen, taken, room = [], start.taken, max_tokens
    for offset in range(pack_window(max_tokens)):
        if room < _SHORTEST:
            break
        if taken >> offset & 1:
            continue
        length = length_of(start.ordinal + offset)
        if length <= room:
            chosen.append(start.ordinal + offset)
            taken |= 1 << offset
            room -= length
    done = (~taken & (taken + 1)).bit_length() - 1  # consumed without a gap
    return tuple(chosen), LanePosition(start.ordinal + done, taken >> done)


@dataclass
class LaneCursor:
    """A lane, row after row. Any row from the first on can be asked for; going back starts again.

    start: where the lane stands before row ``first_row``.
    """

    start: LanePosition
    first_row: int
    max_tokens: int
    length_of: Callable[[int], int]
    _row: int = field(init=False)
    _position: LanePosition = field(init=False)

    def __post_init__(self) -> None:
        self._row, self._position = self.first_row, self.start

    def row(self, number: int) -> tuple[tuple[int, ...], LanePosition]:
        """The ordinals of the samples in row ``number``, and where the lane stands after it."""
        assert number >= self.first_row, "the loader starts where the positions are known"
        if number < self._row:
            self._row, self._position = self.first_row, self.start
        while True:
            chosen, after = first_fit(self._position, self.length_of, self.max_tokens)
            if self._row == number:
                return chosen, after
            self._row, self._position = self._row + 1, after
