"""``python -m trainer.benchmark step CONFIG``: measure a step of a run on these devices, and the time of its parts.

CONFIG is one of ``trainer.train`` or ``trainer.pretrain_vision``. The model has random weights. Batches are synthetic:
full rows of ``max_tokens``, each one sample with as many media as the source allows, made before the clock runs. With
``--data real``, the run's own model and data are measured instead.

There are three phases. Warm-up comes first. Then steps are timed: nothing is measured but the wall clock between the
device-synchronized ends of steps. Then as many steps are profiled: the device is synchronized at the borders of each
part. Each moment of a profiled step belongs to one part, so the parts add up to the step:

- data wait: until the batches of the next step are on the device.
- vision, resampler: the forward of these modules. language model: the rest of the forward. text tower: that of a
  contrastive run, whose first pass without a graph counts too.
- backward: including what it recomputes, and the contrastive loss. optimizer: the engine's step.
- gather (of partitioned parameters), reduce (of gradients and norms): the process waits for a collective, or for the
  slowest rank to join it. This time does not count in the part that called the collective.

On a CPU, a collective that runs beside the computation costs its part only the waiting. On a GPU nothing overlaps in
profiled steps, so the sum of the parts exceeds a timed step. One more step is traced there: "exposed" is the time in
which a collective or an offload transfer ran and nothing computed. The bytes over the host link are those of the
step's copies, including the copies of the batches. A CPU has no such link. "Read from drives" is what the main process
reads in a timed step, such as weights with ``offload_param: {device: nvme}``; what the page cache holds is not read.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import repeat
from pathlib import Path
from typing import Any

from model.flops import UsefulFlops
from trainer.benchmark import contrastive_step
from trainer.benchmark.result_file import Measurement, write_result
from trainer.benchmark.step_memory import check_memory, limit_memory
from trainer.benchmark.step_rows import BENCHMARK, step_contents, step_rows
from trainer.benchmark.step_timings import Accumulate, time_steps
from trainer.benchmark.synthetic_run import random_model, synthetic_step
from trainer.config.loader import check_world_size, load_config, schema_of, to_plain
from trainer.config.run_config import ContrastiveRunConfig, FlamingoRunConfig, RunConfig
from trainer.config.yaml_file import read_yaml
from trainer.data.batch import Batch
from trainer.deepspeed_engine.engine import Engine
from trainer.entry import quiet_libraries
from trainer.errors import ConfigError, TrainerError
from trainer.loop import Task, step_loader
from trainer.planning.random_weights import build_on_meta_device
from trainer.resilience.swap_folders import swap_folders
from trainer.runtime.device_memory import explain_out_of_memory
from trainer.runtime.distributed import World, initialize, shut_down
from trainer.tasks.contrastive.prediction import random_towers
from trainer.tasks.contrastive.task import build_contrastive_task
from trainer.tasks.flamingo import build_flamingo_task

MIN_STEPS = 3


def main(argv: Sequence[str]) -> int:
    """Run ``trainer.benchmark step`` and return the exit code.

    That is 2 for wrong arguments or settings, and 1 where the memory of a device does not suffice.
    """
    options, overrides = _parse(argv)
    try:
        _check_options(options)
        config = _load(options.config, overrides, check_files=options.data == "real")
        quiet_libraries()
        world = initialize(config.deepspeed.timeout_seconds, config.training.threads)
        try:
            check_world_size(config, world.size)
            limit_memory(options.device_memory_gib, world)
            with swap_folders(config.deepspeed, world.rank), explain_out_of_memory():
                rows = measure_run(config, world, options)
        finally:
            shut_down()
    except (ConfigError, ValueError) as error:
        if os.environ.get("RANK", "0") == "0":
            print(error, file=sys.stderr)
        return 2
    except TrainerError as error:  # of any one process
        print(error, file=sys.stderr)
        return error.exit_code
    if world.is_main:
        for row in rows:
            print(f"{row.case:28s} {row.measure:36s} {row.value:12.5g} {row.unit}")
        if options.json is not None:
            described = {"benchmark": BENCHMARK, "processes": world.size, "data": options.data, "steps": options.steps}
            device = "cuda" if world.device.type == "cuda" else "cpu"
            write_result(options.json, device, described | {"config": to_plain(config)}, rows)
    return 0


def _load(path: Path, overrides: Sequence[str], *, check_files: bool) -> FlamingoRunConfig | ContrastiveRunConfig:
    if schema_of(read_yaml(path).values) is ContrastiveRunConfig:
        return load_config(path, overrides, ContrastiveRunConfig, check_files=check_files)
    return load_config(path, overrides, FlamingoRunConfig, check_files=check_files)


def _check_options(options: argparse.Namespace) -> None:
    """Check the options that would fail only after the measurement, or not at all.

    Raises:
        ValueError: An option is wrong.
    """
    if options.steps < MIN_STEPS or options.warmup < 1:
        raise ValueError(f"a median needs --steps {MIN_STEPS} or more, and --warmup 1 or more")
    if options.peak_tflops is not None and options.peak_tflops <= 0:
        raise ValueError(
            f"--peak-tflops {options.peak_tflops:g}: a device's peak is above 0; leave it out to measure it"
        )
    for name, path in (("--json", options.json), ("--trace", options.trace)):
        if path is not None and not path.absolute().parent.is_dir():
            raise ValueError(f"{name} {path}: there is no folder {path.absolute().parent}")


def _parse(argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(
        prog="python -m trainer.benchmark step",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("config", type=Path, help="YAML file of a run; --section.key VALUE changes its settings")
    parser.add_argument(
        "--steps", type=int, default=10, help=f"timed steps, at least {MIN_STEPS} (default: %(default)s)"
    )
    parser.add_argument("--warmup", type=int, default=2, help="steps before them, at least 1 (default: %(default)s)")
    parser.add_argument(
        "--data", choices=("synthetic", "real"), default="synthetic", help="samples to train on (default: %(default)s)"
    )
    parser.add_argument(
        "--peak-tflops",
        type=float,
        help="peak of a device in 10^12 operations per second (default: its data sheet, or else a measured matmul)",
    )
    parser.add_argument(
        "--device-memory-gib", type=float, help="limit of usable GPU memory in GiB, as on a smaller GPU (default: all)"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="file to write the measurements to")
    parser.add_argument(
        "--trace", type=Path, metavar="FILE", help="file to write the profiler's trace of one more step to"
    )
    return parser.parse_known_args(argv)


@dataclass(frozen=True)
class _Prepared:
    """Hold what is measured.

    Attributes:
        engine: Engine to step.
        batches: Micro-batches of this rank in each step.
        contents: Returns what a step's micro-batches hold.
        accumulate: Adds the gradient of a step; None runs one micro-batch after the other.
    """

    engine: Engine
    batches: Iterator[list[Batch]]
    contents: Callable[[list[Batch]], Counter[str]]
    accumulate: Accumulate | None = None


def measure_run(
    config: FlamingoRunConfig | ContrastiveRunConfig, world: World, options: argparse.Namespace
) -> list[Measurement]:
    """Measure steps of a run and return the rows. All ranks call it together."""
    if isinstance(config, ContrastiveRunConfig):
        run = _prepared_towers(config, world, options)
    else:
        run = _prepared_flamingo(config, world, options)
    timings = time_steps(
        run.engine, run.batches, options.steps, options.warmup, options.trace, run.contents, run.accumulate
    )
    return step_rows(
        run.engine.module,
        world,
        config.training.dtype,
        timings,
        real_data=options.data == "real",
        peak_tflops=options.peak_tflops or config.logging.peak_tflops,
    )


def _prepared_flamingo(config: FlamingoRunConfig, world: World, options: argparse.Namespace) -> _Prepared:
    if options.data == "real":
        engine, batches = _real(build_flamingo_task(config, world), config, world, options)
    else:
        check_memory(config, build_on_meta_device(config.model, config.training.dtype), world)
        model, settings = random_model(config, world)
        matmul, replicated = config.training.cpu_matmul, config.deepspeed.replicates_frozen
        engine = Engine(model, config.optimizer, settings, world, matmul, replicate_frozen=replicated)
        batches = repeat(synthetic_step(config, model, world))
    module: Any = engine.module
    return _Prepared(
        engine, batches, partial(step_contents, UsefulFlops.of(module), module.language_model.checkpointed)
    )


def _prepared_towers(config: ContrastiveRunConfig, world: World, options: argparse.Namespace) -> _Prepared:
    towers = random_towers(config, "meta")
    if options.data == "real":
        engine, batches = _real(build_contrastive_task(config, world), config, world, options)
    else:
        check_memory(config, towers, world)
        engine = contrastive_step.random_engine(config, world)
        batches = contrastive_step.synthetic_steps(config, towers, world)
    contents, accumulate = contrastive_step.contents(config, towers, world), contrastive_step.accumulation(config)
    return _Prepared(engine, batches, contents, accumulate)


def _real(
    task: Task, config: RunConfig, world: World, options: argparse.Namespace
) -> tuple[Engine, Iterator[list[Batch]]]:
    """Return the engine of a run, and the micro-batches that it would train on."""
    drawn = options.warmup + 2 * options.steps + 2  # one step counts memory, and one is traced
    matmul, clipping = config.training.cpu_matmul, task.clip_parts
    replicated = config.deepspeed.replicates_frozen
    engine = Engine(task.module, config.optimizer, task.deepspeed, world, matmul, clipping, replicate_frozen=replicated)
    return engine, (step.micro_batches for step in step_loader(task, config, world, 0, drawn))
