"""Decide which urls may be read, and turn local ones into paths."""

from __future__ import annotations

import re
from pathlib import Path

_SCHEME = re.compile(r"^([A-Za-z][A-Za-z0-9+.-]*):")
HTTP_SCHEMES = ("http", "https")
# Object stores and file services of fsspec. Its other protocols wrap further urls (caches, archives, references) or
# reach into this machine; no manifest needs them.
OBJECT_SCHEMES = (
    *("s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "oss", "oci", "hf"),
    *("hdfs", "webhdfs", "sftp", "ssh", "memory"),
)


def scheme_of(url: str) -> str | None:
    """Return the scheme of a url in lower case, or None for a path."""
    match = _SCHEME.match(url)
    return match[1].lower() if match else None


def path_url(path: str) -> str:
    """Return the url of a path: "./" before a name such as "run:1/0.tar", which would read as a scheme."""
    return f"./{path}" if scheme_of(path) is not None else path


def is_remote(url: str) -> bool:
    """Tell whether a shard is read through ``RemoteStore``.

    Raises:
        ValueError: The url is neither remote nor local: ``pipe:``, chained (``a::b``) or of an unknown scheme.
    """
    scheme = scheme_of(url)
    if scheme in HTTP_SCHEMES or scheme in OBJECT_SCHEMES:
        if "::" in url:
            raise ValueError(f"{url!r}: chained urls (::) are not read")
        return True
    local_path(url)
    return False


def local_path(url: str, folder: Path | None = None) -> Path:
    """Return the path of a local shard.

    Args:
        url: A path or a ``file:`` url.
        folder: Folder that relative urls start at, usually that of the manifest.

    Raises:
        ValueError: The url has another scheme. ``pipe:`` is among them, so no url ever reaches a shell.
    """
    scheme = scheme_of(url)
    if scheme is None:
        path = Path(url)
    elif scheme == "file":
        path = Path(re.sub(r"^file:(//(localhost)?(?=/))?", "", url, flags=re.IGNORECASE))
    elif scheme == "pipe":
        raise ValueError(f"{url!r}: pipe: urls run a shell command and are never opened")
    else:
        known = ", ".join((*HTTP_SCHEMES, *OBJECT_SCHEMES))
        raise ValueError(
            f"{url!r}: shards are read from local paths, file: urls and {known}, not from {scheme}:. Write a path with "
            "a colon as ./PATH, and run trainer.index again if a manifest has it without ./"
        )
    return path if folder is None else folder / path
