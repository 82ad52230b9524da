"""Compute the contrastive loss of a step and its gradient with respect to the features, in chunks of rows.

All rows of all ranks are one problem: each image is compared with each caption. A rank has the rows of its own images
and captions, and the features of all ranks as columns. Logits of ``rows_per_chunk`` rows exist at a time, never all.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import deepspeed.comm as dist  # so that trainer.benchmark counts its collectives with DeepSpeed's own
import torch
import torch.nn.functional as F
from torch import Tensor

from trainer.config.contrastive_config import ContrastiveLossConfig
from trainer.runtime.distributed import World


@dataclass(frozen=True)
class Features:
    """Hold the features of pairs, or gradients with respect to them.

    Attributes:
        image_ND: Features of the images, normalized.
        text_ND: Features of the captions, normalized.
        logit_scale: Inverse temperature without its limit, one element.
        logit_bias: Bias of SigLIP's logits, one element; None without one.
    """

    image_ND: Tensor
    text_ND: Tensor
    logit_scale: Tensor
    logit_bias: Tensor | None = None

    def tensors(self) -> list[Tensor]:
        """Return the tensors that there are, in the order of the fields."""
        every = (self.image_ND, self.text_ND, self.logit_scale, self.logit_bias)
        return [tensor for tensor in every if tensor is not None]

    def leaves(self) -> Features:
        """Return float32 copies without a graph, which take gradients."""
        return Features(*(tensor.detach().float().requires_grad_() for tensor in self.tensors()))


@dataclass(frozen=True)
class Solution:
    """Hold the loss of this rank's rows.

    Attributes:
        losses: Loss of each segment of rows, summed over its rows.
        gradients: Gradients of the scaled loss of all ranks with respect to this rank's features, and the mean over
            ranks of those with respect to temperature and bias. At its limit, the temperature has only a gradient that
            leads away from it.
    """

    losses: list[Tensor]
    gradients: Features


def solve(
    features: Features,
    captions_NL: Tensor | None,
    segments: Sequence[int],
    config: ContrastiveLossConfig,
    world: World,
    scale: float,
) -> Solution:
    """Return the loss of this rank's rows, and the gradients of ``scale`` times the losses of all ranks.

    A collective. DeepSpeed averages gradients over ranks: the caller multiplies the scale by the number of ranks.

    Args:
        features: Features of this rank; all ranks have equally many rows. Their graph is not used.
        captions_NL: Tokens of this rank's captions, to leave equal ones out of each other's negatives; None keeps all
            negatives.
        segments: Numbers of consecutive rows whose losses are summed apart.
        config: Settings of the loss.
        world: Processes of the run.
        scale: Factor of the loss in the gradients.
    """
    rows = replace(features, logit_scale=features.logit_scale.clamp(max=config.max_logit_scale)).leaves()
    columns = [_gathered(tensor.detach(), world).requires_grad_() for tensor in (rows.image_ND, rows.text_ND)]
    groups = None if captions_NL is None else _equal_captions(_gathered(captions_NL, world))
    gradients = Features(*(torch.zeros_like(tensor) for tensor in rows.tensors()))
    column_gradients = [torch.zeros_like(tensor) for tensor in columns]
    losses = []
    for segment in _segment_slices(segments):
        parts = []
        for chunk in _chunks(segment, config.rows_per_chunk):
            own = replace(rows, image_ND=rows.image_ND[chunk], text_ND=rows.text_ND[chunk]).leaves()
            first = world.rank * len(rows.image_ND) + chunk.start
            loss, found = chunk_gradients(own, columns, groups, first, config, scale)
            targets = [gradients.image_ND[chunk], gradients.text_ND[chunk], *gradients.tensors()[2:], *column_gradients]
            for target, gradient in zip(targets, found, strict=True):
                target += gradient
            parts.append(loss)
        losses.append(torch.stack(parts).sum())
    _add_over_ranks(gradients, column_gradients, world)
    at_limit = features.logit_scale.detach() > config.max_logit_scale
    scale_gradient = torch.where(at_limit, gradients.logit_scale.clamp(min=0), gradients.logit_scale)
    return Solution(losses, replace(gradients, logit_scale=scale_gradient))


def chunk_gradients(
    own: Features,
    columns: Sequence[Tensor],
    groups_M: Tensor | None,
    first: int,
    config: ContrastiveLossConfig,
    scale: float,
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Return the loss of some rows, and the gradients of ``scale`` times it.

    Args:
        own: Features of the rows; leaves.
        columns: Images and captions of all ranks; leaves.
        groups_M: A number for each caption, equal for equal ones; None leaves no duplicate out.
        first: Column of the first row's own pair.
        config: Settings of the loss.
        scale: Factor of the loss in the gradients.

    Returns:
        The loss, and the gradients with respect to the fields of ``own`` and to the columns.
    """
    masked_NM = None if groups_M is None else _duplicates(groups_M, first, len(own.image_ND))
    loss = _chunk_loss(own, columns[0], columns[1], masked_NM, first, config)
    found = torch.autograd.grad(loss * scale, [*own.tensors(), *columns], allow_unused=True, materialize_grads=True)
    return loss.detach(), found


def _add_over_ranks(gradients: Features, column_gradients: Sequence[Tensor], world: World) -> None:
    """Add what other ranks' rows say of this rank's features, and average over ranks what is no feature."""
    for target, gradient in zip((gradients.image_ND, gradients.text_ND), column_gradients, strict=True):
        target += _own_share(gradient, world)
    if world.size > 1:
        for gradient in gradients.tensors()[2:]:
            dist.all_reduce(gradient)
            gradient /= world.size


def surrogate(features: Features, gradients: Features, *, with_scale: bool) -> Tensor:
    """Return a scalar whose gradient with respect to the features is the given one.

    Args:
        features: Features with a graph.
        gradients: Gradients of the loss of the step.
        with_scale: Whether temperature and bias get their gradients; in one micro-batch of a problem alone.
    """
    total = (features.image_ND.float() * gradients.image_ND).sum() + (
        features.text_ND.float() * gradients.text_ND
    ).sum()
    for value, gradient in zip(features.tensors()[2:], gradients.tensors()[2:], strict=True):
        total = total + (value.float() * (gradient if with_scale else torch.zeros_like(gradient))).sum()
    return total


def _chunk_loss(
    own: Features,
    images_MD: Tensor,
    texts_MD: Tensor,
    masked_NM: Tensor | None,
    first: int,
    config: ContrastiveLossConfig,
) -> Tensor:
    """Return the loss of some rows against all columns, summed over the rows.

    Args:
        own: Features of the rows.
        images_MD: Images of all ranks.
        texts_MD: Captions of all ranks.
        masked_NM: True where a column has the caption of the row, but is another pair.
        first: Column of the first row's own pair.
        config: Settings of the loss.
    """
    labels_N = torch.arange(first, first + len(own.image_ND), device=own.image_ND.device)
    per_image_NM = own.logit_scale * own.image_ND @ texts_MD.T
    if config.kind == "sigmoid":
        assert own.logit_bias is not None, "the towers have a bias for this loss"
        return _sigmoid_loss(per_image_NM + own.logit_bias, labels_N, masked_NM)
    per_text_NM = own.logit_scale * own.text_ND @ images_MD.T
    losses = [
        softmax_loss(logits, labels_N, masked_NM, config.label_smoothing) for logits in (per_image_NM, per_text_NM)
    ]
    return (losses[0] + losses[1]) / 2 * len(labels_N)


def softmax_loss(logits_NM: Tensor, labels_N: Tensor, masked_NM: Tensor | None, smoothing: float) -> Tensor:
    """Return the cross-entropy, averaged over rows.

    The smoothed share of the target is spread over the columns that are not masked.

    Args:
        logits_NM: Logits.
        labels_N: Column of each row's own pair, never masked.
        masked_NM: Columns to leave out; None leaves none out.
        smoothing: Share of the target that is spread evenly.
    """
    if masked_NM is None:
        return F.cross_entropy(logits_NM, labels_N, label_smoothing=smoothing)
    logits_NM = logits_NM.masked_fill(masked_NM, -torch.inf)
    if smoothing == 0:
        return F.cross_entropy(logits_NM, labels_N)
    log_p_NM = F.log_softmax(logits_NM, dim=-1)
    spread_N = log_p_NM.masked_fill(masked_NM, 0).sum(-1) / (~masked_NM).sum(-1)
    target_N = log_p_NM.gather(-1, labels_N[:, None])[:, 0]
    return -((1 - smoothing) * target_N + smoothing * spread_N).mean()


def _sigmoid_loss(logits_NM: Tensor, labels_N: Tensor, masked_NM: Tensor | None) -> Tensor:
    """Return SigLIP's loss, summed over rows: each pair is judged alone (Zhai et al. 2023)."""
    signs_NM = torch.full_like(logits_NM, -1.0).scatter_(1, labels_N[:, None], 1.0)
    losses_NM = -F.logsigmoid(signs_NM * logits_NM)
    return (losses_NM if masked_NM is None else losses_NM.masked_fill(masked_NM, 0)).sum()


def _segment_slices(segments: Sequence[int]) -> Iterator[slice]:
    start = 0
    for size in segments:
        yield slice(start, start + size)
        start += size


def _chunks(rows: slice, size: int) -> Iterator[slice]:
    for start in range(rows.start, rows.stop, size):
        yield slice(start, min(rows.stop, start + size))


def _equal_captions(captions_ML: Tensor) -> Tensor:
    """Return a number for each caption, int64 [M]; equal captions have equal numbers."""
    return torch.unique(captions_ML, dim=0, return_inverse=True)[1]


def _duplicates(groups_M: Tensor, first: int, count: int) -> Tensor:
    """Return where another column has the caption of a row, bool [count, M], for rows from column ``first`` on."""
    same_NM = groups_M[first : first + count, None] == groups_M[None]
    same_NM[torch.arange(count), torch.arange(first, first + count)] = False
    return same_NM


def _gathered(tensor: Tensor, world: World) -> Tensor:
    """Return the rows of all ranks, in the order of the ranks."""
    if world.size == 1:
        return tensor.clone()
    parts = [torch.empty_like(tensor) for _ in range(world.size)]
    dist.all_gather(parts, tensor.contiguous())
    return torch.cat(parts)


def _own_share(gradient_MD: Tensor, world: World) -> Tensor:
    """Sum gradients of all columns over the ranks, and return those of this rank's columns."""
    if world.size == 1:
        return gradient_MD
    received = torch.empty_like(gradient_MD)
    dist.all_to_all_single(received, gradient_MD)
    return received.view(world.size, -1, gradient_MD.shape[-1]).sum(0)
