"""Find the members of a sample by their extension, and decode its text and JSON.

A sample is a mapping from extension (lower-case, without the first dot) to bytes.
"""

from __future__ import annotations

import json
import math
import re
import unicodedata
from collections.abc import Mapping, Sequence
from typing import Any

from trainer.data.errors import SampleError

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff", "avif", "ppm")
# Some of these the decoder only knows by name; it then says which format it met.
VIDEO_EXTENSIONS = ("mp4", "m4v", "mov", "3gp", "webm", "mkv", "avi", "ts", "mts", "m2ts", "flv", "wmv", "mpg", "ogv")
_SURROGATE_ESCAPE = re.compile(r"\\u[dD][89a-fA-F]")
# Control, format, private-use and white characters, and marks without a letter, show nothing; nor do these.
_INVISIBLE_CATEGORIES = frozenset(("Cc", "Cf", "Cs", "Co", "Zs", "Zl", "Zp", "Mn", "Me"))
_INVISIBLE = frozenset("\u115f\u1160\u2800\u3164\uffa0")  # Hangul fillers and the blank Braille pattern


def image_member(members: Mapping[str, bytes]) -> bytes:
    """Return the only image of a sample, encoded.

    Raises:
        SampleError: missing_image, several_images.
    """
    return _only_member(members, IMAGE_EXTENSIONS, "image")


def video_member(members: Mapping[str, bytes]) -> bytes:
    """Return the only video of a sample, encoded. A GIF is one if there is no other; it may also be a preview.

    Raises:
        SampleError: missing_video, several_videos.
    """
    if "gif" in members and not any(extension in members for extension in VIDEO_EXTENSIONS):
        return members["gif"]
    return _only_member(members, VIDEO_EXTENSIONS, "video")


def text_member(members: Mapping[str, bytes], extension: str = "txt") -> str:
    """Return the text of a sample without the white space around it.

    Raises:
        SampleError: missing_text, invalid_utf8, empty_text.
    """
    if extension not in members:
        raise SampleError("missing_text", f"no .{extension}; members: {', '.join(sorted(members))}")
    text = decode_text(members[extension]).strip()
    if not is_visible(text):
        raise SampleError("empty_text", f"the .{extension} has no visible character")
    return text


def is_visible(text: str) -> bool:
    """Return whether a text shows anything: one of white, zero-width and control characters alone does not."""
    return any(
        unicodedata.category(character) not in _INVISIBLE_CATEGORIES and character not in _INVISIBLE
        for character in text
    )


def decode_text(data: bytes) -> str:
    """Decode strict UTF-8, with or without a byte order mark.

    Raises:
        SampleError: invalid_utf8.
    """
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise SampleError("invalid_utf8", f"byte {error.start}: {error.reason}") from error


def decode_json(data: bytes, *, strict: bool = True) -> Any:
    """Decode JSON. Repeated names are errors.

    Args:
        data: JSON in UTF-8.
        strict: Whether NaN, Infinity, numbers beyond double precision and unpaired surrogates are errors anywhere. No
            encoding of text can hold such surrogates, and no tokenizer takes them. If False, numbers may be NaN or
            infinite and texts may hold surrogates, so check the fields that are used (``check_field``).

    Raises:
        SampleError: invalid_utf8, invalid_json.
    """
    text = decode_text(data)
    try:
        value = json.loads(
            text,
            parse_constant=_refuse_constant if strict else float,
            parse_float=_finite_float if strict else float,
            parse_int=_finite_int if strict else _int_or_infinity,
            object_pairs_hook=_unique_names,
        )
        if strict and _SURROGATE_ESCAPE.search(text):
            json.dumps(value, ensure_ascii=False).encode()
        return value
    except (ValueError, RecursionError) as error:
        raise SampleError("invalid_json", str(error)) from error


def check_field(name: str, value: Any) -> None:
    """Check a field of JSON that was not decoded strictly.

    Args:
        name: Name of the field, for the error.
        value: Value of the field; the content of lists and objects is not looked at.

    Raises:
        SampleError: invalid_json: a number that is not finite, or a text with an unpaired surrogate.
    """
    if isinstance(value, float) and not math.isfinite(value):
        raise SampleError("invalid_json", f"{name} is {value}, which is not JSON")
    if isinstance(value, str) and not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise SampleError("invalid_json", f"{name} has half of a surrogate pair at {error.start}") from error


def _only_member(members: Mapping[str, bytes], extensions: Sequence[str], kind: str) -> bytes:
    found = [extension for extension in extensions if extension in members]
    if not found:
        raise SampleError(f"missing_{kind}", f"members: {', '.join(sorted(members))}")
    if len(found) > 1:
        raise SampleError(f"several_{kind}s", f"which of {', '.join(found)}?")
    return members[found[0]]


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def _finite_float(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"the number {text} is out of range")
    return value


def _finite_int(text: str) -> int:
    value = int(text)
    try:
        float(value)
    except OverflowError as error:
        raise ValueError(f"a number of {len(text)} digits is out of range") from error
    return value


def _int_or_infinity(text: str) -> int | float:
    value = float(text)
    return int(text) if math.isfinite(value) else value


def _unique_names(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError(f"a name is repeated in {[name for name, _ in pairs]}")
    return result
