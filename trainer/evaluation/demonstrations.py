"""Choose the demonstrations of queries.

They depend on the seed and the query's id alone, never on the task's other queries, ranks or batches. They nest: the
demonstrations of 4 shots are the last ones among those of 8.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from itertools import islice, permutations

from trainer.data.randomness import permutation, philox
from trainer.evaluation.query import Query

Selector = Callable[[Query, int], list[Query]]
_MOST_ORDERS = 6  # of fewer than this many demonstrations, all orders are listed


def own_demonstrations(query: Query, count: int) -> list[Query]:
    """Return the last ``count`` demonstrations that a query brings."""
    own = query.demonstrations or ()
    return list(own[len(own) - count :]) if count else []


def random_selector(support: Sequence[Query], seed: int, *, balanced: bool) -> Selector:
    """Return a function that draws demonstrations for a query.

    Args:
        support: Demonstrations to draw from. Those of the query's own image are never taken.
        seed: Seed of the evaluation.
        balanced: Whether the demonstrations take turns between the answers, in random order.
    """
    by_answer: dict[str, list[Query]] = {}
    for one in support:
        by_answer.setdefault(one.shown_answer if balanced else "", []).append(one)
    answers = sorted(by_answer)

    def select(query: Query, count: int) -> list[Query]:
        generator = philox(seed, "demonstrations", query.id)
        turns = [answers[place] for place in permutation(generator, len(answers))]
        draws = {answer: _draws(generator.random_raw, by_answer[answer], query) for answer in answers}
        found: list[Query] = []
        while len(found) < count and draws:
            for answer in turns:
                if len(found) < count and answer in draws:
                    drawn = next(draws[answer], None)
                    if drawn is None:
                        del draws[answer]
                    else:
                        found.append(drawn)
        return found[::-1]

    return select


def _draws(random_raw: Callable[[], int], support: Sequence[Query], query: Query) -> Iterator[Query]:
    """Yield demonstrations of other images, each once."""
    seen: set[int] = set()
    while len(seen) < len(support):
        place = int(random_raw()) % len(support)
        if place not in seen:
            seen.add(place)
            if support[place].cluster != query.cluster:
                yield support[place]


def most_available(support: Sequence[Query], queries: Sequence[Query]) -> int:
    """Return the number of demonstrations that every query has: those of its own image do not count."""
    if not queries:
        return len(support)
    clusters = Counter(one.cluster for one in support)
    return len(support) - max(clusters[query.cluster] for query in queries)


def orders(demonstrations: Sequence[Query], count: int, seed: int, identifier: str) -> list[list[Query]]:
    """Return up to ``count`` different orders of the demonstrations, the given one first (paper, section 4).

    Args:
        demonstrations: Demonstrations in their order.
        count: Most orders.
        seed: Seed of the evaluation.
        identifier: Id of the query.
    """
    size = len(demonstrations)
    count = min(count, math.factorial(min(size, 12)))
    places: list[tuple[int, ...]] = [tuple(range(size))]
    generator = philox(seed, "orders", identifier)
    if size < _MOST_ORDERS:
        others = list(islice(permutations(range(size)), 1, None))
        places += [others[number] for number in permutation(generator, len(others))[: count - 1]]
    while len(places) < count:
        drawn = tuple(int(place) for place in permutation(generator, size))
        if drawn not in places:
            places.append(drawn)
    return [[demonstrations[place] for place in order] for order in places]
