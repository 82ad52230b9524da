"""Provide what all conversions share: their results, and images that are named by the data.

A conversion yields ``Converted`` samples and ``Refused`` inputs, in an order that the input alone decides. Images are
copied unread; training finds, counts and replaces those with damaged bytes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ParamSpec

from trainer.data.errors import SampleError

# First bytes of image formats.
_STARTS = ((b"\xff\xd8\xff", "jpg"), (b"\x89PNG", "png"), (b"GIF8", "gif"), (b"BM", "bmp"), (b"II*\0", "tif"))


@dataclass(frozen=True)
class Converted:
    """One sample.

    Attributes:
        members: Content by lower-case extension.
        dropped_images: Reasons for which images of the sample were left out, one for each image.
    """

    members: Mapping[str, bytes]
    dropped_images: tuple[str, ...] = ()


@dataclass(frozen=True)
class Refused:
    """An input that gives no sample.

    Attributes:
        where: File, with a line or row.
        reason: Identifier, for counting.
        detail: Explanation for a person.
    """

    where: str
    reason: str
    detail: str


Result = Converted | Refused
Parameters = ParamSpec("Parameters")


def attempt(
    where: str, convert: Callable[Parameters, Converted], *args: Parameters.args, **kwargs: Parameters.kwargs
) -> Result:
    """Call ``convert(*args, **kwargs)``; refuse the input ``where`` if it raises a SampleError or cannot be read."""
    try:
        return convert(*args, **kwargs)
    except SampleError as error:
        return Refused(where, error.reason, error.detail)
    except OSError as error:
        return Refused(where, "unreadable", str(error))


class DocumentImages:
    """Collect the images of one document as the members ``0.png``, ``1.jpg``, ...

    Attributes:
        members: Content by lower-case extension.
        dropped: Reasons for which images were left out.
    """

    def __init__(self) -> None:
        self.members: dict[str, bytes] = {}
        self.dropped: list[str] = []

    def add(self, number: int, image: Any, images: Path | None) -> str | None:
        """Read an image and return its member's extension; None if it cannot be read.

        Args:
            number: Position of the image among the kept images of the document.
            image: See ``read_image``.
            images: See ``read_image``.
        """
        try:
            data = read_image(image, images)
        except SampleError as error:
            self.dropped.append(error.reason)
            return None
        except OSError:
            self.dropped.append("unreadable")
            return None
        extension = f"{number}.{image_extension(data)}"
        self.members[extension] = data
        return extension


def read_image(image: Any, images: Path | None) -> bytes:
    """Return an image of a document.

    Args:
        image: Its bytes, a name of a file, or a url. The SHA-256 of a url (hexadecimal) is the name of its file.
        images: Folder of the files.

    Raises:
        SampleError: missing_image, outside.
        OSError: The file cannot be read.
    """
    if isinstance(image, bytes):
        return image
    if not isinstance(image, str) or not image:
        raise SampleError("missing_image", "neither bytes nor a name")
    if images is None:
        raise SampleError("missing_image", "the images are files: name their folder with --images")
    name = hashlib.sha256(image.encode()).hexdigest() if "://" in image else image
    return file_inside(images, name).read_bytes()


def file_inside(folder: Path, name: str) -> Path:
    """Return the file of that name below a folder, and never one outside of it.

    Raises:
        SampleError: outside, missing_image.
    """
    try:
        path = (folder / name).resolve()
        if not path.is_relative_to(folder.resolve()):
            raise SampleError("outside", f"{name!a} lies outside {folder}")
        if not path.is_file():
            raise SampleError("missing_image", f"no file {name!a} in {folder}")
    except (OSError, ValueError) as error:  # the name is too long or contains a zero byte
        raise SampleError("missing_image", str(error)) from error
    return path


def image_extension(image: bytes) -> str:
    """Return the extension that fits the first bytes, because names in the data lie and urls have no extension."""
    if image[:4] == b"RIFF" and image[8:12] == b"WEBP":
        return "webp"
    return next((extension for start, extension in _STARTS if image.startswith(start)), "jpg")
