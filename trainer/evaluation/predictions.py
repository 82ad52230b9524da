"""Keep predictions in append-only files, so that an evaluation goes on after a kill.

Each process appends one line for each batch that it has answered. A line that a kill cut off is ignored. When all
batches are there, the lines are merged and the files removed.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TextIO

from trainer.runtime.files import write_atomically

PREDICTIONS_FILE = "predictions.jsonl"


@dataclass(frozen=True)
class Prediction:
    """Hold the model's answer to a query.

    Attributes:
        id: Id of the query.
        answer: Generated answer, or the candidate that ranks first.
        demonstrations: Ids of the demonstrations in the order of the prompt.
        totals: Log-likelihood of the best candidates and of the right ones; empty where the answer is generated.
        per_token: The same, divided by the tokens of each candidate.
    """

    id: str
    answer: str
    demonstrations: tuple[str, ...] = ()
    totals: dict[str, float] = field(default_factory=dict)
    per_token: dict[str, float] = field(default_factory=dict)


class PredictionLog:
    """Append the predictions of this process, and read those of all.

    Args:
        folder: Folder of the results; the files are in ``parts/`` below it.
        rank: Number of this process.
    """

    def __init__(self, folder: Path, rank: int) -> None:
        self._folder = folder / "parts"
        self._rank = rank
        self._file: TextIO | None = None

    def read(self) -> dict[str, dict[str, Prediction]]:
        """Return all predictions so far by the fingerprint of their cell and by id."""
        found: dict[str, dict[str, Prediction]] = {}
        for path in sorted(self._folder.glob("*.jsonl")):
            for line in path.read_bytes().split(b"\n"):
                try:
                    value = json.loads(line)
                    batch = [_prediction(one) for one in value["predictions"]]
                except (ValueError, KeyError, TypeError):  # cut off by a kill
                    continue
                found.setdefault(value["cell"], {}).update({one.id: one for one in batch})
        return found

    def append(self, cell: str, batch: Sequence[Prediction]) -> None:
        """Append a batch, so that it survives a kill of this process.

        Args:
            cell: Fingerprint of the cell.
            batch: All predictions of the batch.
        """
        if self._file is None:
            self._folder.mkdir(parents=True, exist_ok=True)
            # A file of its own for each start: the last line of an older one may be cut off.
            starts = len(list(self._folder.glob(f"rank-{self._rank}.*.jsonl")))
            self._file = (self._folder / f"rank-{self._rank}.{starts}.jsonl").open("x", encoding="utf-8")
        value = {"cell": cell, "predictions": [asdict(one) for one in batch]}
        self._file.write(json.dumps(value) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Close this process's file."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def remove(self) -> None:
        """Remove the files of all processes."""
        shutil.rmtree(self._folder, ignore_errors=True)


def _prediction(value: dict[str, Any]) -> Prediction:
    return Prediction(**{**value, "demonstrations": tuple(value["demonstrations"])})


def write_lines(path: Path, lines: Iterator[dict[str, Any]]) -> None:
    """Write JSON lines whose bytes depend on nothing but their values."""
    text = "".join(json.dumps(line, sort_keys=True, ensure_ascii=False) + "\n" for line in lines)
    write_atomically(path, text)
