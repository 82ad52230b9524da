"""Make the image decoder that fits a vision tower, and describe for exports how training made pixels and text."""

from __future__ import annotations

from collections.abc import Sequence

from model.image_geometry import ImageFit
from model.processor import ProcessorConfig, VideoSampling
from model.vision_encoder import VisionEncoder
from trainer.config.data_config import AugmentConfig, DataConfig, MediaSource, VideoTextSource
from trainer.data.samples.image_decoder import ImageDecoder


def tower_decoder(
    encoder: VisionEncoder,
    fit: ImageFit = DataConfig.image_fit,
    image_tokens: int | None = None,
    *,
    max_pixels: int = DataConfig.max_pixels,
    augment: AugmentConfig | None = None,
) -> ImageDecoder:
    """Return the decoder from image bytes to the tower's input.

    Args:
        encoder: Vision encoder around the tower.
        fit: How an image becomes the tower's square (``data.image_fit``). Unused with ``image_tokens``.
        image_tokens: Most patches of an image, which then keeps its aspect; None makes squares.
        max_pixels: Most pixels of an image (``data.max_pixels``).
        augment: Random changes of each image; None makes none.

    Raises:
        ValueError: ``image_tokens`` is set, but the tower takes squares only.
    """
    if image_tokens is not None:
        require_patches(encoder, ["image_tokens"])
    geometry = ProcessorConfig.of(encoder, image_fit=fit).geometry(image_tokens)
    return ImageDecoder(**vars(geometry), max_pixels=max_pixels, augment=augment)


def require_patches(encoder: VisionEncoder, settings: Sequence[str]) -> int:
    """Return the patch size of a tower that takes images of any aspect.

    Args:
        encoder: Vision encoder around the tower.
        settings: Names of the settings that need such a tower, for the error.

    Raises:
        ValueError: The tower takes squares only.
    """
    if encoder.patch_size is None:
        raise ValueError(
            f"{', '.join(settings)}: the tower {encoder.config.name!r} takes squares only (its blocks take no "
            "attention mask). Leave it out, or use one of open_clip's own vision transformers, such as ViT-L-14"
        )
    return encoder.patch_size


def trained_processor(data: DataConfig, encoder: VisionEncoder) -> ProcessorConfig:
    """Describe how a run makes its media and the text after them, for its export.

    Where sources differ, the first one of a kind (images, videos) decides.
    """
    sources = [source for source in data.sources if isinstance(source, MediaSource)]
    videos = [source for source in sources if isinstance(source, VideoTextSource)]
    budgets = {source.name: source.image_tokens for source in sources if not isinstance(source, VideoTextSource)}
    video = None
    if videos:
        video = VideoSampling(videos[0].num_frames, videos[0].frames_per_second, videos[0].image_tokens)
    return ProcessorConfig.of(
        encoder,
        image_fit=data.image_fit,
        image_tokens=next(iter(budgets.values()), None),
        image_tokens_of_sources=budgets if len(set(budgets.values())) > 1 else {},
        video=video,
        space_after_image=puts_space_after_images(data),
    )


def puts_space_after_images(data: DataConfig) -> bool:
    """Return whether every text that follows a medium has a space before it."""
    sources = [source for source in data.sources if isinstance(source, MediaSource)]
    return bool(sources) and all(source.space_prefix_probability == 1 for source in sources)
