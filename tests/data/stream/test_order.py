"""The order: what it promises, for any sizes."""

from __future__ import annotations

import hashlib
import json
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer.data.randomness import permutation
from trainer.data.stream.order import Location, SourceOrder, lanes_of

COUNTS = [37, 0, 12, 80, 5, 66]


def order(seed: int = 7, name: str = "pairs", **changes: int) -> SourceOrder:
    values = {"num_lanes": 8, "samples_per_step": 16, "read_block": 5, "shuffle_window": 6, **changes}
    return SourceOrder(name, COUNTS, seed=seed, **values)


def flat(step: list[list[Location]]) -> list[Location]:
    return [location for lane in step for location in lane]


def test_the_order_never_changes_silently() -> None:
    """A changed hash means that no checkpoint can be resumed: raise ORDER_VERSION and say so in the changelog."""
    made = order()
    triples = [[(x.epoch, x.shard, x.index) for x in flat(made.samples_of(t))] for t in range(30)]
    triples.append([(x.epoch, x.shard, x.index) for i in range(5) if (x := made.substitute(3, 100, i))])
    digest = hashlib.sha256(json.dumps(triples).encode()).hexdigest()
    assert digest == "00e9db91771538114c411c84e68a0a6b221ec537671897eaffc0519f639edd8e"


@settings(max_examples=60, deadline=None)
@given(
    counts=st.lists(st.integers(0, 40), min_size=1, max_size=8),
    lanes=st.integers(1, 8),
    per_lane=st.integers(1, 3),
    block=st.integers(1, 12),
    window=st.integers(1, 15),
    seed=st.integers(0, 2**40),
)
def test_an_epoch_has_every_sample_at_most_once(
    counts: list[int], lanes: int, per_lane: int, block: int, window: int, seed: int
) -> None:
    total = sum(counts)
    if total < lanes:
        return
    made = SourceOrder(
        "s",
        counts,
        seed=seed,
        num_lanes=lanes,
        samples_per_step=lanes * per_lane,
        read_block=block,
        shuffle_window=window,
    )
    length = total // lanes
    for epoch in (0, 1, 5):
        seen = Counter(made.at(lane, epoch * length + i) for lane in range(lanes) for i in range(length))
        assert max(seen.values()) == 1
        assert len(seen) == length * lanes
        assert all(x.epoch == epoch and 0 <= x.index < counts[x.shard] for x in seen)


def test_access_in_any_order_and_from_any_rank_is_the_same() -> None:
    made = order()
    forward = [flat(made.samples_of(t)) for t in range(60)]
    assert [flat(order().samples_of(t)) for t in reversed(range(60))] == forward[::-1]
    for world in (1, 2, 4, 8):
        ranks = [order() for _ in range(world)]
        for t in (0, 59, 12):
            parts = [flat(ranks[r].samples_of(t, lanes_of(r, world, 8))) for r in range(world)]
            assert [x for part in parts for x in part] == forward[t]


def test_what_the_keys_cover() -> None:
    def first(made: SourceOrder) -> list[Location]:
        return flat(made.samples_of(0))

    made = order()
    assert first(made) == first(order())
    assert first(made) != first(order(seed=8))
    assert first(made) != first(order(name="documents"))
    epochs = [[made.at(lane, e * 25 + i).index for lane in range(8) for i in range(25)] for e in range(3)]
    assert epochs[0] != epochs[1] != epochs[2]


def test_samples_that_rest_are_others_each_epoch() -> None:
    """200 samples in 9 lanes leave 2 over; without the rotation some shard's end would always rest."""
    made = order(num_lanes=9, samples_per_step=9)
    every = {(s, i) for s, count in enumerate(COUNTS) for i in range(count)}
    resting = Counter()
    for epoch in range(40):
        used = {(x.shard, x.index) for lane in range(9) for i in range(22) if (x := made.at(lane, epoch * 22 + i))}
        resting.update(every - used)
    assert len(resting) > 40


def test_batches_mix_shards() -> None:
    made = SourceOrder("s", [100] * 50, seed=0, num_lanes=16, samples_per_step=64, read_block=10, shuffle_window=64)
    same = np.mean(
        [
            sum(n * (n - 1) for n in Counter(x.shard for x in flat(made.samples_of(t))).values()) / (64 * 63)
            for t in range(78)
        ]
    )
    assert same < 2.5 / 50  # 1 / 50 for independent draws


def test_the_first_substitutes_are_the_other_samples_of_the_window() -> None:
    made = order(shuffle_window=10)
    for position in (0, 9, 10, 24, 25):
        start = position % 25 // 10 * 10 + position // 25 * 25
        window = {made.at(2, i) for i in range(start, min(start + 10, position // 25 * 25 + 25))}
        own = made.at(2, position)
        offered = [made.substitute(2, position, attempt) for attempt in range(len(window) - 1)]
        assert sorted(map(repr, offered)) == sorted(map(repr, window - {own}))
        assert offered[0] == order(shuffle_window=10).substitute(2, position, 0)


@pytest.mark.parametrize("shuffle_window", [1, 10, 1000])
def test_substitutes_go_on_through_the_lane_and_then_through_the_other_lanes(shuffle_window: int) -> None:
    made = order(shuffle_window=shuffle_window)
    for position in (0, 24, 25, 49):
        epoch = position // 25
        lanes = {lane: {made.at(lane, epoch * 25 + i) for i in range(25)} for lane in range(made.num_lanes)}
        offered = []
        while (one := made.substitute(2, position, len(offered))) is not None:
            offered.append(one)
        assert len(offered) == len(set(offered)) == 25 * made.num_lanes - 1
        assert set(offered[:24]) == lanes[2] - {made.at(2, position)}
        assert set(offered) == set().union(*lanes.values()) - {made.at(2, position)}
        again = order(shuffle_window=shuffle_window)  # in any order, in any process
        assert [again.substitute(2, position, attempt) for attempt in (30, 3, 24)] == [offered[i] for i in (30, 3, 24)]


def test_what_does_not_fit_names_the_setting() -> None:
    with pytest.raises(ValueError, match=r"200 samples.*data\.num_lanes to at most 200"):
        order(num_lanes=201, samples_per_step=201)


def test_memory_and_time_do_not_grow_with_the_position() -> None:
    made = order()
    far = made.at(5, 10**12)
    assert far.epoch == 10**12 // 25
    assert made.at(5, 10**12) == far


@pytest.mark.parametrize("length", [4095, 4096, 5000, 70_000])
@pytest.mark.parametrize("distinct", [1, 3, 5000, 2**64 - 1])
def test_the_fast_permutation_is_the_stable_sort(length: int, distinct: int) -> None:
    """Also where many keys are equal, or differ in their low bits alone."""

    class Generator:
        def __init__(self, low: bool) -> None:
            keys = np.random.default_rng(0).integers(0, distinct, length, dtype=np.uint64)
            self.keys = keys if low else keys << np.uint64(max(0, 63 - int(distinct).bit_length()))

        def random_raw(self, size: int) -> np.ndarray:
            return self.keys[:size].copy()

    for low in (True, False):
        found = permutation(Generator(low), length)
        assert found.tolist() == np.argsort(Generator(low).keys, kind="stable").tolist()
