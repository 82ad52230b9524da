"""Choose the demonstrations whose images are most similar to the query's (RICES; paper, section 4).

Similar is the cosine of features of the frozen tower. The most similar demonstration stands last, next to the query.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from model.flamingo import Flamingo
from trainer.evaluation.demonstrations import Selector
from trainer.evaluation.media import MediaDecoder
from trainer.evaluation.prepared_task import PreparedTask
from trainer.evaluation.query import Medium, Query
from trainer.evaluation.retrieval import media_features, most_similar


def similarity_selector(
    task: PreparedTask, model: Flamingo, decoder: MediaDecoder, cache: Path | None, *, synced_ranks: bool
) -> Selector:
    """Return a function that takes the most similar demonstrations of a task's training set.

    Args:
        task: Task with a training set.
        model: Model with the tower.
        decoder: Decodes the task's media.
        cache: Folder of the features; None computes them anew.
        synced_ranks: Whether the tower is partitioned over ranks.

    Raises:
        ValueError: A medium cannot be decoded.
    """
    support, queries = task.data.support, task.queries
    # Demonstrations of a query's own image are found first, and left out afterwards.
    own = Counter(one.cluster for one in support)
    extra = max(own[query.cluster] for query in queries)
    count = min(len(support), task.most_drawn + extra)
    found = most_similar(
        media_features(model, decoder, _media(queries), cache, synced_ranks=synced_ranks),
        media_features(model, decoder, _media(support), cache, synced_ranks=synced_ranks),
        count,
    )
    places = {query.id: row for query, row in zip(queries, found.tolist(), strict=True)}

    def select(query: Query, wanted: int) -> list[Query]:
        similar = [support[place] for place in places[query.id]]
        others = [one for one in similar if one.cluster != query.cluster]
        return others[len(others) - wanted :]

    return select


def _media(queries: Sequence[Query]) -> list[Medium]:
    media = [query.medium for query in queries if query.medium is not None]
    assert len(media) == len(queries), "only episodes lack images, and they bring their demonstrations"
    return media
