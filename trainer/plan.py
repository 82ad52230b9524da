"""Predict what a run needs: ``python -m trainer.plan CONFIG --nodes N --devices-per-node D``.

The prediction covers the memory of a device and a node, the seconds and the traffic of a step, and the time for two
billion samples. It needs the configuration of ``trainer.train`` or ``trainer.pretrain_vision`` alone: nothing is
downloaded and no weights are loaded. ``--search`` tries other micro-batches, ZeRO stages, offload, hpZ and activation
checkpointing, and says why each is slower or does not fit. ``--quantized`` does the same once more for each way to
quantize the language model, which changes its outputs. ``--write`` writes a configuration with the best setting that
leaves them as they are. ``--scale`` predicts other numbers of devices.

Exit codes: 0 the configuration fits into memory; 1 it does not; 2 it is wrong.
"""

from __future__ import annotations

import argparse
import difflib
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, get_args

from model.config import QuantizationMethod
from trainer.config.loader import check_world_size, load_config, schema_of
from trainer.config.run_config import ContrastiveRunConfig, FlamingoRunConfig, RunConfig
from trainer.config.yaml_file import read_yaml
from trainer.errors import ConfigError
from trainer.planning.plan_text import print_prediction, print_scaling, print_search, settings_text

if TYPE_CHECKING:  # these load torch; a wrong configuration is reported before that
    from trainer.planning.devices import Device
    from trainer.planning.prediction import Cluster, Prediction
    from trainer.planning.search import Found


_QUANTIZATION = "model.language_model.quantization"


def main(argv: Sequence[str] | None = None) -> int:
    """Print the prediction and return the exit code."""
    options, overrides = _parser().parse_known_args(argv)
    try:
        config = _load(options.config, overrides)
        check_world_size(config, options.nodes * options.devices_per_node)
        quantized = _quantized(config, options, overrides)
        if options.write is not None and not options.write.parent.is_dir():
            raise ValueError(f"--write {options.write}: there is no folder {options.write.parent}")
        code = _plan(config, options, overrides)
        for method, changed in quantized.items():
            print(f"with {_QUANTIZATION} {method}:")
            planned = _planned(changed)
            print_search(_search(changed, planned, _cluster(changed, planned, options)))
        return code
    except (ConfigError, OSError, ValueError) as error:
        print(error, file=sys.stderr)
        return ConfigError.exit_code


def _load(path: Path, overrides: Sequence[str]) -> RunConfig:
    if schema_of(read_yaml(path).values) is ContrastiveRunConfig:
        return load_config(path, overrides, ContrastiveRunConfig, check_files=False)
    return load_config(path, overrides, FlamingoRunConfig, check_files=False)


def _quantized(config: RunConfig, options: argparse.Namespace, overrides: Sequence[str]) -> dict[str, RunConfig]:
    """Return the run with each other quantization that it may have, if the command asks for them."""
    if not options.quantized:
        return {}
    if not isinstance(config, FlamingoRunConfig):
        raise ValueError("--quantized is for a frozen language model, and this run has none")
    others = [method for method in get_args(QuantizationMethod) if method != config.model.language_model.quantization]
    return {method: _load(options.config, [*overrides, f"--{_QUANTIZATION}", method]) for method in others}


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
        "--drive-gbytes",
        type=float,
        metavar="X",
        help="GB per second that a node reads from its drives (default: 7, one PCIe 4.0 drive; unknown with --rates)",
    )
    parser.add_argument(
        "--rates", type=Path, metavar="FILE", help="result of trainer.benchmark rates --json (default: data sheets)"
    )
    parser.add_argument(
        "--measured", type=Path, metavar="FILE", help="result of trainer.benchmark step --json to compare with"
    )
    parser.add_argument("--search", action="store_true", help="also print the fastest settings of each kind")
    parser.add_argument("--quantized", action="store_true", help="also print them for a language model in 8 and 4 bits")
    parser.add_argument("--write", type=Path, metavar="FILE", help="YAML file to write with the fastest settings")
    parser.add_argument(
        "--scale",
        type=_sizes,
        metavar="N,N,...",
        help="numbers of devices to predict, with the same batch and a larger one",
    )
    return parser


def _sizes(text: str) -> list[int]:
    sizes = [int(part) for part in text.split(",")]
    if min(sizes) < 1:
        raise ValueError
    return sizes


def _plan(config: RunConfig, options: argparse.Namespace, overrides: Sequence[str]) -> int:
    from trainer.benchmark.plan_comparison import comparison_table
    from trainer.planning.scaling import scaling
    from trainer.planning.streaming import print_streaming, smallest_hidden_micro_batches
    from trainer.planning.write_config import write_config

    planned = _planned(config)
    cluster = _cluster(config, planned, options)
    found = planned.predict_exactly(config, cluster)
    print(f"{options.config} on {options.nodes} x {options.devices_per_node} {options.rates or options.device}")
    print_prediction(found)
    for hidden in smallest_hidden_micro_batches(config, cluster, planned.predict):
        print_streaming(hidden)
    if options.measured is not None:
        print(comparison_table(found, config, cluster.size, options.measured))
    if options.scale:
        print_scaling(scaling(config, cluster, options.scale, planned.predict))
    ranked: list[Found[Any]] = []
    if options.search or options.write or not found.fits:
        ranked = _search(config, planned, cluster)
    if options.search:
        print_search(ranked)
    best = ranked[0] if ranked and ranked[0].prediction.fits else None
    if options.write is not None and best is None:
        print(f"wrote no {options.write}: no setting of the search fits", file=sys.stderr)
        return 1
    if options.write is not None and best is not None:
        write_config(options.config, overrides, best.variant.settings, options.write)
        print(f"wrote {options.write}: {best.prediction.step_seconds:.2f} s a step")
        return 0
    if found.fits:
        return 0
    advice = f"set {settings_text(best)}" if best else "take more devices, devices with more memory, or a smaller model"
    needed, available = found.device_memory / 2**30, cluster.device.memory / 2**30
    print(f"it does NOT fit: {needed:.1f} GiB on a device with {available:.1f} GiB; {advice}", file=sys.stderr)
    return 1


class _Planned(NamedTuple):
    """Hold what the planning of a run needs of its model.

    Attributes:
        predict_exactly: Predicts a step, with an exact count of its activations.
        predict: Predicts it with extrapolated activations, for many configurations of the model.
        num_blocks: Blocks that can be recomputed.
        width: Width of the model's matrix products.
    """

    predict_exactly: Callable[..., Prediction]
    predict: Callable[..., Prediction]
    num_blocks: int
    width: int


def _planned(config: RunConfig) -> _Planned:
    if isinstance(config, ContrastiveRunConfig):
        from trainer.tasks.contrastive.prediction import ContrastivePredictor, random_towers

        towers = random_towers(config, "meta")
        exactly, roughly = (ContrastivePredictor(config, towers, exact=exact) for exact in (True, False))
        return _Planned(exactly, roughly, 0, exactly.dim)
    from trainer.planning.predictor import Predictor
    from trainer.planning.random_weights import build_on_meta_device

    assert isinstance(config, FlamingoRunConfig)
    model = build_on_meta_device(config.model, config.training.dtype)
    width = model.language_model.lm.get_input_embeddings().weight.shape[1]
    return _Planned(Predictor(model, exact=True), Predictor(model), model.language_model.num_blocks, width)


def _search(config: RunConfig, planned: _Planned, cluster: Cluster) -> list[Found[Any]]:
    from trainer.planning.search import search

    return search(config, planned.num_blocks, cluster, partial(planned.predict, cluster=cluster))


def _cluster(config: RunConfig, planned: _Planned, options: argparse.Namespace) -> Cluster:
    from trainer.planning.prediction import Cluster

    device = _device(config, planned.width, options)
    if options.drive_gbytes is not None:
        if not options.drive_gbytes > 0:
            raise ValueError(f"--drive-gbytes {options.drive_gbytes:g} must be more than 0")
        device = replace(device, drive=options.drive_gbytes * 1e9)
    return Cluster(device, options.nodes, options.devices_per_node)


def _device(config: RunConfig, width: int, options: argparse.Namespace) -> Device:
    """Return the device by its measured rates, or by its name and data sheet."""
    from trainer.benchmark.rates import measured_device
    from trainer.planning.devices import DEVICES

    if options.rates is not None:
        size = options.nodes * options.devices_per_node
        return measured_device(options.rates, config.training.dtype, size, width)
    if options.device not in DEVICES:
        close = difflib.get_close_matches(options.device, DEVICES, n=1)
        hint = f"; did you mean {close[0]}?" if close else ""
        raise ValueError(f"--device {options.device}: not a known device{hint} Known: {', '.join(DEVICES)}")
    return DEVICES[options.device]


if __name__ == "__main__":
    sys.exit(main())
