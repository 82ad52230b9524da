"""The two attentions as others compute them. Every function takes what ours takes and returns what ours returns."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

Attention = Callable[..., Tensor]


@dataclass(frozen=True)
class CrossShape:
    """Text of `batch` rows of `length` tokens, each with its own `media` media, spread evenly.

    leading_text: there is as much text before the first medium, which sees none, as after each of the others.
    """

    batch: int
    length: int
    media: int
    heads: int
    width: int
    latents: int = 64
    leading_text: bool = False

    def within_row(self, device: str) -> Tensor:
        """[length]: the medium of its row that a token sees, or -1."""
        leading = int(self.leading_text)
        return torch.arange(self.length, device=device) * (self.media + leading) // self.length - leading

    def media_index(self, device: str) -> Tensor:
        """[batch * length]: the same in the flat media list of the batch."""
        within = self.within_row(device)
        of_row = self.media * torch.arange(self.batch, device=device)[:, None]
        return torch.where(within >= 0, within + of_row, -1).flatten()

    def mask(self, device: str) -> Tensor:
        """[1, 1, length, media * latents], true where a token sees a latent. The rows of a batch are alike."""
        medium = torch.arange(self.media, device=device).repeat_interleave(self.latents)
        return (self.within_row(device)[:, None] == medium)[None, None]

    def blind(self, device: str) -> Tensor | None:
        """[1, 1, length, 1], true where a token sees no medium, or None if all see one."""
        return (self.within_row(device) < 0)[None, None, :, None] if self.leading_text else None


def by_batch(shape: CrossShape, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """[batch, heads, rows, width] of each."""
    heads = (shape.heads, shape.width)
    q = q.view(shape.batch, shape.length, *heads)
    k, v = (x.reshape(shape.batch, shape.media * shape.latents, *heads) for x in (k, v))
    return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)


def dense_sdpa(shape: CrossShape, device: str) -> Attention:
    """SDPA over all media of a row, with a mask."""
    mask, blind = shape.mask(device), shape.blind(device)

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = F.scaled_dot_product_attention(*by_batch(shape, q, k, v), attn_mask=mask)
        out = out if blind is None else out.masked_fill(blind, 0.0)
        return out.transpose(1, 2).flatten(0, 1)

    return attention


def masked_einsum(shape: CrossShape, device: str) -> Attention:
    """Scores of all media of a row, masked, softmax, weights: as OpenFlamingo computes it."""
    mask, blind = shape.mask(device), shape.blind(device)

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = by_batch(shape, q, k, v)
        scores = torch.einsum("bhid,bhjd->bhij", q * shape.width**-0.5, k)
        scores = scores.masked_fill(~mask, -torch.finfo(scores.dtype).max)
        scores = scores - scores.amax(dim=-1, keepdim=True).detach()
        weights = scores.softmax(dim=-1)
        weights = weights if blind is None else weights.masked_fill(blind, 0.0)
        return torch.einsum("bhij,bhjd->bhid", weights, v).transpose(1, 2).flatten(0, 1)

    return attention


def flex(shape: CrossShape, device: str) -> Attention:
    """FlexAttention, compiled; its block mask belongs to a batch, so it is made in every call."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    compiled = torch.compile(flex_attention)
    make_mask = torch.compile(create_block_mask)

    def sees(_batch: Tensor, _head: Tensor, row: Tensor, key: Tensor) -> Tensor:
        return row * shape.media // shape.length == key // shape.latents

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        block_mask = make_mask(sees, None, None, shape.length, shape.media * shape.latents, device)
        return compiled(*by_batch(shape, q, k, v), block_mask=block_mask).transpose(1, 2).flatten(0, 1)

    return attention


def varlen(shape: CrossShape, device: str) -> Attention:
    """torch's varlen_attn: a sequence for every medium, its text as queries. All rows must see a medium."""
    counts = shape.media_index(device).bincount()
    cu_rows = F.pad(counts.cumsum(0), (1, 0)).int()
    cu_keys = torch.arange(0, counts.numel() + 1, device=device, dtype=torch.int32) * shape.latents
    return varlen_function(cu_rows, cu_keys, int(counts.max()), shape.latents)


def varlen_function(cu_rows: Tensor, cu_keys: Tensor, most_rows: int, most_keys: int) -> Attention:
    """varlen_attn with these offsets; keys and values may have leading dimensions [media, latents]."""
    from torch.nn.attention.varlen import varlen_attn

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.reshape(-1, *x.shape[-2:]) for x in (q, k, v))
        out = varlen_attn(q, k, v, cu_rows, cu_keys, most_rows, most_keys)
        assert isinstance(out, Tensor)  # with the log-sum-exp only where it is asked for
        return out

    return attention


def flash_attention(shape: CrossShape, device: str) -> Attention:
    """flash-attn's function of variable length, where it is installed."""
    from flash_attn import flash_attn_varlen_func  # type: ignore[import-not-found]

    counts = shape.media_index(device).bincount()
    cu_rows = F.pad(counts.cumsum(0), (1, 0)).int()
    cu_keys = torch.arange(0, counts.numel() + 1, device=device, dtype=torch.int32) * shape.latents
    longest = int(counts.max())

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return flash_attn_varlen_func(q, k.flatten(0, 1), v.flatten(0, 1), cu_rows, cu_keys, longest, shape.latents)

    return attention


def cross_baselines(shape: CrossShape, device: str) -> dict[str, Attention]:
    """By name, those that run on this device."""
    baselines = {"SDPA + dense mask": dense_sdpa(shape, device), "masked einsum": masked_einsum(shape, device)}
    if device == "cuda" and not shape.leading_text:
        baselines |= {"FlexAttention": flex(shape, device), "varlen_attn": varlen(shape, device)}
        if importlib.util.find_spec("flash_attn") is not None:
            baselines["flash-attn"] = flash_attention(shape, device)
    return baselines


@dataclass(frozen=True)
class ResamplerShape:
    """`media` media of `features` features each."""

    media: int
    features: int
    heads: int
    width: int
    latents: int = 64


def resampler_baselines(shape: ResamplerShape, device: str) -> dict[str, Attention]:
    """By name; inputs are q, k_features, v_features, k_latents, v_latents."""

    def concatenated(features: Tensor, latents: Tensor) -> Tensor:
        features = features.view(shape.media, shape.features, shape.heads, shape.width)
        return torch.cat([features, latents], dim=1)

    def sdpa(q: Tensor, k_f: Tensor, v_f: Tensor, k_l: Tensor, v_l: Tensor) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q, concatenated(k_f, k_l), concatenated(v_f, v_l)))
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)

    baselines: dict[str, Attention] = {"SDPA on concatenated keys": sdpa}
    if device == "cuda":
        keys = shape.features + shape.latents
        steps = torch.arange(shape.media + 1, device=device, dtype=torch.int32)
        with_latents = varlen_function(steps * shape.latents, steps * keys, shape.latents, keys)
        features_only = varlen_function(steps * shape.latents, steps * shape.features, shape.latents, shape.features)
        baselines["varlen_attn + concatenation"] = lambda q, k_f, v_f, k_l, v_l: with_latents(
            q, concatenated(k_f, k_l), concatenated(v_f, v_l)
        ).view_as(q)
        baselines["varlen_attn, features only"] = lambda q, k_f, v_f, k_l, v_l: features_only(q, k_f, v_f).view_as(q)
    return baselines
