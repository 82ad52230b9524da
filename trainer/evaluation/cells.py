"""Answer all cells of an evaluation on all ranks.

A batch is a pure function of a cell's queries and ``batch_size``; rank r of n takes the batches r, r + n, ... So the
number of ranks and restarts change who answers a batch, never a bit of its answer.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from functools import lru_cache
from typing import Any, Protocol

from trainer.config.loader import to_plain
from trainer.evaluation.answering import Answerer
from trainer.evaluation.predictions import Prediction
from trainer.evaluation.prepared_task import Cell, PreparedTask
from trainer.evaluation.query import Query
from trainer.evaluation.ranks import Ranks

# They change no answer.
_NOT_PART_OF_ANSWERS = ("tasks", "shots", "controls", "confidence", "rices_cache", "ranking")
_NOT_PART_OF_TASK = ("bounds", "shots", "controls")


class Log(Protocol):
    """Keep predictions: ``PredictionLog`` in files, ``MemoryLog`` during training."""

    def read(self) -> dict[str, dict[str, Prediction]]:
        """Return all predictions so far by the fingerprint of their cell and by id."""
        ...

    def append(self, cell: str, batch: Sequence[Prediction]) -> None:
        """Keep a batch."""
        ...

    def close(self) -> None:
        """Stop appending."""
        ...


Report = Callable[[Cell, int, int], None]


def batches_of(queries: Sequence[Query], batch_size: int) -> list[Sequence[Query]]:
    """Return the batches of a cell."""
    return [queries[start : start + batch_size] for start in range(0, len(queries), batch_size)]


def cell_fingerprints(tasks: Sequence[PreparedTask], model: Mapping[str, Any]) -> dict[Cell, str]:
    """Return for each cell a digest of everything that its answers depend on.

    Args:
        tasks: Prepared tasks.
        model: Description of the model.
    """
    found = {}
    for task in tasks:
        config = {name: value for name, value in to_plain(task.config).items() if name not in _NOT_PART_OF_ANSWERS}
        settings = {name: value for name, value in to_plain(task.settings).items() if name not in _NOT_PART_OF_TASK}
        # Demonstrations that a prompt draws nest, so the most shots of other cells do not matter.
        data = hashlib.sha256()
        for query in (*task.data.queries, *task.data.support):
            data.update(json.dumps(_content(query)).encode())
        for cell in task.cells:
            parts = [dict(model), config, settings, data.hexdigest(), asdict(cell)]
            found[cell] = hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]
    return found


def _content(query: Query) -> list[Any]:
    """Return all of a query that its answer can depend on."""
    medium = None if query.medium is None else query.medium.name
    own = None if query.demonstrations is None else [_content(one) for one in query.demonstrations]
    texts = [query.id, query.cluster, medium, query.shown_answer, query.before, sorted(query.fields.items())]
    return [*texts, query.candidates and _digest(query.candidates), own, query.exchange]


@lru_cache(maxsize=64)
def _digest(texts: tuple[str, ...]) -> str:
    return hashlib.sha256(json.dumps(texts).encode()).hexdigest()


def answer_cells(
    tasks: Sequence[PreparedTask],
    answerers: Mapping[str, Answerer],
    fingerprints: Mapping[Cell, str],
    log: Log,
    ranks: Ranks,
    report: Report = lambda cell, done, batches: None,
) -> None:
    """Answer what the log lacks; the log's files then hold every query of every cell.

    Args:
        tasks: Prepared tasks.
        answerers: Answerer of each task.
        fingerprints: Fingerprint of each cell.
        log: Predictions so far.
        ranks: Processes of the evaluation.
        report: Called with a cell, the batches done and their number.

    Raises:
        ValueError: A medium cannot be decoded, or the model cannot continue the prompts.
    """
    known = log.read()
    ranks.wait()  # no rank may append before all have read
    try:
        for task in tasks:
            answerer = answerers[task.name]
            for cell in task.cells:
                fingerprint = fingerprints[cell]
                done = known.get(fingerprint, {})
                remaining = [
                    batch
                    for batch in batches_of(task.queries, task.config.batch_size)
                    if any(query.id not in done for query in batch)
                ]
                for number, batch, counts in _share(remaining, ranks):
                    found = answerer.answer(task, cell, batch)
                    if counts:
                        log.append(fingerprint, found)
                    report(cell, number, len(remaining))
    finally:
        log.close()


def _share(batches: Sequence[Sequence[Query]], ranks: Ranks) -> Iterator[tuple[int, Sequence[Query], bool]]:
    """Yield the batches of this rank: number, queries, and whether they count.

    Where every module is a collective, a rank without a batch repeats the first one, which does not count.
    """
    for start in range(0, len(batches), ranks.size):
        place = start + ranks.rank
        if place < len(batches):
            yield min(start + ranks.size, len(batches)), batches[place], True
        elif ranks.synced:
            yield len(batches), batches[start], False


def collect(
    tasks: Sequence[PreparedTask], fingerprints: Mapping[Cell, str], log: Log
) -> dict[Cell, dict[str, Prediction]]:
    """Return the predictions of each cell by the query's id, in the order of the files.

    Raises:
        ValueError: A query has no prediction.
    """
    known = log.read()
    found: dict[Cell, dict[str, Prediction]] = {}
    for task in tasks:
        for cell in task.cells:
            own = known.get(fingerprints[cell], {})
            missing = [query.id for query in task.queries if query.id not in own]
            if missing:
                raise ValueError(
                    f"{len(missing)} queries of {cell.task!r} have no prediction, such as {missing[0]!r}: all "
                    "processes must write to the same output folder, and nothing may remove its files"
                )
            found[cell] = {query.id: own[query.id] for query in task.queries}
    return found
