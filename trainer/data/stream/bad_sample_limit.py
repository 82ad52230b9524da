"""How many bad samples a run puts up with.

Substitutes keep single bad samples from stopping a run. They must not hide that a source has gone bad: a wrong mount, a
decoder that is not installed, shards of another data set.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Mapping
from dataclasses import dataclass, field

from trainer.config.data_config import DataConfig
from trainer.data.errors import TooManyBadSamplesError

FILTERED = "filtered_"  # reasons that begin so are the source's own filters: wanted, and not bad


@dataclass
class _Window:
    """The last updates of one source: (samples looked at, bad ones by reason)."""

    updates: deque[tuple[int, Counter[str]]] = field(default_factory=deque)
    looked_at: int = 0
    bad: Counter[str] = field(default_factory=Counter)


class BadSampleLimit:
    """``data.max_bad_fraction`` of the last ``data.bad_window`` samples of each source.

    It is fed with sums over all ranks, so every rank comes to the same verdict at the same update, and so does a run
    with another number of ranks.
    """

    def __init__(self, config: DataConfig) -> None:
        self._fraction, self._length = config.max_bad_fraction, config.bad_window
        self._windows = {source.name: _Window() for source in config.sources}

    def record(self, consumed: Mapping[str, int], replaced: Mapping[tuple[str, str], int]) -> None:
        """Takes one update.

        consumed: samples of each source in the global batch. replaced: (source, reason) -> samples that could not be
        used, substitutes included. Raises TooManyBadSamplesError with the reasons and their counts.
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
            window.updates.append((looked_at, bad))
            window.looked_at += looked_at
            window.bad += bad
            while len(window.updates) > 1 and window.looked_at - window.updates[0][0] >= self._length:
                old, old_bad = window.updates.popleft()
                window.looked_at -= old
                window.bad -= old_bad
            self._check(source, window)

    def _check(self, source: str, window: _Window) -> None:
        # A window that is not full yet is judged as if the rest of it were good.
        allowed = self._fraction * max(self._length, window.looked_at)
        if window.bad.total() > allowed:
            reasons = ", ".join(f"{reason} {count:,}" for reason, count in window.bad.most_common())
            raise TooManyBadSamplesError(
                f"source {source!r}: {window.bad.total():,} of the last {window.looked_at:,} samples are bad "
                f"({reasons}); data.max_bad_fraction = {self._fraction:g} of data.bad_window = {self._length:,} allows "
                f"{int(allowed):,}. Mend the shards, or allow more"
            )
