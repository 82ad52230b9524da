"""Log once what the stream replaces, drops and filters; metrics.jsonl counts it all."""

from __future__ import annotations

import logging
from collections import Counter

from trainer.data.batch import RejectedSample
from trainer.data.stream.micro_batches import MicroBatch
from trainer.data.stream.replacement import FILTERED

_LOG = logging.getLogger(__name__)
_FEWEST_LOOKS = 100  # samples of a source before its share of kept ones is judged


class ReplacementLog:
    """Log the first replaced sample and the first dropped image of each reason, and filters that keep a minority.

    Args:
        is_main: Whether this rank speaks for the others on what is much the same for all of them.
    """

    def __init__(self, *, is_main: bool) -> None:
        self._is_main = is_main
        self._logged: set[str] = set()
        self._kept: Counter[str] = Counter()
        self._filtered: dict[str, Counter[str]] = {}

    def record(self, made: MicroBatch) -> None:
        """Log what is new about a micro-batch."""
        for rejected in made.rejected:
            self._log_sample("sample replaced", rejected)
        for dropped in made.dropped_images:
            if self._is_main or not dropped.reason.startswith(FILTERED):
                self._log_sample("image dropped from a document", dropped)
        source = made.batch.source
        filtered = self._filtered.setdefault(source, Counter())
        filtered.update({reason: n for reason, n in made.batch.rejected.items() if reason.startswith(FILTERED)})
        self._kept[source] += len(made.batch.samples)
        self._judge_filters(source, filtered)

    def _judge_filters(self, source: str, filtered: Counter[str]) -> None:
        kept, left_out = self._kept[source], filtered.total()
        if (
            not self._is_main
            or left_out <= kept
            or kept + left_out < _FEWEST_LOOKS
            or f"share {source}" in self._logged
        ):
            return
        self._logged.add(f"share {source}")
        _LOG.warning(
            "source %r: its filters keep %.1f %% of the samples (%s of the first %s; %s). The kept ones are repeated "
            "in place of the others. Write shards of the kept samples alone, or loosen the filters",
            source,
            100 * kept / (kept + left_out),
            f"{kept:,}",
            f"{kept + left_out:,}",
            ", ".join(f"{reason} {count:,}" for reason, count in filtered.most_common()),
        )

    def _log_sample(self, event: str, rejected: RejectedSample) -> None:
        if f"{event} {rejected.reason}" in self._logged:
            return
        self._logged.add(f"{event} {rejected.reason}")
        sample = rejected.sample
        _LOG.warning(
            "%s (%s) source=%s shard=%s index=%d key=%a: %a; more of this reason are only counted",
            event,
            rejected.reason,
            sample.source,
            sample.shard,
            sample.index,
            sample.key,
            rejected.detail,
        )
