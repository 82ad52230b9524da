"""Say which sources a step visits: all of them, or one in turn (``training.combine: round_robin``)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class SourceTurns:
    """Count the visits of sources.

    A source has a batch of its own for each visit, so that no sample is left out where sources take turns.

    Attributes:
        num_sources: Number of sources.
        in_turn: Whether a step visits one source; else it visits all.
    """

    num_sources: int
    in_turn: bool

    def sources(self, step: int) -> range:
        """Return the numbers of the sources that a step visits."""
        first = step % self.num_sources
        return range(first, first + 1) if self.in_turn else range(self.num_sources)

    def visits(self, step: int) -> tuple[int, ...]:
        """Return how often each source was visited before a step."""
        if not self.in_turn:
            return (step,) * self.num_sources
        return tuple((step - source - 1) // self.num_sources + 1 for source in range(self.num_sources))


@dataclass(frozen=True)
class StepIndices:
    """Iterate over the micro-batches of steps, by their index in ``MicroBatches``.

    Attributes:
        turns: Sources of each step.
        slots: Source of each micro-batch of a step that visits all.
        steps: Steps.
    """

    turns: SourceTurns
    slots: Sequence[int]
    steps: range

    def of_step(self, step: int) -> list[int]:
        """Return the indices of a step."""
        sources, visits = self.turns.sources(step), self.turns.visits(step)
        return [visits[s] * len(self.slots) + slot for slot, s in enumerate(self.slots) if s in sources]

    def __iter__(self) -> Iterator[int]:
        for step in self.steps:
            yield from self.of_step(step)
