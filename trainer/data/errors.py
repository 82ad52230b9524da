"""What can go wrong with data, and what happens then.

A ``SampleError`` is about the bytes of one sample: the loader counts it and takes a substitute. A ``ShardError`` is
about storage (missing, changed or damaged shards): it stops the run, for substituting there would hide that data are
lost. A setting that does not fit is a plain ``ValueError`` that names the setting.

Errors cross from loader processes to the training process, so they have to pickle.
"""

from __future__ import annotations

from trainer.errors import TrainerError


class DataError(TrainerError, RuntimeError):
    """Whatever the stream raises on its own account."""


class ShardError(DataError):
    """A shard, sidecar or manifest that is missing, has changed or is damaged."""


class TooManyBadSamplesError(DataError):
    """More samples are bad than ``data.max_bad_fraction`` allows, or all samples of an epoch."""


class NoSamplesLeftError(DataError):
    """The filters of a source leave no sample of an epoch."""


class SampleError(DataError):
    """One sample cannot be used.

    reason: a short identifier, the unit of counting (``replaced_samples`` in metrics.jsonl). detail: for a person.
    """

    def __init__(self, reason: str, detail: str = "") -> None:
        # Names of members need not be UTF-8; then they hold surrogates, which no file and few consoles take.
        detail = detail.encode("utf-8", "backslashreplace").decode()
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason = reason
        self.detail = detail

    def __reduce__(self) -> tuple[type[SampleError], tuple[str, str]]:
        return SampleError, (self.reason, self.detail)
