"""Weights, moments, steps and hyperparameters after a resume on another number of processes, bit for bit."""

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
from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state
from torch import Tensor, nn

from tests.checkpoint.damage import delete, flip_a_bit, truncate
from tests.distributed.processes import run_distributed
from trainer.checkpoint.__main__ import main
from trainer.checkpoint.catalog import find_checkpoint, problems_of
from trainer.checkpoint.load import _restore_random_states, restore, resume_point
from trainer.checkpoint.save import Checkpoints
from trainer.checkpoint.training_state import OFFLOADED, UNIVERSAL, CheckpointError, TrainingState, tag_of
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
    """Sizes that no number of processes divides, a gate that few of them have a part of, and a buffer that counts."""

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
        "gradient_accumulation_steps": 1,
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


def updates(engine: Engine, world: World, steps: range, bf16: bool) -> list[float]:
    """The loss of the global batch in each update."""
    losses = []
    for step in steps:
        draw = torch.Generator().manual_seed(step)
        x, y = torch.randn(ROWS, 7, generator=draw), torch.randn(ROWS, 1, generator=draw)
        mine = slice(world.rank * ROWS // world.size, (world.rank + 1) * ROWS // world.size)
        inputs = {"x": x[mine].bfloat16() if bf16 else x[mine], "y": y[mine]}
        loss = engine.forward_backward(inputs, scale=1 / ROWS)
        torch.distributed.all_reduce(loss)
        losses.append(float(loss))
        engine.step(1.0)
    return losses


def whole_moment(engine: Engine, parameter: Any, key: str) -> Tensor | None:
    """As DeepSpeed's own function says it, which under ZeRO-1 and 2 does not find moments before a resume."""
    if hasattr(parameter, "ds_id"):
        return safe_get_full_optimizer_state(parameter, key)
    whole = torch.zeros(parameter.numel())
    mapping = parameter._hp_mapping
    if mapping is not None:
        here, there = mapping.lp_fragment_address, mapping.get_hp_fragment_address()
        optimizer = engine._deepspeed.optimizer
        [group] = [i for i, group in enumerate(optimizer.bit16_groups) if any(p is parameter for p in group)]
        [flat] = optimizer.optimizer.param_groups[group]["params"]
        part = optimizer.optimizer.state[flat][key].narrow(0, there.start, there.numel)
        whole.narrow(0, here.start, here.numel).copy_(part)
    torch.distributed.all_reduce(whole)
    return whole.view(parameter.shape)


def exactly(tensor: Tensor | None) -> list[float]:
    """Numbers that leave the process unchanged."""
    assert tensor is not None
    return [float(value) for value in tensor.double().flatten().tolist()]


def everything(engine: Engine) -> dict[str, Any]:
    """What the optimizer knows, whole; its learning rate is set in every update."""
    found: dict[str, Any] = {}
    for name, parameter in engine.module.named_parameters():
        if parameter.requires_grad:
            found[name] = exactly(safe_get_full_fp32_param(parameter))
            for key in ("exp_avg", "exp_avg_sq"):
                found[f"{name} {key}"] = exactly(whole_moment(engine, parameter, key))
    base = engine._optimizer
    found["groups"] = [{k: v for k, v in group.items() if k not in ("params", "lr")} for group in base.param_groups]
    found["steps"] = [float(state["step"]) for state in engine._deepspeed.optimizer.optimizer.state.values()]
    found["calls"] = dict(engine.module.named_buffers())["calls"].tolist()
    return found


def saved_sizes(engine: Engine, folder: Path) -> Counter[tuple[torch.dtype, int]]:
    """Type and length of every tensor that a save hands over."""
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
        updates(engine, world, range(BEFORE), variant[1])
        assert not Counter(engine.shard_sizes()) - saved_sizes(engine, folder / "sizes" / str(number)), variant
        checkpoints = Checkpoints(folder / str(number), CheckpointConfig(), world, engine.shard_sizes())
        checkpoints.save(TrainingState(BEFORE, world.size, {}, {}, {}), "run_dir: here\n", engine.save)
        saved = everything(engine)
        results.append((saved, updates(engine, world, range(BEFORE, BEFORE + AFTER), variant[1])))
        checkpoints.wait()
    return results


def resume_and_train(world: World, folder: Path) -> list[tuple[dict[str, Any], list[float], int]]:
    results = []
    for number, variant in enumerate(VARIANTS):
        engine = build(world, variant)
        found = resume_point(folder / str(number), world)
        assert found is not None
        restore(*found, engine.load, engine.load_universal, world)
        loaded, seed = everything(engine), torch.initial_seed()
        _restore_random_states(*found, world)
        assert torch.initial_seed() == seed, "it is the same at every resume"
        results.append((loaded, updates(engine, world, range(BEFORE, BEFORE + AFTER), variant[1]), seed))
    return results


def resume_with_a_full_disk(world: World, folder: Path) -> str:
    """Rank 1 alone may write no more than 100 bytes a file."""
    engine = build(world, VARIANTS[0])
    found = resume_point(folder / "0", world)
    assert found is not None
    if world.rank == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, resource.RLIM_INFINITY))
    try:
        restore(*found, engine.load, engine.load_universal, world)
    except CheckpointError as error:
        return str(error)
    return "no error"


def save_on_a_full_disk(world: World, folder: Path) -> tuple[str, float]:
    """Rank 0 alone may write no more than 100 bytes a file."""
    engine = build(world, VARIANTS[4])
    updates(engine, world, range(BEFORE), bf16=False)
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
        assert "cannot write" in message and "rank 0: OSError" in message
        assert seconds < 30, "somebody waited for a collective's timeout of 60 s"
    assert find_checkpoint(tmp_path) is None


Saved = tuple[Path, list[tuple[dict[str, Any], list[float]]]]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Saved:
    folder = tmp_path_factory.mktemp("saved")
    return folder, run_distributed(train_and_save, 2, folder)[0]


def test_no_space_for_a_conversion_is_a_clear_error_on_all(saved: Saved, tmp_path: Path) -> None:
    checkpoint = tmp_path / "0" / tag_of(BEFORE)
    shutil.copytree(saved[0] / "0", checkpoint.parent)
    shutil.rmtree(checkpoint / UNIVERSAL, ignore_errors=True)
    for message in run_distributed(resume_with_a_full_disk, 3, tmp_path):
        assert f"cannot convert {checkpoint} for 3 processes: rank 1: OSError" in message
        assert "start as many processes as have written it" in message
    assert not list(problems_of(checkpoint)) and not (checkpoint / UNIVERSAL).exists()
    (checkpoint / OFFLOADED).mkdir()
    for message in run_distributed(resume_with_a_full_disk, 3, tmp_path):
        assert "start 2 processes" in message


def assert_restored(saved: Saved, results: list[list[tuple[dict[str, Any], list[float], int]]]) -> None:
    for rank in results:
        for (want, want_losses), (got, got_losses, _), (_, bf16, _) in zip(saved[1], rank, VARIANTS, strict=True):
            for name in want.keys() - {"steps"}:
                assert got[name] == want[name], name
            assert set(got["steps"]) == {float(BEFORE)}
            assert got_losses == pytest.approx(want_losses, rel=2e-2 if bf16 else 1e-5)


@pytest.mark.parametrize("world_size", [3, 4])
def test_everything_is_restored(saved: Saved, world_size: int) -> None:
    results = run_distributed(resume_and_train, world_size, saved[0])
    assert_restored(saved, results)
    new_seeds = [rank[0][2] for rank in results[2:]]
    assert len(set(new_seeds)) == len(new_seeds), "ranks that did not exist draw other numbers than one another"


def test_any_damage_to_shards_or_their_universal_form_is_found(saved: Saved, tmp_path: Path) -> None:
    for variant in (0, 4):  # ZeRO-1 and ZeRO-3
        checkpoint = tmp_path / str(variant) / tag_of(BEFORE)
        shutil.copytree(saved[0] / str(variant) / tag_of(BEFORE), checkpoint)
        shutil.rmtree(checkpoint / UNIVERSAL, ignore_errors=True)
        assert main(["convert", str(checkpoint)]) == 0
        assert not convert(checkpoint), "it is made once"
        paths = [path for path in checkpoint.rglob("*") if path.is_file()]
        assert len(paths) > 20
        for path, damage in product(paths, (delete, truncate, flip_a_bit)):
            content = path.read_bytes()
            damage(path)
            whole = checkpoint / UNIVERSAL if UNIVERSAL in path.parts else checkpoint
            assert [problem.split()[0] for problem in problems_of(whole)] == [path.relative_to(whole).as_posix()]
            path.write_bytes(content)
        assert not list(problems_of(checkpoint)) and not list(problems_of(checkpoint / UNIVERSAL))


def test_a_damaged_or_half_made_universal_form_is_made_again(saved: Saved, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(saved[0], tmp_path / "saved"))
    for number in range(len(VARIANTS)):
        checkpoint = folder / str(number) / tag_of(BEFORE)
        shutil.rmtree(checkpoint / UNIVERSAL, ignore_errors=True)
        if number % 2:
            convert(checkpoint)
            flip_a_bit(checkpoint / UNIVERSAL / "zero" / "attention_gate" / "fp32.pt")
        else:  # as a kill leaves it
            (checkpoint / ".universal.building" / "zero" / "attention_gate").mkdir(parents=True)
            (checkpoint / ".universal.building" / "zero" / "attention_gate" / "fp32.pt").write_bytes(b"half")
    assert_restored(saved, run_distributed(resume_and_train, 1, folder))
    for number in range(len(VARIANTS)):
        checkpoint = folder / str(number) / tag_of(BEFORE)
        assert not list(problems_of(checkpoint / UNIVERSAL))
        assert not (checkpoint / ".universal.building").exists()
