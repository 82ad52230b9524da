"""Search for a sample that can be used in the place of one that cannot, and count those that were rejected.

A search ends with a usable sample, with more bad ones in a row than ``data.max_bad_fraction`` allows, or when every
sample of the epoch was rejected. Samples that filters leave out are not bad; they only make the search longer.
"""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

from trainer.config.data_config import DataConfig
from trainer.data.batch import RejectedSample, SampleId
from trainer.data.errors import DataError, NoSamplesLeftError, SampleError, TooManyBadSamplesError

FILTERED = "filtered_"  # these reasons are wishes of the source's settings: such samples are not bad
_FEWEST_BAD = 16  # bad samples in a row that never stop a search
_FIRST_WARNING = 1000  # rejected samples in a row

_LOG = logging.getLogger(__name__)
_Found = TypeVar("_Found")


class Candidate(NamedTuple):
    """Hold a sample that may take a place of the order.

    Attributes:
        attempt: Number of earlier candidates for the place; 0 is the sample of the order.
        is_near: Whether it is among the first candidates, all of them in the window of the place.
        sample: Identity of the sample.
        members: Content by extension.
    """

    attempt: int
    is_near: bool
    sample: SampleId
    members: dict[str, bytes]


class Rejections:
    """Count rejected samples by reason, and keep the first one of each reason.

    Attributes:
        counts: Rejected samples by reason.
        examples: First rejected sample of each reason.
    """

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.examples: dict[str, RejectedSample] = {}

    def add(self, sample: SampleId, error: SampleError) -> None:
        """Count a sample."""
        self.counts[error.reason] += 1
        self.examples.setdefault(error.reason, RejectedSample(error.reason, error.detail, sample))

    def update(self, other: Rejections) -> None:
        """Add the counts of another object."""
        self.counts.update(other.counts)
        self.examples = other.examples | self.examples

    @property
    def num_bad(self) -> int:
        """Number of rejected samples without those that filters left out."""
        return sum(count for reason, count in self.counts.items() if not reason.startswith(FILTERED))

    def __str__(self) -> str:
        return ", ".join(f"{reason} {count:,}" for reason, count in self.counts.most_common())


@dataclass(frozen=True)
class ReplacementSearch:
    """Search among the candidates for a place of one source.

    Attributes:
        source: Name of the source.
        max_bad_fraction: ``data.max_bad_fraction``.
        bad_window: ``data.bad_window``.
        samples_per_step: Upper bound of the samples that a step consumes over all ranks.
    """

    source: str
    max_bad_fraction: float
    bad_window: int
    samples_per_step: int

    @classmethod
    def of(cls, config: DataConfig, source: str, samples_per_step: int) -> ReplacementSearch:
        """Return the search of a source with the settings of a run."""
        return cls(source, config.max_bad_fraction, config.bad_window, samples_per_step)

    def first_usable(
        self, candidates: Iterable[Candidate], use: Callable[[Candidate], _Found], rejected: Rejections
    ) -> tuple[Candidate, _Found]:
        """Return the first candidate that can be used, and what ``use`` made of it.

        Args:
            candidates: Candidates in their order.
            use: Makes something of a candidate, or raises a SampleError.
            rejected: Receives the rejected candidates.

        Raises:
            TooManyBadSamplesError: Too many candidates in a row are bad, or all of them are rejected.
            NoSamplesLeftError: Filters leave no candidate.
        """
        failed = Rejections()
        for candidate in candidates:
            try:
                found = use(candidate)
            except SampleError as error:
                failed.add(candidate.sample, error)
                self.check(failed)
                continue
            rejected.update(failed)
            return candidate, found
        raise self.exhausted(failed)

    def check(self, failed: Rejections) -> None:
        """Judge a search that has found nothing so far, and log that it takes long.

        Raises:
            TooManyBadSamplesError: ``BadSampleLimit`` will stop the run for certain.
        """
        looked_at = failed.counts.total()
        if looked_at >= _FIRST_WARNING and math.log10(looked_at).is_integer():
            _LOG.warning(
                "source %r: %s samples in a row cannot be used (%s); the search for one goes on",
                self.source,
                f"{looked_at:,}",
                failed,
            )
        if failed.num_bad > self._most_bad():
            raise TooManyBadSamplesError(
                f"source {self.source!r}: {failed.num_bad:,} samples one after another are bad ({failed}), more than "
                f"data.max_bad_fraction = {self.max_bad_fraction:g} of data.bad_window = {self.bad_window:,} allows. "
                f"{_examples(failed)}. Check that the source's type and settings fit its shards, or repair the shards"
            )

    def exhausted(self, failed: Rejections) -> DataError:
        """Return the error for a search that has rejected every sample of the epoch."""
        looked_at = f"all {failed.counts.total():,} samples of an epoch"
        if failed.num_bad:
            return TooManyBadSamplesError(
                f"source {self.source!r}: {looked_at} are bad or left out ({failed}). {_examples(failed)}. Check that "
                "the source's type and settings fit its shards"
            )
        return NoSamplesLeftError(
            f"source {self.source!r}: its filters leave nothing, {looked_at} are left out ({failed}). "
            f"{_examples(failed)}. Loosen these settings of the source, or use other shards"
        )

    def _most_bad(self) -> float:
        """Return the number of bad samples in a row above which ``BadSampleLimit`` stops the run, whatever else it saw.

        The limit looks back on fewer than ``bad_window`` samples and those of two steps.
        """
        if self.max_bad_fraction == 1:
            return math.inf
        odds = self.max_bad_fraction / (1 - self.max_bad_fraction)
        return max(_FEWEST_BAD, odds * (self.bad_window + 2 * self.samples_per_step))


def _examples(failed: Rejections) -> str:
    shown = [f"{one.sample.shard}[{one.sample.index}] {one.reason}: {one.detail}" for one in failed.examples.values()][
        :3
    ]
    return "Examples: " + "; ".join(shown)
