"""``python -m trainer.benchmark checkpoint``: what a checkpoint costs in bytes and in time that training waits.

One process trains a linear layer under ZeRO-3 beside a frozen one, and saves in turns: asynchronously, synchronously
and as DeepSpeed does alone (``torch.save``, neither durable nor with checksums). Saves go to the folder for temporary
files (``TMPDIR`` names another).
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from trainer.benchmark.measurements import Measurement
from trainer.checkpoint.catalog import find_checkpoint, read_state
from trainer.checkpoint.load import restore
from trainer.checkpoint.save import Checkpoints
from trainer.checkpoint.training_state import UNIVERSAL, TrainingState
from trainer.checkpoint.universal import convert
from trainer.config.run_config import CheckpointConfig, OptimizerConfig
from trainer.deepspeed_engine.engine import Engine
from trainer.runtime import distributed
from trainer.runtime.distributed import World

BENCHMARK = "checkpoint"
WIDTH = 5000
# A float32 weight and two float32 moments of each trained number.
BYTES_A_NUMBER = 12


class _Layers(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.trained = nn.Linear(width, width)
        self.frozen = nn.Linear(width, width).requires_grad_(False)

    def forward(self, x: Tensor) -> Any:
        return SimpleNamespace(loss=self.frozen(self.trained(x)).square().sum())


def run(device: str, repeats: int = 5, width: int = WIDTH) -> list[Measurement]:
    """All measurements, in this process and the folder for temporary files."""
    world = distributed.initialize(timeout_seconds=600)
    if world.device.type != device:
        raise ValueError(
            f"DeepSpeed takes {world.device.type} here: set DS_ACCELERATOR={device} to measure on {device}"
        )
    try:
        with tempfile.TemporaryDirectory() as folder:
            return list(_measure(Path(folder), world, repeats, width))
    finally:
        distributed.shut_down()


def _engine(world: World, width: int) -> Engine:
    settings = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 1.0,
        "steps_per_print": 10**9,
        "zero_optimization": {"stage": 3},
    }
    return Engine(_Layers(width), OptimizerConfig(), settings, world)


def _measure(folder: Path, world: World, repeats: int, width: int) -> Iterator[Measurement]:
    engine = _engine(world, width)
    x = torch.randn(64, width, device=world.device)
    sizes = engine.shard_sizes()
    savers = {
        mode: Checkpoints(folder / mode, CheckpointConfig(keep_last=1), world, sizes)
        for mode in ("background", "first")
    }
    savers["synchronous"] = Checkpoints(folder / "synchronous", CheckpointConfig(1, 1, asynchronous=False), world)
    waited: defaultdict[str, list[float]] = defaultdict(list)

    def update() -> None:
        engine.forward_backward({"x": x}, scale=1.0)
        engine.step(1.0)

    def save(mode: str, step: int) -> None:
        if mode == "torch.save":
            (folder / "plain" / str(step)).mkdir(parents=True)
            engine.save(folder / "plain", str(step), torch.save)
        else:
            savers[mode].save(TrainingState(step, 1, {}, {}, {}), "", engine.save)

    waited["update"].append(_seconds(update))
    waited["first"].append(_seconds(partial(save, "first", 1)))
    savers["first"].wait()
    save("background", 1)
    for step in range(2, repeats + 2):
        savers["background"].wait()
        waited["update"].append(_seconds(update))
        for mode in ("torch.save", "synchronous", "background"):
            waited[mode].append(_seconds(partial(save, mode, step)))
        waited["update while writing"].append(_seconds(update))
    savers["background"].wait()
    times = {name: statistics.median(found) for name, found in waited.items()}
    yield from _waiting(times)
    yield from _size_and_resume(folder / "synchronous", world, width)


def _waiting(times: dict[str, float]) -> Iterator[Measurement]:
    stall, synchronous = times["background"], times["synchronous"]
    case = "training waits for a save"
    yield _row(case, "background", "s", stall, "synchronous", synchronous, synchronous / stall, 10.0)
    plain = times["torch.save"]
    yield _row(case, "background", "s", stall, "torch.save alone", plain, plain / stall)
    first = times["first"]
    yield _row(case, "first save of a run", "s", first, "synchronous", synchronous, synchronous / first, 10.0)
    slow, alone = times["update while writing"], times["update"]
    yield _row("an update", "while a save is written", "s", slow, "without", alone, alone / slow)


def _size_and_resume(folder: Path, world: World, width: int) -> Iterator[Measurement]:
    checkpoint = find_checkpoint(folder)
    assert checkpoint is not None
    state = BYTES_A_NUMBER * (width * width + width)
    written = sum(path.stat().st_size for path in checkpoint.rglob("*") if path.is_file())
    most = 1.05 * state
    yield _row("bytes written", "of weights and moments", "MB", written / 1e6, "limit", most / 1e6, most / written, 1.0)
    yield _row("a resume", "checksums", "s", _seconds(lambda: find_checkpoint(folder)))
    fresh = _engine(world, width)
    found = read_state(checkpoint)
    read = _seconds(lambda: restore(checkpoint, found, fresh.load, fresh.load_universal, world))
    yield _row("a resume", "same number of processes", "s", read)
    yield _row("another number of processes", "conversion, once", "s", _seconds(lambda: convert(checkpoint)))
    read = _seconds(lambda: fresh.load_universal(checkpoint, UNIVERSAL))
    yield _row("another number of processes", "reading", "s", read)


def _row(case: str, measure: str, unit: str, value: float, *baseline: Any) -> Measurement:
    return Measurement(BENCHMARK, case, measure, unit, value, *baseline)


def _seconds(work: Callable[[], Any]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start
