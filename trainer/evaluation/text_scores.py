"""Score pieces of text with a causal model, exactly as ``forgetting`` counts them; all processes share the pieces."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from trainer.runtime.distributed import World, gather_objects


class PieceScore(NamedTuple):
    """Hold -log p of the predicted tokens of a piece, and whether each is the most likely one."""

    nats: float
    is_greedy: bool


@dataclass(frozen=True)
class TextScorer:
    """Score pieces of text.

    Every rank scores a part of the pieces, in equally many forwards, because ZeRO-3 makes each a collective.

    Attributes:
        logits_of: Token ids [B, L] -> logits [B, L, Z]; called without gradients.
        counts_Z: Which tokens the model chooses from, bool [Z].
        pad_id: Token that fills rows up.
        batch_size: Pieces of a rank in one forward.
        world: Processes that share the pieces; None where this one works alone.
    """

    logits_of: Callable[[Tensor], Tensor]
    counts_Z: Tensor
    pad_id: int
    batch_size: int
    world: World | None = None

    def scores(self, pieces: Sequence[Sequence[int]], num_predicted: Sequence[int] | None = None) -> list[PieceScore]:
        """Return the score of each piece, the same on every rank; a collective.

        Args:
            pieces: Token ids of each piece, two or more.
            num_predicted: How many ids at the end of each piece are predicted; None predicts all but the first.
        """
        found: dict[int, PieceScore] = {}
        for numbers in self.batches(len(pieces)):
            ids_BL = self.padded([pieces[number] for number in numbers])
            with torch.no_grad():
                logits_BLZ = self.logits_of(ids_BL)
            for number, ids_L, logits_LZ in zip(numbers, ids_BL, logits_BLZ, strict=True):
                last = len(pieces[number]) - 1 if num_predicted is None else num_predicted[number]
                found[number] = self._score(logits_LZ, ids_L[: len(pieces[number])], last)
        if self.world is not None:
            for own in gather_objects(found, self.world):
                found |= own  # a piece that fills up a rank's last batch is there more than once, and counts once
        return [found[number] for number in range(len(pieces))]

    def batches(self, total: int) -> Iterator[Sequence[int]]:
        """Yield the numbers of this rank's pieces, batch by batch; all ranks have equally many batches."""
        rank, size = (0, 1) if self.world is None else (self.world.rank, self.world.size)
        own = [(index * size + rank) % total for index in range(math.ceil(total / size))]
        for start in range(0, len(own), self.batch_size):
            yield own[start : start + self.batch_size]

    def padded(self, pieces: Sequence[Sequence[int]]) -> Tensor:
        """Return pieces as the rows of a batch, int64 [B, L]."""
        longest = max(map(len, pieces))
        rows = [[*piece, *[self.pad_id] * (longest - len(piece))] for piece in pieces]
        return torch.tensor(rows, device=self.counts_Z.device)

    def _score(self, logits_LZ: Tensor, ids_L: Tensor, num_predicted: int) -> PieceScore:
        first = len(ids_L) - 1 - num_predicted
        wide = torch.promote_types(logits_LZ.dtype, torch.float32)
        logits_LZ = logits_LZ[first : len(ids_L) - 1].to(wide).masked_fill(~self.counts_Z, -torch.inf)
        targets_L = ids_L[first + 1 :]
        log_p_L = logits_LZ.log_softmax(-1).gather(-1, targets_L[:, None])
        return PieceScore(-float(log_p_L.sum(dtype=torch.float64)), bool((logits_LZ.argmax(-1) == targets_L).all()))
