"""Files and urls: what a url may be, and writing without half-written results."""

from __future__ import annotations

import os
import re
from pathlib import Path

_SCHEME = re.compile(r"^([A-Za-z][A-Za-z0-9+.-]*):")


def local_path(url: str, folder: Path | None = None) -> Path:
    """The path that a shard's url means; relative urls start at ``folder`` (the manifest's).

    Raises ValueError for every scheme but ``file:``. In particular nothing is ever given to a shell (``pipe:``).
    """
    match = _SCHEME.match(url)
    if match is None:
        path = Path(url)
    elif match[1].lower() == "file":
        path = Path(re.sub(r"^file:(//(localhost)?(?=/))?", "", url, flags=re.IGNORECASE))
    elif match[1].lower() == "pipe":
        raise ValueError(f"{url!r}: pipe: urls run a shell command and are never opened")
    else:
        raise ValueError(f"{url!r}: shards are read from local paths or file: urls, not from {match[1]}:")
    return path if folder is None else folder / path


def write_atomically(path: Path, content: bytes) -> None:
    """Writes beside the target, syncs and renames, so that a crash never leaves a part under the final name."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
