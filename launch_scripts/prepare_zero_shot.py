"""Write images into a folder for each caption, the layout of ``zero_shot.classification``.

``python launch_scripts/prepare_zero_shot.py --output FOLDER SOURCE...``

A source is a shard of png and txt members, or a folder that ``prepare_easy_vqa.py`` wrote in VQAv2's layout. Its images
get captions such as "a teal circle". The folder of a caption is named by it, with underscores for spaces. Use
``templates: ["{}"]``.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import tarfile
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple


class Pair(NamedTuple):
    """Hold an image file and its caption."""

    name: str
    image: bytes
    caption: str


def shard_pairs(shard: Path) -> Iterator[Pair]:
    """Yield the pairs of a shard.

    Raises:
        ValueError: An image has no caption.
    """
    with tarfile.open(shard) as archive:
        members = {member.name: archive.extractfile(member) for member in archive.getmembers() if member.isfile()}
        contents = {name: file.read() for name, file in members.items() if file is not None}
    for name in contents:
        if name.endswith(".png"):
            text = contents.get(name.removesuffix(".png") + ".txt")
            if text is None:
                raise ValueError(f"{shard}: {name} has no caption")
            yield Pair(f"{shard.stem}-{Path(name).name}", contents[name], text.decode())


def vqa_pairs(folder: Path) -> Iterator[Pair]:
    """Yield the images whose questions say both color and shape."""
    answers: dict[int, dict[str, str]] = defaultdict(dict)
    for entry in json.loads((folder / "annotations.json").read_text(encoding="utf-8"))["annotations"]:
        answers[entry["image_id"]][entry["question_type"]] = entry["multiple_choice_answer"]
    for number, facts in answers.items():
        if {"color", "shape"} <= facts.keys():
            file = folder / "images" / f"{number}.png"
            yield Pair(file.name, file.read_bytes(), f"a {facts['color']} {facts['shape']}")


def main(argv: Sequence[str] | None = None) -> int:
    """Write the images and return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("sources", type=Path, nargs="+", help="shards, or folders in VQAv2's layout")
    parser.add_argument("--output", type=Path, required=True, help="folder to write")
    options = parser.parse_args(argv)
    count = 0
    try:
        for source in options.sources:
            for pair in vqa_pairs(source) if source.is_dir() else shard_pairs(source):
                folder = options.output / re.sub(r"\W+", "_", pair.caption.strip())
                folder.mkdir(parents=True, exist_ok=True)
                (folder / pair.name).write_bytes(pair.image)
                count += 1
    except (OSError, ValueError, KeyError, tarfile.TarError) as error:
        print(f"prepare_zero_shot: {source}: {error}", file=sys.stderr)
        return 1
    print(f"{count} images of {len(list(options.output.iterdir()))} captions in {options.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
