"""Implement the model as OpenFlamingo does: the baseline of ``trainer.benchmark openflamingo``.

As in OpenFlamingo, rows are padded to a fixed length, and documents to six images. The attentions are einsums with a
dense mask over all images of a row. The language model has one embedding table that includes the new tokens, and
computes the logits of all positions. The tower runs without a graph, and so do blocks of the language model that need
no gradient. One thing is better than in OpenFlamingo: only the embeddings of the two new tokens train, instead of whole
tables with a masked gradient.

Shape letters are those of ``model``, except that M counts the images of one row, padding included.
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
    """Hold padded rows.

    Attributes:
        vision_x: uint8 [B, M, F, 3, height, width].
        input_ids: int64 [B, L].
        attention_mask: int64 [B, L].
        labels: int64 [B, L].
    """

    vision_x: Tensor
    input_ids: Tensor
    attention_mask: Tensor
    labels: Tensor


def padded_batch(rows: list[Row], num_tokens: int, num_images: int, pad_id: int) -> PaddedBatch:
    """Pad every row to a number of tokens and, with black ones, of images."""
    shape = (len(rows), num_tokens)
    ids, mask = torch.full(shape, pad_id), torch.zeros(shape, dtype=torch.int64)
    labels = torch.full(shape, IGNORED_LABEL)
    vision_x = torch.zeros(len(rows), num_images, *rows[0].media[0].shape, dtype=torch.uint8)
    for number, row in enumerate(rows):
        length = len(row.input_ids)
        ids[number, :length], mask[number, :length], labels[number, :length] = row.input_ids, 1, row.labels
        for place, medium in enumerate(row.media):
            vision_x[number, place] = medium
    return PaddedBatch(vision_x, ids, mask, labels)


def feed_forward(dim: int, ff_mult: int) -> nn.Sequential:
    """Return LayerNorm, up projection, GELU and down projection."""
    return nn.Sequential(
        nn.LayerNorm(dim),
        nn.Linear(dim, ff_mult * dim, bias=False),
        nn.GELU(),
        nn.Linear(ff_mult * dim, dim, bias=False),
    )


def split_heads(x: Tensor, num_heads: int) -> Tensor:
    """Reshape [B, ..., H * K] to [B, H, ..., K]."""
    return x.unflatten(-1, (num_heads, -1)).movedim(-2, 1)


class PerceiverAttention(nn.Module):
    """Let latents attend to the concatenated features and latents of their image."""

    def __init__(self, dim: int, num_heads: int, head_dim: int) -> None:
        super().__init__()
        self.num_heads, self.scale = num_heads, head_dim**-0.5
        inner = num_heads * head_dim
        self.norm_media, self.norm_latents = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.to_q = nn.Linear(dim, inner, bias=False)
        self.to_kv = nn.Linear(dim, 2 * inner, bias=False)
        self.to_out = nn.Linear(inner, dim, bias=False)

    def forward(self, x_BMSW: Tensor, latents_BMRW: Tensor) -> Tensor:
        x, latents = self.norm_media(x_BMSW), self.norm_latents(latents_BMRW)
        q = split_heads(self.to_q(latents), self.num_heads) * self.scale
        k, v = (split_heads(y, self.num_heads) for y in self.to_kv(torch.cat((x, latents), dim=-2)).chunk(2, dim=-1))
        sim = torch.einsum("bhtid,bhtjd->bhtij", q, k)
        attention = (sim - sim.amax(dim=-1, keepdim=True).detach()).softmax(dim=-1)
        out = torch.einsum("bhtij,bhtjd->bhtid", attention, v)
        return self.to_out(out.movedim(1, -2).flatten(-2))


class PerceiverResampler(nn.Module):
    """Turn the features [B, M, F, S, W] of an image into its latents [B, M, R, W]."""

    def __init__(
        self, dim: int, num_layers: int, num_heads: int, head_dim: int, num_latents: int, num_frames: int
    ) -> None:
        super().__init__()
        self.latents = nn.Parameter(torch.empty(num_latents, dim))
        self.frame_embeddings = nn.Parameter(torch.empty(num_frames, dim))
        self.layers = nn.ModuleList(
            nn.ModuleList([PerceiverAttention(dim, num_heads, head_dim), feed_forward(dim, 4)])
            for _ in range(num_layers)
        )
        self.norm = nn.LayerNorm(dim)

    def forward(self, x_BMFSW: Tensor) -> Tensor:
        x = x_BMFSW + self.frame_embeddings[: x_BMFSW.shape[2], None]
        x = x.flatten(2, 3)
        latents = self.latents.expand(*x.shape[:2], -1, -1)
        for attention, forward in self.layers:
            latents = attention(x, latents) + latents
            latents = forward(latents) + latents
        return self.norm(latents)


class MaskedCrossAttention(nn.Module):
    """Let text attend to the images of its row, under a dense mask that leaves the last one before each token."""

    def __init__(self, dim: int, media_dim: int, num_heads: int, head_dim: int) -> None:
        super().__init__()
        self.num_heads, self.scale = num_heads, head_dim**-0.5
        inner = num_heads * head_dim
        self.norm = nn.LayerNorm(dim)
        self.to_q = nn.Linear(dim, inner, bias=False)
        self.to_kv = nn.Linear(media_dim, 2 * inner, bias=False)
        self.to_out = nn.Linear(inner, dim, bias=False)

    def forward(self, x_BLD: Tensor, media_BMRW: Tensor, text_time_BL: Tensor) -> Tensor:
        num_images, num_latents = media_BMRW.shape[1:3]
        media_time = torch.arange(num_images).repeat_interleave(num_latents) + 1
        q = split_heads(self.to_q(self.norm(x_BLD)), self.num_heads) * self.scale
        k, v = (split_heads(y, self.num_heads) for y in self.to_kv(media_BMRW.flatten(1, 2)).chunk(2, dim=-1))
        sim = torch.einsum("bhid,bhjd->bhij", q, k)
        mask = text_time_BL[:, None, :, None] == media_time
        sim = sim.masked_fill(~mask, -torch.finfo(sim.dtype).max)
        attention = (sim - sim.amax(dim=-1, keepdim=True).detach()).softmax(dim=-1)
        attention = attention.masked_fill((text_time_BL == 0)[:, None, :, None], 0.0)
        out = torch.einsum("bhij,bhjd->bhid", attention, v)
        return self.to_out(out.transpose(1, 2).flatten(-2))


class GatedCrossAttentionBlock(nn.Module):
    """Apply gated cross-attention and a gated feed-forward."""

    def __init__(self, dim: int, media_dim: int, num_heads: int, head_dim: int) -> None:
        super().__init__()
        self.attention = MaskedCrossAttention(dim, media_dim, num_heads, head_dim)
        self.attention_gate = nn.Parameter(torch.zeros(1))
        self.feed_forward = feed_forward(dim, 4)
        self.feed_forward_gate = nn.Parameter(torch.zeros(1))

    def forward(self, x_BLD: Tensor, media_BMRW: Tensor, text_time_BL: Tensor) -> Tensor:
        x = self.attention(x_BLD, media_BMRW, text_time_BL) * self.attention_gate.tanh() + x_BLD
        return self.feed_forward(x) * self.feed_forward_gate.tanh() + x


class FlamingoLayer(nn.Module):
    """Run a block of the language model after its cross-attention, on media that the model sets."""

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
    """Hold a frozen table, and trained rows for the new tokens that follow it."""

    def __init__(self, table: Tensor, rows: Tensor) -> None:
        super().__init__()
        self.table = nn.Parameter(table, requires_grad=False)
        self.rows = nn.Parameter(rows)


class Embedding(NewRows):
    """Look up the embeddings of token ids."""

    def forward(self, ids: Tensor) -> Tensor:
        known = F.embedding(ids.clamp(max=len(self.table) - 1), self.table)
        new = F.embedding((ids - len(self.table)).clamp(min=0), self.rows)
        return torch.where((ids >= len(self.table))[..., None], new, known)


class Head(NewRows):
    """Turn hidden states into the logits of all tokens."""

    def forward(self, hidden: Tensor) -> Tensor:
        return torch.cat([F.linear(hidden, self.table), F.linear(hidden, self.rows)], dim=-1)


class Baseline(nn.Module):
    """The same model as a ``Flamingo`` around Llama, with copies of its weights and its own frozen tower."""

    def __init__(self, ours: Flamingo, lm: Any) -> None:
        """Build the model.

        Args:
            ours: Model to copy the weights from.
            lm: Another language model of the same configuration, as Hugging Face builds it.
        """
        super().__init__()
        config, text = ours.config, ours.language_model
        self.image_id = ours.tokens.image_id
        self.vision_encoder = ours.vision_encoder
        media_dim = ours.resampler.dim
        sizes = config.resampler
        self.perceiver = PerceiverResampler(
            media_dim, sizes.num_layers, sizes.num_heads, sizes.head_dim, sizes.num_latents, sizes.num_frames
        )
        lm.load_state_dict(text.lm.state_dict())
        lm.requires_grad_(False).eval()
        inputs, outputs = (torch.cat([row.weight.data for row in rows]) for rows in (text.input_rows, text.output_rows))
        lm.set_input_embeddings(Embedding(lm.get_input_embeddings().weight.data, inputs))
        lm.lm_head = Head(lm.lm_head.weight.data, outputs)
        lm.config.vocab_size = text.vocab_size
        cross = ours.blocks_with_cross_attention()
        attention = config.cross_attention
        for index, block in enumerate(lm.model.layers):
            gated = None
            if index in cross:
                assert attention.num_heads is not None
                gated = GatedCrossAttentionBlock(text.dim, media_dim, attention.num_heads, attention.head_dim)
            lm.model.layers[index] = FlamingoLayer(gated, block)
        self.lm = lm
        self._copy(ours)

    def forward(self, batch: PaddedBatch) -> Tensor:
        """Return the mean loss over the labels."""
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
