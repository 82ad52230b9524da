"""What a run will need, before anyone queues for it: ``python -m trainer.plan CONFIG --nodes N --devices-per-node D``.

Memory of a device, seconds of an update, what it sends, and the time for two billion samples, from the configuration
alone: nothing is downloaded, no weights are loaded. ``--search`` tries other micro-batches, offload, hpZ and
checkpointing, and shows the fastest that fit. Exits with 0 when the configuration fits, 1 when not, 2 when it is wrong.
"""

from __future__ import annotations

import argparse
import bisect
import difflib
import itertools
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from trainer.config.loader import check_world_size, load_config
from trainer.config.run_config import DeepSpeedConfig, FlamingoRunConfig
from trainer.errors import ConfigError

if TYPE_CHECKING:  # they load torch, and a wrong configuration is reported before that
    from model.flamingo import Flamingo
    from trainer.planning.cost_model import Device
    from trainer.planning.prediction import Cluster, Prediction

GIB, SAMPLES = 2.0**30, 2e9
_SHOWN = 5


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; prints the prediction and returns the exit code."""
    options, overrides = _parse(argv)
    try:
        config = load_config(options.config, overrides, FlamingoRunConfig, check_files=False)
        check_world_size(config, options.nodes * options.devices_per_node)
        return _plan(config, options)
    except (ConfigError, ValueError) as error:
        print(error, file=sys.stderr)
        return ConfigError.exit_code


def _parse(argv: Sequence[str] | None) -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(prog="python -m trainer.plan", description=__doc__, allow_abbrev=False)
    parser.add_argument("config", type=Path, help="a run's YAML; further --section.key VALUE change it")
    parser.add_argument("--nodes", type=int, default=1)
    parser.add_argument("--devices-per-node", type=int, default=8)
    parser.add_argument("--device", default="h100", help="an accelerator by name; an unknown one prints the known")
    parser.add_argument("--rates", type=Path, metavar="FILE", help="of trainer.benchmark rates --json: for the seconds")
    parser.add_argument("--measured", type=Path, metavar="FILE", help="of trainer.benchmark step --json: compare")
    parser.add_argument("--search", action="store_true", help="also try settings that change speed and memory only")
    return parser.parse_known_args(argv)


def _plan(config: FlamingoRunConfig, options: argparse.Namespace) -> int:
    from trainer.benchmark.plan_comparison import against
    from trainer.planning.cost_model import ActivationMemory, build_without_weights
    from trainer.planning.prediction import Cluster, predict

    model = build_without_weights(config.model, config.training.dtype)
    cluster = Cluster(_device(config, model, options), options.nodes, options.devices_per_node)
    activations = ActivationMemory(config, model)
    found = predict(config, model, cluster, activations)
    print(f"{options.config} on {options.nodes} x {options.devices_per_node} {options.rates or options.device}")
    print(f"  parameters {found.parameters / 1e9:.3f} G, of them trained {found.trainable / 1e9:.3f} G")
    _print_prediction(found)
    if options.measured is not None:
        print(against(found, config, cluster.size, options.measured))
    ranked = []
    if options.search or not found.fits:
        lines = ActivationMemory(config, model, interpolate=True)
        predicted = partial(predict, model=model, cluster=cluster, activations=lines)
        those = fitting(config, model.language_model.blocks, cluster, predicted)
        ranked = sorted(those, key=lambda one: one[1].step_seconds)
    if options.search:
        print("the fastest that fit:" if ranked else "no setting of the search fits")
        for what, one in ranked[:_SHOWN]:
            print(f"  {one.step_seconds:8.2f} s  {one.total_memory / GIB:6.1f} GiB  {what}")
    if found.fits:
        return 0
    change = f"set {ranked[0][0]}" if ranked else "take more devices, devices with more memory, or a smaller model"
    print(
        f"it does NOT fit: {found.total_memory / GIB:.1f} GiB a device of {cluster.device.memory / GIB:.1f}; {change}",
        file=sys.stderr,
    )
    return 1


def _device(config: FlamingoRunConfig, model: Flamingo, options: argparse.Namespace) -> Device:
    """By measured rates, or by name and data sheet."""
    from trainer.benchmark.rates import measured_device
    from trainer.planning.cost_model import DEVICES

    if options.rates is not None:
        width = model.language_model.lm.get_input_embeddings().weight.shape[1]
        size = options.nodes * options.devices_per_node
        return measured_device(options.rates, config.training.dtype, size, width)
    if options.device not in DEVICES:
        close = difflib.get_close_matches(options.device, DEVICES, n=1)
        hint = f"; did you mean {close[0]}?" if close else ""
        raise ValueError(f"--device {options.device}: not a known device{hint} Known: {', '.join(DEVICES)}")
    return DEVICES[options.device]


def _print_prediction(found: Prediction) -> None:
    for name, size in found.memory.parts.items():
        if size:
            print(f"  memory   {name:28s} {size / GIB:10.2f} GiB")
    print(f"  memory   {'of a device, in all':28s} {found.total_memory / GIB:10.2f} GiB, at {found.memory.moment}")
    for name, seconds in found.seconds.items():
        print(f"  update   {name:28s} {seconds:10.3f} s")
    speed = found.samples / found.step_seconds
    print(f"  update   {'in all':28s} {found.step_seconds:10.3f} s, {speed:.0f} samples/s")
    print(f"  sent     {'by a device, an update':28s} {found.sent / GIB:10.2f} GiB")
    print(f"  {found.recomputed} of the language model's blocks are recomputed in the backward")
    print(f"  2 billion samples {found.days(SAMPLES):28.1f} days", flush=True)


def fitting(
    config: FlamingoRunConfig, blocks: int, cluster: Cluster, predicted: Callable[[FlamingoRunConfig], Prediction]
) -> Iterator[tuple[str, Prediction]]:
    """(settings in words, prediction) of those that fit, each with as few of the language model's blocks recomputed as
    that takes."""
    for words, variant in variants(config, cluster):

        def recomputing(number: int, variant: FlamingoRunConfig = variant) -> Prediction:
            training = replace(variant.training, activation_checkpointing=number, activation_memory_gib=None)
            return predicted(replace(variant, training=training))

        def fits(number: int, recomputing: Callable[[int], Prediction] = recomputing) -> bool:
            return recomputing(number).fits

        if fits(blocks):
            number = 0 if fits(0) else bisect.bisect_left(range(blocks), True, lo=1, key=fits)
            value = {0: "false", blocks: "true"}.get(number, str(number))
            yield f"{words}, training.activation_checkpointing {value}", recomputing(number)


def variants(config: FlamingoRunConfig, cluster: Cluster) -> Iterator[tuple[str, FlamingoRunConfig]]:
    """(settings in words, configuration) for what changes memory and speed, and never what is trained; checkpointing,
    which depends on what they leave, is as it was."""
    hpz = [1, cluster.devices_per_node] if cluster.nodes > 1 and cluster.devices_per_node > 1 else [1]
    devices: list[Literal["none", "cpu"]] = ["none", "cpu"]
    for smaller, parameters, optimizer, secondary in itertools.product((1, 2, 4, 8, 16), devices, devices, hpz):
        sources = []
        for source in config.data.sources:
            per_rank = source.batch_size // cluster.size
            if per_rank % smaller:
                break
            sources.append(replace(source, micro_batch_size=per_rank // smaller))
        if len(sources) < len(config.data.sources):
            continue
        words = [f"data.sources.{i}.micro_batch_size {source.micro_batch_size}" for i, source in enumerate(sources)]
        words += [f"deepspeed.offload_param.device {parameters}", f"deepspeed.offload_optimizer.device {optimizer}"]
        if secondary > 1 or config.deepspeed.hpz_partition_size > 1:
            words.append(f"deepspeed.hpz_partition_size {secondary}")
        data = replace(config.data, sources=tuple(sources))
        settings = _with(config.deepspeed, parameters, optimizer, secondary)
        yield ", ".join(words), replace(config, data=data, deepspeed=settings)


def _with(
    settings: DeepSpeedConfig, parameters: Literal["none", "cpu"], optimizer: Literal["none", "cpu"], hpz: int
) -> DeepSpeedConfig:
    raw = settings.raw
    values: dict[str, Any] = json.loads(raw.read_text(encoding="utf-8")) if isinstance(raw, Path) else dict(raw or {})
    zero = dict(values.get("zero_optimization", {}))
    for name in ("offload_param", "offload_optimizer", "zero_hpz_partition_size"):
        zero.pop(name, None)  # these are what the search tries
    return replace(
        settings,
        hpz_partition_size=hpz,
        raw=values | {"zero_optimization": zero},
        offload_param=replace(settings.offload_param, device=parameters),
        offload_optimizer=replace(settings.offload_optimizer, device=optimizer),
    )


if __name__ == "__main__":
    sys.exit(main())
