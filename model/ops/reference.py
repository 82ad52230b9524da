"""Compute the two attentions in plain torch: the fallback where no kernel exists, and the oracle of the tests."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from model.internals import FakeTensor


def masked_cross_attention(
    q_THK: Tensor,
    k_MRUK: Tensor,
    v_MRUK: Tensor,
    media_index_T: Tensor,
    gate: Tensor | None = None,
    *,
    first_media_T: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """Attend from each text token to the latents of one medium, or of a run of media; see ``model.ops``.

    Tokens are grouped by the media that they see, so that no mask over all media is built (Flamingo, section 2.4,
    computes the full product and masks it). Group sizes are unknown under ``torch.compile`` and on meta tensors, which
    get the dense oracle. On fake tensors, which only count memory, all groups have one size.
    """
    shared_by = q_THK.shape[1] // k_MRUK.shape[2]
    if shared_by > 1:
        q_TUK, index_T, first_T = _heads_as_tokens(shared_by, q_THK, media_index_T, first_media_T)
        out_TUK = masked_cross_attention(q_TUK, k_MRUK, v_MRUK, index_T, gate, first_media_T=first_T, scale=scale)
        return _tokens_as_heads(shared_by, out_TUK)
    if torch.compiler.is_compiling() or q_THK.is_meta:
        return dense_masked_cross_attention(
            q_THK, k_MRUK, v_MRUK, media_index_T, gate, first_media_T=first_media_T, scale=scale
        )
    if isinstance(media_index_T, FakeTensor):
        return _apply_gate(_equal_groups(q_THK, k_MRUK, v_MRUK, scale), gate)
    index_T = media_index_T.long()
    if first_media_T is None:
        rows, values = _one_medium(q_THK, k_MRUK, v_MRUK, index_T, scale)
    else:
        rows, values = _media_so_far(q_THK, k_MRUK, v_MRUK, index_T, first_media_T.long(), scale)
    out_THK = torch.zeros_like(q_THK, memory_format=torch.contiguous_format).index_copy(0, rows, values)
    return _apply_gate(out_THK, gate)


def dense_masked_cross_attention(
    q_THK: Tensor,
    k_MRUK: Tensor,
    v_MRUK: Tensor,
    media_index_T: Tensor,
    gate: Tensor | None = None,
    *,
    first_media_T: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """Compute the definition: all scores, a mask, a softmax. Memory grows with T * M * R."""
    num_media, num_latents, num_heads, head_dim = k_MRUK.shape
    shared_by = q_THK.shape[1] // num_heads
    if shared_by > 1:
        q_TUK, index_T, first_T = _heads_as_tokens(shared_by, q_THK, media_index_T, first_media_T)
        out_TUK = dense_masked_cross_attention(q_TUK, k_MRUK, v_MRUK, index_T, gate, first_media_T=first_T, scale=scale)
        return _tokens_as_heads(shared_by, out_TUK)
    scale = head_dim**-0.5 if scale is None else scale
    last_T = media_index_T.long()
    first_T = last_T if first_media_T is None else first_media_T.long()
    medium_J = torch.arange(num_media, device=q_THK.device).repeat_interleave(num_latents)
    seen_TJ = (medium_J >= first_T[:, None]) & (medium_J <= last_T[:, None]) & (last_T >= 0)[:, None]
    k_JHK, v_JHK = (x.reshape(num_media * num_latents, num_heads, head_dim) for x in (k_MRUK, v_MRUK))
    scores_HTJ = torch.einsum("thk,jhk->htj", q_THK, k_JHK) * scale
    scores_HTJ = scores_HTJ.masked_fill(~seen_TJ, torch.finfo(scores_HTJ.dtype).min)
    # A token that sees nothing has a uniform softmax, so its weights are zeroed after it, not before.
    weights_HTJ = scores_HTJ.float().softmax(-1) if scores_HTJ.dtype.itemsize < 4 else scores_HTJ.softmax(-1)
    weights_HTJ = weights_HTJ.masked_fill(~seen_TJ, 0.0).to(q_THK.dtype)
    return _apply_gate(torch.einsum("htj,jhk->thk", weights_HTJ, v_JHK), gate)


def resampler_attention(
    q_MRHK: Tensor,
    k_features_SHK: Tensor,
    v_features_SHK: Tensor,
    k_latents_MRHK: Tensor,
    v_latents_MRHK: Tensor,
    cu_media: Tensor,
    *,
    scale: float | None = None,
) -> Tensor:
    """Attend from the latents of each medium to its features and to the latents; see ``model.ops``.

    Media of one length are computed together, so the number of SDPA calls is the number of distinct lengths.
    """
    if q_MRHK.is_meta:
        return torch.empty_like(q_MRHK, memory_format=torch.contiguous_format)
    if isinstance(cu_media, FakeTensor):
        length = k_features_SHK.shape[0] // q_MRHK.shape[0]
        return _equal_lengths(q_MRHK, k_features_SHK, v_features_SHK, k_latents_MRHK, v_latents_MRHK, length, scale)
    lengths_M = cu_media.diff()
    distinct = lengths_M.unique().tolist()
    if not distinct:
        return (q_MRHK + 0 * (k_latents_MRHK + v_latents_MRHK)) + 0 * (k_features_SHK.sum() + v_features_SHK.sum())
    if len(distinct) == 1:
        return _equal_lengths(
            q_MRHK, k_features_SHK, v_features_SHK, k_latents_MRHK, v_latents_MRHK, distinct[0], scale
        )
    out_MRHK = torch.zeros_like(q_MRHK, memory_format=torch.contiguous_format)
    for length in distinct:
        media = (lengths_M == length).nonzero().squeeze(1)
        rows = (cu_media[:-1][media, None] + torch.arange(length, device=q_MRHK.device)).flatten()
        values = _equal_lengths(
            q_MRHK[media],
            k_features_SHK[rows],
            v_features_SHK[rows],
            k_latents_MRHK[media],
            v_latents_MRHK[media],
            length,
            scale,
        )
        out_MRHK = out_MRHK.index_copy(0, media, values)
    return out_MRHK


def _heads_as_tokens(
    shared_by: int, q_THK: Tensor, media_index_T: Tensor, first_media_T: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Turn heads that share keys and values into further tokens, which see the same; so nothing large is repeated."""
    q_TUK = q_THK.unflatten(1, (-1, shared_by)).transpose(1, 2).flatten(0, 1)
    first_media_T = None if first_media_T is None else first_media_T.repeat_interleave(shared_by)
    return q_TUK, media_index_T.repeat_interleave(shared_by), first_media_T


def _tokens_as_heads(shared_by: int, out_TUK: Tensor) -> Tensor:
    """Undo ``_heads_as_tokens``."""
    num_tokens = out_TUK.shape[0] // shared_by
    return out_TUK.unflatten(0, (num_tokens, shared_by)).transpose(1, 2).flatten(1, 2)


def _apply_gate(out: Tensor, gate: Tensor | None) -> Tensor:
    """Return ``out * tanh(gate)`` in the type of ``out``; a float32 factor keeps small gates from being rounded."""
    if gate is None:
        return out
    factor = torch.tanh(gate.to(torch.promote_types(gate.dtype, torch.float32)))
    return (out * factor.to(torch.promote_types(out.dtype, factor.dtype))).to(out.dtype)


def _one_medium(
    q_THK: Tensor, k_MRHK: Tensor, v_MRHK: Tensor, index_T: Tensor, scale: float | None
) -> tuple[Tensor, Tensor]:
    """Return the tokens that see a medium, and their outputs.

    Tokens are sorted by medium and padded to the longest group, so that SDPA needs no mask.
    """
    sorted_T, order_T = index_T.sort(stable=True)
    rows = order_T[sorted_T >= 0]
    used, group_of_row, counts = index_T[rows].unique_consecutive(return_inverse=True, return_counts=True)
    longest = int(counts.max()) if counts.numel() else 0
    starts = counts.cumsum(0) - counts
    slot_of_row = group_of_row * longest + torch.arange(rows.numel(), device=rows.device) - starts[group_of_row]
    q_padded = q_THK.new_zeros(used.numel() * longest, *q_THK.shape[1:]).index_copy(0, slot_of_row, q_THK[rows])
    q_MQHK = q_padded.unflatten(0, (used.numel(), longest))
    out_MQHK = _attention(q_MQHK, k_MRHK[used], v_MRHK[used], None, scale)
    return rows, out_MQHK.flatten(0, 1)[slot_of_row]


def _media_so_far(
    q_THK: Tensor, k_MRHK: Tensor, v_MRHK: Tensor, index_T: Tensor, first_T: Tensor, scale: float | None
) -> tuple[Tensor, Tensor]:
    """Return the tokens that see a medium, and their outputs, by one masked SDPA for each first medium."""
    num_latents = k_MRHK.shape[1]
    all_rows = [(index_T < 0).nonzero().squeeze(1)[:0]]
    all_values = [q_THK[:0] + k_MRHK[:0].sum() + v_MRHK[:0].sum()]  # keeps every input in the graph
    for first in first_T[index_T >= 0].unique().tolist():
        rows = ((first_T == first) & (index_T >= 0)).nonzero().squeeze(1)
        end = int(index_T[rows].max()) + 1
        medium_J = torch.arange(first, end, device=q_THK.device).repeat_interleave(num_latents)
        k, v = (x[first:end].flatten(0, 1)[None] for x in (k_MRHK, v_MRHK))
        all_values.append(_attention(q_THK[rows][None], k, v, medium_J <= index_T[rows, None], scale)[0])
        all_rows.append(rows)
    return torch.cat(all_rows), torch.cat(all_values)


def _equal_groups(q_THK: Tensor, k_MRHK: Tensor, v_MRHK: Tensor, scale: float | None) -> Tensor:
    """Replace ``_one_medium`` where indices have no values: equally many tokens see each medium, in order."""
    num_media, total = k_MRHK.shape[0], q_THK.shape[0]
    slots = torch.arange(total, device=q_THK.device)
    q_padded = q_THK.new_zeros(num_media * -(-total // num_media), *q_THK.shape[1:]).index_copy(0, slots, q_THK[slots])
    out_MQHK = _attention(
        q_padded.unflatten(0, (num_media, -1)), k_MRHK[slots[:num_media]], v_MRHK[slots[:num_media]], None, scale
    )
    values = out_MQHK.flatten(0, 1)[slots]
    return torch.zeros_like(q_THK, memory_format=torch.contiguous_format).index_copy(0, slots, values)


def _equal_lengths(
    q_MRHK: Tensor,
    k_features_SHK: Tensor,
    v_features_SHK: Tensor,
    k_latents_MRHK: Tensor,
    v_latents_MRHK: Tensor,
    length: int,
    scale: float | None,
) -> Tensor:
    shape = (q_MRHK.shape[0], length, *q_MRHK.shape[2:])
    k = torch.cat([k_features_SHK.reshape(shape), k_latents_MRHK], dim=1)
    v = torch.cat([v_features_SHK.reshape(shape), v_latents_MRHK], dim=1)
    return _attention(q_MRHK, k, v, None, scale)


def _attention(q_MQHK: Tensor, k_MJHK: Tensor, v_MJHK: Tensor, mask: Tensor | None, scale: float | None) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q_MQHK, k_MJHK, v_MJHK))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale).transpose(1, 2)
