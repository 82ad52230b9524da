"""Record the samples that applied steps consumed: ``ledger/rank-N.jsonl``, one line a sample."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

from trainer.metrics.jsonl import JsonLinesWriter, drop_steps_after
from trainer.runtime.run_folder import RunFolder


class ConsumedSample(Protocol):
    """Identify a sample in the ledger; ``trainer.data.batch.SampleId`` fulfills this protocol."""

    @property
    def source(self) -> str:
        """Name of the source."""

    @property
    def shard(self) -> str:
        """URL of the shard, as in the manifest."""

    @property
    def index(self) -> int:
        """Position of the sample in its shard."""

    @property
    def key(self) -> str:
        """Key of the sample in its shard."""


class LedgerWriter:
    """Write this rank's ledger.

    Ledgers of ranks that an earlier, larger run had are shortened too: rank r takes those whose rank equals r modulo
    ``world_size``.

    Args:
        run_folder: Folder of the run.
        rank: Rank of this process.
        world_size: Number of ranks of this run.
        resume_step: Last step that the checkpoint holds, 0 in a new run; lines of later steps are removed.

    Raises:
        RecordError: A ledger cannot be written; so does ``write``.
    """

    def __init__(self, run_folder: RunFolder, *, rank: int, world_size: int, resume_step: int) -> None:
        for path in run_folder.ledger.glob("rank-*.jsonl"):
            number = path.stem.removeprefix("rank-")
            if number.isdigit() and int(number) >= world_size and int(number) % world_size == rank:
                drop_steps_after(path, resume_step)
        self._writer = JsonLinesWriter(run_folder.ledger_of(rank), resume_step)

    def write(self, step: int, samples: Iterable[ConsumedSample]) -> None:
        """Record the samples that an applied step consumed on this rank; ``step`` as in metrics.jsonl."""
        self._writer.write(
            {"step": step, "source": s.source, "shard": s.shard, "index": s.index, "key": s.key} for s in samples
        )

    def close(self) -> None:
        """Close the file; no write may follow."""
        self._writer.close()
