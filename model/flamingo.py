"""Join the parts of the model: vision encoder -> resampler -> language model with gated cross-attention."""

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
from model.loss import find_target_positions, gather_labels, summed_cross_entropy
from model.perceiver_resampler import PerceiverResampler
from model.tokens import SpecialTokenIds
from model.tower_patches import Grid, feature_offsets
from model.vision_encoder import VisionEncoder


@dataclass
class FlamingoOutput(ModelOutput):
    """Hold the result of a forward.

    Attributes:
        loss: SUM of the cross-entropy over all labels, a float32 scalar, where labels were given.
        logits: [B, L, Z], where no labels were given.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None


class Flamingo(nn.Module):
    """Compute loss or logits of text with media; ``model.factory`` builds it.

    The vision encoder and ``language_model.lm`` are frozen, everything else trains. No module keeps anything between
    calls.

    Attributes:
        config: Settings of the model.
        tokens: Ids of the special tokens.
        vision_encoder: Frozen image tower.
        resampler: Perceiver resampler.
        cross_attention: Gated cross-attentions in the order of ``cross_attention_blocks``.
        language_model: Frozen language model.
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
        """Join parts that fit each other; ``cross_attention`` holds ``GatedCrossAttentionBlock``."""
        super().__init__()
        self.config = config
        self.tokens = tokens
        self.vision_encoder = vision_encoder
        self.resampler = resampler
        self.cross_attention = cross_attention
        self.language_model = language_model

    @property
    def device(self) -> torch.device:
        """Device of the computation, also while parameters are partitioned or offloaded."""
        return self.vision_encoder.statistics_bits.device

    def set_activation_checkpointing(self, num_blocks: bool | int = True) -> None:
        """Set how many blocks of the language model, each with its cross-attention, the backward recomputes.

        ``LanguageModel.set_activation_checkpointing`` explains ``num_blocks``.
        """
        self.language_model.set_activation_checkpointing(num_blocks)

    def encode_media(self, media: Tensor, media_grids: Sequence[Grid] | None = None) -> Tensor:
        """Return the latents [M, R, W] of media.

        Args:
            media: [M, F, 3, Y, X], uint8 or floating point in 0..1; with ``media_grids`` the patches of media of any
                shape, as ``VisionEncoder`` takes them.
            media_grids: Frames, rows and columns of patches of each medium.

        Raises:
            ValueError: Media of any shape have more frames than trained time embeddings.
        """
        most, trained = max((frames for frames, _, _ in media_grids or ()), default=0), self.config.resampler.num_frames
        if most > trained:
            raise ValueError(
                f"a medium of patches has {most} frames, but the resampler has time embeddings of {trained}, which are "
                "interpolated for squares only: take fewer frames (num_frames), or squares (no image_tokens)"
            )
        features = self.vision_encoder(media, media_grids)
        latents_MRW: Tensor
        if media_grids is None:
            latents_MRW = self.resampler(features)
        else:
            latents_MRW = self.resampler(features, *feature_offsets(media_grids, media.device))
        return latents_MRW

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        media_index: Tensor | None = None,
        media: Tensor | None = None,
        position_ids: Tensor | None = None,
        media_grids: Sequence[Grid] | None = None,
        target_positions: Tensor | None = None,
    ) -> FlamingoOutput:
        """Return the loss of a batch, or its logits where there are no labels.

        Args:
            input_ids: int64 [B, L].
            attention_mask: [B, L], 1 for real tokens; None where all are real.
            labels: int64 [B, L] at their token's own position (they are shifted here), -100 where nothing is trained.
            media_index: int64 [B, L], the medium that each token sees, -1 for none; None takes the preceding medium.
            media: As for ``encode_media``. None for text alone, to which cross-attention adds exactly 0.
            position_ids: int64 [B, L] of packed documents, restarting at 0 with each; leave out the attention mask
                then.
            media_grids: As for ``encode_media``.
            target_positions: int64 [N], ``find_target_positions`` of the labels; None finds them here, which waits for
                a GPU.
        """
        documents = None if position_ids is None else media_indices.documents_from_positions(position_ids)
        targets = None
        if labels is not None:
            target_positions = find_target_positions(labels) if target_positions is None else target_positions
            targets = gather_labels(labels, target_positions)
        latents = None if media is None else self.encode_media(media, media_grids)
        if latents is not None and media_index is None:
            media_index = media_indices.preceding(input_ids, self.tokens.image_id, documents)
        first = None
        if latents is not None and media_index is not None and self.config.cross_attention.attend == "all":
            first = media_indices.first_media(media_index, documents)
        before: dict[int, BeforeBlock] = {
            index: partial(block, latents_MRW=latents, media_index_BL=media_index, first_media_BL=first)
            for index, block in self.blocks_with_cross_attention().items()
        }
        call = Call(before, target_positions, targets)
        result = self.language_model(input_ids, attention_mask, position_ids, call)
        if targets is None:
            return FlamingoOutput(logits=result)
        fused = self.language_model.fuses_loss
        return FlamingoOutput(loss=result if fused else summed_cross_entropy(result, targets))

    def project_media(self, latents: Tensor) -> dict[int, KeysValues]:
        """Return keys and values of every cross-attention, by the index of the language model's block after it."""
        return {index: block.project_media(latents) for index, block in self.blocks_with_cross_attention().items()}

    def blocks_with_cross_attention(self) -> dict[int, GatedCrossAttentionBlock]:
        """Return every cross-attention by the index of the language model's block after it."""
        indices = cross_attention_blocks(self.config, self.language_model.num_blocks)
        return dict(zip(indices, self.cross_attention, strict=True))  # type: ignore[arg-type]  # ModuleList is untyped


def cross_attention_blocks(config: FlamingoConfig, num_blocks: int) -> list[int]:
    """Return the indices of the language model's blocks that have a cross-attention before them.

    Raises:
        ValueError: There would be none.
    """
    every, offset = config.cross_attention.every_n_layers, config.cross_attention.offset
    if every < 1 or not 0 <= offset < num_blocks:
        raise ValueError(
            f"cross_attention.every_n_layers {every} and cross_attention.offset {offset} give no block of the language "
            f"model's {num_blocks}: set every_n_layers >= 1 and 0 <= offset < {num_blocks}"
        )
    return list(range(offset, num_blocks, every))
