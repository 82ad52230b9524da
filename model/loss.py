"""Compute the summed cross-entropy without holding the logits in float32, or without holding them at all."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

IGNORED_LABEL = -100
_CHUNK_ROWS = 1024  # logits' rows that are in float32 at once: 0.5 GB at a vocabulary of 128 k
_CHUNK_BYTES = 64 * 2**20  # of float32 logits that exist at once in the fused loss


class _SummedCrossEntropy(torch.autograd.Function):
    """Keep the logits and one number a row for the backward, never a float32 copy of all logits."""

    @staticmethod
    def forward(ctx: Any, logits_NZ: Tensor, labels_N: Tensor) -> Tensor:
        wide = torch.promote_types(logits_NZ.dtype, torch.float32)
        normalizers, total = [], logits_NZ.new_zeros((), dtype=wide)
        for logits, labels in zip(logits_NZ.split(_CHUNK_ROWS), labels_N.split(_CHUNK_ROWS), strict=True):
            logits = logits.to(wide)
            normalizer = logits.logsumexp(-1)
            total = total + (normalizer - logits.gather(-1, labels[:, None]).squeeze(-1)).sum()
            normalizers.append(normalizer)
        ctx.save_for_backward(logits_NZ, labels_N, torch.cat(normalizers))
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        logits_NZ, labels_N, normalizer_N = ctx.saved_tensors
        grad_NZ = torch.empty_like(logits_NZ)
        for start in range(0, len(labels_N), _CHUNK_ROWS):
            rows = slice(start, start + _CHUNK_ROWS)
            chunk = (logits_NZ[rows] - normalizer_N[rows, None]).exp_()
            chunk.scatter_add_(-1, labels_N[rows, None], torch.full_like(normalizer_N[rows, None], -1.0))
            grad_NZ[rows] = chunk.mul_(grads[0])
        return grad_NZ, None


def summed_cross_entropy(logits_NZ: Tensor, labels_N: Tensor) -> Tensor:
    """Return the sum of -log p(label), a float32 scalar (float64 for float64 logits); 0 without labels.

    It is a sum, not a mean, because its divisor is known only over the global batch (paper, section 2.4: a sum over
    tokens). Every label has to be an id of the vocabulary.
    """
    total: Tensor = _SummedCrossEntropy.apply(logits_NZ, labels_N)
    return total


class _HeadCrossEntropy(torch.autograd.Function):
    """Compute logits, loss and gradient chunk by chunk, so that [N, Z] never exists.

    The table is frozen, so the backward has to keep the gradient of the hidden states only, as in Liger-Kernel's fused
    linear cross-entropy.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden_NE: Tensor,
        rows_AE: Tensor,
        table_ZE: Tensor,
        bias_Z: Tensor | None,
        token_ids: Sequence[int],
        labels_N: Tensor,
    ) -> Tensor:
        wide = torch.promote_types(hidden_NE.dtype, torch.float32)
        total = hidden_NE.new_zeros((), dtype=wide)
        needs_gradient = any(ctx.needs_input_grad[:2])
        grad_NE = torch.empty_like(hidden_NE) if needs_gradient else None
        grad_AE = torch.zeros_like(rows_AE, dtype=wide)
        replaced = [token for token in token_ids if token < len(table_ZE)]
        step = max(1, _CHUNK_BYTES // (4 * len(table_ZE)))
        for start in range(0, len(labels_N), step):
            hidden, labels = hidden_NE[start : start + step], labels_N[start : start + step, None]
            # Token by token: a tensor of their ids would have to come from the host, which waits for the device.
            is_added_NA = torch.cat([labels == token for token in token_ids], dim=-1)
            in_table_N1 = ~is_added_NA.any(-1, keepdim=True)
            column_N1 = labels.clamp(max=len(table_ZE) - 1)
            logits_NZ = F.linear(hidden, table_ZE, bias_Z).to(wide)
            for token in replaced:
                logits_NZ[:, token] = -torch.inf
            added_NA = F.linear(hidden, rows_AE).to(wide)
            label_logit = torch.where(
                in_table_N1, logits_NZ.gather(-1, column_N1), (added_NA * is_added_NA).sum(-1, True)
            )
            highest = torch.maximum(logits_NZ.amax(-1, True), added_NA.amax(-1, True))
            logits_NZ.sub_(highest).exp_()
            added_NA.sub_(highest).exp_()
            normalizer = logits_NZ.sum(-1, True) + added_NA.sum(-1, True)
            total += (normalizer.log() + highest - label_logit).sum()
            if grad_NE is not None:
                logits_NZ.div_(normalizer).scatter_add_(-1, column_N1, -in_table_N1.to(wide))
                added_NA.div_(normalizer).sub_(is_added_NA.to(wide))
                error_NZ, error_NA = logits_NZ.to(hidden.dtype), added_NA.to(hidden.dtype)
                grad_NE[start : start + step] = torch.addmm(error_NA @ rows_AE, error_NZ, table_ZE)
                grad_AE += error_NA.T @ hidden
        ctx.save_for_backward(grad_NE, grad_AE.to(rows_AE.dtype))
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad_NE, grad_AE = ctx.saved_tensors
        return grad_NE * grads[0], grad_AE * grads[0], None, None, None, None


def head_cross_entropy(
    hidden_NE: Tensor,
    rows_AE: Tensor,
    table_ZE: Tensor,
    bias_Z: Tensor | None,
    token_ids: Sequence[int],
    labels_N: Tensor,
) -> Tensor:
    """Return ``summed_cross_entropy`` of ``hidden @ table.T + bias``, without ever holding those logits.

    Args:
        hidden_NE: Hidden states at the target positions; they get a gradient.
        rows_AE: Output embeddings of the added tokens; they get a gradient.
        table_ZE: Frozen output embeddings of all other tokens.
        bias_Z: Bias of the table.
        token_ids: Ids of the added tokens. They lie inside the table, whose embeddings are ignored there, or beyond it.
        labels_N: Ids to predict.
    """
    total: Tensor = _HeadCrossEntropy.apply(hidden_NE, rows_AE, table_ZE, bias_Z, token_ids, labels_N)
    return total


class _SummedDivergence(torch.autograd.Function):
    """Keep both logits for the backward, never a float32 copy of all of them."""

    @staticmethod
    def forward(ctx: Any, logits_NZ: Tensor, base_NZ: Tensor, counts_Z: Tensor) -> Tensor:
        total = logits_NZ.new_zeros((), dtype=torch.promote_types(logits_NZ.dtype, torch.float32))
        for logits, base in zip(logits_NZ.split(_CHUNK_ROWS), base_NZ.split(_CHUNK_ROWS), strict=True):
            log_p, log_q = _log_probabilities(logits, counts_Z), _log_probabilities(base, counts_Z)
            total = total + (log_p.exp() * (log_p - log_q)).sum()
        ctx.save_for_backward(logits_NZ, base_NZ, counts_Z)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        logits_NZ, base_NZ, counts_Z = ctx.saved_tensors
        grad_NZ = torch.empty_like(logits_NZ)
        for start in range(0, len(logits_NZ), _CHUNK_ROWS):
            rows = slice(start, start + _CHUNK_ROWS)
            log_p = _log_probabilities(logits_NZ[rows], counts_Z)
            difference, p = log_p - _log_probabilities(base_NZ[rows], counts_Z), log_p.exp_()
            divergence = (p * difference).sum(-1, keepdim=True)
            grad_NZ[rows] = difference.sub_(divergence).mul_(p).mul_(grads[0])
        return grad_NZ, None, None


def _log_probabilities(logits_NZ: Tensor, counts_Z: Tensor) -> Tensor:
    """Return log-probabilities over the tokens that count; those of the others are very low, but finite."""
    wide = logits_NZ.to(torch.promote_types(logits_NZ.dtype, torch.float32))
    return wide.masked_fill(~counts_Z, -1e30).log_softmax(-1)


def summed_divergence(logits_NZ: Tensor, base_NZ: Tensor, counts_Z: Tensor) -> Tensor:
    """Return the sum over rows of KL(softmax(logits) || softmax(base)) in nats; only ``logits_NZ`` gets a gradient.

    Args:
        logits_NZ: Logits of the model that trains.
        base_NZ: Logits to stay close to.
        counts_Z: Tokens that the distributions are over, bool; all others are left out of both.
    """
    total: Tensor = _SummedDivergence.apply(logits_NZ, base_NZ.detach(), counts_Z)
    return total


def find_target_positions(labels_BL: Tensor) -> Tensor:
    """Return the positions whose next token has a label: int64 [N], in the flattened [B * L].

    A label stands at its token's own position, and is predicted from the position before. The first token of a row is
    never predicted. On a GPU the host waits to learn N, so the collator calls this before the batch goes there.
    """
    return (_next_labels(labels_BL) != IGNORED_LABEL).nonzero().squeeze(1)


def gather_labels(labels_BL: Tensor, target_positions_N: Tensor) -> Tensor:
    """Return the labels that the target positions predict, [N]."""
    return _next_labels(labels_BL)[target_positions_N]


def _next_labels(labels_BL: Tensor) -> Tensor:
    return F.pad(labels_BL[:, 1:], (0, 1), value=IGNORED_LABEL).flatten()
