"""The baseline of ``trainer.benchmark openflamingo``: the same model, written plainly in the manner of OpenFlamingo.

Rows are padded to a fixed length and documents to six images; the attentions are einsum, with a dense mask over all
images of a row; the language model gets one table of embeddings with the new rows in it and computes the logits of all
positions. As there, the tower runs without a graph, and blocks of the language model that need no gradient build none.
Better than there, only the two new rows of the tables are trained, instead of whole tables whose gradient is masked.

Shape suffixes: B rows, L tokens, T images of a row, F frames, N features or latents of an image, D width.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.flamingo import Flamingo
from trainer.data.batch import IGNORED_LABEL, Row


@dataclass(frozen=True)
class PaddedBatch:
    """vision_x: uint8 [B, T, F, 3, height, width]; the others int64 [B, L]."""

    vision_x: Tensor
    input_ids: Tensor
    attention_mask: Tensor
    labels: Tensor


def padded_batch(rows: list[Row], tokens: int, images: int, pad_id: int) -> PaddedBatch:
    """Every row padded to that many tokens and (with black ones) images."""
    shape = (len(rows), tokens)
    ids, mask = torch.full(shape, pad_id), torch.zeros(shape, dtype=torch.int64)
    labels = torch.full(shape, IGNORED_LABEL)
    vision_x = torch.zeros(len(rows), images, *rows[0].media[0].shape, dtype=torch.uint8)
    for number, row in enumerate(rows):
        length = len(row.input_ids)
        ids[number, :length], mask[number, :length], labels[number, :length] = row.input_ids, 1, row.labels
        for place, medium in enumerate(row.media):
            vision_x[number, place] = medium
    return PaddedBatch(vision_x, ids, mask, labels)


def feed_forward(width: int, multiplier: int) -> nn.Sequential:
    """LayerNorm, widen, GELU, narrow."""
    return nn.Sequential(
        nn.LayerNorm(width),
        nn.Linear(width, multiplier * width, bias=False),
        nn.GELU(),
        nn.Linear(multiplier * width, width, bias=False),
    )


def split_heads(x: Tensor, heads: int) -> Tensor:
    """[B, ..., H * K] -> [B, H, ..., K]"""
    return x.unflatten(-1, (heads, -1)).movedim(-2, 1)


class PerceiverAttention(nn.Module):
    """Latents attend to the features and the latents of their image, concatenated."""

    def __init__(self, width: int, heads: int, head_dim: int) -> None:
        super().__init__()
        self.heads, self.scale = heads, head_dim**-0.5
        inner = heads * head_dim
        self.norm_media, self.norm_latents = nn.LayerNorm(width), nn.LayerNorm(width)
        self.to_q = nn.Linear(width, inner, bias=False)
        self.to_kv = nn.Linear(width, 2 * inner, bias=False)
        self.to_out = nn.Linear(inner, width, bias=False)

    def forward(self, x_BTND: Tensor, latents_BTND: Tensor) -> Tensor:
        x, latents = self.norm_media(x_BTND), self.norm_latents(latents_BTND)
        q = split_heads(self.to_q(latents), self.heads) * self.scale
        k, v = (split_heads(y, self.heads) for y in self.to_kv(torch.cat((x, latents), dim=-2)).chunk(2, dim=-1))
        sim = torch.einsum("bhtid,bhtjd->bhtij", q, k)
        attention = (sim - sim.amax(dim=-1, keepdim=True).detach()).softmax(dim=-1)
        out = torch.einsum("bhtij,bhtjd->bhtid", attention, v)
        return self.to_out(out.movedim(1, -2).flatten(-2))


class PerceiverResampler(nn.Module):
    """[B, T, F, N, D] features -> [B, T, latents, D]."""

    def __init__(self, width: int, layers: int, heads: int, head_dim: int, latents: int, frames: int) -> None:
        super().__init__()
        self.latents = nn.Parameter(torch.empty(latents, width))
        self.frame_embeddings = nn.Parameter(torch.empty(frames, width))
        self.layers = nn.ModuleList(
            nn.ModuleList([PerceiverAttention(width, heads, head_dim), feed_forward(width, 4)]) for _ in range(layers)
        )
        self.norm = nn.LayerNorm(width)

    def forward(self, x_BTFND: Tensor) -> Tensor:
        x = x_BTFND + self.frame_embeddings[: x_BTFND.shape[2], None]
        x = x.flatten(2, 3)
        latents = self.latents.expand(*x.shape[:2], -1, -1)
        for attention, forward in self.layers:
            latents = attention(x, latents) + latents
            latents = forward(latents) + latents
        return self.norm(latents)


class MaskedCrossAttention(nn.Module):
    """Text attends to the images of its row under a dense mask: only to the last one before."""

    def __init__(self, width: int, media_width: int, heads: int, head_dim: int) -> None:
        super().__init__()
        self.heads, self.scale = heads, head_dim**-0.5
        inner = heads * head_dim
        self.norm = nn.LayerNorm(width)
        self.to_q = nn.Linear(width, inner, bias=False)
        self.to_kv = nn.Linear(media_width, 2 * inner, bias=False)
        self.to_out = nn.Linear(inner, width, bias=False)

    def forward(self, x_BLD: Tensor, media_BTND: Tensor, text_time_BL: Tensor) -> Tensor:
        images, latents = media_BTND.shape[1:3]
        media_time = torch.arange(images).repeat_interleave(latents) + 1
        q = split_heads(self.to_q(self.norm(x_BLD)), self.heads) * self.scale
        k, v = (split_heads(y, self.heads) for y in self.to_kv(media_BTND.flatten(1, 2)).chunk(2, dim=-1))
        sim = torch.einsum("bhid,bhjd->bhij", q, k)
        mask = text_time_BL[:, None, :, None] == media_time
        sim = sim.masked_fill(~mask, -torch.finfo(sim.dtype).max)
        attention = (sim - sim.amax(dim=-1, keepdim=True).detach()).softmax(dim=-1)
        attention = attention.masked_fill((text_time_BL == 0)[:, None, :, None], 0.0)
        out = torch.einsum("bhij,bhjd->bhid", attention, v)
        return self.to_out(out.transpose(1, 2).flatten(-2))


class GatedCrossAttentionBlock(nn.Module):
    """Gated attention, gated feed-forward."""

    def __init__(self, width: int, media_width: int, heads: int, head_dim: int) -> None:
        super().__init__()
        self.attention = MaskedCrossAttention(width, media_width, heads, head_dim)
        self.attention_gate = nn.Parameter(torch.zeros(1))
        self.feed_forward = feed_forward(width, 4)
        self.feed_forward_gate = nn.Parameter(torch.zeros(1))

    def forward(self, x_BLD: Tensor, media_BTND: Tensor, text_time_BL: Tensor) -> Tensor:
        x = self.attention(x_BLD, media_BTND, text_time_BL) * self.attention_gate.tanh() + x_BLD
        return self.feed_forward(x) * self.feed_forward_gate.tanh() + x


class FlamingoLayer(nn.Module):
    """A block of the language model after its cross-attention, conditioned from outside."""

    def __init__(self, cross_attention: GatedCrossAttentionBlock | None, block: nn.Module) -> None:
        super().__init__()
        self.cross_attention, self.block = cross_attention, block
        self.media: Tensor | None = None
        self.text_time: Tensor | None = None

    def forward(self, x_BLD: Tensor, *args: Any, **kwargs: Any) -> Any:
        if self.cross_attention is not None:
            x_BLD = self.cross_attention(x_BLD, self.media, self.text_time)
        return self.block(x_BLD, *args, **kwargs)


class NewRows(nn.Module):
    """A frozen table with trained rows for new tokens behind it."""

    def __init__(self, table: Tensor, rows: Tensor) -> None:
        super().__init__()
        self.table = nn.Parameter(table, requires_grad=False)
        self.rows = nn.Parameter(rows)


class Embedding(NewRows):
    """Ids to rows."""

    def forward(self, ids: Tensor) -> Tensor:
        known = F.embedding(ids.clamp(max=len(self.table) - 1), self.table)
        new = F.embedding((ids - len(self.table)).clamp(min=0), self.rows)
        return torch.where((ids >= len(self.table))[..., None], new, known)


class Head(NewRows):
    """Hidden states to the logits of all tokens."""

    def forward(self, hidden: Tensor) -> Tensor:
        return torch.cat([F.linear(hidden, self.table), F.linear(hidden, self.rows)], dim=-1)


class Baseline(nn.Module):
    """The same model as a ``Flamingo`` around Llama, with its weights (copied, but for the frozen tower)."""

    def __init__(self, ours: Flamingo, lm: Any) -> None:
        """lm: a second language model of the same configuration, as Hugging Face made it."""
        super().__init__()
        config, text = ours.config, ours.language_model
        self.image_id = ours.tokens.image_id
        self.vision_encoder = ours.vision_encoder
        width = ours.resampler.dim
        sizes = config.resampler
        self.perceiver = PerceiverResampler(
            width, sizes.num_layers, sizes.num_heads, sizes.head_dim, sizes.num_latents, sizes.num_frames
        )
        lm.load_state_dict(text.lm.state_dict())
        lm.requires_grad_(False).eval()
        inputs, outputs = (torch.cat([row.weight.data for row in rows]) for rows in (text.input_rows, text.output_rows))
        lm.set_input_embeddings(Embedding(lm.get_input_embeddings().weight.data, inputs))
        lm.lm_head = Head(lm.lm_head.weight.data, outputs)
        lm.config.vocab_size = text.vocabulary
        cross = ours.blocks_with_cross_attention()
        attention = config.cross_attention
        for index, block in enumerate(lm.model.layers):
            gated = None
            if index in cross:
                assert attention.num_heads is not None
                gated = GatedCrossAttentionBlock(text.width, width, attention.num_heads, attention.head_dim)
            lm.model.layers[index] = FlamingoLayer(gated, block)
        self.lm = lm
        self._copy(ours)

    def forward(self, batch: PaddedBatch) -> Tensor:
        """The mean loss over the labels."""
        rows = batch.vision_x.shape[:2]
        features = self.vision_encoder(batch.vision_x.flatten(0, 1)).unflatten(0, rows)
        media = self.perceiver(features)
        text_time = (batch.input_ids == self.image_id).cumsum(dim=-1)
        for layer in self.lm.model.layers:
            layer.media, layer.text_time = media, text_time
        out = self.lm(
            input_ids=batch.input_ids, attention_mask=batch.attention_mask, labels=batch.labels, use_cache=False
        )
        return out.loss

    def _copy(self, ours: Flamingo) -> None:
        self.perceiver.latents.data.copy_(ours.resampler.latents.data)
        self.perceiver.frame_embeddings.data.copy_(ours.resampler.time_embeddings.data)
        self.perceiver.norm.load_state_dict(ours.resampler.norm.state_dict())
        for (attention, forward), layer in zip(self.perceiver.layers, ours.resampler.layers, strict=True):
            _copy_attention(attention, layer.attention, "norm_media", "norm_features")
            attention.norm_latents.load_state_dict(layer.attention.norm_latents.state_dict())
            _copy_feed_forward(forward, layer.feed_forward)
        for index, block in ours.blocks_with_cross_attention().items():
            gated = self.lm.model.layers[index].cross_attention
            _copy_attention(gated.attention, block.attention, "norm", "norm")
            _copy_feed_forward(gated.feed_forward, block.feed_forward)
            gated.attention_gate.data.copy_(block.attention_gate.data)
            gated.feed_forward_gate.data.copy_(block.feed_forward_gate.data)


def _copy_attention(baseline: Any, ours: Any, baseline_norm: str, our_norm: str) -> None:
    getattr(baseline, baseline_norm).load_state_dict(getattr(ours, our_norm).state_dict())
    for theirs, name in (("to_q", "query"), ("to_kv", "key_value"), ("to_out", "output")):
        getattr(baseline, theirs).weight.data.copy_(getattr(ours, name).weight.data)


def _copy_feed_forward(baseline: nn.Sequential, ours: Any) -> None:
    for module, name in ((baseline[0], "norm"), (baseline[1], "up"), (baseline[3], "down")):
        module.load_state_dict(copy.deepcopy(getattr(ours, name).state_dict()))
