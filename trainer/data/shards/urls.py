"""Which urls are read at all, and which path a local one means."""

from __future__ import annotations

import re
from pathlib import Path

_SCHEME = re.compile(r"^([A-Za-z][A-Za-z0-9+.-]*):")
HTTP_SCHEMES = ("http", "https")
# Object stores and file services of fsspec. Its other protocols are wrappers (caches, archives, references) or reach
# into this machine, and no manifest needs them.
OBJECT_SCHEMES = (
    *("s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "oss", "oci", "hf"),
    *("hdfs", "webhdfs", "sftp", "ssh", "memory"),
)


def scheme_of(url: str) -> str | None:
    """The scheme of a url in lower case; None for a path."""
    match = _SCHEME.match(url)
    return match[1].lower() if match else None


def is_remote(url: str) -> bool:
    """Whether a shard is read through ``trainer.data.shards.remote``.

    Raises ValueError for urls that are neither remote nor local: ``pipe:``, chained (``a::b``) and unknown ones.
    """
    scheme = scheme_of(url)
    if scheme in HTTP_SCHEMES or scheme in OBJECT_SCHEMES:
        if "::" in url:
            raise ValueError(f"{url!r}: chained urls (::) are not read")
        return True
    local_path(url)
    return False


def local_path(url: str, folder: Path | None = None) -> Path:
    """The path that a shard's url means; relative urls start at ``folder`` (the manifest's).

    Raises ValueError for every scheme but ``file:``. In particular nothing is ever given to a shell (``pipe:``).
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
        raise ValueError(f"{url!r}: shards are read from local paths, file: urls and {known}, not from {scheme}:")
    return path if folder is None else folder / path
