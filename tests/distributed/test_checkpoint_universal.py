"""Weights, moments, steps and hyperparameters are the same bits after a resume on another number of processes."""

from __future__ import annotations

import resource
import shutil
import time
from collections import Counter
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from deepspeed.utils import safe_get_full_fp32_param
from torch import Tensor, nn

from tests.checkpoint.damage import delete, flip_a_bit, truncate
from tests.deepspeed_engine.zero_state import whole_moment
from tests.distributed.processes import run_distributed
from trainer.checkpoint.__main__ import main
from trainer.checkpoint.catalog import find_checkpoint, problems_of
from trainer.checkpoint.errors import CheckpointError
from trainer.checkpoint.layout import OFFLOADED, UNIVERSAL, tag_of
from trainer.checkpoint.load import restore, restore_random_states, resume_point
from trainer.checkpoint.save import Checkpoints
from trainer.checkpoint.training_state import TrainingState
from trainer.checkpoint.universal import convert
from trainer.config.run_config import CheckpointConfig, OptimizerConfig
from trainer.deepspeed_engine.engine import Engine
from trainer.runtime.distributed import World

pytestmark = pytest.mark.distributed

OPTIMIZER = OptimizerConfig(lr=0.05, weight_decay=0.1, gate_lr_multiplier=3.0)
ROWS, BEFORE, AFTER = 12, 3, 2
# stage, bfloat16, offloaded optimizer
VARIANTS = [(1, False, False), (1, True, False), (2, False, True), (2, True, False), (3, False, False), (3, True, True)]


class Gated(nn.Module):
    """Parameters whose sizes no number of processes divides, a gate of one element, and a buffer that counts calls."""

    calls: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(7, 5)
        self.outer = nn.Linear(5, 1)
        self.frozen = nn.Linear(1, 1, bias=False).requires_grad_(False)
        self.attention_gate = nn.Parameter(torch.tensor([0.5]))
        self.register_buffer("calls", torch.zeros(1))

    def forward(self, x: Tensor, y: Tensor) -> Any:
        self.calls += 1
        hidden = torch.tanh(self.inner(x)) * torch.tanh(self.attention_gate)
        return SimpleNamespace(loss=(self.frozen(self.outer(hidden)) - y).float().square().sum())


def build(world: World, variant: tuple[int, bool, bool]) -> Engine:
    stage, bf16, offload = variant
    torch.manual_seed(0)
    settings: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_clipping": 1.0,
        "steps_per_print": 10**9,
        "bf16": {"enabled": bf16},
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
        "zero_force_ds_cpu_optimizer": False,
    }
    if bf16 and stage >= 2:
        settings["data_types"] = {"grad_accum_dtype": "fp32"}
    if offload:
        settings["zero_optimization"]["offload_optimizer"] = {"device": "cpu"}
    return Engine(Gated().bfloat16() if bf16 else Gated(), OPTIMIZER, settings, world)


def train_steps(engine: Engine, world: World, steps: range, bf16: bool) -> list[float]:
    """Train the steps; return the loss of each global batch."""
    losses = []
    for step in steps:
        draw = torch.Generator().manual_seed(step)
        x, y = torch.randn(ROWS, 7, generator=draw), torch.randn(ROWS, 1, generator=draw)
        mine = slice(world.rank * ROWS // world.size, (world.rank + 1) * ROWS // world.size)
        inputs = {"x": x[mine].bfloat16() if bf16 else x[mine], "y": y[mine]}
        loss = engine.forward_backward(inputs, scale=1 / ROWS, is_last=True)
        torch.distributed.all_reduce(loss)
        losses.append(float(loss))
        engine.step(1.0)
    return losses


def exact_values(tensor: Tensor | None) -> list[float]:
    """Return the values as Python floats, which pickle without loss."""
    assert tensor is not None
    return [float(value) for value in tensor.double().flatten().tolist()]


def optimizer_contents(engine: Engine) -> dict[str, Any]:
    """Return weights, moments, steps, hyperparameters and buffers; the learning rate is set anew in each step."""
    found: dict[str, Any] = {}
    for name, parameter in engine.module.named_parameters():
        if parameter.requires_grad:
            found[name] = exact_values(safe_get_full_fp32_param(parameter))
            for key in ("exp_avg", "exp_avg_sq"):
                found[f"{name} {key}"] = exact_values(whole_moment(engine, parameter, key))
    base = engine._optimizer
    found["groups"] = [{k: v for k, v in group.items() if k not in ("params", "lr")} for group in base.param_groups]
    found["steps"] = [float(state["step"]) for state in engine._deepspeed.optimizer.optimizer.state.values()]
    found["calls"] = dict(engine.module.named_buffers())["calls"].tolist()
    return found


def saved_sizes(engine: Engine, folder: Path) -> Counter[tuple[torch.dtype, int]]:
    """Count the tensors that a save writes, by type and length."""
    found: Counter[tuple[torch.dtype, int]] = Counter()

    def look(value: Any) -> None:
        if isinstance(value, Tensor):
            found[value.dtype, value.numel()] += 1
        elif isinstance(value, (dict, list, tuple)):
            for item in value.values() if isinstance(value, dict) else value:
                look(item)

    engine.save(folder, "sizes", lambda value, path: look(value))
    return found


def train_and_save(world: World, folder: Path) -> list[tuple[dict[str, Any], list[float]]]:
    results = []
    for number, variant in enumerate(VARIANTS):
        engine = build(world, variant)
        train_steps(engine, world, range(BEFORE), variant[1])
        assert not Counter(engine.shard_sizes()) - saved_sizes(engine, folder / "sizes" / str(number)), variant
        checkpoints = Checkpoints(folder / str(number), CheckpointConfig(), world, engine.shard_sizes())
        checkpoints.save(TrainingState(BEFORE, world.size, {}, {}, {}), "run_dir: here\n", engine.save)
        saved = optimizer_contents(engine)
        results.append((saved, train_steps(engine, world, range(BEFORE, BEFORE + AFTER), variant[1])))
        checkpoints.wait()
    return results


def resume_and_train(world: World, folder: Path) -> list[tuple[dict[str, Any], list[float], int]]:
    results = []
    for number, variant in enumerate(VARIANTS):
        engine = build(world, variant)
        found = resume_point(folder / str(number), world)
        assert found is not None
        restore(*found, engine, world)
        loaded, seed = optimizer_contents(engine), torch.initial_seed()
        restore_random_states(*found, world)
        assert torch.initial_seed() == seed, "every resume must give the same seed"
        results.append((loaded, train_steps(engine, world, range(BEFORE, BEFORE + AFTER), variant[1]), seed))
    return results


def resume_with_a_full_disk(world: World, folder: Path) -> str:
    """Resume while rank 1 alone cannot write files over 100 bytes; return the error."""
    engine = build(world, VARIANTS[0])
    found = resume_point(folder / "0", world)
    assert found is not None
    if world.rank == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, resource.RLIM_INFINITY))
    try:
        restore(*found, engine, world)
    except CheckpointError as error:
        return str(error)
    return "no error"


def save_on_a_full_disk(world: World, folder: Path) -> tuple[str, float]:
    """Save while rank 0 alone cannot write files over 100 bytes; return the error and how many seconds it took."""
    engine = build(world, VARIANTS[4])
    train_steps(engine, world, range(BEFORE), bf16=False)
    if world.rank == 0:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, resource.RLIM_INFINITY))
    checkpoints, start = Checkpoints(folder, CheckpointConfig(), world), time.monotonic()
    try:
        checkpoints.save(TrainingState(BEFORE, world.size, {}, {}, {}), "", engine.save)
        checkpoints.wait()
    except CheckpointError as error:
        return str(error), time.monotonic() - start
    return "no error", 0.0


def test_a_full_disk_reaches_all_ranks_at_once(tmp_path: Path) -> None:
    for message, seconds in run_distributed(save_on_a_full_disk, 2, tmp_path):
        assert "rank 0" in message and "OSError" in message
        assert seconds < 30, "a rank waited for a collective's timeout of 60 s"
    assert find_checkpoint(tmp_path) is None


Saved = tuple[Path, list[tuple[dict[str, Any], list[float]]]]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Saved:
    folder = tmp_path_factory.mktemp("saved")
    return folder, run_distributed(train_and_save, 2, folder)[0]


def test_a_full_disk_during_a_conversion_is_an_error_on_all_ranks(saved: Saved, tmp_path: Path) -> None:
    checkpoint = tmp_path / "0" / tag_of(BEFORE)
    shutil.copytree(saved[0] / "0", checkpoint.parent)
    shutil.rmtree(checkpoint / UNIVERSAL, ignore_errors=True)
    for message in run_distributed(resume_with_a_full_disk, 3, tmp_path):
        assert str(checkpoint) in message and "3 processes" in message
        assert "rank 1" in message and "OSError" in message
    assert not list(problems_of(checkpoint)) and not (checkpoint / UNIVERSAL).exists()
    (checkpoint / OFFLOADED).mkdir()
    for message in run_distributed(resume_with_a_full_disk, 3, tmp_path):
        assert "2 processes" in message


def assert_restored(saved: Saved, results: list[list[tuple[dict[str, Any], list[float], int]]]) -> None:
    for rank in results:
        for (want, want_losses), (got, got_losses, _), (_, bf16, _) in zip(saved[1], rank, VARIANTS, strict=True):
            for name in want.keys() - {"steps"}:
                assert got[name] == want[name], name
            assert set(got["steps"]) == {float(BEFORE)}
            assert got_losses == pytest.approx(want_losses, rel=2e-2 if bf16 else 1e-5)


@pytest.mark.parametrize("world_size", [3, 4])
def test_weights_and_optimizer_are_restored_on_more_processes(saved: Saved, world_size: int) -> None:
    results = run_distributed(resume_and_train, world_size, saved[0])
    assert_restored(saved, results)
    new_ranks_seeds = [rank[0][2] for rank in results[2:]]
    assert len(set(new_ranks_seeds)) == len(new_ranks_seeds), "new ranks must not share a seed"


def test_any_damage_to_a_checkpoint_or_its_universal_form_is_found(saved: Saved, tmp_path: Path) -> None:
    for variant in (0, 4):  # ZeRO-1 and ZeRO-3
        checkpoint = tmp_path / str(variant) / tag_of(BEFORE)
        shutil.copytree(saved[0] / str(variant) / tag_of(BEFORE), checkpoint)
        shutil.rmtree(checkpoint / UNIVERSAL, ignore_errors=True)
        assert main(["convert", str(checkpoint)]) == 0
        assert not convert(checkpoint), "a second call must not convert again"
        paths = [path for path in checkpoint.rglob("*") if path.is_file()]
        assert len(paths) > 20
        for path, damage in product(paths, (delete, truncate, flip_a_bit)):
            content = path.read_bytes()
            damage(path)
            whole = checkpoint / UNIVERSAL if UNIVERSAL in path.parts else checkpoint
            assert [problem.split()[0] for problem in problems_of(whole)] == [path.relative_to(whole).as_posix()]
            path.write_bytes(content)
        assert not list(problems_of(checkpoint)) and not list(problems_of(checkpoint / UNIVERSAL))


def test_a_damaged_or_incomplete_universal_form_is_converted_again(saved: Saved, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(saved[0], tmp_path / "saved"))
    for number in range(len(VARIANTS)):
        checkpoint = folder / str(number) / tag_of(BEFORE)
        shutil.rmtree(checkpoint / UNIVERSAL, ignore_errors=True)
        if number % 2:
            convert(checkpoint)
            flip_a_bit(checkpoint / UNIVERSAL / "zero" / "attention_gate" / "fp32.pt")
        else:  # a killed conversion leaves this
            (checkpoint / ".universal.building" / "zero" / "attention_gate").mkdir(parents=True)
            (checkpoint / ".universal.building" / "zero" / "attention_gate" / "fp32.pt").write_bytes(b"half")
    assert_restored(saved, run_distributed(resume_and_train, 1, folder))
    for number in range(len(VARIANTS)):
        checkpoint = folder / str(number) / tag_of(BEFORE)
        assert not list(problems_of(checkpoint / UNIVERSAL))
        assert not (checkpoint / ".universal.building").exists()
