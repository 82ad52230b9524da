"""Real videos, made by PyAV."""

from __future__ import annotations

import io
from collections.abc import Callable

import av
import numpy as np


def gray_by_second(seconds: float) -> tuple[int, int, int]:
    """A color that tells the time: 20 levels a second."""
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
    """A video whose frames are of one color each; size is (width, height), rate and keyframe_every in frames."""
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
