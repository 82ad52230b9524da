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
from model.loss import find_target_positions, gather_labels, summed_cross_entropy, summed_divergence
from model.ops import find_token_ranges
from model.perceiver_resampler import LinearProjector, PerceiverResampler
from model.seen_media import MediaBlocks, SeenMedia, find_seen_media
from model.tokens import SpecialTokenIds
from model.tower_patches import Grid, PatchLayout
from model.vision_encoder import VisionEncoder


@dataclass
class FlamingoOutput(ModelOutput):
    """Hold the result of a forward.

    Attributes:
        loss: SUM of the cross-entropy over all labels, a float32 scalar, where labels were given.
        logits: [B, L, Z], where no labels were given.
        divergence: SUM over all labels of KL(this model || the language model alone), a float32 scalar, if asked for.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    divergence: Tensor | None = None


class Flamingo(nn.Module):
    """Compute loss or logits of text with media; ``model.factory`` builds it.

    The vision encoder and ``language_model.lm`` are frozen, everything else trains. No module keeps anything between
    calls.

    Attributes:
        config: Settings of the model.
        tokens: Ids of the special tokens.
        vision_encoder: Frozen image tower.
        resampler: Perceiver resampler, or linear projector.
        cross_attention: Gated cross-attentions in the order of ``cross_attention_blocks``.
        language_model: Frozen language model.
    """

    def __init__(
        self,
        config: FlamingoConfig,
        tokens: SpecialTokenIds,
        vision_encoder: VisionEncoder,
        resampler: PerceiverResampler | LinearProjector,
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
        return next(self.resampler.parameters()).device

    def blocks(self) -> list[nn.Module]:
        """Return modules that use all of their parameters in each call, and whose parameters nothing else reads."""
        return [*self.vision_encoder.blocks, *self.resampler.layers, *self.language_model.decoder_blocks()]

    def set_activation_checkpointing(self, num_blocks: bool | int = True) -> None:
        """Set how many blocks of the language model, each with its cross-attention, the backward recomputes.

        ``LanguageModel.set_activation_checkpointing`` explains ``num_blocks``.
        """
        self.language_model.set_activation_checkpointing(num_blocks)

    def encode_media(
        self, media: Tensor, media_grids: Sequence[Grid] | None = None, patch_layout: PatchLayout | None = None
    ) -> Tensor:
        """Return the latents of media: [M, R, W] from a perceiver, or the blocks of ``media_blocks`` from a projector.

        Args:
            media: [M, F, 3, Y, X], uint8 or floating point in 0..1; with ``media_grids`` the patches of media of any
                shape, as ``VisionEncoder`` takes them.
            media_grids: Frames, rows and columns of patches of each medium.
            patch_layout: ``PatchLayout.of(media_grids)``, on the device of the media; None computes it here, which
                waits for a GPU.

        Raises:
            ValueError: Media of any shape have more frames than trained time embeddings.
        """
        layout = None
        if media_grids is not None:
            layout = patch_layout or PatchLayout.of(media_grids).to(media.device)
        features = self.vision_encoder(media, media_grids, layout)
        latents_MRW: Tensor
        if isinstance(self.resampler, LinearProjector):
            return self.resampler(features.reshape(-1, self._block_size(media_grids), features.shape[-1]))
        if layout is None:
            latents_MRW = self.resampler(features)
            return latents_MRW
        most, trained = max(frames for frames, _, _ in media_grids or ()), self.config.resampler.num_frames
        if trained and most > trained:
            raise ValueError(
                f"a medium of patches has {most} frames, but the resampler has time embeddings of {trained}, which are "
                "interpolated for squares only: take fewer frames (num_frames), or squares (no image_tokens)"
            )
        each = self.vision_encoder.features_per_patch
        frame_of_feature = layout.frame_of_patch if each == 1 else layout.frame_of_patch.repeat_interleave(each)
        latents_MRW = self.resampler(features, layout.cu_media * each, frame_of_feature)
        return latents_MRW

    def media_blocks(
        self, media: Tensor, media_grids: Sequence[Grid] | None = None, patch_layout: PatchLayout | None = None
    ) -> MediaBlocks | None:
        """Return how the latents of ``encode_media`` belong to the media; None where each medium is one block.

        Raises:
            ValueError: Media of several frames have tiles that fill them up.
        """
        if not isinstance(self.resampler, LinearProjector):
            return None
        tiles = self.vision_encoder.max_tiles if self.config.vision.padding_tiles else None
        if media_grids is None:
            num_media, num_frames = media.shape[:2]
            layout = None
        else:
            layout = patch_layout or PatchLayout.of(media_grids).to(media.device)
            num_media, num_frames = len(media_grids), max(frames for frames, _, _ in media_grids)
        offsets = torch.arange(num_media + 1, device=media.device)
        if tiles is not None:
            if num_frames > 1:
                raise ValueError("vision.padding_tiles: media have one frame, no video; set it to false")
            number_M = torch.ones_like(offsets[1:]) if layout is None else layout.patches_per_image
            return MediaBlocks(offsets * tiles, number_M)
        if layout is not None:
            return MediaBlocks(layout.cu_media)
        return None if num_frames == 1 else MediaBlocks(offsets * num_frames)

    def find_seen_media(
        self, input_ids: Tensor, media_index: Tensor, documents: Tensor | None, blocks: MediaBlocks | None
    ) -> SeenMedia:
        """Return the blocks of latents that each token attends to; ``model.seen_media`` explains the arguments."""
        is_image = input_ids == self.tokens.image_id
        return find_seen_media(self.config.cross_attention, media_index, is_image, documents, blocks)

    def _block_size(self, media_grids: Sequence[Grid] | None) -> int:
        """Return the latents of a block of a projector: of a frame, a tile, or with grids of a patch."""
        encoder = self.vision_encoder
        if media_grids is not None or encoder.max_tiles is not None:
            return encoder.features_per_patch
        return encoder.num_features

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
        patch_layout: PatchLayout | None = None,
        document_offsets: Tensor | None = None,
        longest_document: int | None = None,
        diverges: bool = False,
    ) -> FlamingoOutput:
        """Return the loss of a batch, or its logits where there are no labels.

        Args:
            input_ids: int64 [B, L].
            attention_mask: [B, L], 1 for real tokens. None where all are real, or where padding comes after them: the
                language model is causal, so no real token sees it. A mask costs a GPU its fastest attention.
            labels: int64 [B, L] at their token's own position (they are shifted here), -100 where nothing is trained.
            media_index: int64 [B, L], the medium that each token sees, -1 for none; None takes the preceding medium.
            media: As for ``encode_media``. None for text alone, to which cross-attention adds exactly 0.
            position_ids: int64 [B, L] of packed documents, restarting at 0 with each; leave out the attention mask
                then. Some row has two documents or more.
            media_grids: As for ``encode_media``.
            target_positions: int64 [N], ``find_target_positions`` of the labels; None finds them here, which waits for
                a GPU.
            patch_layout: As for ``encode_media``.
            document_offsets: int32 [N + 1], ``media_index.find_documents`` of the positions, with ``longest_document``;
                None finds them here if the attention needs them, which waits for a GPU.
            longest_document: Tokens of the longest packed document.
            diverges: Whether the divergence is computed too, with labels only. It holds the logits of both models.
        """
        documents = None if position_ids is None else media_indices.documents_from_positions(position_ids)
        targets = None
        if labels is not None:
            target_positions = find_target_positions(labels) if target_positions is None else target_positions
            targets = gather_labels(labels, target_positions)
        latents = None if media is None else self.encode_media(media, media_grids, patch_layout)
        seen, token_ranges = None, None
        if media is not None and latents is not None:
            if media_index is None:
                media_index = media_indices.preceding(input_ids, self.tokens.image_id, documents)
            blocks = self.media_blocks(media, media_grids, patch_layout)
            seen = self.find_seen_media(input_ids, media_index, documents, blocks)
            latents = latents if seen.order is None else latents[seen.order]
            one_head = latents.new_empty(0, self.config.cross_attention.head_dim)
            token_ranges = find_token_ranges(seen.last, seen.first, latents.shape[0], one_head)
        before: dict[int, BeforeBlock] = {
            index: partial(
                block,
                latents_MRW=latents,
                media_index_BL=None if seen is None else seen.last,
                first_media_BL=None if seen is None else seen.first,
                has_media_BL=None if seen is None else seen.has_media,
                token_ranges=token_ranges,
            )
            for index, block in self.blocks_with_cross_attention().items()
        }
        wanted = None if diverges else targets
        call = Call(before, target_positions, wanted, document_offsets, longest_document)
        result = self.language_model(input_ids, attention_mask, position_ids, call)
        if targets is None:
            return FlamingoOutput(logits=result)
        if diverges:
            base = self.language_model.base_logits(input_ids, attention_mask, position_ids, call)
            divergence = summed_divergence(result, base, self.language_model.own_tokens(result.device))
            return FlamingoOutput(loss=summed_cross_entropy(result, targets), divergence=divergence)
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
