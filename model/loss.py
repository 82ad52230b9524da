"""The summed cross-entropy. Shape suffixes: N positions with a label, E width of the output embedding, V its rows,
K new tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
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


_CHUNK_BYTES = 64 * 2**20  # of float32 logits that exist at once


class _HeadCrossEntropy(torch.autograd.Function):
    """Logits, their loss and its gradient chunk by chunk: [N, V] never exists. The table is frozen, so the gradient of
    the hidden states is all that the backward has to keep (the way of Liger-Kernel's fused linear cross-entropy)."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_NE: Tensor,
        rows_KE: Tensor,
        table_VE: Tensor,
        bias_V: Tensor | None,
        token_ids_K: Sequence[int],
        labels_N: Tensor,
    ) -> Tensor:
        wide = torch.promote_types(hidden_NE.dtype, torch.float32)
        total = hidden_NE.new_zeros((), dtype=wide)
        needs_gradient = any(ctx.needs_input_grad[:2])
        grad_NE = torch.empty_like(hidden_NE) if needs_gradient else None
        grad_KE = torch.zeros_like(rows_KE, dtype=wide)
        replaced = [token for token in token_ids_K if token < len(table_VE)]
        step = max(1, _CHUNK_BYTES // (4 * len(table_VE)))
        for start in range(0, len(labels_N), step):
            hidden, labels = hidden_NE[start : start + step], labels_N[start : start + step, None]
            # Token by token: a tensor of their ids would have to come from the host, which waits for the device.
            is_new_NK = torch.cat([labels == token for token in token_ids_K], dim=-1)
            in_table_N1 = ~is_new_NK.any(-1, keepdim=True)
            column_N1 = labels.clamp(max=len(table_VE) - 1)
            logits_NV = F.linear(hidden, table_VE, bias_V).to(wide)
            for token in replaced:
                logits_NV[:, token] = -torch.inf
            new_NK = F.linear(hidden, rows_KE).to(wide)
            label_logit = torch.where(in_table_N1, logits_NV.gather(-1, column_N1), (new_NK * is_new_NK).sum(-1, True))
            highest = torch.maximum(logits_NV.amax(-1, True), new_NK.amax(-1, True))
            logits_NV.sub_(highest).exp_()
            new_NK.sub_(highest).exp_()
            normalizer = logits_NV.sum(-1, True) + new_NK.sum(-1, True)
            total += (normalizer.log() + highest - label_logit).sum()
            if grad_NE is not None:
                logits_NV.div_(normalizer).scatter_add_(-1, column_N1, -in_table_N1.to(wide))
                new_NK.div_(normalizer).sub_(is_new_NK.to(wide))
                error_NV, error_NK = logits_NV.to(hidden.dtype), new_NK.to(hidden.dtype)
                grad_NE[start : start + step] = torch.addmm(error_NK @ rows_KE, error_NV, table_VE)
                grad_KE += error_NK.T @ hidden
        ctx.save_for_backward(grad_NE, grad_KE.to(rows_KE.dtype))
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad_NE, grad_KE = ctx.saved_tensors
        return grad_NE * grads[0], grad_KE * grads[0], None, None, None, None


def head_cross_entropy(
    hidden_NE: Tensor,
    rows_KE: Tensor,
    table_VE: Tensor,
    bias_V: Tensor | None,
    token_ids: Sequence[int],
    labels_N: Tensor,
) -> Tensor:
    """``summed_cross_entropy`` of ``hidden @ table.T + bias``, without ever holding those logits.

    rows: the output rows of the new tokens, whose ids may lie inside the frozen table (their rows there are not used)
    or beyond it. Gradients: of the hidden states and of the rows.
    """
    total: Tensor = _HeadCrossEntropy.apply(hidden_NE, rows_KE, table_VE, bias_V, token_ids, labels_N)
    return total


def target_positions(labels_BL: Tensor) -> Tensor:
    """Where the next token has a label: int64 [N], positions in the flattened [B * L].

    labels stand at their token's own position and are predicted from the position before; the first of a row never is.
    On a GPU the host waits to learn how many there are, so the collator asks before the batch goes there.
    """
    return (_next_labels(labels_BL) != IGNORED_LABEL).nonzero().squeeze(1)


def labels_after(labels_BL: Tensor, positions_N: Tensor) -> Tensor:
    """The labels that these positions predict, [N]."""
    return _next_labels(labels_BL)[positions_N]


def _next_labels(labels_BL: Tensor) -> Tensor:
    return F.pad(labels_BL[:, 1:], (0, 1), value=IGNORED_LABEL).flatten()
