"""Open the container of a video with PyAV (FFmpeg's libraries) inside this process, and read its header.

The container format comes from the first bytes. FFmpeg's own guess could also be a playlist, which names other files
and urls.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import av
from av.stream import Disposition

from trainer.data.errors import SampleError

_MATROSKA_START = b"\x1aE\xdf\xa3"
_SEGMENT = 0x18538067  # Matroska's outermost element, beside its header
# Types of the first box of an mp4 or of a QuickTime file, which need not have an "ftyp".
_FIRST_BOXES = (b"ftyp", b"moov", b"mdat", b"wide", b"free", b"skip", b"pnot")
_TS_PACKETS = ((0, 188), (4, 192))  # offset of the sync byte and length of a packet: broadcast, and Blu-ray or camera
_NAMED_ONLY = (
    (b"FLV\x01", "flv"),
    (b"\x30\x26\xb2\x75\x8e\x66\xcf\x11", "wmv or asf"),
    (b"\0\0\x01\xba", "mpg"),
    (b"\0\0\x01\xb3", "mpg"),
    (b"OggS", "ogv"),
    (b".RMF", "rm"),
)
_READ = "mp4, mov, webm, mkv, avi, ts and gif are read"
_LARGEST_PIXEL_ASPECT = 16.0  # either way; beyond, the header is wrong


@dataclass(frozen=True)
class VideoHeader:
    """Hold what a container says before anything is decoded.

    Attributes:
        width: Pixels of a frame.
        height: Pixels of a frame.
        seconds: Length of the video stream; None if the container does not say it.
        pixel_aspect: Width of a shown pixel divided by its height.
    """

    width: int
    height: int
    seconds: float | None
    pixel_aspect: float = 1.0


@contextmanager
def typed_errors() -> Iterator[None]:
    """Raise whatever PyAV raises as a SampleError.

    Raises:
        SampleError: unsupported_video, corrupt_video.
        MemoryError: Python has no memory left. FFmpeg's error of that name is about the sizes in the file.
    """
    try:
        yield
    except SampleError:
        raise
    except (av.DecoderNotFoundError, NotImplementedError) as error:
        raise SampleError("unsupported_video", str(error)) from error
    except Exception as error:
        if isinstance(error, MemoryError) and not isinstance(error, av.FFmpegError):
            raise
        raise SampleError("corrupt_video", str(error) or type(error).__name__) from error


@contextmanager
def open_container(data: bytes) -> Iterator[Any]:
    """Open a container, and close it at the end.

    Raises:
        SampleError: empty_video, unsupported_video, corrupt_video, truncated_video.
    """
    if not data:
        raise SampleError("empty_video", "the video has no bytes")
    container_format = _container_format(data)
    with typed_errors():
        container = av.open(io.BytesIO(data), format=container_format, metadata_errors="replace")
    try:
        yield container
    finally:
        container.close()


def video_stream(container: Any) -> Any:
    """Return the first video stream that is not the picture of a cover.

    Raises:
        SampleError: no_video_stream, unsupported_video, corrupt_video.
    """
    with typed_errors():
        streams = [one for one in container.streams.video if not one.disposition & Disposition.attached_pic]
        if not streams:
            raise SampleError("no_video_stream", "the container has no video in it")
        stream = streams[0]
        if stream.codec_context is None:
            raise SampleError("unsupported_video", "FFmpeg has no decoder for it")
        if not stream.width or not stream.height or not stream.time_base:
            raise SampleError("corrupt_video", "the header gives no frame size or unit of time")
        return stream


def read_header(stream: Any) -> VideoHeader:
    """Return the header of a video stream.

    Raises:
        SampleError: corrupt_video.
    """
    with typed_errors():
        # The container's duration is that of its longest stream, from the time 0 on: often that of the sound.
        seconds = None if stream.duration is None else float(stream.duration * stream.time_base)
        aspect = float(stream.sample_aspect_ratio or 1)
        if not 1 / _LARGEST_PIXEL_ASPECT <= aspect <= _LARGEST_PIXEL_ASPECT:
            aspect = 1.0
        return VideoHeader(stream.width, stream.height, seconds, aspect)


def packet_span(container: Any, stream: Any) -> tuple[float, float]:
    """Return start and length of a stream in seconds from the times of its packets, without decoding.

    Matroska keeps no duration of a stream, and live recordings have none at all.

    Raises:
        SampleError: corrupt_video.
    """
    with typed_errors():
        times = [(p.pts, p.pts + (p.duration or 0)) for p in container.demux(stream) if p.pts is not None]
        first, last = min((start for start, _ in times), default=0), max((end for _, end in times), default=0)
        container.seek(first, stream=stream, backward=True)
        return float(first * stream.time_base), float((last - first) * stream.time_base)


def _container_format(data: bytes) -> str:
    """Return FFmpeg's name of the format, after checking that the data reach to the end that they announce."""
    if data[4:8] in _FIRST_BOXES:
        _check_boxes(data)
        return "mov"
    if data.startswith(_MATROSKA_START):
        _check_segment(data)
        return "matroska"
    if data.startswith(b"RIFF") and data[8:12] == b"AVI ":
        _check_length(data, 8 + int.from_bytes(data[4:8], "little"))
        return "avi"
    if data.startswith((b"GIF87a", b"GIF89a")):
        if not data.rstrip(b"\0").endswith(b";"):
            raise SampleError("truncated_video", "the gif has no end mark")
        return "gif"
    if any(data[offset : offset + 2 * size + 1 : size] == b"GGG" for offset, size in _TS_PACKETS):
        return "mpegts"
    for start, name in _NAMED_ONLY:
        if data.startswith(start):
            raise SampleError("unsupported_video", f"a video of the format {name}; {_READ}: convert it")
    raise SampleError("unsupported_video", f"the first bytes are not those of a video; {_READ}")


def _check_length(data: bytes, end: int) -> None:
    if end > len(data):
        raise SampleError("truncated_video", f"it has {len(data)} bytes, but its contents end at {end}")


def _check_boxes(data: bytes) -> None:
    """Check that the outermost boxes of an mp4 (ISO 14496-12) end within the data.

    A fragmented mp4 that was truncated would otherwise play as if it were shorter.

    Raises:
        SampleError: truncated_video, corrupt_video.
    """
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
    _check_length(data, start)


def _check_segment(data: bytes) -> None:
    """Check that the segment of a Matroska file (RFC 8794, RFC 9559) ends within the data.

    Raises:
        SampleError: truncated_video.
    """
    start = 0
    while start < len(data):
        name, start = _vint(data, start, keep_marker=True)
        size, start = _vint(data, start, keep_marker=False)
        if size < 0:  # a recording whose length was unknown
            return
        if name == _SEGMENT or start + size > len(data):
            _check_length(data, start + size)
            return
        start += size


def _vint(data: bytes, start: int, *, keep_marker: bool) -> tuple[int, int]:
    """Read EBML's number of variable length.

    Returns:
        The number, -1 if all its bits are ones ("unknown"), and the offset after it.
    """
    first = data[start] if start < len(data) else 0
    if not first:
        raise SampleError("corrupt_video", f"no EBML number at byte {start}")
    length = 9 - first.bit_length()
    value = int.from_bytes(data[start : start + length], "big")
    if not keep_marker:
        ones = (1 << 7 * length) - 1
        value &= ones
        value = -1 if value == ones else value
    return value, start + length
