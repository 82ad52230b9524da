"""Read uploads as training reads its data, and say in the user's words what is wrong with a file."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from trainer.data.samples.prompt_media import read_media
from trainer.demo_page.uploads import read_uploads
from trainer.prompting.exported_model import ExportedModel


def test_uploads_are_the_media_of_trainer_generate(folder: Path, exported: ExportedModel) -> None:
    names = ["0.png", "1.png", "2.png"]
    pieces, messages = read_uploads([folder / name for name in names], exported.processor, 1.0)
    media, _ = read_media([("image", folder / name) for name in names], exported.processor)
    assert messages == [] and media is not None
    assert [(piece.kind, piece.text) for piece in pieces] == [("image", name) for name in names]
    assert torch.equal(torch.stack([piece.pixels for piece in pieces if piece.pixels is not None]), media)


def test_a_video_becomes_frames(folder: Path, exported: ExportedModel) -> None:
    [piece], messages = read_uploads([folder / "clip.mp4"], exported.processor, 1.0)
    assert messages == [] and piece.kind == "video"
    assert piece.pixels is not None and piece.pixels.shape == (2, 3, 16, 16)


def test_the_name_decides_and_else_the_content(folder: Path, tmp_path: Path, exported: ExportedModel) -> None:
    for name, source, kind in (("image", "0.png", "image"), ("blob", "clip.mp4", "video"), ("a.JPG", "0.png", "image")):
        (tmp_path / name).write_bytes((folder / source).read_bytes())
        [piece], _ = read_uploads([tmp_path / name], exported.processor, 1.0)
        assert piece.kind == kind


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("text.png", "text.png cannot be used: it is not an image that can be read, or it is damaged."),
        ("cut.png", "cut.png cannot be used: the image is cut off: its end is missing."),
        ("cut.mp4", "cut.mp4 cannot be used: the video is cut off: its end is missing."),
        ("notes.txt", "notes.txt cannot be used: it is neither an image nor a video."),
        ("empty.jpg", "empty.jpg cannot be used: the file is empty."),
    ],
)
def test_a_bad_file_is_a_message(folder: Path, exported: ExportedModel, name: str, message: str) -> None:
    pieces, messages = read_uploads([folder / "0.png", folder / name], exported.processor, 1.0)
    assert messages == [message]
    assert [piece.text for piece in pieces] == ["0.png"]


def test_a_large_file_is_a_message(folder: Path, exported: ExportedModel, tmp_path: Path) -> None:
    (tmp_path / "big.png").write_bytes(bytes(3 << 19))
    assert read_uploads([tmp_path / "big.png"], exported.processor, 1.0) == (
        [],
        ["big.png cannot be used: it has 1.5 MiB, and at most 1 MiB are taken."],
    )
