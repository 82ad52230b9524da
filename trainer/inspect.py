"""What the data are, as text, and what a Flamingo is fed, as a page with its images.

    python -m trainer.inspect MANIFEST [--samples N]               shards, and the first samples' members
    python -m trainer.inspect CONFIG.yaml --step T [--section.key VALUE ...]   the samples of global batch T
    python -m trainer.inspect CONFIG.yaml --step T --html FILE [--rows N]      its images, tokens and what they see

Steps count updates from 0. Nothing is trained or changed; the second form reads the run's configuration like the
trainers do, and says the same for any number of processes.
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
from trainer.data.errors import DataError
from trainer.data.shards.manifest import Manifest, load_manifest
from trainer.data.shards.reader import ShardReader
from trainer.data.shards.storage import StorageSettings
from trainer.data.stream.contact_sheet import contact_sheet
from trainer.data.stream.micro_batches import MicroBatches
from trainer.data.stream.step_plan import build_orders, plan_step
from trainer.errors import ConfigError, TrainerError
from trainer.runtime.files import write_atomically

_TEXT_EXTENSIONS = ("txt", "json")
_SHOWN_CHARACTERS = 100
_SHOWN_SHARDS = 5


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit code: 1 for data that cannot be read, 2 for a wrong configuration."""
    arguments, overrides = _parser().parse_known_args(argv)
    path: Path = arguments.path
    try:
        if path.suffix in (".yaml", ".yml"):
            config = _config_of(path, overrides)
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


def _config_of(path: Path, overrides: Sequence[str]) -> RunConfig:
    values = yaml.safe_load(path.read_text(encoding="utf-8"))
    schema = schema_of(values if isinstance(values, dict) else {})
    if not issubclass(schema, RunConfig):
        raise ValueError(f"{path} is not the configuration of a training run")
    config: RunConfig = load_config(path, overrides, schema)
    return config


def describe_manifest(manifest: Manifest, samples: int) -> Iterator[str]:
    """Shards of a manifest and its first samples. Raises ShardError."""
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
    """The samples of global batch ``step`` in the order of the lanes, source after source.

    Raises ValueError (settings) and ShardError.
    """
    plans = plan_step(data, 1)
    manifests = [load_manifest(source.manifest) for source in data.sources]
    for plan, manifest, order in zip(plans, manifests, build_orders(data, plans, manifests), strict=True):
        if plan.source.packing:
            yield (
                f"{order.name} ({plan.source.type}): step {step}, {plan.source.batch_size} packed rows from "
                f"{order.num_lanes} lanes; which samples share a row depends on their tokens: --html shows them"
            )
            continue
        reader = ShardReader(manifest, storage=StorageSettings.of(data))
        yield (
            f"{order.name} ({plan.source.type}): step {step}, {plan.source.batch_size} sequences from {order.num_lanes} "
            f"lanes, samples {step * plan.samples_per_step:,} and on of {order.samples:,} an epoch"
        )
        for lane, locations in enumerate(order.samples_of(step)):
            for place in locations:
                sample = describe_sample(*reader.read(place.shard, place.index))
                yield f"  lane {lane} epoch {place.epoch} {manifest.url(place.shard)}[{place.index}] {sample}"
        reader.close()


def write_contact_sheet(config: RunConfig, step: int, path: Path, rows: int) -> None:
    """Global batch ``step`` as one HTML page; rows: at most so many of each source.

    Loads the tower, for its input size and mean color, and the tokenizer. The texts of packed sources are gone through
    from the start of the run. Raises ValueError (settings), ShardError and TooManyBadSamplesError.
    """
    if not isinstance(config, FlamingoRunConfig):
        raise ValueError("--html shows the batches of trainer.train; this is the configuration of another trainer")
    # Heavy imports, which text output does without.
    from model.factory import build_tokenizer
    from model.vision_encoder import VisionEncoder, build_tower
    from trainer.tasks.row_builders import flamingo_builders

    tokenizer = build_tokenizer(config.model)
    encoder = VisionEncoder(build_tower(config.model.vision), config.model.vision)
    micro_batches = MicroBatches(
        config.data,
        flamingo_builders(config.data, tokenizer, encoder),
        [load_manifest(source.manifest) for source in config.data.sources],
        pad_id=tokenizer.pad_id,
        media_shape=(1, 3, encoder.image_size, encoder.image_size),
        patch_size=encoder.patch_size,
        rank=0,
        world_size=1,
    )
    each = micro_batches.micro_batches_per_step
    made = [micro_batches[index] for index in range(step * each, (step + 1) * each)]
    batches = []
    for one in made:
        if isinstance(one, DataError):
            raise one
        batches.append(one.batch)
    page = contact_sheet(
        batches,
        lambda token: tokenizer.tokenizer.decode([token], skip_special_tokens=False),
        tokenizer.image_id,
        title=f"{config.run_dir.name}: global batch {step}",
        rows=rows,
    )
    write_atomically(path, page.encode())


def describe_sample(key: str, members: Mapping[str, bytes]) -> str:
    """Key and members on one line: texts quoted (with whatever they contain escaped), the rest by size."""
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
        prog="python -m trainer.inspect", description="what the data are, as text", allow_abbrev=False
    )
    parser.add_argument("path", type=Path, metavar="MANIFEST|CONFIG.yaml")
    parser.add_argument("--step", type=int, default=0, metavar="T", help="of a configuration: which global batch")
    parser.add_argument("--samples", type=int, default=5, metavar="N", help="of a manifest: how many samples")
    parser.add_argument("--html", type=Path, metavar="FILE", help="of a configuration: write a page with its images")
    parser.add_argument("--rows", type=int, default=32, metavar="N", help="of that page: rows of each source")
    return parser


if __name__ == "__main__":
    sys.exit(main())
