"""Make the image decoder that fits a vision tower, the same for training and for prompts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from model.vision_encoder import VisionEncoder
from trainer.config.data_config import AugmentConfig, DataConfig
from trainer.data.samples.image_decoder import ImageDecoder, PatchBudget, padding_color


def tower_decoder(
    encoder: VisionEncoder,
    fit: Literal["pad", "crop", "stretch"] = DataConfig.image_fit,
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
    budget = None
    if image_tokens is not None:
        patch_size = require_patches(encoder, ["image_tokens"])
        budget = PatchBudget(image_tokens, patch_size)
    return ImageDecoder(encoder.image_size, fit, padding_color(encoder.mean), max_pixels, augment, budget)


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
