"""Sources that take turns lose no batch, and all sources of a step keep their indices."""

from __future__ import annotations

from trainer.data.stream.turns import SourceTurns, StepIndices

SLOTS = [0, 0, 1]  # source 0 has two micro-batches, source 1 has one


def test_all_sources_have_consecutive_indices() -> None:
    indices = StepIndices(SourceTurns(2, in_turn=False), SLOTS, range(3, 6))
    assert list(indices) == list(range(9, 18))
    assert SourceTurns(2, in_turn=False).visits(5) == (5, 5)


def test_sources_in_turn_get_their_next_batch_at_each_visit() -> None:
    turns = SourceTurns(2, in_turn=True)
    indices = StepIndices(turns, SLOTS, range(5))
    assert [indices.of_step(step) for step in range(5)] == [[0, 1], [2], [3, 4], [5], [6, 7]]
    assert list(indices) == list(range(8))
    assert list(StepIndices(turns, SLOTS, range(3, 5))) == [5, 6, 7]
    assert [turns.visits(step) for step in range(5)] == [(0, 0), (1, 0), (1, 1), (2, 1), (2, 2)]
