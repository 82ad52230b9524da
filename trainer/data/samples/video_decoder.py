"""Decode a video to the frames of one medium."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from model.image_geometry import shown_size
from trainer.config.data_config import VideoTextSource
from trainer.data.errors import SampleError
from trainer.data.samples.augmentation import Augmentation
from trainer.data.samples.image_decoder import ImageDecoder
from trainer.data.samples.sample_members import video_member
from trainer.data.samples.video_container import (
    VideoHeader,
    open_container,
    packet_span,
    read_header,
    typed_errors,
    video_stream,
)

# Some decoders hold back their last frames at a clean end. A video that misses more than this was truncated.
_MISSING_SECONDS = 0.5


@dataclass(frozen=True)
class VideoDecoder:
    """Decode a video to uint8 [frames, 3, height, width] (RGB); the device normalizes it later.

    Frame k is the picture that a player shows ``k / frames_per_second`` seconds after the start, whatever the video's
    own rate. A video too short for all frames starts at 0 and repeats its last frame. The rotation and the shape of
    pixels in the container are applied.

    Attributes:
        source: Number of frames, their rate, the start and the longest video.
        image: Decides the size of a frame, its most pixels and its augmentation.
    """

    source: VideoTextSource
    image: ImageDecoder

    def __call__(self, data: bytes, start: float, augmentation: Augmentation | None = None) -> Tensor:
        """Decode the frames, all with the same augmentation.

        Args:
            data: Encoded video.
            start: Position of a random start, in [0, 1): 0 is the video's beginning, 1 the last possible start.
            augmentation: Changes of every frame.

        Raises:
            SampleError: empty_video, unsupported_video (container or codec), corrupt_video, truncated_video,
                no_video_stream, too_many_pixels, filtered_max_seconds.
        """
        with open_container(data) as container:
            stream = video_stream(container)
            header = read_header(stream)
            self.image.check_pixels(header.width, header.height)
            if header.seconds is None:
                origin, seconds = packet_span(container, stream)
            else:
                origin, seconds = float((stream.start_time or 0) * stream.time_base), header.seconds
            if seconds > self.source.max_seconds:
                detail = f"{seconds:.1f} s exceed the source's max_seconds = {self.source.max_seconds}"
                raise SampleError("filtered_max_seconds", detail)
            stream.thread_type = "NONE"  # the loader processes share the cores already
            # The frame size may change within the video, so FFmpeg checks the pixels of each frame.
            stream.codec_context.options = {"max_pixels": str(self.image.max_pixels)}
            times = self._frame_times(seconds, start)
            if times[0] > 0 and container.format.name != "mpegts":  # which has no index of keyframes
                with typed_errors():
                    container.seek(math.floor((origin + times[0]) / stream.time_base), stream=stream, backward=True)
            fit = partial(self._fit_frame, augmentation, header.pixel_aspect)
            return _choose_frames(_frames(container, stream), stream, times, origin, seconds, fit)

    def medium(self, members: Mapping[str, bytes], rng: np.random.Generator) -> Tensor:
        """Decode the only video of a sample, with a start and an augmentation drawn from ``rng``.

        Raises:
            SampleError: As for one video; missing_video, several_videos.
        """
        start = rng.random()  # always drawn, and always first: no setting shifts the draws of another
        return self(video_member(members), start, self.image.draw_augmentation(rng))

    def frame_size(self, members: Mapping[str, bytes]) -> tuple[int, int]:
        """Return width and height of the frames of a sample's only video as they are shown, from its header.

        Raises:
            SampleError: As ``header``; missing_video, several_videos.
        """
        header = self.header(video_member(members))
        height, width = shown_size(header.height, header.width, header.pixel_aspect)
        return width, height

    def header(self, data: bytes) -> VideoHeader:
        """Read the header of an encoded video.

        Raises:
            SampleError: empty_video, unsupported_video, corrupt_video, truncated_video, no_video_stream.
        """
        with open_container(data) as container:
            return read_header(video_stream(container))

    def _frame_times(self, seconds: float, start: float) -> list[float]:
        """Return the time of each frame, in seconds from the video's beginning."""
        spare = max(0.0, seconds - self.source.num_frames / self.source.frames_per_second)
        first = spare * (start if self.source.start == "random" else 0.5)
        return [first + number / self.source.frames_per_second for number in range(self.source.num_frames)]

    def _fit_frame(self, augmentation: Augmentation | None, pixel_aspect: float, frame: Any) -> Tensor:
        if frame.rotation % 180:
            pixel_aspect = 1 / pixel_aspect
        return self.image.fit_pixels(torch.from_numpy(_rgb(frame)).permute(2, 0, 1), augmentation, pixel_aspect)


def _choose_frames(
    decoded: Iterator[Any],
    stream: Any,
    times: list[float],
    origin: float,
    seconds: float,
    fit: Callable[[Any], Tensor],
) -> Tensor:
    """Return the frames that a player shows at given times.

    Args:
        decoded: Frames of the stream, from before the first time on.
        stream: Stream of the video.
        times: Seconds from the stream's beginning, in ascending order.
        origin: Time of the stream's beginning, in seconds.
        seconds: Length of the stream.
        fit: Converts a frame to uint8 [3, height, width].

    Raises:
        SampleError: truncated_video, unsupported_video, and those of the frames.
    """
    frames: list[Tensor] = []
    shown, end = None, 0.0
    for frame in decoded:
        time = end if frame.time is None else float(frame.time) - origin
        while shown is not None and len(frames) < len(times) and times[len(frames)] < time:
            frames.append(fit(shown))
        if len(frames) == len(times):
            return _stack(frames)
        shown, end = frame, time + float((frame.duration or 0) * stream.time_base)
    if shown is None:
        raise SampleError("truncated_video", "it ends before its first frame")
    if end < min(seconds, times[-1]) - _MISSING_SECONDS:
        raise SampleError("truncated_video", f"it ends at {end:.2f} s of {seconds:.2f} s")
    return _stack([*frames, *[fit(shown)] * (len(times) - len(frames))])


def _stack(frames: list[Tensor]) -> Tensor:
    # Only frames that keep their aspect differ in shape when the frame size changes within the video.
    if len({frame.shape for frame in frames}) > 1:
        raise SampleError("unsupported_video", "the aspect of its frames changes")
    return torch.stack(frames)


def _frames(container: Any, stream: Any) -> Iterator[Any]:
    """Decode the frames; errors of the decoder alone become SampleErrors, not those of the caller."""
    with typed_errors():
        for frame in container.decode(stream):
            if frame.is_corrupt:
                raise SampleError("corrupt_video", f"a frame at {frame.time} s is damaged")
            yield frame


def _rgb(frame: Any) -> NDArray[np.uint8]:
    """Convert a frame to uint8 [height, width, 3], with alpha over white, as it is shown."""
    with typed_errors():
        turns = frame.rotation // 90
        if not any(component.is_alpha for component in frame.format.components):
            return np.rot90(frame.to_ndarray(format="rgb24"), turns).copy()
        pixels = frame.to_ndarray(format="rgba").astype(np.uint16)
    alpha = pixels[..., 3:]
    rgb = (pixels[..., :3] * alpha + 255 * (255 - alpha) + 127) // 255
    return np.rot90(rgb.astype(np.uint8), turns).copy()
