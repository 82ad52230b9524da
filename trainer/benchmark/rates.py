"""``[deepspeed ... --module] trainer.benchmark rates``: the speeds from which ``trainer.plan --rates`` predicts.

Forward and backward of two frozen blocks with a cross-attention, of a few widths; DeepSpeed's optimizer step; the
collectives of ZeRO-3 over the processes; on a GPU the host link. Start it as the run will be started: as many processes
on each node, and as many threads. Each is the median of its repetitions; every process measures, and the slowest
counts.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import torch
import torch.distributed
from torch import Tensor, nn
from transformers.modeling_outputs import CausalLMOutput

from model.config import DType
from model.factory import build_flamingo, torch_dtype
from model.flops import UsefulFlops, Workload
from model.presets import preset
from trainer.benchmark.measurements import Measurement, header
from trainer.benchmark.results import read_result
from trainer.benchmark.step_parts import device_clock, sent_bytes
from trainer.config.run_config import OptimizerConfig
from trainer.deepspeed_engine.engine import Engine
from trainer.planning.cost_model import Device, synthetic_tokens
from trainer.runtime.cpu_matmul import use_onednn
from trainer.runtime.distributed import World, gather_objects, initialize, shut_down

BENCHMARK = "rates"
LEAST_REPEATS = 3
# Of a language model. On a CPU wider ones take minutes, and are no faster.
_WIDTHS = {"cpu": (256, 512, 1024), "cuda": (1024, 2048, 4096)}
_ROWS, _LENGTH = 2, 256  # sequences and their tokens, each with one image
_MESSAGES = (2**16, 2**20, 2**24)  # bytes that all processes have together
_TRAINED = 2**24  # numbers that the optimizer steps
_STATE = 12 + 4  # bytes of each: float32 weight and two moments, and its gradient
_COMPUTE, _GATHER, _REDUCE = "blocks", "all_gather_into_tensor", "reduce_scatter_tensor"
_OPTIMIZER, _HOST_LINK, _MEMORY = "optimizer", "host link", "memory"


def main(argv: Sequence[str]) -> int:
    """Entry point behind ``trainer.benchmark rates``; returns the exit code: 2 for wrong arguments."""
    options = _parse(argv)
    if options.repeats < LEAST_REPEATS:
        return _refuse(f"--repeats {options.repeats}: a median needs {LEAST_REPEATS} or more")
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
            how = {"benchmark": BENCHMARK, "processes": world.size, "dtype": dtype, "repeats": options.repeats}
            document = [header(world.device.type) | how, *(row.as_json() for row in rows)]
            options.json.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
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
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="default: bfloat16 on a GPU, float32 without")
    parser.add_argument("--repeats", type=int, default=7, help=f"of each measurement, at least {LEAST_REPEATS}")
    parser.add_argument("--threads", type=int, help="torch threads a process on the CPU; default: torch's choice")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rates there, for trainer.plan --rates")
    return parser.parse_args(argv)


def measure(world: World, dtype: DType, repeats: int) -> Iterator[Measurement]:
    """The rates as rows; a collective. dtype: of weights and activations."""

    def row(case: str, measure: str, unit: str, value: float) -> Measurement:
        return Measurement(BENCHMARK, case, measure, unit, value)

    kind = torch_dtype(dtype)
    if world.device.type == "cpu":
        use_onednn()  # as the engine does
    for width in _WIDTHS[world.device.type]:
        run, operations = _blocks(width, dtype, world)
        yield row(_COMPUTE, f"of width {width}", "FLOP/s", operations / _slowest(world, run, repeats))
    yield row(_OPTIMIZER, "AdamW under ZeRO-3", "B/s", _optimizer_rate(world, kind, repeats))
    if world.size > 1:
        for operation in (_GATHER, _REDUCE):
            for size in _MESSAGES:
                seconds = _slowest(world, _collective(operation, size, kind, world), repeats)
                part = size // world.size if operation == _GATHER else size
                yield row(operation, f"{size} bytes", "B/s", sent_bytes(operation, part, world.size) / seconds)
    if world.device.type == "cuda":
        pinned = torch.empty(2**28, dtype=torch.uint8, pin_memory=True)
        there = torch.empty_like(pinned, device=world.device)
        seconds = _slowest(world, lambda: there.copy_(pinned, non_blocking=True), repeats)
        yield row(_HOST_LINK, "to the device, pinned", "B/s", pinned.numel() / seconds)
        memory = float(torch.cuda.mem_get_info(world.device)[1])
    else:
        memory = psutil.virtual_memory().total / int(os.environ.get("LOCAL_WORLD_SIZE", world.size))
    yield row(_MEMORY, "of a device", "B", memory)


def _blocks(width: int, dtype: DType, world: World) -> tuple[Callable[[], None], float]:
    """An update's forward and backward of a model that is hardly more than them, and its floating-point operations."""
    small = preset("debug")
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
    operations = _ROWS * UsefulFlops.of(model).sequence(Workload(1, _LENGTH))
    return lambda: model(**inputs).loss.backward(), operations


def _slowest(world: World, run: Callable[[], Any], repeats: int) -> float:
    """Seconds of the median repetition, after one that is not counted, on the process where that is most."""
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
    """The same of torch's that DeepSpeed calls, over ``size`` bytes in all."""
    part = size // dtype.itemsize // world.size
    whole = torch.zeros(part * world.size, dtype=dtype, device=world.device)
    own = torch.zeros(part, dtype=dtype, device=world.device)
    run: Any = getattr(torch.distributed, operation)
    return (lambda: run(whole, own)) if operation == _GATHER else (lambda: run(own, whole))


class _OneMatrix(nn.Module):
    """As many weights as are trained here, and hardly anything to compute."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.matrix = nn.Linear(1024, _TRAINED // 1024, bias=False, dtype=dtype)

    def forward(self, row: Tensor) -> CausalLMOutput:
        """A loss with a gradient for each weight."""
        return CausalLMOutput(loss=self.matrix(row).sum())


def _optimizer_rate(world: World, dtype: torch.dtype, repeats: int) -> float:
    """Bytes of optimizer state, gradients and weights that a process's step reads and writes a second."""
    settings: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,
        "steps_per_print": 1_000_000_000,
        "gradient_clipping": 1.0,
        "bf16": {"enabled": dtype == torch.bfloat16},
        "zero_optimization": {"stage": 3, "reduce_bucket_size": _TRAINED, "stage3_param_persistence_threshold": 0},
    }
    if dtype == torch.bfloat16:
        settings["data_types"] = {"grad_accum_dtype": "fp32"}
    engine = Engine(_OneMatrix(dtype).to(world.device), OptimizerConfig(), settings, world)
    row = torch.ones(1, 1024, dtype=dtype, device=world.device)
    now, taken = device_clock(world), []
    for _ in range(repeats + 1):
        engine.forward_backward({"row": row}, 1.0)
        start = now()
        engine.step(1.0)
        taken.append((now() - start) / 1e9)
    seconds = max(gather_objects(statistics.median(taken[1:]), world))
    return (_STATE + dtype.itemsize) * _TRAINED / world.size / seconds


def measured_device(path: Path, dtype: str, processes: int, width: int) -> Device:
    """The device that ``rates --json`` measured. width: of the language model; blocks of the nearest one count.

    Raises: ValueError for a file that is no such result, or one of another type or number of processes.
    """
    head, rows = read_result(path)
    if head["benchmark"] != BENCHMARK:
        raise ValueError(f"{path} is a result of trainer.benchmark {head['benchmark']}, not of rates")
    if head["dtype"] != dtype:
        raise ValueError(
            f"{path} was measured in {head['dtype']}, and training.dtype is {dtype}: rates --dtype {dtype}"
        )
    if processes > 1 and head["processes"] != processes:
        raise ValueError(f"{path} was measured with {head['processes']} processes, and this is for {processes}")
    found = {(row["case"], row["measure"]): float(row["value"]) for row in rows}
    nearest = min(_WIDTHS[head["device"]], key=lambda known: max(known / width, width / known))
    flops = found[_COMPUTE, f"of width {nearest}"]
    largest = f"{_MESSAGES[-1]} bytes"
    # ZeRO sends about as much to gather as to reduce.
    links = [found[operation, largest] for operation in (_GATHER, _REDUCE) if (operation, largest) in found]
    link = statistics.harmonic_mean(links) if links else float("inf")
    return Device(
        flops / 1e12,
        found[_MEMORY, "of a device"],
        host_link=found.get((_HOST_LINK, "to the device, pinned"), float("inf")),
        node_link=link,
        network=link,
        flops=flops,
        optimizer=found[_OPTIMIZER, "AdamW under ZeRO-3"],
        overlaps=head["device"] != "cpu",
    )
