"""Turn uploaded files into pieces of a prompt, or say in the user's words why that is impossible."""

from __future__ import annotations

import mimetypes
from collections.abc import Sequence
from pathlib import Path

from model.processor import ProcessorConfig
from trainer.data.errors import SampleError
from trainer.data.samples.prompt_media import decode_medium
from trainer.demo_page.conversation import Kind, Piece
from trainer.demo_page.limits import UserError

_MIB = 2**20
_REASONS = {
    "empty_image": "the file is empty",
    "empty_video": "the file is empty",
    "corrupt_image": "it is not an image that can be read, or it is damaged",
    "truncated_image": "the image is cut off: its end is missing",
    "unsupported_image": "images of this format cannot be read here; save it as PNG or JPEG",
    "corrupt_video": "the video is damaged",
    "truncated_video": "the video is cut off: its end is missing",
    "unsupported_video": "it is not a video that can be read here; mp4 and webm work",
    "no_video_stream": "the file has no picture, perhaps only sound",
    "too_many_pixels": "it has too many pixels; make it smaller first",
}


def read_uploads(
    files: Sequence[str | Path], processor: ProcessorConfig, upload_mib: float
) -> tuple[list[Piece], list[str]]:
    """Return the pieces of the files that can be used, and a message for each other file.

    Args:
        files: Uploaded files, with the names that the user gave them.
        processor: Processor of the model.
        upload_mib: Largest file, in MiB.
    """
    pieces, messages = [], []
    for path in map(Path, files):
        try:
            pieces.append(_read(path, processor, upload_mib))
        except UserError as error:
            messages.append(str(error))
    return pieces, messages


def _read(path: Path, processor: ProcessorConfig, upload_mib: float) -> Piece:
    size = path.stat().st_size / _MIB
    if size > upload_mib:
        raise UserError(f"{path.name} cannot be used: it has {size:.1f} MiB, and at most {upload_mib:g} MiB are taken.")
    kinds = _kinds(path.name)
    data = path.read_bytes()
    first: SampleError | None = None
    for kind in kinds:
        try:
            return Piece(kind, path.name, decode_medium(kind, data, processor))
        except SampleError as error:
            first = first or error
        except ValueError as error:
            raise UserError(f"{path.name} cannot be used: {error}") from error
    assert first is not None
    reason = "it is neither an image nor a video" if len(kinds) > 1 else _REASONS.get(first.reason, str(first))
    raise UserError(f"{path.name} cannot be used: {reason}.") from first


def _kinds(name: str) -> tuple[Kind, ...]:
    """Return the kinds that a file may have, by its name."""
    kind = (mimetypes.guess_type(name)[0] or "").partition("/")[0]
    if kind == "image":
        return ("image",)
    return ("video",) if kind == "video" else ("image", "video")
