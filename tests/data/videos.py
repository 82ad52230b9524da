"""Encode real videos with PyAV."""

from __future__ import annotations

import io
from collections.abc import Callable

import av
import numpy as np


def gray_by_second(seconds: float) -> tuple[int, int, int]:
    """Return a gray that tells the time: 20 levels a second."""
    return (round(20 * seconds) % 256,) * 3


def video_bytes(
    seconds: float = 4,
    *,
    rate: int = 10,
    size: tuple[int, int] = (32, 32),
    container: str = "mp4",
    codec: str = "libx264",
    color: Callable[[float], tuple[int, int, int]] = gray_by_second,
    keyframe_every: int = 10,
    **options: str,
) -> bytes:
    """Return a video whose frames have one color each.

    Args:
        seconds: Length of the video.
        rate: Frames per second.
        size: Width and height in pixels.
        container: FFmpeg's name of the container.
        codec: FFmpeg's name of the encoder.
        color: Time in seconds -> RGB.
        keyframe_every: Frames from one keyframe to the next.
        options: Options of the container's writer.
    """
    buffer = io.BytesIO()
    with av.open(buffer, "w", format=container, options=options) as output:
        stream = output.add_stream(codec, rate=rate, options={"qp": "0"} if codec == "libx264" else {})
        stream.width, stream.height = size
        stream.pix_fmt = "yuv420p"
        stream.gop_size = keyframe_every
        for number in range(round(seconds * rate)):
            picture = np.empty((size[1], size[0], 3), np.uint8)
            picture[:] = color(number / rate)
            output.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        output.mux(stream.encode(None))
    return buffer.getvalue()
