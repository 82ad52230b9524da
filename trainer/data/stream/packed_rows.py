"""Build the rows of packed sources: ``trainer.data.stream.packing`` chooses the samples, this module replaces bad ones.

Which samples share a row follows from texts, headers and metadata (``RowBuilder.length``), because going through a lane
must not decode media. A sample that fails only in decoding is replaced by one that is not longer than the room left in
the row. Where there is none, the row stays shorter.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

from trainer.data.batch import Row
from trainer.data.errors import SampleError
from trainer.data.samples.rows import RowBuilder, pack, sample_rng
from trainer.data.stream.packing import LaneCursor, LanePosition, LanePositions
from trainer.data.stream.replacement import Candidate, Rejections, ReplacementSearch

Candidates = Callable[[int, int, int], Iterator[Candidate]]


class _Choice(NamedTuple):
    """Hold the sample chosen for a lane position: attempt number, length in tokens, rejected attempts."""

    attempt: int
    length: int
    rejected: Rejections


class PackedRows:
    """Build the rows of one source, lane by lane.

    Args:
        builder: Row builder of the source.
        candidates: Maps lane, ordinal and first attempt to the sample at that place (attempt 0) and its replacements.
        search: Search of the source among these candidates.
        seed: ``data.seed``.
        max_tokens: Tokens that a row holds.
        first_row: First row that can be asked for, counted from the start of the run.
        positions: Positions of the lanes before ``first_row``; lanes without one are at their start.
    """

    def __init__(
        self,
        builder: RowBuilder,
        candidates: Candidates,
        search: ReplacementSearch,
        *,
        seed: int,
        max_tokens: int,
        first_row: int,
        positions: LanePositions,
    ) -> None:
        self._builder, self._candidates, self._search = builder, candidates, search
        self._seed, self._max_tokens = seed, max_tokens
        self._first_row, self._positions = first_row, positions
        self._cursors: dict[int, LaneCursor] = {}
        self._known: dict[int, dict[int, _Choice]] = {}

    def row(self, lane: int, number: int, rejected: Rejections) -> tuple[Row, LanePosition]:
        """Build row ``number`` of a lane.

        Args:
            lane: Lane of the row.
            number: Number of the row in its lane, counted from the start of the run.
            rejected: Receives the samples that were replaced.

        Returns:
            The row, and the position of the lane after it.

        Raises:
            ShardError: A shard cannot be read.
            TooManyBadSamplesError: Too many samples are bad.
            NoSamplesLeftError: Filters leave nothing.
        """
        if lane not in self._cursors:
            start = self._positions.get(lane, LanePosition())
            length_of = partial(self._length, lane)
            self._cursors[lane] = LaneCursor(start, self._first_row, self._max_tokens, length_of)
        ordinals, after = self._cursors[lane].row(number)
        chosen = [self._choice(lane, ordinal) for ordinal in ordinals]
        lengths = [choice.length for choice in chosen]
        parts = []
        for place, (ordinal, choice) in enumerate(zip(ordinals, chosen, strict=True)):
            rejected.update(choice.rejected)
            room = self._max_tokens - sum(lengths) + lengths[place]
            part = self._build(lane, ordinal, choice.attempt, room, rejected)
            lengths[place] = 0 if part is None else len(part.input_ids)
            if part is not None:
                parts.append(part)
        known = self._known[lane]
        self._known[lane] = {ordinal: known[ordinal] for ordinal in known if ordinal >= after.ordinal}
        return pack(parts), after

    def _length(self, lane: int, ordinal: int) -> int:
        return self._choice(lane, ordinal).length

    def _choice(self, lane: int, ordinal: int) -> _Choice:
        known = self._known.setdefault(lane, {})
        if ordinal not in known:
            known[ordinal] = self._first_usable(lane, ordinal)
        return known[ordinal]

    def _first_usable(self, lane: int, ordinal: int) -> _Choice:
        rejected = Rejections()
        candidate, length = self._search.first_usable(
            self._candidates(lane, ordinal, 0), self._length_of_candidate, rejected
        )
        return _Choice(candidate.attempt, length, rejected)

    def _length_of_candidate(self, candidate: Candidate) -> int:
        return self._builder.length(candidate.members, candidate.sample, sample_rng(self._seed, candidate.sample))

    def _build(self, lane: int, ordinal: int, first_attempt: int, room: int, rejected: Rejections) -> Row | None:
        """Build the sample, or the first replacement that decodes and fits.

        Returns:
            None when all near replacements, or the first usable one behind them, are longer than ``room``.
        """
        failed = Rejections()
        too_long = False
        for candidate in self._candidates(lane, ordinal, first_attempt):
            if too_long and not candidate.is_near:
                break
            try:
                if failed.counts and self._length_of_candidate(candidate) > room:
                    too_long = True
                    continue
                built = self._builder(candidate.members, candidate.sample, sample_rng(self._seed, candidate.sample))
            except SampleError as error:
                failed.add(candidate.sample, error)
                self._search.check(failed)
                continue
            rejected.update(failed)
            return built
        if not too_long:
            raise self._search.exhausted(failed)
        rejected.update(failed)
        return None
