"""Implement the two attentions in other ways, as baselines. They take and return the same tensors as ``model.ops``."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from model import ops

Attention = Callable[..., Tensor]


@dataclass(frozen=True)
class CrossShape:
    """Describe rows of text with media spread over them.

    Attributes:
        rows: Rows of the batch.
        length: Tokens of a row.
        num_media: Media of a row.
        num_heads: Heads of the queries.
        head_dim: Width of a head.
        num_latents: Latents of a medium.
        leading_text: Whether text precedes the first medium. It sees no medium, and counts as the text of one.
        uneven: Whether the texts of consecutive media are as 1 : 2 : 3 : 4 : 1 ... instead of equally long.
        num_kv_heads: Heads of keys and values; None takes ``num_heads``.
    """

    rows: int
    length: int
    num_media: int
    num_heads: int
    head_dim: int
    num_latents: int = 64
    leading_text: bool = False
    uneven: bool = False
    num_kv_heads: int | None = None

    @property
    def kind(self) -> str:
        """Media and heads in words."""
        heads = f"{self.num_heads}x{self.head_dim}"
        heads += "" if self.num_kv_heads is None else f" with {self.num_kv_heads} of keys"
        latents = "" if self.num_latents == CrossShape.num_latents else f" of {self.num_latents}"
        return f"{self.num_media} {'uneven ' if self.uneven else ''}media{latents}, {heads}"

    def min_bytes(self, element_size: int) -> tuple[int, int]:
        """Return the bytes that forward and backward read and write at least."""
        q = element_size * self.rows * self.length * self.num_heads * self.head_dim
        keys = self.rows * self.num_media * self.num_latents * (self.num_kv_heads or self.num_heads)
        k_and_v = 2 * element_size * keys * self.head_dim
        return 2 * q + k_and_v, 3 * q + 2 * k_and_v

    def within_row(self, device: str) -> Tensor:
        """Return int64 [length]: the medium of its row that a token sees, or -1."""
        leading = int(self.leading_text)
        if self.uneven:
            ends = torch.tensor([1 + text % 4 for text in range(self.num_media + leading)], device=device).cumsum(0)
            # In units of the shortest text, token t starts at t * ends[-1] / length.
            starts = torch.arange(self.length, device=device) * ends[-1]
            return torch.searchsorted(ends * self.length, starts, right=True) - leading
        return torch.arange(self.length, device=device) * (self.num_media + leading) // self.length - leading

    def media_index(self, device: str) -> Tensor:
        """Return int64 [rows * length]: the medium of the batch that a token sees, or -1."""
        within_row = self.within_row(device)
        first_of_row = self.num_media * torch.arange(self.rows, device=device)[:, None]
        return torch.where(within_row >= 0, within_row + first_of_row, -1).flatten()

    def mask(self, device: str) -> Tensor:
        """Return bool [1, 1, length, num_media * num_latents]: whether a token sees a latent. All rows are alike."""
        medium = torch.arange(self.num_media, device=device).repeat_interleave(self.num_latents)
        return (self.within_row(device)[:, None] == medium)[None, None]

    def blind(self, device: str) -> Tensor | None:
        """Return bool [1, 1, length, 1]: whether a token sees no medium; None if every token sees one."""
        return (self.within_row(device) < 0)[None, None, :, None] if self.leading_text else None


def by_batch(shape: CrossShape, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return q, k and v as [rows, num_heads, length or keys, head_dim]."""
    heads = (shape.num_heads, shape.head_dim)
    q = q.view(shape.rows, shape.length, *heads)
    k, v = (x.reshape(shape.rows, shape.num_media * shape.num_latents, *heads) for x in (k, v))
    return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)


def dense_sdpa(shape: CrossShape, device: str) -> Attention:
    """Return SDPA over all media of a row, with a dense mask."""
    mask, blind = shape.mask(device), shape.blind(device)

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = F.scaled_dot_product_attention(*by_batch(shape, q, k, v), attn_mask=mask)
        out = out if blind is None else out.masked_fill(blind, 0.0)
        return out.transpose(1, 2).flatten(0, 1)

    return attention


def masked_einsum(shape: CrossShape, device: str) -> Attention:
    """Return einsums over all media of a row with masked scores, as in OpenFlamingo's ``helpers.py``."""
    mask, blind = shape.mask(device), shape.blind(device)

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = by_batch(shape, q, k, v)
        scores = torch.einsum("bhid,bhjd->bhij", q * shape.head_dim**-0.5, k)
        scores = scores.masked_fill(~mask, -torch.finfo(scores.dtype).max)
        scores = scores - scores.amax(dim=-1, keepdim=True).detach()
        weights = scores.softmax(dim=-1)
        weights = weights if blind is None else weights.masked_fill(blind, 0.0)
        return torch.einsum("bhij,bhjd->bhid", weights, v).transpose(1, 2).flatten(0, 1)

    return attention


def flex(shape: CrossShape, device: str) -> Attention:
    """Return compiled FlexAttention. Its block mask depends on the batch, so every call makes it."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    compiled = torch.compile(flex_attention)
    make_mask = torch.compile(create_block_mask)

    def sees(_batch: Tensor, _head: Tensor, row: Tensor, key: Tensor) -> Tensor:
        return row * shape.num_media // shape.length == key // shape.num_latents

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        block_mask = make_mask(sees, None, None, shape.length, shape.num_media * shape.num_latents, device)
        return compiled(*by_batch(shape, q, k, v), block_mask=block_mask).transpose(1, 2).flatten(0, 1)

    return attention


def varlen(shape: CrossShape, device: str) -> Attention:
    """Return torch's varlen_attn, with the text of each medium as one query sequence. Every token must see a medium."""
    counts = shape.media_index(device).bincount()
    cu_queries = F.pad(counts.cumsum(0), (1, 0)).int()
    cu_keys = torch.arange(0, counts.numel() + 1, device=device, dtype=torch.int32) * shape.num_latents
    return varlen_function(cu_queries, cu_keys, int(counts.max()), shape.num_latents)


def varlen_function(cu_queries: Tensor, cu_keys: Tensor, max_queries: int, max_keys: int) -> Attention:
    """Return varlen_attn with these offsets; keys and values may have leading dimensions [media, latents]."""
    from torch.nn.attention.varlen import varlen_attn

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.reshape(-1, *x.shape[-2:]) for x in (q, k, v))
        out = varlen_attn(q, k, v, cu_queries, cu_keys, max_queries, max_keys)
        assert isinstance(out, Tensor)  # it comes with the log-sum-exp only on request
        return out

    return attention


def flash_attention(shape: CrossShape, device: str) -> Attention:
    """Return flash-attn's attention of variable length."""
    from flash_attn import flash_attn_varlen_func  # type: ignore[import-not-found]

    counts = shape.media_index(device).bincount()
    cu_queries = F.pad(counts.cumsum(0), (1, 0)).int()
    cu_keys = torch.arange(0, counts.numel() + 1, device=device, dtype=torch.int32) * shape.num_latents
    longest = int(counts.max())

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        k, v = k.flatten(0, 1), v.flatten(0, 1)
        return flash_attn_varlen_func(q, k, v, cu_queries, cu_keys, longest, shape.num_latents)

    return attention


def repeated_keys(shape: CrossShape, device: str) -> Attention:
    """Return the fused op on keys and values that are repeated in memory, one head for each head of the queries."""
    shared_by, index = shape.num_heads // (shape.num_kv_heads or shape.num_heads), shape.media_index(device)

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        k, v = (x.repeat_interleave(shared_by, 2) for x in (k, v))
        return ops.masked_cross_attention(q, k, v, index, backend="fused")

    return attention


def cross_baselines(shape: CrossShape, device: str) -> dict[str, Attention]:
    """Return the baselines that run on this device, by name."""
    if shape.num_kv_heads is not None:
        return {"repeated keys and values": repeated_keys(shape, device)}
    if shape.uneven and device == "cuda":  # the others take long to compile, or are far slower
        return {"varlen_attn": varlen(shape, device)}
    baselines = {"SDPA + dense mask": dense_sdpa(shape, device), "masked einsum": masked_einsum(shape, device)}
    if device == "cuda" and not shape.leading_text:
        baselines |= {"FlexAttention": flex(shape, device), "varlen_attn": varlen(shape, device)}
        if importlib.util.find_spec("flash_attn") is not None:
            baselines["flash-attn"] = flash_attention(shape, device)
    return baselines


@dataclass(frozen=True)
class ResamplerShape:
    """Describe media before the resampler.

    Attributes:
        num_media: Media of the batch.
        num_features: Features of a medium.
        num_heads: Heads of the attention.
        head_dim: Width of a head.
        num_latents: Latents of a medium.
    """

    num_media: int
    num_features: int
    num_heads: int
    head_dim: int
    num_latents: int = 64

    def min_bytes(self, element_size: int) -> tuple[int, int]:
        """Return the bytes that forward and backward read and write at least."""
        row = element_size * self.num_media * self.num_heads * self.head_dim
        q, k_and_v = row * self.num_latents, 2 * row * (self.num_features + self.num_latents)
        return 2 * q + k_and_v, 3 * q + 2 * k_and_v


def resampler_baselines(shape: ResamplerShape, device: str) -> dict[str, Attention]:
    """Return the baselines by name. Their inputs are q, k_features, v_features, k_latents, v_latents."""

    def concatenated(features: Tensor, latents: Tensor) -> Tensor:
        features = features.view(shape.num_media, shape.num_features, shape.num_heads, shape.head_dim)
        return torch.cat([features, latents], dim=1)

    def sdpa(q: Tensor, k_f: Tensor, v_f: Tensor, k_l: Tensor, v_l: Tensor) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q, concatenated(k_f, k_l), concatenated(v_f, v_l)))
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)

    baselines: dict[str, Attention] = {"SDPA on concatenated keys": sdpa}
    if device == "cuda":
        keys = shape.num_features + shape.num_latents
        media = torch.arange(shape.num_media + 1, device=device, dtype=torch.int32)
        cu_queries = media * shape.num_latents
        with_latents = varlen_function(cu_queries, media * keys, shape.num_latents, keys)
        features_only = varlen_function(cu_queries, media * shape.num_features, shape.num_latents, shape.num_features)
        baselines["varlen_attn + concatenation"] = lambda q, k_f, v_f, k_l, v_l: with_latents(
            q, concatenated(k_f, k_l), concatenated(v_f, v_l)
        ).view_as(q)
        baselines["varlen_attn, features only"] = lambda q, k_f, v_f, k_l, v_l: features_only(q, k_f, v_f).view_as(q)
    return baselines
