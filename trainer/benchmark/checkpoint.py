"""``python -m trainer.benchmark checkpoint``: measure bytes and time of saving and resuming.

One process trains a linear layer under ZeRO-3 beside a frozen one. It saves in turns asynchronously, synchronously, and
as DeepSpeed does alone (``torch.save``, without durability and checksums). Checkpoints go to the folder for temporary
files, which ``TMPDIR`` names.
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

from trainer.benchmark.result_file import Measurement
from trainer.checkpoint.catalog import find_checkpoint, read_state
from trainer.checkpoint.layout import UNIVERSAL
from trainer.checkpoint.load import restore
from trainer.checkpoint.save import Checkpoints
from trainer.checkpoint.training_state import TrainingState
from trainer.checkpoint.universal import convert
from trainer.config.run_config import CheckpointConfig, OptimizerConfig
from trainer.deepspeed_engine.engine import Engine
from trainer.planning.peak_memory import ADAMW_STATE_BYTES
from trainer.runtime import distributed
from trainer.runtime.distributed import World

BENCHMARK = "checkpoint"
WIDTH = 5000


class _Layers(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.trained = nn.Linear(width, width)
        self.frozen = nn.Linear(width, width).requires_grad_(False)

    def forward(self, x: Tensor) -> Any:
        return SimpleNamespace(loss=self.frozen(self.trained(x)).square().sum())


def run(device: str, repeats: int = 5, width: int = WIDTH) -> list[Measurement]:
    """Return all measurements.

    Raises:
        ValueError: DeepSpeed runs on another device than ``device``.
    """
    world = distributed.initialize(timeout_seconds=600)
    if world.device.type != device:
        raise ValueError(f"--device {device}: DeepSpeed runs on {world.device.type} here; set DS_ACCELERATOR={device}")
    try:
        with tempfile.TemporaryDirectory() as folder:
            return list(measure(Path(folder), world, repeats, width))
    finally:
        distributed.shut_down()


def _engine(world: World, width: int) -> Engine:
    settings = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_clipping": 1.0,
        "steps_per_print": 10**9,
        "zero_optimization": {"stage": 3},
    }
    return Engine(_Layers(width), OptimizerConfig(), settings, world)


def measure(folder: Path, world: World, repeats: int, width: int) -> Iterator[Measurement]:
    """Yield the measurements, with the checkpoints of a layer of ``width`` in ``folder``."""
    engine = _engine(world, width)
    x = torch.randn(64, width, device=world.device)
    sizes = engine.shard_sizes()
    savers = {
        mode: Checkpoints(folder / mode, CheckpointConfig(keep_last=1), world, sizes)
        for mode in ("background", "first")
    }
    savers["synchronous"] = Checkpoints(folder / "synchronous", CheckpointConfig(1, 1, asynchronous=False), world)
    waited: defaultdict[str, list[float]] = defaultdict(list)

    def train_step() -> None:
        engine.forward_backward({"x": x}, scale=1.0, is_last=True)
        engine.step(1.0)

    def save(mode: str, step: int) -> None:
        if mode == "torch.save":
            (folder / "plain" / str(step)).mkdir(parents=True)
            engine.save(folder / "plain", str(step), torch.save)
        else:
            savers[mode].save(TrainingState(step, 1, {}, {}, {}), "", engine.save)

    waited["step"].append(_seconds(train_step))
    waited["first"].append(_seconds(partial(save, "first", 1)))
    savers["first"].wait()
    save("background", 1)
    for step in range(2, repeats + 2):
        savers["background"].wait()
        waited["step"].append(_seconds(train_step))
        for mode in ("torch.save", "synchronous", "background"):
            waited[mode].append(_seconds(partial(save, mode, step)))
        waited["step while writing"].append(_seconds(train_step))
    savers["background"].wait()
    times = {name: statistics.median(found) for name, found in waited.items()}
    yield from _waiting(times)
    yield from _size_and_resume(folder / "synchronous", world, width)


def _waiting(times: dict[str, float]) -> Iterator[Measurement]:
    stall, synchronous = times["background"], times["synchronous"]
    case = "training waits for a save"
    yield _row(case, "background", "s", stall, "synchronous", synchronous, 10.0)
    plain = times["torch.save"]
    yield _row(case, "background", "s", stall, "torch.save alone", plain)
    first = times["first"]
    yield _row(case, "first save of a run", "s", first, "synchronous", synchronous, 10.0)
    slow, alone = times["step while writing"], times["step"]
    yield _row("a step", "while a save is written", "s", slow, "without a save", alone)


def _size_and_resume(folder: Path, world: World, width: int) -> Iterator[Measurement]:
    checkpoint = find_checkpoint(folder)
    assert checkpoint is not None
    state = ADAMW_STATE_BYTES * (width * width + width)
    written = sum(path.stat().st_size for path in checkpoint.rglob("*") if path.is_file())
    most = 1.05 * state
    yield _row("bytes written", "weights and moments", "MB", written / 1e6, "limit", most / 1e6, 1.0)
    yield Measurement(BENCHMARK, "resume", "checksums", "s", _seconds(lambda: find_checkpoint(folder)))
    fresh = _engine(world, width)
    found = read_state(checkpoint)
    read = _seconds(lambda: restore(checkpoint, found, fresh, world))
    yield Measurement(BENCHMARK, "resume", "same number of processes", "s", read)
    case = "resume with another number of processes"
    yield Measurement(BENCHMARK, case, "conversion, once", "s", _seconds(lambda: convert(checkpoint)))
    read = _seconds(lambda: fresh.load_universal(checkpoint, UNIVERSAL))
    yield Measurement(BENCHMARK, case, "reading", "s", read)


def _row(
    case: str, measure: str, unit: str, value: float, baseline: str, baseline_value: float, target: float | None = None
) -> Measurement:
    return Measurement.compared(BENCHMARK, case, measure, unit, value, baseline, baseline_value, target)


def _seconds(work: Callable[[], Any]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start
