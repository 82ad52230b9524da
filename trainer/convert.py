"""Convert other layouts to indexed shards: ``python -m trainer.convert {folder,mmc4,obelics} --output FOLDER ...``.

    folder IMAGES [--captions FILE]        images with .txt captions beside them, or a table that names both: .csv,
                                           .tsv, .jsonl, a .json array or COCO's captions
    mmc4 JSONL... [--images FOLDER]        MMC4's documents (.jsonl or .jsonl.zip) and their images
    obelics PARQUET... [--images FOLDER]   rows with texts and images in the order of the document

The command writes shards and ``FOLDER/manifest.npz``. Inputs that give no sample are listed in ``FOLDER/refused.json``
with their reasons. The exit code is 1 if no manifest was written, and 2 for wrong arguments.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path

from trainer.data.conversion.common import Refused, Result
from trainer.data.conversion.from_folder import CAPTION_COLUMNS, IMAGE_COLUMNS, folder_pairs, table_pairs
from trainer.data.conversion.from_mmc4 import mmc4_documents
from trainer.data.conversion.from_obelics import obelics_documents
from trainer.data.errors import ShardError
from trainer.data.shards.writer import IndexedShardWriter
from trainer.runtime.files import write_atomically

_LISTED_INPUTS = 10_000  # refused inputs in the report; the others are only counted


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    arguments = _parser().parse_args(argv)
    try:
        return convert(_read(arguments), arguments.output, arguments.samples_per_shard)
    except FileNotFoundError as error:
        print(f"trainer.convert: {error.filename}: {error.strerror}", file=sys.stderr)
        return 2
    except ValueError as error:
        print(f"trainer.convert: {error}", file=sys.stderr)
        return 2
    except (ShardError, OSError) as error:
        print(f"trainer.convert: {error}", file=sys.stderr)
        return 1


def convert(results: Iterable[Result], output: Path, samples_per_shard: int = 1000) -> int:
    """Write samples to shards, with manifest and report.

    Args:
        results: Samples and refused inputs of one layout.
        output: Folder of the shards.
        samples_per_shard: Most samples of a shard.

    Returns:
        The exit code: 1 if there was no sample.

    Raises:
        ValueError: The folder has a manifest already.
        ShardError: A shard does not read as it was written.
    """
    refused: list[Refused] = []
    reasons: Counter[str] = Counter()
    dropped: Counter[str] = Counter()
    samples = 0
    with IndexedShardWriter(output, samples_per_shard) as writer:
        for result in results:
            if isinstance(result, Refused):
                reasons[result.reason] += 1
                if len(refused) < _LISTED_INPUTS:
                    refused.append(result)
                continue
            writer.write(f"{samples:09d}", result.members)
            samples += 1
            dropped.update(result.dropped_images)
        manifest = writer.close()
    if reasons:
        report = json.dumps([asdict(one) for one in refused], indent=1, ensure_ascii=True)
        write_atomically(output / "refused.json", report.encode())
        print(f"{reasons.total():,} refused ({_listed(reasons)}): see {output / 'refused.json'}", file=sys.stderr)
        # Names come from the data: !a keeps control characters and broken UTF-8 off the terminal.
        for one in {one.reason: one for one in reversed(refused)}.values():
            print(f"  {one.where!a}: {one.reason}: {one.detail!a}", file=sys.stderr)
    if dropped:
        print(f"{dropped.total():,} images left out of their documents ({_listed(dropped)})", file=sys.stderr)
    if manifest is None:
        print("no samples: no manifest written", file=sys.stderr)
        return 1
    print(
        f"{manifest.path}: {len(manifest):,} shards beside it, {manifest.total_samples:,} samples, content sha256 "
        f"{manifest.content_sha256[:12]}"
    )
    return 0


def _listed(counts: Counter[str]) -> str:
    return ", ".join(f"{reason} {count:,}" for reason, count in counts.most_common())


def _read(arguments: argparse.Namespace) -> Iterable[Result]:
    if arguments.images is not None and not arguments.images.is_dir():
        raise ValueError(f"{arguments.images} is not a folder")
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
    common.add_argument(
        "--output", type=Path, required=True, metavar="FOLDER", help="folder to write shards and manifest to"
    )
    common.add_argument(
        "--samples-per-shard",
        type=_positive,
        default=1000,
        metavar="N",
        help="most samples of a shard (default: %(default)s)",
    )
    folder = layouts.add_parser("folder", parents=[common], help="images with captions")
    folder.add_argument("images", type=Path, metavar="IMAGES", help="folder of the images")
    folder.add_argument(
        "--captions",
        type=Path,
        metavar="FILE",
        help="table of captions: .csv, .tsv, .jsonl, .json (default: a .txt file beside each image)",
    )
    folder.add_argument(
        "--image-column",
        metavar="NAME",
        help=f"column of the table with the path below IMAGES (default: the first of {', '.join(IMAGE_COLUMNS)})",
    )
    folder.add_argument(
        "--caption-column",
        metavar="NAME",
        help=f"column of the table with the caption (default: the first of {', '.join(CAPTION_COLUMNS)})",
    )
    for name, kind in (("mmc4", "JSONL"), ("obelics", "PARQUET")):
        documents = layouts.add_parser(name, parents=[common], help=f"interleaved documents from {kind.lower()}")
        documents.add_argument("tables", type=Path, nargs="+", metavar=kind, help="files of documents")
        documents.add_argument(
            "--images", type=Path, metavar="FOLDER", help="folder of images that the documents name by file"
        )
    return parser


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise ValueError(text)
    return value


if __name__ == "__main__":
    sys.exit(main())
