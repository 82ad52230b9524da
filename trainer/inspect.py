"""What the data are, as text.

    python -m trainer.inspect MANIFEST [--samples N]               shards, and the first samples' members
    python -m trainer.inspect CONFIG.yaml --step T [--section.key VALUE ...]   the samples of global batch T

Steps count updates from 0. Nothing is trained or changed; the second form reads the run's configuration like the
trainers do, and says the same for any number of processes.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import yaml

from trainer.config.loader import load_config, schema_of
from trainer.config.schema import DataConfig, RunConfig
from trainer.data.manifest import Manifest, load_manifest
from trainer.data.plan import build_orders, plan_update
from trainer.data.reader import ShardReader
from trainer.errors import ConfigError, TrainerError

_TEXT_EXTENSIONS = ("txt", "json")
_SHOWN_CHARACTERS = 100
_SHOWN_SHARDS = 5


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit code: 1 for data that cannot be read, 2 for a wrong configuration."""
    arguments, overrides = _parser().parse_known_args(argv)
    path: Path = arguments.path
    try:
        if path.suffix in (".yaml", ".yml"):
            lines = describe_update(_data_of(path, overrides), arguments.step)
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


def _data_of(path: Path, overrides: Sequence[str]) -> DataConfig:
    values = yaml.safe_load(path.read_text(encoding="utf-8"))
    schema = schema_of(values if isinstance(values, dict) else {})
    if not issubclass(schema, RunConfig):
        raise ValueError(f"{path} is not the configuration of a training run")
    config: RunConfig = load_config(path, overrides, schema)
    return config.data


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


def describe_update(data: DataConfig, step: int) -> Iterator[str]:
    """The samples of global batch ``step`` in the order of the lanes, source after source.

    Raises ValueError (settings) and ShardError.
    """
    plans = plan_update(data, 1)
    manifests = [load_manifest(source.manifest) for source in data.sources]
    for plan, manifest, order in zip(plans, manifests, build_orders(data, plans, manifests), strict=True):
        reader = ShardReader(manifest)
        yield (
            f"{order.name} ({plan.source.type}): step {step}, {plan.source.batch_size} sequences from {order.lanes} "
            f"lanes, samples {step * plan.samples_per_update:,} and on of {order.samples:,} an epoch"
        )
        for lane, locations in enumerate(order.samples_of(step)):
            for place in locations:
                sample = describe_sample(*reader.read(place.shard, place.index))
                yield f"  lane {lane} epoch {place.epoch} {manifest.url(place.shard)}[{place.index}] {sample}"
        reader.close()


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
    return parser


if __name__ == "__main__":
    sys.exit(main())
