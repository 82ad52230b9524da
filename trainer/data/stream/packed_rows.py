"""Rows of several samples: what ``trainer.data.stream.packing`` chose, built, with substitutes for what cannot be used.

Which samples share a row follows from texts, headers and metadata, for a lane has to be gone through without decoding
(``Builder.length``). A sample that fails only then, in decoding, makes room for a substitute that is not longer than
what the row has left; where there is none, the row stays shorter.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

from trainer.data.batch import RejectedSample, Row, SampleId
from trainer.data.errors import SampleError, TooManyBadSamplesError
from trainer.data.samples.row_builder import Builder, pack, sample_rng
from trainer.data.stream.packing import LaneCursor, LanePosition, LanePositions

Candidates = Callable[[int, int, int], Iterator[tuple[SampleId, dict[str, bytes]]]]


class _Candidate(NamedTuple):
    """What stands at an ordinal: which attempt of its candidates, its tokens, and why the earlier ones do not."""

    attempt: int
    length: int
    rejected: tuple[RejectedSample, ...]


class PackedRows:
    """The rows of one source, lane by lane.

    candidates: (lane, ordinal, first attempt) -> the sample that the order has there (attempt 0), then its substitutes.
    first_row: counted from the start of the run; positions: where the lanes stand before it, by default at the start.
    """

    def __init__(
        self,
        name: str,
        builder: Builder,
        candidates: Candidates,
        *,
        seed: int,
        max_tokens: int,
        first_row: int,
        positions: LanePositions,
    ) -> None:
        self._name, self._builder, self._candidates = name, builder, candidates
        self._seed, self._max_tokens = seed, max_tokens
        self._first_row, self._positions = first_row, positions
        self._cursors: dict[int, LaneCursor] = {}
        self._known: dict[int, dict[int, _Candidate]] = {}

    def row(self, lane: int, number: int, rejected: list[RejectedSample]) -> tuple[Row, LanePosition]:
        """Row ``number`` of a lane and where the lane stands after it; appends to ``rejected``.

        Raises: ShardError, TooManyBadSamplesError.
        """
        if lane not in self._cursors:
            start = self._positions.get(lane, LanePosition())
            length_of = partial(self._length, lane)
            self._cursors[lane] = LaneCursor(start, self._first_row, self._max_tokens, length_of)
        ordinals, after = self._cursors[lane].row(number)
        chosen = [self._candidate(lane, ordinal) for ordinal in ordinals]
        lengths = [candidate.length for candidate in chosen]
        parts = []
        for place, (ordinal, candidate) in enumerate(zip(ordinals, chosen, strict=True)):
            rejected.extend(candidate.rejected)
            room = self._max_tokens - sum(lengths) + lengths[place]
            part = self._build(lane, ordinal, candidate.attempt, room, rejected)
            lengths[place] = 0 if part is None else len(part.input_ids)
            if part is not None:
                parts.append(part)
        known = self._known[lane]
        self._known[lane] = {ordinal: known[ordinal] for ordinal in known if ordinal >= after.ordinal}
        return pack(parts), after

    def _length(self, lane: int, ordinal: int) -> int:
        return self._candidate(lane, ordinal).length

    def _candidate(self, lane: int, ordinal: int) -> _Candidate:
        known = self._known.setdefault(lane, {})
        if ordinal not in known:
            known[ordinal] = self._first_usable(lane, ordinal)
        return known[ordinal]

    def _first_usable(self, lane: int, ordinal: int) -> _Candidate:
        rejected: list[RejectedSample] = []
        for attempt, (sample, members) in enumerate(self._candidates(lane, ordinal, 0)):
            try:
                length = self._builder.length(members, sample, sample_rng(self._seed, sample))
                return _Candidate(attempt, length, tuple(rejected))
            except SampleError as error:
                rejected.append(RejectedSample(error.reason, error.detail, sample))
        raise too_many_bad_samples(self._name, rejected)

    def _build(
        self, lane: int, ordinal: int, first_attempt: int, room: int, rejected: list[RejectedSample]
    ) -> Row | None:
        """The sample, or the first substitute that is whole and fits; None when all that could be used are longer."""
        failed: list[RejectedSample] = []
        too_long = False
        for sample, members in self._candidates(lane, ordinal, first_attempt):
            try:
                if failed and self._builder.length(members, sample, sample_rng(self._seed, sample)) > room:
                    too_long = True
                    continue
                built = self._builder(members, sample, sample_rng(self._seed, sample))
            except SampleError as error:
                failed.append(RejectedSample(error.reason, error.detail, sample))
                continue
            rejected.extend(failed)
            return built
        if not too_long:
            raise too_many_bad_samples(self._name, failed)
        rejected.extend(failed)
        return None


def too_many_bad_samples(name: str, failed: list[RejectedSample]) -> TooManyBadSamplesError:
    """The error for a sample of source ``name`` that failed with all its substitutes."""
    reasons = ", ".join(f"{one.sample.shard}[{one.sample.index}] {one.reason}" for one in failed[:3])
    return TooManyBadSamplesError(
        f"source {name!r}: {len(failed)} samples in a row cannot be used ({reasons}, ...): are these data of the type "
        "that the source's settings say?"
    )
