"""Show shards and batches: as text, or as a page with the images and tokens of a batch.

    python -m trainer.inspect MANIFEST [--samples N]               shards and first samples
    python -m trainer.inspect CONFIG.yaml --step T [--section.key VALUE ...]   the samples of global batch T
    python -m trainer.inspect CONFIG.yaml --step T --html FILE [--rows N]      its images, and the tokens that see them

Steps are counted from 0. Nothing is trained or changed. The output for a configuration is the same for any number of
processes.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import yaml

from trainer.config.data_config import DataConfig
from trainer.config.loader import load_config, schema_of
from trainer.config.run_config import FlamingoRunConfig, RunConfig
from trainer.data.batch import BatchFormat
from trainer.data.errors import DataError
from trainer.data.shards.manifest import Manifest, load_manifest
from trainer.data.shards.reader import ShardReader
from trainer.data.shards.storage_settings import StorageSettings
from trainer.data.stream.contact_sheet import contact_sheet
from trainer.data.stream.micro_batches import MicroBatches
from trainer.data.stream.step_plan import build_orders, plan_step
from trainer.errors import ConfigError, TrainerError
from trainer.runtime.files import write_atomically

_TEXT_EXTENSIONS = ("txt", "json")
_SHOWN_CHARACTERS = 100
_SHOWN_SHARDS = 5


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command, and return its exit code: 1 for data that cannot be read, 2 for a wrong configuration."""
    arguments, overrides = _parser().parse_known_args(argv)
    path: Path = arguments.path
    try:
        if path.suffix in (".yaml", ".yml"):
            config = _load_run_config(path, overrides)
            if arguments.html is not None:
                write_contact_sheet(config, arguments.step, arguments.html, arguments.rows)
            lines = describe_step(config.data, arguments.step)
        elif overrides:
            raise ValueError(f"unknown arguments: {' '.join(overrides)}")
        else:
            lines = describe_manifest(load_manifest(path), arguments.samples)
        for line in lines:
            print(line)
    except BrokenPipeError:  # | head
        return 0
    except ConfigError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    except (TrainerError, ValueError, OSError, yaml.YAMLError) as error:
        print(f"trainer.inspect: {error}", file=sys.stderr)
        return 1
    return 0


def _load_run_config(path: Path, overrides: Sequence[str]) -> RunConfig:
    values = yaml.safe_load(path.read_text(encoding="utf-8"))
    schema = schema_of(values if isinstance(values, dict) else {})
    if not issubclass(schema, RunConfig):
        raise ValueError(f"{path} is not the configuration of a training run")
    config: RunConfig = load_config(path, overrides, schema)
    return config


def describe_manifest(manifest: Manifest, samples: int) -> Iterator[str]:
    """Yield lines about the shards of a manifest and its first samples.

    Args:
        manifest: Manifest to describe.
        samples: Number of samples.

    Raises:
        ShardError: A shard cannot be read.
    """
    size = int(manifest.shard_bytes.sum()) / 1e9
    yield f"{manifest.path}: {len(manifest):,} shards, {manifest.total_samples:,} samples, {size:.3f} GB"
    yield f"sha256 {manifest.sha256}"
    for shard in range(min(_SHOWN_SHARDS, len(manifest))):
        yield f"  {manifest.url(shard)}: {manifest.samples[shard]:,} samples, {manifest.shard_bytes[shard]:,} bytes"
    if len(manifest) > _SHOWN_SHARDS:
        yield f"  ... {len(manifest) - _SHOWN_SHARDS:,} more"
    reader = ShardReader(manifest)
    places = ((shard, index) for shard, count in enumerate(manifest.samples.tolist()) for index in range(count))
    for _, (shard, index) in zip(range(samples), places, strict=False):
        yield f"{manifest.url(shard)}[{index}] {describe_sample(*reader.read(shard, index))}"


def describe_step(data: DataConfig, step: int) -> Iterator[str]:
    """Yield lines about the samples of global batch ``step``, by source and lane.

    Args:
        data: Settings of the data.
        step: Step counted from 0.

    Raises:
        ValueError: Settings do not fit one another.
        ShardError: A shard cannot be read.
    """
    plans = plan_step(data, 1)
    manifests = [load_manifest(source.manifest) for source in data.sources]
    for plan, manifest, order in zip(plans, manifests, build_orders(data, plans, manifests), strict=True):
        if plan.source.packing:
            yield (
                f"{order.name} ({plan.source.type}): step {step}, {plan.source.batch_size} packed rows from "
                f"{order.num_lanes} lanes; their tokens decide which samples share a row: --html shows them"
            )
            continue
        reader = ShardReader(manifest, storage=StorageSettings.of(data))
        yield (
            f"{order.name} ({plan.source.type}): step {step}, {plan.source.batch_size} rows from {order.num_lanes} "
            f"lanes, from sample {step * plan.samples_per_step:,} on; an epoch has {order.samples:,}"
        )
        for lane, locations in enumerate(order.samples_of(step)):
            for place in locations:
                sample = describe_sample(*reader.read(place.shard, place.index))
                yield f"  lane {lane} epoch {place.epoch} {manifest.url(place.shard)}[{place.index}] {sample}"
        reader.close()


def write_contact_sheet(config: RunConfig, step: int, path: Path, rows: int) -> None:
    """Write global batch ``step`` as one HTML page.

    This loads the vision tower, for its input size and mean color, and the tokenizer. Packed sources are read from the
    start of the run, because the samples of a packed row depend on those before it.

    Args:
        config: Configuration of a Flamingo run.
        step: Step counted from 0.
        path: HTML file to write.
        rows: Most rows to show of each source.

    Raises:
        ValueError: Settings do not fit one another, or the configuration is not one of ``trainer.train``.
        ShardError: A shard cannot be read.
        TooManyBadSamplesError: More samples are bad than ``data.max_bad_fraction`` allows, or all samples are.
        NoSamplesLeftError: The filters of a source leave nothing.
    """
    if not isinstance(config, FlamingoRunConfig):
        raise ValueError("--html shows the batches of trainer.train; this is the configuration of another trainer")
    # These imports take seconds, and text output does not need them.
    from model.factory import build_tokenizer
    from model.vision_encoder import VisionEncoder, build_tower
    from trainer.tasks.row_builders import flamingo_builders

    tokenizer = build_tokenizer(config.model)
    encoder = VisionEncoder(build_tower(config.model.vision), config.model.vision)
    micro_batches = MicroBatches(
        config.data,
        flamingo_builders(config.data, tokenizer, encoder),
        [load_manifest(source.manifest) for source in config.data.sources],
        BatchFormat(tokenizer.pad_id, encoder.image_size, encoder.patch_size),
        rank=0,
        world_size=1,
    )
    num_micro_batches = micro_batches.micro_batches_per_step
    batches = []
    for index in range(step * num_micro_batches, (step + 1) * num_micro_batches):
        micro_batch = micro_batches[index]
        if isinstance(micro_batch, DataError):
            raise micro_batch
        batches.append(micro_batch.batch)
    page = contact_sheet(
        batches,
        lambda token: tokenizer.tokenizer.decode([token], skip_special_tokens=False),
        tokenizer.image_id,
        title=f"{config.run_dir.name}: global batch {step}",
        rows=rows,
    )
    write_atomically(path, page.encode())


def describe_sample(key: str, members: Mapping[str, bytes]) -> str:
    """Return the key and the members on one line: texts quoted and escaped, other members by size."""
    parts = []
    for extension, content in sorted(members.items()):
        if extension in _TEXT_EXTENSIONS:
            text = content.decode("utf-8", "backslashreplace")
            more = "..." if len(text) > _SHOWN_CHARACTERS else ""
            parts.append(f"{extension} {text[:_SHOWN_CHARACTERS]!a}{more}")
        else:
            parts.append(f"{extension} {len(content):,} bytes")
    return f"{key!a}: {', '.join(parts)}"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m trainer.inspect", description="show shards and batches", allow_abbrev=False
    )
    parser.add_argument("path", type=Path, metavar="MANIFEST|CONFIG.yaml", help="what to show")
    parser.add_argument(
        "--step", type=int, default=0, metavar="T", help="global batch of a configuration (default: %(default)s)"
    )
    parser.add_argument(
        "--samples", type=int, default=5, metavar="N", help="samples shown of a manifest (default: %(default)s)"
    )
    parser.add_argument(
        "--html", type=Path, metavar="FILE", help="page to write with the images of a configuration's batch"
    )
    parser.add_argument(
        "--rows", type=int, default=32, metavar="N", help="rows of each source on that page (default: %(default)s)"
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
