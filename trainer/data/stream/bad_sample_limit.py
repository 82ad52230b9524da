"""Stop a run that meets too many bad samples.

Replacing single bad samples keeps a run going. It must not hide that a whole source has gone bad: a wrong mount, a
missing decoder, shards of another data set.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Mapping
from dataclasses import dataclass, field

from trainer.config.data_config import DataConfig
from trainer.data.errors import TooManyBadSamplesError
from trainer.data.stream.replacement import FILTERED


@dataclass
class _Window:
    """Hold the last steps of one source: samples looked at, and bad ones by reason."""

    steps: deque[tuple[int, Counter[str]]] = field(default_factory=deque)
    looked_at: int = 0
    bad: Counter[str] = field(default_factory=Counter)


class BadSampleLimit:
    """Allow ``data.max_bad_fraction`` of the last ``data.bad_window`` samples of each source.

    It counts sums over all ranks, so every rank stops at the same step, whatever the number of ranks.
    """

    def __init__(self, config: DataConfig) -> None:
        self._fraction, self._length = config.max_bad_fraction, config.bad_window
        self._windows = {source.name: _Window() for source in config.sources}

    def record(self, consumed: Mapping[str, int], replaced: Mapping[tuple[str, str], int]) -> None:
        """Count one step.

        Args:
            consumed: Samples of the global batch, by source.
            replaced: Rejected samples, including rejected replacements, by source and reason.

        Raises:
            TooManyBadSamplesError: More samples are bad than allowed; the message has the reasons and their counts.
        """
        for source, window in self._windows.items():
            bad = Counter(
                {
                    reason: count
                    for (name, reason), count in replaced.items()
                    if name == source and not reason.startswith(FILTERED)
                }
            )
            looked_at = consumed.get(source, 0) + bad.total()
            window.steps.append((looked_at, bad))
            window.looked_at += looked_at
            window.bad += bad
            while len(window.steps) > 1 and window.looked_at - window.steps[0][0] >= self._length:
                old, old_bad = window.steps.popleft()
                window.looked_at -= old
                window.bad -= old_bad
            self._check(source, window)

    def _check(self, source: str, window: _Window) -> None:
        # A window that is not full yet counts as if the rest of it were good.
        allowed = self._fraction * max(self._length, window.looked_at)
        if window.bad.total() > allowed:
            reasons = ", ".join(f"{reason} {count:,}" for reason, count in window.bad.most_common())
            raise TooManyBadSamplesError(
                f"source {source!r}: {window.bad.total():,} of the last {window.looked_at:,} samples are bad "
                f"({reasons}); data.max_bad_fraction = {self._fraction:g} of data.bad_window = {self._length:,} allows "
                f"{int(allowed):,}. Repair the shards, or raise data.max_bad_fraction"
            )
