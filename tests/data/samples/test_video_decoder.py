"""Decode real videos, good and bad: the frames that are taken, and the reasons for rejection."""

from __future__ import annotations

import io
from dataclasses import replace
from fractions import Fraction
from typing import Any

import av
import numpy as np
import pytest
import torch

from model.image_geometry import PatchBudget
from tests.data.helpers import FORMAT, NO_MANIFEST, SAMPLE, encoding, image_bytes, text_of
from tests.data.videos import video_bytes
from trainer.config.data_config import AugmentConfig, VideoTextSource
from trainer.data.batch import SampleId, collate
from trainer.data.errors import SampleError
from trainer.data.samples.image_decoder import ImageDecoder
from trainer.data.samples.pair_rows import PairBuilder
from trainer.data.samples.rows import sample_rng
from trainer.data.samples.video_container import VideoHeader
from trainer.data.samples.video_decoder import VideoDecoder

FORMATS = [("mp4", "libx264"), ("mp4", "mpeg4"), ("webm", "libvpx"), ("matroska", "libx264")]
IMAGE_DECODER = ImageDecoder(16)


def video_decoder(image: ImageDecoder = IMAGE_DECODER, **settings: Any) -> VideoDecoder:
    return VideoDecoder(VideoTextSource("videos", NO_MANIFEST, 1, num_frames=4, **settings), image)


DECODER = video_decoder()


def seconds_of(frames: torch.Tensor) -> list[float]:
    """Return the time of each frame, to a twentieth of a second."""
    return [round(float(frame.float().mean()) / 20, 2) for frame in frames]


@pytest.mark.parametrize(("container", "codec"), FORMATS)
def test_frames_at_one_a_second_from_the_center(container: str, codec: str) -> None:
    data = video_bytes(10, container=container, codec=codec)
    frames = video_decoder(start="center")(data, 0.9)
    assert (frames.shape, frames.dtype) == ((4, 3, 16, 16), torch.uint8)
    assert seconds_of(frames) == pytest.approx([3, 4, 5, 6], abs=0.15)  # the middle four of ten seconds


def test_the_draw_decides_a_random_start() -> None:
    data = video_bytes(10)
    for draw in (0.0, 0.35, 0.99):
        expected = [6 * draw + k for k in range(4)]
        assert seconds_of(DECODER(data, draw)) == pytest.approx(expected, abs=0.15)
    faster = video_decoder(frames_per_second=4.0)
    assert seconds_of(faster(data, 0.0)) == pytest.approx([0, 0.2, 0.5, 0.7], abs=0.15)


def test_seeking_changes_nothing() -> None:
    """Start at the nearest of many keyframes, or at the only one: the frames are the same."""
    first, second = (DECODER(video_bytes(10, keyframe_every=every), 0.7) for every in (1, 500))
    assert int((first.int() - second.int()).abs().max()) <= 3


def test_a_short_video_repeats_its_last_frame() -> None:
    frames = DECODER(video_bytes(2.5), 0.5)
    assert seconds_of(frames) == pytest.approx([0, 1, 2, 2.4], abs=0.15)
    one = DECODER(video_bytes(0.1), 0.5)
    assert torch.equal(one, one[:1].expand(4, -1, -1, -1))


def test_a_header_without_a_duration() -> None:
    """Neither the stream nor the container of a browser's recording says how long it is."""
    data = video_bytes(10, container="webm", codec="libvpx", live="1")
    assert DECODER.header(data).seconds is None
    assert seconds_of(video_decoder(start="center")(data, 0.0)) == pytest.approx([3, 4, 5, 6], abs=0.15)


def test_frames_are_resized_like_images() -> None:
    data = video_bytes(1, size=(64, 32), color=lambda _: (255, 255, 255))
    frame = DECODER(data, 0.0)[0]
    mean = torch.tensor(DECODER.image.mean_color, dtype=torch.uint8)
    assert torch.equal(frame[:, 0, 0], mean) and torch.equal(frame[:, 15, 15], mean)  # padded above and below
    assert int(frame[:, 8].min()) > 250
    assert DECODER.header(data) == VideoHeader(64, 32, pytest.approx(1.0))


def test_all_frames_are_augmented_alike() -> None:
    data = io.BytesIO()
    with av.open(data, "w", format="mp4") as output:
        stream = output.add_stream("libx264", rate=10)
        stream.width, stream.height, stream.pix_fmt = 32, 32, "yuv420p"
        picture = np.zeros((32, 32, 3), np.uint8)
        picture[:, :16] = 255
        for _ in range(40):
            output.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        output.mux(stream.encode(None))
    decoder = video_decoder(ImageDecoder(16, augment=AugmentConfig(horizontal_flip=0.5)))
    bright_side = []
    for index in range(20):
        rng = sample_rng(0, SampleId("s", 0, "a.tar", index, "k"))
        frames = decoder(data.getvalue(), 0.0, decoder.image.draw_augmentation(rng))
        columns = frames.float().mean((1, 2))  # [frames, width]
        sides = {bool(frame[:8].mean() > frame[8:].mean()) for frame in columns}
        assert len(sides) == 1
        bright_side += sides
    assert 4 < sum(bright_side) < 16


@pytest.mark.parametrize(
    ("container", "codec", "pixel_format"),
    [
        ("avi", "mpeg4", "yuv420p"),
        ("mov", "mpeg4", "yuv420p"),
        ("mpegts", "libx264", "yuv420p"),
        ("gif", "gif", "rgb8"),
    ],
)
def test_other_containers(container: str, codec: str, pixel_format: str) -> None:
    data = video_bytes(6, container=container, codec=codec, pixel_format=pixel_format)
    assert seconds_of(video_decoder(start="center")(data, 0.0)) == pytest.approx([1, 2, 3, 4], abs=0.5)
    assert seconds_of(DECODER(data, 0.99)) == pytest.approx([2, 3, 4, 5], abs=0.5)


def test_a_quicktime_file_without_ftyp() -> None:
    data = video_bytes(2, container="mov", codec="mpeg4")
    assert data[4:8] == b"ftyp"
    assert torch.equal(DECODER(data[:4] + b"wide" + data[8:], 0.0), DECODER(data, 0.0))


@pytest.mark.parametrize("container", ["matroska", "mov"])
def test_the_span_is_that_of_the_video_stream(container: str) -> None:
    """Neither a longer sound nor a late first frame moves the frames or makes the video longer."""
    plain = video_decoder(frames_per_second=4.0, max_seconds=3.0)
    for start, sound_seconds in ((0.0, 10.0), (2.5, 0.0), (2.5, 10.0)):
        data = video_bytes(2, container=container, codec="mpeg4", start=start, sound_seconds=sound_seconds)
        for draw in (0.0, 0.99):
            expected = [draw + k / 4 for k in range(4)]
            assert seconds_of(plain(data, draw)) == pytest.approx(expected, abs=0.2)


@pytest.mark.parametrize("container", ["mp4", "matroska"])
@pytest.mark.parametrize(("aspect", "shown"), [((2, 1), (64, 48)), ((1, 2), (32, 96)), ((900, 1), (32, 48))])
def test_the_aspect_of_pixels_is_applied(container: str, aspect: tuple[int, int], shown: tuple[int, int]) -> None:
    data = video_bytes(
        1, size=(32, 48), container=container, pixel_aspect=Fraction(*aspect), color=lambda _: (255, 255, 255)
    )
    assert DECODER.frame_size({"mp4": data}) == shown
    frame = video_decoder(ImageDecoder(48, "pad"))(data, 0.0)[0]
    white = [int((frame.amax((0, axis)) > 250).sum()) for axis in (1, 2)]  # columns, rows
    assert white == pytest.approx([round(48 * side / max(shown)) for side in shown], abs=1)
    kept = video_decoder(ImageDecoder(48, budget=PatchBudget(36, 8)))(data, 0.0)[0]
    assert kept.shape[1:] == PatchBudget(36, 8).size(*reversed(shown))
    assert int(video_decoder(ImageDecoder(48, "crop"))(data, 0.0).min()) > 250


def test_transparent_pixels_of_a_gif_are_white() -> None:
    from PIL import Image

    frames = [Image.new("RGBA", (16, 16), (0, 0, 0, 0)) for _ in range(3)]
    frames[1].putpixel((0, 0), (9, 9, 9, 255))
    buffer = io.BytesIO()
    frames[0].save(buffer, "GIF", save_all=True, append_images=frames[1:], duration=100)
    assert int(DECODER(buffer.getvalue(), 0.0)[0].min()) > 250


def test_an_allocation_that_ffmpeg_refuses_is_the_files_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    data = video_bytes(1)

    def fail(error: MemoryError) -> None:
        def opened(*_: object, **__: object) -> None:
            raise error

        monkeypatch.setattr(av, "open", opened)

    fail(av.error.MemoryError(12, "Cannot allocate memory"))
    with pytest.raises(SampleError, match="corrupt_video"):
        DECODER(data, 0.0)
    fail(MemoryError())
    with pytest.raises(MemoryError):
        DECODER(data, 0.0)


def test_errors_of_our_own_are_not_bad_videos(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(ImageDecoder, "fit_pixels", broken)
    with pytest.raises(ZeroDivisionError):
        DECODER(video_bytes(1), 0.0)


FRAGMENTED = video_bytes(8, size=(64, 64), movflags="frag_keyframe+empty_moov", color=lambda t: (int(t * 31), 0, 90))


@pytest.mark.parametrize(
    ("data", "reasons"),
    [
        (b"", {"empty_video"}),
        (b"not a video at all", {"unsupported_video"}),
        (b"#EXTM3U\n#EXTINF:3,\nfile:///etc/hostname\n", {"unsupported_video"}),
        (b"ffconcat version 1.0\nfile '/etc/hostname'\n", {"unsupported_video"}),
        (b"\x00\x00\x00\x18ftypmp42" + bytes(40), {"corrupt_video"}),
        (video_bytes(4)[:-200], {"truncated_video"}),  # mp4 keeps its table of contents at the end
        (video_bytes(8, container="webm", codec="libvpx")[:800], {"truncated_video", "corrupt_video"}),
        (FRAGMENTED[: len(FRAGMENTED) // 2], {"truncated_video"}),
        (video_bytes(4, container="matroska", codec="mpeg4")[:-500], {"truncated_video"}),
        (video_bytes(4, container="avi", codec="mpeg4")[:-500], {"truncated_video"}),
        (video_bytes(2, container="gif", codec="gif", pixel_format="rgb8")[:-500], {"truncated_video"}),
        (video_bytes(2, container="flv", codec="flv1"), {"unsupported_video"}),
        (image_bytes(), {"unsupported_video"}),
    ],
)
def test_bad_videos(data: bytes, reasons: set[str]) -> None:
    with pytest.raises(SampleError) as caught:
        DECODER(data, 0.5)
    assert caught.value.reason in reasons


def test_damage_anywhere_gives_frames_or_a_sample_error() -> None:
    data = video_bytes(4, size=(64, 64), color=lambda t: (int(t * 60), 30, 200 - int(t * 40)))
    rng = np.random.default_rng(0)
    for _ in range(60):
        broken = bytearray(data)
        for place in rng.integers(0, len(data), 4):
            broken[place] = rng.integers(0, 256)
        try:
            assert DECODER(bytes(broken), 0.5).shape == (4, 3, 16, 16)
        except SampleError:
            pass


def test_limits_are_checked_by_the_header() -> None:
    wide = video_bytes(1, size=(320, 240))
    with pytest.raises(SampleError, match="too_many_pixels"):
        video_decoder(ImageDecoder(16, max_pixels=1000))(wide, 0.0)
    with pytest.raises(SampleError, match="filtered_max_seconds.*max_seconds = 3"):
        video_decoder(max_seconds=3.0)(video_bytes(4), 0.0)


def test_sound_alone_is_no_video() -> None:
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="matroska") as output:
        stream = output.add_stream("pcm_s16le", rate=8000, layout="mono")
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 800), np.int16), format="s16", layout="mono")
        frame.sample_rate = 8000
        output.mux(stream.encode(frame))
        output.mux(stream.encode(None))
    with pytest.raises(SampleError, match="no_video_stream"):
        DECODER(buffer.getvalue(), 0.0)


def test_row_of_a_video_and_its_text() -> None:
    builder = PairBuilder(replace(DECODER.source, end_of_sequence=True), encoding(), DECODER)
    members = {"mp4": video_bytes(10), "txt": b"a cat"}

    def rng(index: int) -> np.random.Generator:
        return sample_rng(0, SampleId("source", 0, "a.tar", index, "k"))

    row = builder(members, SAMPLE, rng(0))
    assert text_of(row.input_ids) == "B#a cat|E"
    assert row.media_index.tolist() == [-1, *[0] * 8]
    assert row.media[0].shape == (4, 3, 16, 16)
    assert builder.length(members, SAMPLE, rng(0)) == 9
    again, other = builder(members, SAMPLE, rng(0)), builder(members, SAMPLE, rng(1))
    assert torch.equal(row.media[0], again.media[0]) and not torch.equal(row.media[0], other.media[0])
    _, start = rng(0).random(2)  # the first draw decides the space before the caption
    assert torch.equal(row.media[0], DECODER(members["mp4"], start))
    batch = collate([row, other], FORMAT, source="s", num_frames=4)
    assert batch.media.shape == (2, 4, 3, 16, 16)
    for bad, reason in (({"txt": b"a"}, "missing_video"), ({**members, "webm": b"x"}, "several_videos")):
        with pytest.raises(SampleError, match=reason):
            builder(bad, SAMPLE, rng(0))
