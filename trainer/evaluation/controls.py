"""Change the media of prompts, which shows what the model gained from seeing them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from trainer.config.evaluation_tasks import Control
from trainer.data.randomness import permutation, philox, stable_key
from trainer.evaluation.query import BlankMedium, Medium, Query

OF_DEMONSTRATIONS: frozenset[Control] = frozenset(
    {"shuffled_demonstrations", "exchanged_demonstrations", "replaced_demonstrations"}
)
WITHOUT_IMAGES: frozenset[Control] = frozenset({"no_images", "language_model_alone"})


def donors(queries: Sequence[Query], seed: int) -> dict[str, Query]:
    """Return for each query, by its id, another one whose media it can show: that of another image.

    The queries form a cycle in the order of a hash of their ids, so the order of the files does not matter.

    Raises:
        ValueError: All queries are about one image.
    """
    if len({query.cluster for query in queries}) < 2:
        raise ValueError("all queries are about one image, so none can show that of another")
    cycle = sorted(queries, key=lambda query: stable_key(seed, "donors", query.id))
    found: dict[str, Query] = {}
    for place, query in enumerate(cycle):
        other = place + 1
        while cycle[other % len(cycle)].cluster == query.cluster:
            other += 1
        found[query.id] = cycle[other % len(cycle)]
    return found


def with_images(demonstrations: Sequence[Query], media: Sequence[Medium | None]) -> list[Query]:
    """Return demonstrations that show other media; those without a medium stay as they are."""
    return [
        one if one.medium is None or medium is None else replace(one, medium=medium)
        for one, medium in zip(demonstrations, media, strict=True)
    ]


def shuffled(demonstrations: Sequence[Query], seed: int, identifier: str) -> list[Query]:
    """Return demonstrations whose media are permuted at random; some may keep theirs."""
    places = permutation(philox(seed, "shuffled demonstrations", identifier), len(demonstrations))
    return with_images(demonstrations, [demonstrations[place].medium for place in places])


def exchanged(query: Query, demonstrations: Sequence[Query]) -> list[Query]:
    """Return an episode's last demonstrations with the media that its ``exchange`` gives them."""
    own, exchange = query.demonstrations or (), query.exchange or ()
    media = [own[place].medium for place in exchange]
    return with_images(demonstrations, media[len(media) - len(demonstrations) :])


def replaced(demonstrations: Sequence[Query], others: Sequence[Query]) -> list[Query]:
    """Return demonstrations that show the media of another query's demonstrations."""
    if not others:
        return list(demonstrations)
    return with_images(demonstrations, [others[place % len(others)].medium for place in range(len(demonstrations))])


def control_query(query: Query, control: Control, donor: Mapping[str, Query]) -> Query:
    """Return the query with the medium that a control gives it."""
    if control == "shuffled_query":
        return replace(query, medium=donor[query.id].medium)
    return replace(query, medium=BlankMedium()) if control == "blank" else query
