"""Predict what a run needs: ``python -m trainer.plan CONFIG --nodes N --devices-per-node D``.

The prediction covers a device's memory, the seconds and the traffic of a step, and the time for two billion samples. It
needs the configuration alone: nothing is downloaded and no weights are loaded. ``--search`` also tries other
micro-batches, offload, hpZ and activation checkpointing, and prints the fastest settings that fit.

Exit codes: 0 the configuration fits into memory; 1 it does not; 2 it is wrong.
"""

from __future__ import annotations

import argparse
import difflib
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from trainer.config.loader import check_world_size, load_config
from trainer.config.run_config import FlamingoRunConfig
from trainer.errors import ConfigError

if TYPE_CHECKING:  # these load torch; a wrong configuration is reported before that
    from model.flamingo import Flamingo
    from trainer.planning.devices import Device
    from trainer.planning.prediction import Prediction

_GIB = 2.0**30
_SAMPLES = 2e9
_NUM_PRINTED = 5  # variants of the search


def main(argv: Sequence[str] | None = None) -> int:
    """Print the prediction and return the exit code."""
    options, overrides = _parser().parse_known_args(argv)
    try:
        config = load_config(options.config, overrides, FlamingoRunConfig, check_files=False)
        check_world_size(config, options.nodes * options.devices_per_node)
        return _plan(config, options)
    except (ConfigError, ValueError) as error:
        print(error, file=sys.stderr)
        return ConfigError.exit_code


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m trainer.plan",
        usage="%(prog)s CONFIG.yaml [options] [--section.key VALUE ...]",
        description=__doc__.replace("``", ""),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "config", type=Path, metavar="CONFIG.yaml", help="YAML file of a run; --section.key VALUE changes its settings"
    )
    parser.add_argument("--nodes", type=int, default=1, metavar="N", help="number of nodes (default: %(default)s)")
    parser.add_argument(
        "--devices-per-node", type=int, default=8, metavar="D", help="devices of each node (default: %(default)s)"
    )
    parser.add_argument(
        "--device", default="h100", metavar="NAME", help="kind of device; a wrong name lists all (default: %(default)s)"
    )
    parser.add_argument(
        "--rates", type=Path, metavar="FILE", help="result of trainer.benchmark rates --json (default: data sheets)"
    )
    parser.add_argument(
        "--measured", type=Path, metavar="FILE", help="result of trainer.benchmark step --json to compare with"
    )
    parser.add_argument("--search", action="store_true", help="also print the fastest settings that fit")
    return parser


def _plan(config: FlamingoRunConfig, options: argparse.Namespace) -> int:
    from trainer.benchmark.plan_comparison import comparison_table
    from trainer.planning.activation_memory import ActivationMemory
    from trainer.planning.prediction import Cluster, predict
    from trainer.planning.random_weights import build_on_meta_device
    from trainer.planning.search import fitting_variants

    model = build_on_meta_device(config.model, config.training.dtype)
    cluster = Cluster(_device(config, model, options), options.nodes, options.devices_per_node)
    found = predict(config, model, cluster, ActivationMemory(config, model))
    print(f"{options.config} on {options.nodes} x {options.devices_per_node} {options.rates or options.device}")
    _print_prediction(found)
    if options.measured is not None:
        print(comparison_table(found, config, cluster.size, options.measured))
    ranked = []
    if options.search or not found.fits:
        activations = ActivationMemory(config, model, interpolate=True)
        predict_variant = partial(predict, model=model, cluster=cluster, activations=activations)
        candidates = fitting_variants(config, model.language_model.num_blocks, cluster, predict_variant)
        ranked = sorted(candidates, key=lambda candidate: candidate[1].step_seconds)
    if options.search:
        print("the fastest that fit:" if ranked else "no setting of the search fits")
        for settings, prediction in ranked[:_NUM_PRINTED]:
            print(f"  {prediction.step_seconds:8.2f} s  {prediction.total_memory / _GIB:6.1f} GiB  {settings}")
    if found.fits:
        return 0
    advice = f"set {ranked[0][0]}" if ranked else "take more devices, devices with more memory, or a smaller model"
    needed, available = found.total_memory / _GIB, cluster.device.memory / _GIB
    print(f"it does NOT fit: {needed:.1f} GiB on a device with {available:.1f} GiB; {advice}", file=sys.stderr)
    return 1


def _device(config: FlamingoRunConfig, model: Flamingo, options: argparse.Namespace) -> Device:
    """Return the device by its measured rates, or by its name and data sheet."""
    from trainer.benchmark.rates import measured_device
    from trainer.planning.devices import DEVICES

    if options.rates is not None:
        dim = model.language_model.lm.get_input_embeddings().weight.shape[1]
        size = options.nodes * options.devices_per_node
        return measured_device(options.rates, config.training.dtype, size, dim)
    if options.device not in DEVICES:
        close = difflib.get_close_matches(options.device, DEVICES, n=1)
        hint = f"; did you mean {close[0]}?" if close else ""
        raise ValueError(f"--device {options.device}: not a known device{hint} Known: {', '.join(DEVICES)}")
    return DEVICES[options.device]


def _print_prediction(found: Prediction) -> None:
    print(f"  parameters {found.parameters / 1e9:.3f} G, of which {found.trainable / 1e9:.3f} G train")
    for name, size in found.memory.parts.items():
        if size:
            print(f"  memory   {name:28s} {size / _GIB:10.2f} GiB")
    print(f"  memory   {'of a device, total':28s} {found.total_memory / _GIB:10.2f} GiB, at {found.memory.moment}")
    for name, seconds in found.seconds.items():
        print(f"  step     {name:28s} {seconds:10.3f} s")
    rate = found.samples / found.step_seconds
    print(f"  step     {'total':28s} {found.step_seconds:10.3f} s, {rate:.0f} samples/s")
    print(f"  sent     {'by a device, in a step':28s} {found.sent / _GIB:10.2f} GiB")
    print(f"  {found.recomputed} of the language model's blocks are recomputed in the backward pass")
    print(f"  2 billion samples {found.days(_SAMPLES):28.1f} days", flush=True)


if __name__ == "__main__":
    sys.exit(main())
