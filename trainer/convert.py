"""``python -m trainer.convert {folder,mmc4,obelics} --output FOLDER ...``: other layouts to indexed shards.

    folder IMAGES [--captions FILE]   images with .txt captions beside them, or a csv or jsonl that names both
    mmc4 JSONL... --images FOLDER     MMC4's documents and their images
    obelics PARQUET... [--images FOLDER]   rows with texts and images, in which order they stand

The result is ``FOLDER/manifest.npz`` beside its shards. Inputs that give no sample stand in ``FOLDER/refused.json``
with their reasons. The exit code is 1 when nothing was written, and 2 for wrong arguments.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path

from trainer.data.conversion.layouts import (
    Refused,
    Result,
    folder_pairs,
    mmc4_documents,
    obelics_documents,
    table_pairs,
)
from trainer.data.errors import ShardError
from trainer.data.shards.writer import IndexedShardWriter
from trainer.runtime.files import write_atomically

_LISTED = 10_000  # refused inputs that are listed one by one


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit code."""
    arguments = _parser().parse_args(argv)
    try:
        return convert(_results(arguments), arguments.output, arguments.samples_per_shard)
    except (ValueError, FileNotFoundError) as error:
        print(f"trainer.convert: {error}", file=sys.stderr)
        return 2
    except (ShardError, OSError) as error:
        print(f"trainer.convert: {error}", file=sys.stderr)
        return 1


def convert(results: Iterable[Result], output: Path, samples_per_shard: int = 1000) -> int:
    """Writes samples to shards; returns 0, or 1 when there were none. Raises ValueError, ShardError."""
    refused: list[Refused] = []
    reasons: Counter[str] = Counter()
    dropped: Counter[str] = Counter()
    samples = 0
    with IndexedShardWriter(output, samples_per_shard) as writer:
        for result in results:
            if isinstance(result, Refused):
                reasons[result.reason] += 1
                if len(refused) < _LISTED:
                    refused.append(result)
                continue
            writer.write(f"{samples:09d}", result.members)
            samples += 1
            dropped.update(result.dropped)
        manifest = writer.close()
    if reasons:
        report = json.dumps([asdict(one) for one in refused], indent=1, ensure_ascii=True)
        write_atomically(output / "refused.json", report.encode())
        print(f"{reasons.total():,} refused ({_listed(reasons)}): see {output / 'refused.json'}", file=sys.stderr)
    if dropped:
        print(f"{dropped.total():,} images left out of their documents ({_listed(dropped)})", file=sys.stderr)
    if manifest is None:
        print("no samples: no manifest written", file=sys.stderr)
        return 1
    print(
        f"{manifest.path}: {len(manifest):,} shards, {manifest.total_samples:,} samples, sha256 {manifest.sha256[:12]}"
    )
    return 0


def _listed(counts: Counter[str]) -> str:
    return ", ".join(f"{reason} {count:,}" for reason, count in counts.most_common())


def _results(arguments: argparse.Namespace) -> Iterable[Result]:
    for folder in (arguments.images,):
        if folder is not None and not folder.is_dir():
            raise ValueError(f"{folder} is no folder")
    if arguments.layout == "mmc4":
        return mmc4_documents(arguments.tables, arguments.images)
    if arguments.layout == "obelics":
        return obelics_documents(arguments.tables, arguments.images)
    if arguments.captions is None:
        return folder_pairs(arguments.images)
    return table_pairs(arguments.captions, arguments.images, arguments.image_column, arguments.caption_column)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m trainer.convert",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    layouts = parser.add_subparsers(dest="layout", required=True)
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--output", type=Path, required=True, metavar="FOLDER", help="where shards and manifest go")
    common.add_argument("--samples-per-shard", type=_positive, default=1000, metavar="N")
    folder = layouts.add_parser("folder", parents=[common], help="images with captions")
    folder.add_argument("images", type=Path, metavar="IMAGES", help="the folder")
    folder.add_argument("--captions", type=Path, metavar="FILE", help="a .csv or .jsonl instead of .txt files")
    folder.add_argument("--image-column", default="image", metavar="NAME", help="path below IMAGES")
    folder.add_argument("--caption-column", default="caption", metavar="NAME")
    for name, kind in (("mmc4", "JSONL"), ("obelics", "PARQUET")):
        documents = layouts.add_parser(name, parents=[common], help=f"interleaved documents from {kind.lower()}")
        documents.add_argument("tables", type=Path, nargs="+", metavar=kind)
        documents.add_argument("--images", type=Path, metavar="FOLDER", help="where images that are files lie")
    return parser


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise ValueError(text)
    return value


if __name__ == "__main__":
    sys.exit(main())
