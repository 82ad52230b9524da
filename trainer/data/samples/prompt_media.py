"""Read the images and videos of a prompt as training read them, and turn them into the model's media."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from torch import Tensor

from model.image_geometry import ImageFit
from model.media_inputs import media_inputs, prompt_inputs
from model.processor import PROCESSOR_FILE, ProcessorConfig, VideoSampling
from model.tower_patches import Grid
from trainer.config.data_config import VideoTextSource
from trainer.data.errors import SampleError
from trainer.data.samples.image_decoder import ImageDecoder
from trainer.data.samples.video_decoder import VideoDecoder

Media = tuple[Tensor | None, tuple[Grid, ...] | None]  # media and media_grids of the model

_log = logging.getLogger(__name__)


def prompt_image_decoder(processor: ProcessorConfig) -> ImageDecoder:
    """Return the decoder of images, without random changes.

    Raises:
        ValueError: ``image_tokens`` is set, but the tower takes squares only.
    """
    return ImageDecoder(**vars(processor.geometry(processor.image_tokens)))


def prompt_video_decoder(processor: ProcessorConfig) -> VideoDecoder:
    """Return the decoder of videos of any length, whose frames lie in the center.

    Raises:
        ValueError: The processor has no settings of videos, or ``image_tokens`` is set and the tower takes squares
            only.
    """
    if processor.video is None:
        raise ValueError("the processor has no settings of videos")
    source = VideoTextSource(
        name="prompt",
        manifest=Path(),
        batch_size=1,
        num_frames=processor.video.num_frames,
        frames_per_second=processor.video.frames_per_second,
        start="center",
        max_seconds=math.inf,
    )
    return VideoDecoder(source, ImageDecoder(**vars(processor.geometry(processor.video.image_tokens))))


def override(
    processor: ProcessorConfig,
    folder: Path,
    *,
    image_fit: tuple[str, ImageFit | None],
    image_tokens: tuple[str, int | None],
) -> ProcessorConfig:
    """Replace settings of an export's processor, with a warning where training had others.

    Args:
        processor: Processor of the export.
        folder: Export folder, for the warning.
        image_fit: Name of the setting, and its value; None keeps that of the export.
        image_tokens: Name of the setting, and its value; None keeps that of the export, 0 makes squares.
    """
    changed = processor
    if image_fit[1] is not None:
        changed = replace(changed, image_fit=image_fit[1])
    if image_tokens[1] is not None:
        budget = image_tokens[1] or None
        video = None if changed.video is None else replace(changed.video, image_tokens=budget)
        changed = replace(changed, image_tokens=budget, image_tokens_of_sources={}, video=video)
    for (setting, _), name in ((image_fit, "image_fit"), (image_tokens, "image_tokens")):
        old, new = getattr(processor, name), getattr(changed, name)
        if old != new and new not in processor.image_tokens_of_sources.values():
            _log.warning(
                "%s: %s, but training had %s (%s in %s): the model sees other pixels than it was trained on",
                *(setting, _text(new), _text(old), name, folder / PROCESSOR_FILE),
            )
    if image_fit[1] is not None and changed.image_tokens is not None:
        _log.warning("%s: no effect on images that keep their aspect (image_tokens)", image_fit[0])
    if changed.image_tokens_of_sources:
        _log.warning(
            "sources differed in image_tokens in training (%s): %s is taken; choose with %s",
            ", ".join(f"{name}: {_text(value)}" for name, value in changed.image_tokens_of_sources.items()),
            *(_text(changed.image_tokens), image_tokens[0]),
        )
    return changed


def with_video_settings(
    processor: ProcessorConfig, num_frames: int | None, frames_per_second: float | None, default_frames: int
) -> ProcessorConfig:
    """Replace the settings of videos, with a warning where training had others or none.

    Args:
        processor: Processor of the export.
        num_frames: Frames of a video; None keeps those of the export.
        frames_per_second: Frames taken per second of video; None keeps that of the export.
        default_frames: Frames of a video where training had none.
    """
    trained = processor.video
    sampling = trained or VideoSampling(default_frames, VideoTextSource.frames_per_second, processor.image_tokens)
    chosen = replace(
        sampling,
        num_frames=num_frames or sampling.num_frames,
        frames_per_second=frames_per_second or sampling.frames_per_second,
    )
    text = f"{chosen.num_frames} frames, {chosen.frames_per_second:g} a second"
    if trained is None:
        _log.warning("the model was trained without videos: each one becomes %s", text)
    elif chosen != trained:
        was = f"{trained.num_frames} frames, {trained.frames_per_second:g} a second"
        _log.warning("--num-frames, --frames-per-second: a video becomes %s; in training it was %s", text, was)
    return replace(processor, video=chosen)


def read_media(files: Sequence[tuple[str, Path]], processor: ProcessorConfig) -> Media:
    """Read files to the model's ``media`` and ``media_grids``; both are None if there are no files.

    Args:
        files: Kind ("image" or "video") and path of each medium.
        processor: Processor of the model.

    Raises:
        OSError: A file cannot be read.
        ValueError: A file is no image or video, or the tower cannot take all of them together; the error names it.
    """
    media: list[tuple[str, Tensor]] = []
    for kind, path in files:
        try:
            media.append((kind, decode_medium(kind, path.read_bytes(), processor)))
        except SampleError as error:
            raise ValueError(f"--{kind} {path}: {error}") from error
    return stack_media(media, processor)


def decode_medium(kind: str, data: bytes, processor: ProcessorConfig) -> Tensor:
    """Decode an image or video to its pixels, uint8 [F, 3, Y, X].

    Args:
        kind: "image" or "video".
        data: Encoded image or video.
        processor: Processor of the model.

    Raises:
        SampleError: As ``ImageDecoder`` and ``VideoDecoder``.
        ValueError: The tower takes squares only, but the processor keeps the aspect.
    """
    if kind == "image":
        return prompt_image_decoder(processor)(data)[None]
    return prompt_video_decoder(processor)(data, 0.0)


def stack_media(media: Sequence[tuple[str, Tensor]], processor: ProcessorConfig) -> Media:
    """Return the model's ``media`` and ``media_grids``; both are None if there are no media.

    Args:
        media: Kind and pixels of each medium, from ``decode_medium``.
        processor: Processor of the model.

    Raises:
        ValueError: The tower cannot take all of them together.
    """
    if not media:
        return None, None
    settings = {"image": processor, "video": processor.video}
    budgets = [None if (chosen := settings[kind]) is None else chosen.image_tokens for kind, _ in media]
    keeps_aspect = any(budget is not None for budget in budgets)
    return prompt_inputs([pixels for _, pixels in media], processor.patch_size, keeps_aspect)


def model_media(images: Sequence[Tensor], decoder: ImageDecoder) -> Media:
    """Return ``media`` and ``media_grids`` of decoded images; both are None if there are none."""
    if not images:
        return None, None
    return media_inputs(images, None if decoder.budget is None else decoder.budget.patch_size)


def _text(value: object) -> str:
    return "squares" if value is None else str(value)
