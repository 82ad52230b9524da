"""The summed cross-entropy. Shape suffixes: N positions with a label, V vocabulary."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

IGNORED_LABEL = -100
_ROWS = 1024  # rows whose float32 copy exists at once: 0.5 GB at a vocabulary of 128 k


class _SummedCrossEntropy(torch.autograd.Function):
    """Keeps the logits and one number a row for the backward, never a float32 copy of all logits."""

    @staticmethod
    def forward(ctx: Any, logits_NV: Tensor, labels_N: Tensor) -> Tensor:
        wide = torch.promote_types(logits_NV.dtype, torch.float32)
        normalizers, total = [], logits_NV.new_zeros((), dtype=wide)
        for logits, labels in zip(logits_NV.split(_ROWS), labels_N.split(_ROWS), strict=True):
            logits = logits.to(wide)
            normalizer = logits.logsumexp(-1)
            total = total + (normalizer - logits.gather(-1, labels[:, None]).squeeze(-1)).sum()
            normalizers.append(normalizer)
        ctx.save_for_backward(logits_NV, labels_N, torch.cat(normalizers))
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        logits_NV, labels_N, normalizer_N = ctx.saved_tensors
        grad_NV = torch.empty_like(logits_NV)
        for start in range(0, len(labels_N), _ROWS):
            rows = slice(start, start + _ROWS)
            chunk = (logits_NV[rows] - normalizer_N[rows, None]).exp_()
            chunk.scatter_add_(-1, labels_N[rows, None], torch.full_like(normalizer_N[rows, None], -1.0))
            grad_NV[rows] = chunk.mul_(grads[0])
        return grad_NV, None


def summed_cross_entropy(logits_NV: Tensor, labels_N: Tensor) -> Tensor:
    """Sum of -log p(label) over the rows, a float32 scalar (float64 for float64 logits); 0 without rows.

    A sum, not a mean: what it is divided by is known only over the global batch (paper, section 2.4: a sum over
    tokens). Every label has to be an id of the vocabulary.
    """
    total: Tensor = _SummedCrossEntropy.apply(logits_NV, labels_N)
    return total


def label_positions(labels_BL: Tensor) -> tuple[Tensor, Tensor]:
    """Where the next token has a label, as positions in the flattened [B * L], and those labels, [N] each.

    labels stand at their token's own position and are predicted from the position before; the first of a row never is.
    """
    shifted_BL = torch.full_like(labels_BL, IGNORED_LABEL)
    shifted_BL[:, :-1] = labels_BL[:, 1:]
    shifted = shifted_BL.flatten()
    positions = (shifted != IGNORED_LABEL).nonzero().squeeze(1)
    return positions, shifted[positions]
