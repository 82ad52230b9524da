"""For each source of a run, what makes sequences of its samples."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from model.language_model import separates_packed_documents
from model.tokens import FlamingoTokenizer
from model.vision_encoder import VisionEncoder
from trainer.config.data_config import (
    DataConfig,
    ImageTextSource,
    InterleavedSource,
    Source,
    TextSource,
    VideoTextSource,
)
from trainer.data.samples.contrastive import ContrastiveBuilder
from trainer.data.samples.decode import ImageDecoder, PatchBudget
from trainer.data.samples.interleaved import InterleavedBuilder
from trainer.data.samples.pairs import ImageTextBuilder, VideoTextBuilder
from trainer.data.samples.row_builder import Builder
from trainer.data.samples.text import TextBuilder
from trainer.data.samples.text_encoding import PlainTextEncoder, TextEncoding
from trainer.data.samples.video import VideoDecoder


def flamingo_builders(
    data: DataConfig, tokenizer: FlamingoTokenizer, vision_encoder: VisionEncoder
) -> dict[str, Builder]:
    """Builders for ``trainer.train``. Raises ValueError where a source wants patches and the tower takes none."""
    check_image_tokens(data, vision_encoder)
    decoder = image_decoder(data, vision_encoder.image_size, vision_encoder.mean)
    make = partial(_flamingo_builder, encoding=flamingo_encoding(tokenizer), decoder=decoder)
    return {source.name: make(source, patch_size=vision_encoder.patch_size) for source in data.sources}


def _flamingo_builder(source: Source, encoding: TextEncoding, decoder: ImageDecoder, patch_size: int | None) -> Builder:
    if not isinstance(source, TextSource):
        decoder = replace(decoder, augment=source.augment)
        if source.image_tokens is not None and patch_size is not None:
            decoder = replace(decoder, budget=PatchBudget(source.image_tokens, patch_size))
    match source:
        case ImageTextSource():
            return ImageTextBuilder(
                encoding,
                decoder,
                max_tokens=source.max_tokens,
                space_prefix_probability=source.space_prefix_probability,
                end_of_sequence=source.end_of_sequence,
                filters=source.filters,
            )
        case VideoTextSource():
            return VideoTextBuilder(
                encoding,
                VideoDecoder(
                    decoder,
                    num_frames=source.num_frames,
                    frames_per_second=source.frames_per_second,
                    start=source.start,
                    max_seconds=source.max_seconds,
                ),
                max_tokens=source.max_tokens,
                space_prefix_probability=source.space_prefix_probability,
                end_of_sequence=source.end_of_sequence,
                filters=source.filters,
            )
        case InterleavedSource():
            return InterleavedBuilder(
                encoding,
                decoder,
                max_tokens=source.max_tokens,
                max_images=source.max_images,
                subsequence=source.subsequence,
                p_next=source.p_next,
                min_similarity=source.min_similarity,
                space_prefix_probability=source.space_prefix_probability,
                filters=source.filters,
            )
        case TextSource():
            return TextBuilder(encoding, max_tokens=source.max_tokens, filters=source.filters)


def text_builders(data: DataConfig, tokenizer: PreTrainedTokenizerBase) -> dict[str, Builder]:
    """Builders for ``trainer.pretrain_lm``: text sources only (the configuration was checked)."""
    eos = tokenizer.eos_token_id
    encoding = TextEncoding(PlainTextEncoder(tokenizer.backend_tokenizer), bos_id=eos, eos_id=eos, pad_id=eos)
    return {
        source.name: TextBuilder(encoding, max_tokens=source.max_tokens, filters=source.filters)
        for source in data.sources
    }


def contrastive_builders(
    data: DataConfig, tokenize: Callable[[str], Tensor], image_size: int, mean: tuple[float, ...]
) -> dict[str, Builder]:
    """Builders for ``trainer.pretrain_vision``: image-text sources only (the configuration was checked)."""
    decoder = image_decoder(data, image_size, mean)
    return {
        source.name: ContrastiveBuilder(tokenize, replace(decoder, augment=source.augment), source.filters)
        for source in data.sources
        if isinstance(source, ImageTextSource)
    }


def check_image_tokens(data: DataConfig, vision_encoder: VisionEncoder) -> None:
    """Raises ValueError where a source keeps the aspect of its images and the tower takes squares only."""
    wanted = [
        f"data.sources.{number}.image_tokens"
        for number, source in enumerate(data.sources)
        if not isinstance(source, TextSource) and source.image_tokens is not None
    ]
    if wanted and vision_encoder.patch_size is None:
        raise ValueError(
            f"{', '.join(wanted)}: the tower {vision_encoder.config.name!r} takes squares only (its blocks take no "
            "attention mask): leave this out, or take one of open_clip's own vision transformers, such as ViT-L-14"
        )


def check_packing(data: DataConfig, lm: nn.Module) -> None:
    """Raises ValueError where a source packs and the language model would let its documents see one another."""
    packed = [f"data.sources.{number}.packing" for number, source in enumerate(data.sources) if source.packing]
    if packed and not separates_packed_documents(lm):
        raise ValueError(
            f"{', '.join(packed)}: {type(lm).__name__} does not keep packed documents apart (its attention mask "
            "ignores their positions, or it has layers that are no attention): set pack to false, or take another model"
        )


def flamingo_encoding(tokenizer: FlamingoTokenizer) -> TextEncoding:
    """The tokenizer as the data sees it: plain text never becomes a special token."""
    return TextEncoding(
        PlainTextEncoder(tokenizer.tokenizer.backend_tokenizer),
        bos_id=tokenizer.bos_id,
        eos_id=tokenizer.eos_id,
        pad_id=tokenizer.pad_id,
        image_id=tokenizer.image_id,
        end_of_chunk_id=tokenizer.end_of_chunk_id,
    )


def image_decoder(data: DataConfig, image_size: int, mean: tuple[float, ...]) -> ImageDecoder:
    """Bytes to the tower's square; ``mean`` in 0..1 is the color of what is padded."""
    red, green, blue = (round(255 * value) for value in mean)
    return ImageDecoder(image_size, data.image_fit, (red, green, blue), data.max_pixels)
