"""The whole model: vision encoder -> resampler -> language model with gated cross-attention.

Shape suffixes: B rows, L tokens, M media, F frames, C channels, Y and X pixels, R latents, W their width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from transformers.utils import ModelOutput

from model import media_index as media_indices
from model.config import FlamingoConfig
from model.gated_cross_attention import GatedCrossAttentionBlock, KeysValues
from model.language_model import BeforeBlock, Call, LanguageModel
from model.loss import labels_after, summed_cross_entropy, target_positions
from model.perceiver_resampler import PerceiverResampler
from model.tokens import SpecialTokenIds
from model.tower_patches import Grid, feature_offsets
from model.vision_encoder import VisionEncoder


@dataclass
class FlamingoOutput(ModelOutput):
    """loss: the SUM of the cross-entropy over all labels, a float32 scalar, where labels were given; logits
    [B, L, V] where they were not."""

    loss: Tensor | None = None
    logits: Tensor | None = None


class Flamingo(nn.Module):
    """Children: ``vision_encoder``, ``resampler``, ``cross_attention``, ``language_model``; see ``model.factory``.

    The vision encoder and ``language_model.lm`` are frozen, everything else trains. No module keeps anything between
    calls.
    """

    def __init__(
        self,
        config: FlamingoConfig,
        tokens: SpecialTokenIds,
        vision_encoder: VisionEncoder,
        resampler: PerceiverResampler,
        cross_attention: nn.ModuleList,
        language_model: LanguageModel,
    ) -> None:
        """cross_attention: one ``GatedCrossAttentionBlock`` for each of ``cross_attention_blocks``, in order."""
        super().__init__()
        self.config = config
        self.tokens = tokens
        self.vision_encoder = vision_encoder
        self.resampler = resampler
        self.cross_attention = cross_attention
        self.language_model = language_model

    @property
    def device(self) -> torch.device:
        """Where it computes, also while its parameters are partitioned or offloaded."""
        return self.vision_encoder.statistics_bits.device

    def activation_checkpointing(self, blocks: bool | int = True) -> None:
        """Recompute blocks of the language model, each with its cross-attention, in the backward: all, none, or the
        first so many. See ``LanguageModel.activation_checkpointing``."""
        self.language_model.activation_checkpointing(blocks)

    def encode_media(self, media: Tensor, media_grids: Sequence[Grid] | None = None) -> Tensor:
        """uint8 (or floating point in 0..1) pixels [M, F, 3, Y, X] -> latents [M, R, W].

        With ``media_grids``: patches of media of any shape, as ``VisionEncoder`` takes them.
        """
        features = self.vision_encoder(media, media_grids)
        latents: Tensor
        if media_grids is None:
            latents = self.resampler(features)
        else:
            latents = self.resampler(features, *feature_offsets(media_grids, media.device))
        return latents

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        media_index: Tensor | None = None,
        media: Tensor | None = None,
        position_ids: Tensor | None = None,
        media_grids: Sequence[Grid] | None = None,
        positions: Tensor | None = None,
    ) -> FlamingoOutput:
        """The loss of a batch, or its logits.

        Args:
            input_ids: int64 [B, L].
            attention_mask: [B, L], 1 for real tokens; None: all are.
            labels: int64 [B, L] at their token's own position (they are shifted here), -100 where nothing is trained.
            media_index: int64 [B, L], the row of ``media`` that each token sees, -1 for none; None: the preceding one.
            media: [M, F, 3, Y, X], uint8 or floating point in 0..1; None: text only, cross-attention adds exactly 0.
            position_ids: int64 [B, L], for packed documents: restarts at 0 with each of them. Give no attention mask
                then.
            media_grids: ``media`` are then patches of media of any shape, as ``VisionEncoder`` takes them.
            positions: int64 [N], ``target_positions`` of the labels; None: found here, and the host waits for a GPU.

        Returns:
            ``loss`` where labels are given, else ``logits``.
        """
        documents = None if position_ids is None else media_indices.documents_from_positions(position_ids)
        targets = None
        if labels is not None:
            positions = target_positions(labels) if positions is None else positions
            targets = labels_after(labels, positions)
        latents = None if media is None else self.encode_media(media, media_grids)
        if latents is not None and media_index is None:
            media_index = media_indices.preceding(input_ids, self.tokens.image_id, documents)
        first = None
        if latents is not None and media_index is not None and self.config.cross_attention.attend == "all":
            first = media_indices.first_media(media_index, documents)
        before: dict[int, BeforeBlock] = {
            index: partial(block, latents_MNW=latents, media_index_BL=media_index, first_media_BL=first)
            for index, block in self.blocks_with_cross_attention().items()
        }
        result = self.language_model(input_ids, attention_mask, position_ids, Call(before, positions, targets))
        if targets is None:
            return FlamingoOutput(logits=result)
        fused = self.language_model.fuses_loss
        return FlamingoOutput(loss=result if fused else summed_cross_entropy(result, targets))

    def project_media(self, latents: Tensor) -> dict[int, KeysValues]:
        """Keys and values of every cross-attention, by the block of the language model that it stands before."""
        return {index: block.project_media(latents) for index, block in self.blocks_with_cross_attention().items()}

    def blocks_with_cross_attention(self) -> dict[int, GatedCrossAttentionBlock]:
        """Block of the language model -> the cross-attention before it."""
        indices = cross_attention_blocks(self.config, self.language_model.blocks)
        return dict(zip(indices, self.cross_attention, strict=True))  # type: ignore[arg-type]  # ModuleList is untyped


def cross_attention_blocks(config: FlamingoConfig, blocks: int) -> list[int]:
    """Before which of the language model's blocks cross-attention stands.

    Raises:
        ValueError: before none.
    """
    every, offset = config.cross_attention.every_n_layers, config.cross_attention.offset
    if every < 1 or not 0 <= offset < blocks:
        raise ValueError(
            f"cross_attention.every_n_layers {every} and cross_attention.offset {offset} give no block of the language model's "
            f"{blocks}: set every >= 1 and 0 <= offset < {blocks}"
        )
    return list(range(offset, blocks, every))
