"""Write the shards of the launch scripts' data sets, once for each choice of settings."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from webdataset import ShardWriter

from trainer import index
from trainer.runtime.files import write_atomically

STAMP = "finished.json"
SAMPLES_PER_SHARD = 1000

Members = dict[str, bytes]  # content of one sample by extension
Parts = Iterator[tuple[str, Callable[[], str]]]  # names and writers of the parts of a data set


def parse_arguments(description: str, argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the options that every command has: ``output`` and ``seed``."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="folder to write the data to")
    parser.add_argument("--seed", type=int, default=0, help="seed of all random choices (default: %(default)s)")
    return parser.parse_args(argv)


def prepare_once(output: Path, settings: Any, parts: Callable[[], Parts]) -> int:
    """Write a data set, or do nothing if an earlier call finished it with the same settings.

    Args:
        output: Folder of the data set; ``finished.json`` in it holds the settings.
        settings: Dataclass of the settings.
        parts: Returns names and functions; each function writes a part and returns a line that describes it.

    Returns:
        Exit code of the command.
    """
    stamp = output / STAMP
    if stamp.exists() and json.loads(stamp.read_text()) == asdict(settings):
        print(f"{output}: finished before with the same settings")
        return 0
    stamp.unlink(missing_ok=True)
    start = time.monotonic()
    for name, write in parts():
        try:
            described = write()
        except ShardsNotIndexedError as error:
            return error.exit_code
        print(f"  {name}: {described}, {time.monotonic() - start:.1f} s", flush=True)
    write_atomically(stamp, json.dumps(asdict(settings)).encode())
    return 0


class ShardsNotIndexedError(RuntimeError):
    """Report that ``trainer.index`` failed, after it has printed why.

    Attributes:
        exit_code: Exit code of ``trainer.index``.
    """

    def __init__(self, folder: Path, exit_code: int) -> None:
        super().__init__(f"{folder} could not be indexed")
        self.exit_code = exit_code


def write_shards(folder: Path, samples: Iterable[Members]) -> str:
    """Write shards and manifest of one folder, in place of older ones. The same samples give the same bytes.

    Returns:
        Number of samples, in words.

    Raises:
        ShardsNotIndexedError: ``trainer.index`` failed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("*.tar*"):
        old.unlink()
    pattern = str(folder.resolve()).replace("%", "%%") + "/%05d.tar"
    reproducible = {"encoder": False, "mtime": 0, "user": "", "group": ""}
    count = 0
    with ShardWriter(pattern, maxcount=SAMPLES_PER_SHARD, verbose=0, **reproducible) as writer:
        for number, members in enumerate(samples):
            writer.write({"__key__": f"{number:06d}", **members})
            count = number + 1
    code = index.main(["--output", str(folder / "manifest.npz"), "--processes", "1", str(folder / "*.tar")])
    if code:
        raise ShardsNotIndexedError(folder, code)
    return f"{count:,} samples"
