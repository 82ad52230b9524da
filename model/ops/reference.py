"""The two attentions in plain torch: the fallback where no kernel exists, and the oracle of the tests.

Shape suffixes: T text rows (batch and length flattened), M media, N latents of a medium, R latent queries,
S features of all media together, H heads, D head width, L rows of the longest group.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor


def masked_cross_attention(
    q_THD: Tensor,
    k_MNHD: Tensor,
    v_MNHD: Tensor,
    media_index_T: Tensor,
    gate: Tensor | None = None,
    *,
    first_media_T: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """Each text row attends to the latents of one medium, or of a run of media; see `model.ops`.

    Rows are grouped by what they see, so that no mask over all media is built (Flamingo, section 2.4, computes the
    full product and masks it). Under `torch.compile` and on meta tensors, where group sizes are unknown, it is the
    dense oracle; on fake ones, which are for counting, equal groups stand for them.
    """
    if torch.compiler.is_compiling() or q_THD.is_meta:
        return dense_masked_cross_attention(
            q_THD, k_MNHD, v_MNHD, media_index_T, gate, first_media_T=first_media_T, scale=scale
        )
    if isinstance(media_index_T, FakeTensor):
        return _apply_gate(_equal_groups(q_THD, k_MNHD, v_MNHD, scale), gate)
    index_T = media_index_T.long()
    if first_media_T is None:
        rows, values = _one_medium(q_THD, k_MNHD, v_MNHD, index_T, scale)
    else:
        rows, values = _media_so_far(q_THD, k_MNHD, v_MNHD, index_T, first_media_T.long(), scale)
    out_THD = torch.zeros_like(q_THD, memory_format=torch.contiguous_format).index_copy(0, rows, values)
    return _apply_gate(out_THD, gate)


def dense_masked_cross_attention(
    q_THD: Tensor,
    k_MNHD: Tensor,
    v_MNHD: Tensor,
    media_index_T: Tensor,
    gate: Tensor | None = None,
    *,
    first_media_T: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """The same by definition: all scores, a mask, a softmax. The oracle: memory grows with T * M * N."""
    media, latents, heads, width = k_MNHD.shape
    scale = width**-0.5 if scale is None else scale
    last_T = media_index_T.long()
    first_T = last_T if first_media_T is None else first_media_T.long()
    medium_K = torch.arange(media, device=q_THD.device).repeat_interleave(latents)
    seen_TK = (medium_K >= first_T[:, None]) & (medium_K <= last_T[:, None]) & (last_T >= 0)[:, None]
    k_KHD, v_KHD = (x.reshape(media * latents, heads, width) for x in (k_MNHD, v_MNHD))
    scores_HTK = torch.einsum("thd,khd->htk", q_THD, k_KHD) * scale
    scores_HTK = scores_HTK.masked_fill(~seen_TK, torch.finfo(scores_HTK.dtype).min)
    # A row that sees nothing has a uniform softmax, so its weights are zeroed after it, not before.
    weights_HTK = scores_HTK.float().softmax(-1) if scores_HTK.dtype.itemsize < 4 else scores_HTK.softmax(-1)
    weights_HTK = weights_HTK.masked_fill(~seen_TK, 0.0).to(q_THD.dtype)
    return _apply_gate(torch.einsum("htk,khd->thd", weights_HTK, v_KHD), gate)


def resampler_attention(
    q_MRHD: Tensor,
    k_features_SHD: Tensor,
    v_features_SHD: Tensor,
    k_latents_MRHD: Tensor,
    v_latents_MRHD: Tensor,
    cu_media: Tensor,
    *,
    scale: float | None = None,
) -> Tensor:
    """The latents of each medium attend to its features and to themselves; see `model.ops`.

    Media of one length are computed together, so the number of SDPA calls is the number of distinct lengths.
    """
    if q_MRHD.is_meta:
        return torch.empty_like(q_MRHD, memory_format=torch.contiguous_format)
    if isinstance(cu_media, FakeTensor):
        length = k_features_SHD.shape[0] // q_MRHD.shape[0]
        return _equal_lengths(q_MRHD, k_features_SHD, v_features_SHD, k_latents_MRHD, v_latents_MRHD, length, scale)
    lengths_M = cu_media.diff()
    distinct = lengths_M.unique().tolist()
    if not distinct:
        return (q_MRHD + 0 * (k_latents_MRHD + v_latents_MRHD)) + 0 * (k_features_SHD.sum() + v_features_SHD.sum())
    if len(distinct) == 1:
        return _equal_lengths(
            q_MRHD, k_features_SHD, v_features_SHD, k_latents_MRHD, v_latents_MRHD, distinct[0], scale
        )
    out_MRHD = torch.zeros_like(q_MRHD, memory_format=torch.contiguous_format)
    for length in distinct:
        media = (lengths_M == length).nonzero().squeeze(1)
        rows = (cu_media[:-1][media, None] + torch.arange(length, device=q_MRHD.device)).flatten()
        values = _equal_lengths(
            q_MRHD[media],
            k_features_SHD[rows],
            v_features_SHD[rows],
            k_latents_MRHD[media],
            v_latents_MRHD[media],
            length,
            scale,
        )
        out_MRHD = out_MRHD.index_copy(0, media, values)
    return out_MRHD


def _apply_gate(out: Tensor, gate: Tensor | None) -> Tensor:
    """`out * tanh(gate)` in the type of `out`; the factor itself is float32 so that small gates are not rounded."""
    if gate is None:
        return out
    factor = torch.tanh(gate.to(torch.promote_types(gate.dtype, torch.float32)))
    return (out * factor.to(torch.promote_types(out.dtype, factor.dtype))).to(out.dtype)


def _one_medium(
    q_THD: Tensor, k_MNHD: Tensor, v_MNHD: Tensor, index_T: Tensor, scale: float | None
) -> tuple[Tensor, Tensor]:
    """Rows that see a medium, and their outputs: rows sorted by medium, padded to the longest group, SDPA unmasked."""
    sorted_T, order_T = index_T.sort(stable=True)
    rows = order_T[sorted_T >= 0]
    used, group_of_row, counts = index_T[rows].unique_consecutive(return_inverse=True, return_counts=True)
    longest = int(counts.max()) if counts.numel() else 0
    starts = counts.cumsum(0) - counts
    slot_of_row = group_of_row * longest + torch.arange(rows.numel(), device=rows.device) - starts[group_of_row]
    q_padded = q_THD.new_zeros(used.numel() * longest, *q_THD.shape[1:]).index_copy(0, slot_of_row, q_THD[rows])
    q_GLHD = q_padded.unflatten(0, (used.numel(), longest))
    out_GLHD = _attention(q_GLHD, k_MNHD[used], v_MNHD[used], None, scale)
    return rows, out_GLHD.flatten(0, 1)[slot_of_row]


def _media_so_far(
    q_THD: Tensor, k_MNHD: Tensor, v_MNHD: Tensor, index_T: Tensor, first_T: Tensor, scale: float | None
) -> tuple[Tensor, Tensor]:
    """Rows that see a medium, and their outputs: one masked SDPA for all rows that share their first medium."""
    latents = k_MNHD.shape[1]
    all_rows = [(index_T < 0).nonzero().squeeze(1)[:0]]
    all_values = [q_THD[:0] + k_MNHD[:0].sum() + v_MNHD[:0].sum()]  # keeps every input in the graph
    for first in first_T[index_T >= 0].unique().tolist():
        rows = ((first_T == first) & (index_T >= 0)).nonzero().squeeze(1)
        end = int(index_T[rows].max()) + 1
        medium_K = torch.arange(first, end, device=q_THD.device).repeat_interleave(latents)
        k, v = (x[first:end].flatten(0, 1)[None] for x in (k_MNHD, v_MNHD))
        all_values.append(_attention(q_THD[rows][None], k, v, medium_K <= index_T[rows, None], scale)[0])
        all_rows.append(rows)
    return torch.cat(all_rows), torch.cat(all_values)


def _equal_groups(q_THD: Tensor, k_MNHD: Tensor, v_MNHD: Tensor, scale: float | None) -> Tensor:
    """Stands for ``_one_medium`` where indices have no values: as many rows see each medium, one after the other."""
    media, total = k_MNHD.shape[0], q_THD.shape[0]
    slots = torch.arange(total, device=q_THD.device)
    q_padded = q_THD.new_zeros(media * -(-total // media), *q_THD.shape[1:]).index_copy(0, slots, q_THD[slots])
    out_MLHD = _attention(q_padded.unflatten(0, (media, -1)), k_MNHD[slots[:media]], v_MNHD[slots[:media]], None, scale)
    values = out_MLHD.flatten(0, 1)[slots]
    return torch.zeros_like(q_THD, memory_format=torch.contiguous_format).index_copy(0, slots, values)


def _equal_lengths(
    q_MRHD: Tensor,
    k_features: Tensor,
    v_features: Tensor,
    k_latents: Tensor,
    v_latents: Tensor,
    length: int,
    scale: float | None,
) -> Tensor:
    shape = (q_MRHD.shape[0], length, *q_MRHD.shape[2:])
    k = torch.cat([k_features.reshape(shape), k_latents], dim=1)
    v = torch.cat([v_features.reshape(shape), v_latents], dim=1)
    return _attention(q_MRHD, k, v, None, scale)


def _attention(q_BLHD: Tensor, k_BKHD: Tensor, v_BKHD: Tensor, mask: Tensor | None, scale: float | None) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q_BLHD, k_BKHD, v_BKHD))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale).transpose(1, 2)
