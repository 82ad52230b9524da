"""Video bytes to the frames of a medium, through PyAV (FFmpeg's libraries) inside this process.

The container is told to FFmpeg by its signature instead of being guessed: its guess could as well be a playlist, which
names other files and urls.
"""

from __future__ import annotations

import io
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import av
import numpy as np
import torch
from torch import Tensor

from trainer.data.errors import SampleError
from trainer.data.samples.augment import Augmentation
from trainer.data.samples.decode import ImageDecoder

VIDEO_EXTENSIONS = ("mp4", "m4v", "mov", "webm", "mkv")
_MATROSKA_START = b"\x1aE\xdf\xa3"
# A decoder may hold back its last frames at a clean end; what lacks more than this was cut.
_MISSING_SECONDS = 0.5


@dataclass(frozen=True)
class VideoHeader:
    """What a container says before anything is decoded: pixels of a frame, and seconds (None where it does not say)."""

    width: int
    height: int
    seconds: float | None


@dataclass(frozen=True)
class VideoDecoder:
    """Video bytes -> uint8 [frames, 3, height, width] (RGB), normalized later on the device.

    image: what a frame becomes, and max_pixels. frames: T. frames_per_second: how far apart the
    frames are taken (paper: 8 frames at 1 a second), whatever the video's own rate. start: ``random`` or ``center``.
    max_seconds: videos whose header says more are refused before they are decoded.

    Frame k is what a player shows ``k / frames_per_second`` seconds after the start. A video that is shorter than the
    T frames starts at 0 and repeats its last frame. The rotation that the container asks for is applied.
    """

    image: ImageDecoder
    num_frames: int = 8
    frames_per_second: float = 1.0
    start: Literal["random", "center"] = "random"
    max_seconds: float = 600.0

    def header(self, data: bytes) -> VideoHeader:
        """Raises SampleError: empty_video, unsupported_video, corrupt_video, no_video_stream."""
        with _opened(data) as container:
            return _header(container)

    def __call__(self, data: bytes, draw: float, augmentation: Augmentation | None = None) -> Tensor:
        """The frames; ``draw`` in [0, 1) decides a random start. All frames are augmented alike.

        Raises SampleError: empty_video, unsupported_video (container or codec), corrupt_video, truncated_video,
        no_video_stream, too_many_pixels, too_long.
        """
        with _opened(data) as container:
            header = _header(container)
            self.image.check_pixels(header.width, header.height)
            if header.seconds is not None and header.seconds > self.max_seconds:
                detail = f"{header.seconds:.1f} s exceed the source's max_seconds = {self.max_seconds}"
                raise SampleError("too_long", detail)
            seconds = _last_packet_end(container) if header.seconds is None else header.seconds
            times = self._times(seconds, draw)
            stream = container.streams.video[0]
            stream.thread_type = "NONE"  # the loader's processes share the cores already
            stream.codec_context.options = {"max_pixels": str(self.image.max_pixels)}  # sizes may change on the way
            return self._frames_at(container, times, seconds, augmentation)

    def _times(self, seconds: float, draw: float) -> list[float]:
        """Seconds from the video's beginning at which the frames are taken."""
        spare = max(0.0, seconds - self.num_frames / self.frames_per_second)
        first = spare * (draw if self.start == "random" else 0.5)
        return [first + number / self.frames_per_second for number in range(self.num_frames)]

    def _frames_at(
        self, container: Any, times: list[float], seconds: float, augmentation: Augmentation | None
    ) -> Tensor:
        stream = container.streams.video[0]
        origin = float((stream.start_time or 0) * stream.time_base)
        if times[0] > 0:
            container.seek(math.floor((origin + times[0]) / stream.time_base), stream=stream, backward=True)
        taken: list[Tensor] = []
        shown, end = None, 0.0
        for frame in container.decode(stream):
            if frame.is_corrupt:
                raise SampleError("corrupt_video", f"a frame at {frame.time} s is damaged")
            time = end if frame.time is None else float(frame.time) - origin
            while shown is not None and len(taken) < len(times) and times[len(taken)] < time:
                taken.append(self._fitted(shown, augmentation))
            if len(taken) == len(times):
                return _stacked(taken)
            shown, end = frame, time + float((frame.duration or 0) * stream.time_base)
        if shown is None:
            raise SampleError("truncated_video", "it ends before its first frame")
        if end < min(seconds, times[-1]) - _MISSING_SECONDS:
            raise SampleError("truncated_video", f"it ends at {end:.2f} s of {seconds:.2f} s")
        last = self._fitted(shown, augmentation)
        return _stacked([*taken, *[last] * (len(times) - len(taken))])

    def _fitted(self, frame: Any, augmentation: Augmentation | None) -> Tensor:
        array = np.rot90(frame.to_ndarray(format="rgb24"), frame.rotation // 90)
        return self.image.fitted(torch.from_numpy(array.copy()).permute(2, 0, 1), augmentation)


def _stacked(frames: list[Tensor]) -> Tensor:
    """A container may change the frames' size on the way, which shows where their aspect is kept."""
    if len({frame.shape for frame in frames}) > 1:
        raise SampleError("unsupported_video", "its frames change their aspect on the way")
    return torch.stack(frames)


def video_member(members: Mapping[str, bytes]) -> bytes:
    """The one video of a sample. Raises SampleError: missing_video, several_videos."""
    found = [extension for extension in VIDEO_EXTENSIONS if extension in members]
    if not found:
        raise SampleError("missing_video", f"members: {', '.join(sorted(members))}")
    if len(found) > 1:
        raise SampleError("several_videos", f"which of {', '.join(found)}?")
    return members[found[0]]


@contextmanager
def _opened(data: bytes) -> Iterator[Any]:
    """The container, with FFmpeg's errors as SampleError."""
    if not data:
        raise SampleError("empty_video", "the video has no bytes")
    if data[4:8] == b"ftyp":
        container_format = "mov"
        _check_boxes(data)
    elif data.startswith(_MATROSKA_START):
        container_format = "matroska"
    else:
        raise SampleError("unsupported_video", "neither mp4 nor webm nor mkv by its first bytes")
    try:
        with av.open(io.BytesIO(data), format=container_format, metadata_errors="replace") as container:
            yield container
    except (SampleError, MemoryError):
        raise
    except (av.DecoderNotFoundError, NotImplementedError) as error:
        raise SampleError("unsupported_video", str(error)) from error
    except (av.FFmpegError, ValueError, EOFError, OverflowError) as error:
        raise SampleError("corrupt_video", str(error) or type(error).__name__) from error


def _check_boxes(data: bytes) -> None:
    """The outermost boxes of an mp4 (ISO 14496-12) have to end inside: a fragmented one that was cut plays as if it
    were shorter. Raises SampleError (truncated_video)."""
    start = 0
    while start + 8 <= len(data):
        size = int.from_bytes(data[start : start + 4], "big")
        if size == 1:
            size = int.from_bytes(data[start + 8 : start + 16], "big")
        if size == 0:  # to the end of the file
            return
        if size < 8:
            raise SampleError("corrupt_video", f"a box of {size} bytes at byte {start}")
        start += size
    if start > len(data):
        raise SampleError("truncated_video", f"{len(data)} bytes, and its boxes end at {start}")


def _header(container: Any) -> VideoHeader:
    if not container.streams.video:
        raise SampleError("no_video_stream", "the container has no video in it")
    stream = container.streams.video[0]
    if stream.codec_context is None:
        raise SampleError("unsupported_video", "FFmpeg has no decoder for it")
    if not stream.width or not stream.height:
        raise SampleError("corrupt_video", "the header gives no frame size")
    seconds = None
    if stream.duration is not None:
        seconds = float(stream.duration * stream.time_base)
    elif container.duration is not None:
        seconds = container.duration / av.time_base
    return VideoHeader(stream.width, stream.height, seconds)


def _last_packet_end(container: Any) -> float:
    """Seconds, from the packets' own times: what a live recording's header leaves out. Nothing is decoded."""
    stream = container.streams.video[0]
    ends = [p.pts + (p.duration or 0) for p in container.demux(stream) if p.pts is not None]
    container.seek(0)
    return float((max(ends, default=0) - (stream.start_time or 0)) * stream.time_base)
