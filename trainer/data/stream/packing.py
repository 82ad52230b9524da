"""Choose which samples of a lane fill a row, and where the lane stands after it.

The samples of a lane come in its order. A row takes each one that fits into the rest of it (first fit). It looks at a
limited number of samples, counted from the lane's first waiting one. That sample always starts the row, so none waits
for ever.

The position of a lane is the ordinal of its first waiting sample, and which of the samples after it are consumed. Both
depend on the lane alone, so neither ranks nor loader processes change the content of a row. They follow from the
lengths of texts, so finding them again decodes nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

_TOKENS_PER_LOOK = 4  # few samples are shorter than <BOS><image>word<EOC>
_FEWEST_LOOKS = 32
_SHORTEST_SAMPLE = 3  # tokens; with less room than that, looking on would find nothing


class LanePosition(NamedTuple):
    """Say how far a packed lane is consumed.

    Attributes:
        ordinal: First sample of the lane that is not consumed.
        consumed: Bit i says whether sample ``ordinal + i`` is consumed.
    """

    ordinal: int = 0
    consumed: int = 0

    def to_json(self) -> list[int | str]:
        """Return a form that any JSON reader keeps exactly: the bits are hexadecimal digits."""
        return [self.ordinal, f"{self.consumed:x}"]

    @classmethod
    def from_json(cls, value: Sequence[int | str]) -> LanePosition:
        """Return the position that ``to_json`` gave."""
        ordinal, consumed = value
        return cls(int(ordinal), int(str(consumed), 16))


LanePositions = Mapping[int, LanePosition]


def num_looks(max_tokens: int) -> int:
    """Return how many samples a row of ``max_tokens`` looks at."""
    return max(_FEWEST_LOOKS, max_tokens // _TOKENS_PER_LOOK)


def first_fit(
    start: LanePosition, length_of: Callable[[int], int], max_tokens: int
) -> tuple[tuple[int, ...], LanePosition]:
    """Choose the samples of the next row.

    Args:
        start: Position of the lane.
        length_of: Tokens of the sample at an ordinal, from 1 to ``max_tokens``.
        max_tokens: Tokens that a row holds.

    Returns:
        Ordinals of the chosen samples in their order, and the position after the row.
    """
    chosen, consumed, room = [], start.consumed, max_tokens
    for offset in range(num_looks(max_tokens)):
        if room < _SHORTEST_SAMPLE:
            break
        if consumed >> offset & 1:
            continue
        length = length_of(start.ordinal + offset)
        if length <= room:
            chosen.append(start.ordinal + offset)
            consumed |= 1 << offset
            room -= length
    leading = (~consumed & (consumed + 1)).bit_length() - 1  # consumed without a gap
    return tuple(chosen), LanePosition(start.ordinal + leading, consumed >> leading)


@dataclass
class LaneCursor:
    """Go through a lane row by row. Any row from the first one on can be asked for; going back starts again.

    Attributes:
        start: Position of the lane before ``first_row``.
        first_row: First row that can be asked for.
        max_tokens: Tokens that a row holds.
        length_of: Tokens of the sample at an ordinal.
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
        """Return the ordinals of the samples in row ``number``, and the position after it."""
        assert number >= self.first_row, "the loader starts where the positions are known"
        if number < self._row:
            self._row, self._position = self.first_row, self.start
        while True:
            chosen, after = first_fit(self._position, self.length_of, self.max_tokens)
            if self._row == number:
                return chosen, after
            self._row, self._position = self._row + 1, after
