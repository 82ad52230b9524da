"""``[deepspeed ... --module] trainer.benchmark rates``: measure the speeds for ``trainer.plan --rates``.

It measures forward and backward of two frozen blocks with a cross-attention, at a few widths; on a CPU what ZeRO-3
adds to them; turning the codes of quantized weights into numbers; DeepSpeed's optimizer step; the collectives of ZeRO-3
over the processes; and on a GPU the host link. Start it as the run will be started, with as many processes per node and
as many threads. Each rate is the median of its repetitions on the slowest process.
"""

from __future__ import annotations

import argparse
import math
import os
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import torch
import torch.distributed
from torch import Tensor, nn
from transformers.modeling_outputs import CausalLMOutput

from model.config import DType, QuantizationMethod
from model.factory import build_flamingo, torch_dtype
from model.flamingo import Flamingo
from model.flops import UsefulFlops, Workload
from model.presets import get_preset
from model.quantization import BLOCKS, dequantize, level_pairs, quantize
from trainer.benchmark.part_clock import GATHER, REDUCE, PartClock, device_clock
from trainer.benchmark.result_file import Measurement, read_result, write_result
from trainer.benchmark.timed_parts import parts_timed, sent_bytes
from trainer.config.run_config import OptimizerConfig
from trainer.deepspeed_engine.engine import Engine
from trainer.planning.devices import Device
from trainer.planning.peak_memory import ADAMW_STATE_BYTES
from trainer.planning.random_weights import synthetic_tokens
from trainer.runtime.cpu_matmul import use_cpu_matmul
from trainer.runtime.distributed import World, gather_objects, initialize, shut_down

BENCHMARK = "rates"
MIN_REPEATS = 3
# Widths of the language model. On a CPU, wider ones take minutes and reach no more FLOP/s.
_WIDTHS = {"cpu": (256, 512, 1024), "cuda": (1024, 2048, 4096)}
_ROWS, _LENGTH = 2, 256  # rows and their tokens; each row has one image
_MESSAGE_BYTES = (2**16, 2**20, 2**24)  # of all processes together
_TRAINED = 2**24  # parameters that the optimizer steps
_STATE_BYTES = ADAMW_STATE_BYTES + 4  # per parameter, with its float32 gradient
_COMPUTE, _GATHER, _REDUCE = "blocks", "all_gather_into_tensor", "reduce_scatter_tensor"
_CODES = (1024, 4096)  # weights that are quantized
_OPTIMIZER, _HOST_LINK, _MEMORY, _ZERO, _DEQUANTIZE = "optimizer", "host link", "memory", "ZeRO-3", "dequantize"


def main(argv: Sequence[str]) -> int:
    """Run ``trainer.benchmark rates`` and return the exit code, which is 2 for wrong arguments."""
    options = _parse(argv)
    if options.repeats < MIN_REPEATS:
        return _refuse(f"--repeats {options.repeats}: a median needs {MIN_REPEATS} or more")
    if options.json is not None and not options.json.absolute().parent.is_dir():
        return _refuse(f"--json {options.json}: there is no folder {options.json.absolute().parent}")
    world = initialize(timeout_seconds=600, threads=options.threads)
    try:
        dtype: DType = options.dtype or ("bfloat16" if world.device.type == "cuda" else "float32")
        rows = list(measure(world, dtype, options.repeats))
    finally:
        shut_down()
    if world.is_main:
        for row in rows:
            print(f"{row.case:28s} {row.measure:28s} {row.value:12.5g} {row.unit}")
        if options.json is not None:
            described = {"benchmark": BENCHMARK, "processes": world.size, "dtype": dtype, "repeats": options.repeats}
            write_result(options.json, world.device.type, described, rows)
    return 0


def _refuse(message: str) -> int:
    if os.environ.get("RANK", "0") == "0":
        print(message, file=sys.stderr)
    return 2


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m trainer.benchmark rates",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16"),
        help="type of the tensors (default: bfloat16 on a GPU, else float32)",
    )
    parser.add_argument(
        "--repeats",
        type=int,
        default=7,
        help=f"repetitions of each measurement, at least {MIN_REPEATS} (default: %(default)s)",
    )
    parser.add_argument("--threads", type=int, help="torch threads per process on the CPU (default: torch's choice)")
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="file to write the rates to, for trainer.plan --rates"
    )
    return parser.parse_args(argv)


def measure(world: World, dtype: DType, repeats: int) -> Iterator[Measurement]:
    """Yield the rates as rows. All ranks call it together.

    Args:
        world: The processes.
        dtype: Type of weights and activations.
        repeats: Repetitions of each measurement.
    """

    def row(case: str, measure: str, unit: str, value: float) -> Measurement:
        return Measurement(BENCHMARK, case, measure, unit, value)

    kind = torch_dtype(dtype)
    if world.device.type == "cpu":
        use_cpu_matmul("auto")  # as the engine does
    for width in _WIDTHS[world.device.type]:
        model, inputs, operations = _blocks(width, dtype, world)
        seconds = _slowest(world, partial(_forward_backward, model, inputs), repeats)
        yield row(_COMPUTE, f"width {width}", "FLOP/s", operations / seconds)
    if world.device.type == "cpu":  # a GPU computes meanwhile
        size = sum(parameter.numel() for parameter in model.parameters()) * kind.itemsize
        added = _seconds_under_zero(model, inputs, world, repeats) - seconds
        yield row(_ZERO, "weights made whole", "B/s", size / max(added, 1e-9))
    for method in BLOCKS:
        seconds = _slowest(world, _dequantization(method, kind, world), repeats)
        yield row(_DEQUANTIZE, method, "weights/s", math.prod(_CODES) / seconds)
    yield row(_OPTIMIZER, "AdamW under ZeRO-3", "B/s", _optimizer_rate(world, kind, repeats))
    if world.size > 1:
        for operation in (_GATHER, _REDUCE):
            for size in _MESSAGE_BYTES:
                seconds = _slowest(world, _collective(operation, size, kind, world), repeats)
                part = size // world.size if operation == _GATHER else size
                yield row(operation, f"{size} bytes", "B/s", sent_bytes(operation, part, world.size) / seconds)
    if world.device.type == "cuda":
        pinned = torch.empty(2**28, dtype=torch.uint8, pin_memory=True)
        on_device = torch.empty_like(pinned, device=world.device)
        seconds = _slowest(world, lambda: on_device.copy_(pinned, non_blocking=True), repeats)
        yield row(_HOST_LINK, "to the device, pinned", "B/s", pinned.numel() / seconds)
        memory = float(torch.cuda.mem_get_info(world.device)[1])
    else:
        memory = psutil.virtual_memory().total / int(os.environ.get("LOCAL_WORLD_SIZE", world.size))
    yield row(_MEMORY, "per device", "B", memory)


def _blocks(width: int, dtype: DType, world: World) -> tuple[Flamingo, dict[str, Tensor], float]:
    """Return a model of two blocks and little else, its inputs, and its floating-point operations."""
    small = get_preset("debug")
    architecture = dict(small.language_model.architecture or {})
    architecture |= {"hidden_size": width, "intermediate_size": 3 * width, "num_hidden_layers": 2}
    architecture |= dict.fromkeys(("num_attention_heads", "num_key_value_heads"), width // 64)
    config = replace(
        small,
        language_model=replace(small.language_model, architecture=architecture),
        cross_attention=replace(small.cross_attention, every_n_layers=2, head_dim=64),
    )
    model = build_flamingo(config, synthetic_tokens(config), dtype=dtype).to(world.device)
    size = model.vision_encoder.image_size
    inputs = {
        "input_ids": torch.ones(_ROWS, _LENGTH, dtype=torch.int64, device=world.device),
        "labels": torch.ones(_ROWS, _LENGTH, dtype=torch.int64, device=world.device),
        "media_index": torch.arange(_ROWS, device=world.device)[:, None].repeat(1, _LENGTH),
        "media": torch.zeros(_ROWS, 1, 3, size, size, dtype=torch.uint8, device=world.device),
    }
    operations = _ROWS * UsefulFlops.of(model).row(Workload(1, _LENGTH))
    return model, inputs, operations


def _forward_backward(model: Flamingo, inputs: dict[str, Tensor]) -> None:
    model(**inputs).loss.backward()


def _dequantization(method: QuantizationMethod, dtype: torch.dtype, world: World) -> Callable[[], Any]:
    """Return a call that turns the codes of a weight into numbers."""
    codes, scales = quantize(torch.randn(_CODES, dtype=dtype, device=world.device), method)
    pairs = level_pairs().to(world.device) if method == "nf4" else None
    return lambda: dequantize(codes, scales, dtype, _CODES[1], pairs)


def _seconds_under_zero(model: Flamingo, inputs: dict[str, Tensor], world: World, repeats: int) -> float:
    """Return the median seconds of forward and backward under ZeRO-3 without its collectives, on the slowest process.

    A processor itself copies weights and gradients, makes memory for them, and runs ZeRO-3's hooks.
    """
    engine = Engine(model, OptimizerConfig(), _zero_settings(next(model.parameters()).dtype), world)
    clock = PartClock(device_clock(world), _COMPUTE)
    taken = []
    with parts_timed(engine, clock):
        for _ in range(repeats + 1):
            torch.distributed.barrier()
            clock.lap()
            engine.forward_backward(inputs, 1.0, is_last=False)
            spent = clock.lap()
            taken.append((spent.total() - spent[GATHER] - spent[REDUCE]) / 1e9)
    return max(gather_objects(statistics.median(taken[1:]), world))


def _zero_settings(dtype: torch.dtype) -> dict[str, Any]:
    settings: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,
        "steps_per_print": 1_000_000_000,
        "gradient_clipping": 1.0,
        "bf16": {"enabled": dtype == torch.bfloat16},
        "zero_optimization": {"stage": 3, "reduce_bucket_size": _TRAINED, "stage3_param_persistence_threshold": 0},
    }
    if dtype == torch.bfloat16:
        settings["data_types"] = {"grad_accum_dtype": "fp32"}
    return settings


def _slowest(world: World, run: Callable[[], Any], repeats: int) -> float:
    """Return the median seconds of a repetition on the slowest process, after one repetition to warm up."""
    now = device_clock(world)
    run()
    taken = []
    for _ in range(repeats):
        torch.distributed.barrier()
        start = now()
        run()
        taken.append((now() - start) / 1e9)
    return max(gather_objects(statistics.median(taken), world))


def _collective(operation: str, size: int, dtype: torch.dtype, world: World) -> Callable[[], Any]:
    """Return a call of torch's collective that DeepSpeed uses, over ``size`` bytes of all processes together."""
    part = size // dtype.itemsize // world.size
    whole = torch.zeros(part * world.size, dtype=dtype, device=world.device)
    own = torch.zeros(part, dtype=dtype, device=world.device)
    run: Any = getattr(torch.distributed, operation)
    return (lambda: run(whole, own)) if operation == _GATHER else (lambda: run(own, whole))


class _OneMatrix(nn.Module):
    """Hold as many weights as the optimizer steps, with little to compute."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.matrix = nn.Linear(1024, _TRAINED // 1024, bias=False, dtype=dtype)

    def forward(self, row: Tensor) -> CausalLMOutput:
        """Return a loss with a gradient for each weight."""
        return CausalLMOutput(loss=self.matrix(row).sum())


def _optimizer_rate(world: World, dtype: torch.dtype, repeats: int) -> float:
    """Return the bytes of state, gradients and weights per second that one process steps, on the slowest process."""
    engine = Engine(_OneMatrix(dtype).to(world.device), OptimizerConfig(), _zero_settings(dtype), world)
    row = torch.ones(1, 1024, dtype=dtype, device=world.device)
    now, taken = device_clock(world), []
    for _ in range(repeats + 1):
        engine.forward_backward({"row": row}, 1.0, is_last=True)
        start = now()
        engine.step(1.0)
        taken.append((now() - start) / 1e9)
    seconds = max(gather_objects(statistics.median(taken[1:]), world))
    return (_STATE_BYTES + dtype.itemsize) * _TRAINED / world.size / seconds


def measured_device(path: Path, dtype: str, processes: int, width: int) -> Device:
    """Return the device that ``rates --json`` measured.

    Args:
        path: The result.
        dtype: Type that the run computes in.
        processes: Number of processes of the run.
        width: Width of its language model; the measured width nearest to it counts.

    Raises:
        ValueError: The file is not such a result, or it is of another type or number of processes.
    """
    header, rows = read_result(path)
    if header["benchmark"] != BENCHMARK:
        raise ValueError(f"{path} is a result of trainer.benchmark {header['benchmark']}, not of rates")
    if header["dtype"] != dtype:
        raise ValueError(
            f"{path} was measured in {header['dtype']}, and training.dtype is {dtype}; measure with --dtype {dtype}"
        )
    if processes > 1 and header["processes"] != processes:
        raise ValueError(f"{path} was measured with {header['processes']} processes, and this run has {processes}")
    found = {(row["case"], row["measure"]): float(row["value"]) for row in rows}
    nearest = min(_WIDTHS[header["device"]], key=lambda known: max(known / width, width / known))
    flops = found[_COMPUTE, f"width {nearest}"]
    small, large = (f"{size} bytes" for size in (_MESSAGE_BYTES[0], _MESSAGE_BYTES[-1]))
    link = found.get((_GATHER, large), float("inf"))
    sent = sent_bytes(_GATHER, _MESSAGE_BYTES[0] // header["processes"], header["processes"])
    start = sent / found[_GATHER, small] - sent / link if link < float("inf") else 0.0
    return Device(
        flops / 1e12,
        found[_MEMORY, "per device"],
        host_link=found.get((_HOST_LINK, "to the device, pinned"), float("inf")),
        node_link=link,
        network=link,
        flops=flops,
        optimizer=found[_OPTIMIZER, "AdamW under ZeRO-3"],
        overlaps=header["device"] != "cpu",
        message_seconds=(max(0.0, start), 0.0),
        made_whole=found.get((_ZERO, "weights made whole")),
        dequantized={method: found[_DEQUANTIZE, method] for method in BLOCKS if (_DEQUANTIZE, method) in found},
        # gloo has no reduce-scatter: it sends what an all-reduce sends.
        scatter_ratio=link / found[_REDUCE, large] if link < float("inf") else 1.0,
    )
