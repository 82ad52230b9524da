"""Choose the row builder of each source of a run."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from model.image_geometry import padding_color
from model.processor import PlainTextEncoder
from model.tokens import FlamingoTokenizer
from model.vision_encoder import VisionEncoder
from trainer.config.data_config import (
    DataConfig,
    ImageTextSource,
    InterleavedSource,
    MediaSource,
    Source,
    TextSource,
    VideoTextSource,
)
from trainer.data.samples.contrastive_rows import ContrastiveBuilder
from trainer.data.samples.image_decoder import ImageDecoder
from trainer.data.samples.interleaved_rows import InterleavedBuilder
from trainer.data.samples.pair_rows import PairBuilder
from trainer.data.samples.rows import RowBuilder
from trainer.data.samples.text_encoding import TextEncoding
from trainer.data.samples.text_rows import TextBuilder
from trainer.data.samples.tower_decoder import require_patches, tower_decoder
from trainer.data.samples.video_decoder import VideoDecoder


def flamingo_builders(
    data: DataConfig, tokenizer: FlamingoTokenizer, vision_encoder: VisionEncoder
) -> dict[str, RowBuilder]:
    """Return the builders for ``trainer.train`` by the name of their source.

    Raises:
        ValueError: A source sets ``image_tokens``, but the tower takes squares only.
    """
    check_image_tokens(data, vision_encoder)
    encoding = flamingo_encoding(tokenizer)
    return {source.name: _flamingo_builder(source, data, encoding, vision_encoder) for source in data.sources}


def _flamingo_builder(
    source: Source, data: DataConfig, encoding: TextEncoding, vision_encoder: VisionEncoder
) -> RowBuilder:
    if isinstance(source, TextSource):
        return TextBuilder(source, encoding)
    decoder = tower_decoder(
        vision_encoder, data.image_fit, source.image_tokens, max_pixels=data.max_pixels, augment=source.augment
    )
    match source:
        case ImageTextSource():
            return PairBuilder(source, encoding, decoder)
        case VideoTextSource():
            return PairBuilder(source, encoding, VideoDecoder(source, decoder))
        case InterleavedSource():
            return InterleavedBuilder(source, encoding, decoder)


def text_builders(data: DataConfig, tokenizer: PreTrainedTokenizerBase) -> dict[str, RowBuilder]:
    """Return the builders for ``trainer.pretrain_lm``, whose configuration allows text sources only."""
    eos = tokenizer.eos_token_id
    encoding = TextEncoding(PlainTextEncoder(tokenizer.backend_tokenizer), bos_id=eos, eos_id=eos, pad_id=eos)
    return {source.name: TextBuilder(source, encoding) for source in data.sources if isinstance(source, TextSource)}


def contrastive_builders(
    data: DataConfig, tokenize: Callable[[str], Tensor], image_size: int, mean: tuple[float, ...]
) -> dict[str, RowBuilder]:
    """Return the builders for ``trainer.pretrain_vision``, whose configuration allows image-text sources only.

    Args:
        data: Settings of the data.
        tokenize: Caption -> int64 [context length].
        image_size: Side of the tower's square in pixels.
        mean: Mean of the tower's input, in 0..1 for each channel.
    """
    return {
        source.name: ContrastiveBuilder(
            source,
            tokenize,
            ImageDecoder(
                image_size,
                data.image_fit,
                padding_color(mean),
                max_pixels=data.max_pixels,
                augment=source.augment,
            ),
            augments_on_device=data.augmentation == "device",
        )
        for source in data.sources
        if isinstance(source, ImageTextSource)
    }


def check_image_tokens(data: DataConfig, vision_encoder: VisionEncoder) -> None:
    """Check that the tower suits the sources that set ``image_tokens``.

    Raises:
        ValueError: The tower takes squares only; the error names all of these sources.
    """
    settings = [
        f"data.sources.{number}.image_tokens"
        for number, source in enumerate(data.sources)
        if isinstance(source, MediaSource) and source.image_tokens is not None
    ]
    if settings:
        require_patches(vision_encoder, settings)


def flamingo_encoding(tokenizer: FlamingoTokenizer) -> TextEncoding:
    """Return the tokenizer as an encoding that never turns text into special tokens."""
    return TextEncoding(
        PlainTextEncoder(tokenizer.tokenizer.backend_tokenizer),
        bos_id=tokenizer.bos_id,
        eos_id=tokenizer.eos_id,
        pad_id=tokenizer.pad_id,
        image_id=tokenizer.image_id,
        end_of_chunk_id=tokenizer.end_of_chunk_id,
    )
