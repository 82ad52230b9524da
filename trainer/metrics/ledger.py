"""Which samples the applied updates consumed: ``ledger/rank-N.jsonl``, one line a sample."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Protocol

from trainer.metrics.jsonl import JsonLinesWriter, drop_steps_after


class ConsumedSample(Protocol):
    """What the ledger writes of a sample (``trainer.data.batch.SampleId`` has it)."""

    @property
    def source(self) -> str:
        """The source's name."""

    @property
    def shard(self) -> str:
        """The shard's url, as in the manifest."""

    @property
    def index(self) -> int:
        """The sample's place in its shard."""

    @property
    def key(self) -> str:
        """The sample's key in the shard."""


class LedgerWriter:
    """This rank's ledger.

    resume_step: the last step that the checkpoint holds, 0 in a new run; later lines are dropped.
    world_size: number of ranks of this run. When it is given, the ledgers of ranks that an earlier run had and this one
        has not are shortened too (each rank r takes those with number = r modulo world_size).
    """

    def __init__(self, run_dir: Path, rank: int, resume_step: int, world_size: int | None = None) -> None:
        folder = run_dir / "ledger"
        if world_size is not None:
            for path in folder.glob("rank-*.jsonl"):
                number = path.stem.removeprefix("rank-")
                if number.isdigit() and int(number) >= world_size and int(number) % world_size == rank:
                    drop_steps_after(path, resume_step)
        self._writer = JsonLinesWriter(folder / f"rank-{rank}.jsonl", resume_step)

    def write(self, step: int, samples: Iterable[ConsumedSample]) -> None:
        """Note what an applied update consumed on this rank; ``step`` as in metrics.jsonl."""
        self._writer.write(
            {"step": step, "source": s.source, "shard": s.shard, "index": s.index, "key": s.key} for s in samples
        )

    def close(self) -> None:
        """Close the file."""
        self._writer.close()
