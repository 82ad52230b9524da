"""Encode real videos with PyAV."""

from __future__ import annotations

import io
from collections.abc import Callable
from fractions import Fraction

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
    pixel_format: str = "yuv420p",
    pixel_aspect: Fraction | None = None,
    start: float = 0,
    sound_seconds: float = 0,
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
        pixel_format: FFmpeg's name of the pixels that the encoder takes.
        pixel_aspect: Width of a shown pixel divided by its height; None says nothing about it.
        start: Time of the first frame in the container, in seconds.
        sound_seconds: Length of a silent sound stream, which begins at 0.
        options: Options of the container's writer.
    """
    buffer = io.BytesIO()
    with av.open(buffer, "w", format=container, options=options) as output:
        stream = output.add_stream(codec, rate=rate, options={"qp": "0"} if codec == "libx264" else {})
        stream.width, stream.height = size
        stream.pix_fmt = pixel_format
        stream.gop_size = keyframe_every
        if pixel_aspect is not None:
            stream.codec_context.sample_aspect_ratio = pixel_aspect
        sound = output.add_stream("pcm_s16le", rate=8000, layout="mono") if sound_seconds else None
        for number in range(round(seconds * rate)):
            picture = np.empty((size[1], size[0], 3), np.uint8)
            picture[:] = color(number / rate)
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24").reformat(format=pixel_format)
            frame.pts, frame.time_base = number + round(start * rate), Fraction(1, rate)
            output.mux(stream.encode(frame))
        output.mux(stream.encode(None))
        if sound is not None:
            silence = av.AudioFrame.from_ndarray(np.zeros((1, round(8000 * sound_seconds)), np.int16), "s16", "mono")
            silence.sample_rate = 8000
            output.mux(sound.encode(silence))
            output.mux(sound.encode(None))
    return buffer.getvalue()
