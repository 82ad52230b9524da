"""After a load, the optimizer has the state of the checkpoint and the settings of the run, whatever differs."""

from __future__ import annotations

import shutil
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.distributed.processes import run_distributed
from tests.distributed.test_checkpoint_universal import BEFORE, OPTIMIZER, Gated, optimizer_contents, train_steps
from trainer.checkpoint.errors import CheckpointError
from trainer.checkpoint.layout import UNIVERSAL
from trainer.checkpoint.load import check_fits, restore, resume_point
from trainer.checkpoint.save import Checkpoints
from trainer.checkpoint.training_state import TrainingState
from trainer.config.run_config import CheckpointConfig, OptimizerConfig
from trainer.deepspeed_engine.engine import Engine
from trainer.runtime.distributed import World

pytestmark = pytest.mark.distributed

OTHER = OptimizerConfig(
    lr=0.01, betas=(0.5, 0.9), eps=1e-4, weight_decay=0.5, gate_lr_multiplier=1.5, clip_grad_norm=0.25
)


class Resampled(Gated):
    """Has a module that ``optimizer.no_decay_resampler`` moves to another group of parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.resampler = nn.Linear(5, 5)

    def forward(self, x: Tensor, y: Tensor) -> Any:
        self.calls += 1
        hidden = self.resampler(torch.tanh(self.inner(x))) * torch.tanh(self.attention_gate)
        return SimpleNamespace(loss=(self.frozen(self.outer(hidden)) - y).float().square().sum())


@dataclass(frozen=True)
class Setup:
    """Settings of one run.

    Attributes:
        stage: ZeRO stage.
        bf16: Whether weights and activations are in bfloat16.
        zero: Keys of DeepSpeed's ``zero_optimization``.
        optimizer: Settings of the optimizer.
    """

    stage: int
    bf16: bool = False
    zero: tuple[tuple[str, Any], ...] = ()
    optimizer: OptimizerConfig = OPTIMIZER

    def build(self, world: World) -> Engine:
        torch.manual_seed(0)
        settings: dict[str, Any] = {
            "train_micro_batch_size_per_gpu": 1,
            "gradient_clipping": self.optimizer.clip_grad_norm,
            "steps_per_print": 10**9,
            "bf16": {"enabled": self.bf16},
            "zero_optimization": {"stage": self.stage, "stage3_param_persistence_threshold": 0, **dict(self.zero)},
            "zero_force_ds_cpu_optimizer": False,
        }
        if self.bf16 and self.stage >= 2:
            settings["data_types"] = {"grad_accum_dtype": "fp32"}
        if self.optimizer.name == "cpu_adam":
            settings["zero_optimization"]["offload_optimizer"] = {"device": "cpu"}
        return Engine(Resampled().bfloat16() if self.bf16 else Resampled(), self.optimizer, settings, world)


def save(world: World, folder: Path, setups: list[Setup]) -> list[dict[str, Any]]:
    """Train and save each setup; return what its optimizer held."""
    contents = []
    for number, setup in enumerate(setups):
        engine = setup.build(world)
        train_steps(engine, world, range(BEFORE), setup.bf16)
        checkpoints = Checkpoints(folder / str(number), CheckpointConfig(), world)
        state = TrainingState(BEFORE, world.size, {}, {}, {}, layout=engine.layout)
        checkpoints.save(state, "run_dir: here\n", engine.save)
        checkpoints.wait()
        contents.append(optimizer_contents(engine))
    return contents


def load(world: World, folder: Path, number: int, setup: Setup) -> tuple[dict[str, Any], float, list[float]]:
    """Restore a checkpoint into a setup; return what its optimizer holds, its clipping norm, and the next losses."""
    engine = setup.build(world)
    found = resume_point(folder / str(number), world)
    assert found is not None
    restore(*found, engine, world)
    contents, norm = optimizer_contents(engine), float(engine._deepspeed.optimizer.clip_grad)
    return contents, norm, train_steps(engine, world, range(BEFORE, BEFORE + 2), setup.bf16)


def load_all(
    world: World, folder: Path, setups: list[tuple[int, Setup]]
) -> list[tuple[dict[str, Any], float, list[float]]]:
    return [load(world, folder, number, setup) for number, setup in setups]


def state_of(contents: dict[str, Any]) -> dict[str, Any]:
    """Return weights, moments and buffers."""
    return {key: value for key, value in contents.items() if key not in ("groups", "steps")}


@pytest.mark.parametrize("ranks", [pytest.param(2, marks=pytest.mark.long), 1], ids=["shards", "universal"])
def test_the_settings_of_the_run_hold_after_a_load(tmp_path: Path, ranks: int) -> None:
    setups = [Setup(1), Setup(2, bf16=True), Setup(3), Setup(3, zero=(("sub_group_size", 10),))]
    saved = run_distributed(save, 2, tmp_path, setups)[0]
    others = [(number, replace(setup, optimizer=OTHER)) for number, setup in enumerate(setups)]
    for before, (contents, norm, _) in zip(saved, run_distributed(load_all, ranks, tmp_path, others)[0], strict=True):
        assert state_of(contents) == state_of(before)
        assert set(contents["steps"]) == {float(BEFORE)}
        assert norm == 0.25
        for group in contents["groups"]:
            assert group["weight_decay"] in (0.0, 0.5) and tuple(group["betas"]) == (0.5, 0.9)
            assert group["eps"] == 1e-4 and group["lr_multiplier"] in (1.0, 1.5)
        assert {group["weight_decay"] for group in contents["groups"]} == {0.0, 0.5}
        assert {group["lr_multiplier"] for group in contents["groups"]} == {1.0, 1.5}


LAYOUTS = [
    Setup(1),
    Setup(2),
    Setup(3),
    Setup(3, zero=(("sub_group_size", 10),)),
]


def test_another_layout_of_the_shards_is_converted(tmp_path: Path) -> None:
    saved = run_distributed(save, 2, tmp_path, LAYOUTS)[0]
    pairs = list(product(range(len(LAYOUTS)), LAYOUTS))
    loaded = run_distributed(load_all, 2, tmp_path, pairs)[0]
    losses = [result[2] for result in loaded]
    for (number, setup), (contents, _, _) in zip(pairs, loaded, strict=True):
        assert state_of(contents) == state_of(saved[number]), (LAYOUTS[number], setup)
        assert set(contents["steps"]) == {float(BEFORE)}
    assert all(found == pytest.approx(losses[0], rel=1e-5) for found in losses)
    assert all((path / UNIVERSAL).is_dir() for path in tmp_path.glob("*/step-*"))


def test_other_groups_of_parameters_are_converted(tmp_path: Path) -> None:
    setups = [Setup(1), Setup(3)]
    saved = run_distributed(save, 2, tmp_path, setups)[0]
    regrouped = replace(OPTIMIZER, no_decay_resampler=False)
    pairs = [(number, replace(setup, optimizer=regrouped)) for number, setup in enumerate(setups)]
    for before, (contents, _, _) in zip(saved, run_distributed(load_all, 2, tmp_path, pairs)[0], strict=True):
        assert state_of(contents) == state_of(before)
        assert set(contents["steps"]) == {float(BEFORE)}


def test_another_dtype_is_converted(tmp_path: Path) -> None:
    setups = [Setup(3), Setup(1), Setup(3, bf16=True), Setup(2, bf16=True)]
    saved = run_distributed(save, 2, tmp_path, setups)[0]
    pairs = [(number, setup) for number in range(4) for setup in setups]
    loaded = run_distributed(load_all, 2, tmp_path, pairs)[0]
    for (number, setup), (contents, _, _) in zip(pairs, loaded, strict=True):
        assert {k: v for k, v in state_of(contents).items() if k != "calls"} == {
            k: v for k, v in state_of(saved[number]).items() if k != "calls"
        }, (setups[number], setup)


@pytest.mark.long  # DeepSpeed compiles its CPU Adam for two minutes
def test_adamw_and_cpu_adam_read_each_other(tmp_path: Path) -> None:
    setups = [
        Setup(stage, optimizer=replace(OPTIMIZER, name=name)) for stage in (2, 3) for name in ("adamw", "cpu_adam")
    ]
    saved = run_distributed(save, 2, tmp_path, setups, timeout_seconds=600)[0]
    pairs = list(
        product(range(len(setups)), [replace(s, optimizer=replace(OTHER, name=s.optimizer.name)) for s in setups])
    )
    for ranks in (2, 1):
        loaded = run_distributed(load_all, ranks, tmp_path, pairs, timeout_seconds=600)[0]
        for (number, _), (contents, norm, _) in zip(pairs, loaded, strict=True):
            assert state_of(contents) == state_of(saved[number])
            assert norm == 0.25 and {group["weight_decay"] for group in contents["groups"]} == {0.0, 0.5}
            assert set(contents["steps"]) == {float(BEFORE)}


def test_a_difference_that_cannot_be_converted_is_refused_by_its_name() -> None:
    layout = {"training.dtype": "float32", "optimizer.name": "adamw or cpu_adam"}
    state = TrainingState(4, 2, {}, {"lm.weight": "0" * 64}, {}, layout=layout)
    check_fits(state, model={}, frozen=state.frozen, layout=layout)
    for name, other in (("optimizer.name", "apex_fused_adam"), ("deepspeed.offload_optimizer.device", "nvme")):
        with pytest.raises(CheckpointError, match=f"{name} is {other}"):
            check_fits(state, model={}, frozen=state.frozen, layout={**layout, name: other})
    with pytest.raises(CheckpointError, match=r"training\.dtype is bfloat16.*float32"):
        check_fits(state, model={}, frozen={"lm.weight": "1" * 64}, layout={**layout, "training.dtype": "bfloat16"})


def test_a_nvme_checkpoint_is_refused_with_the_settings_to_restore(tmp_path: Path) -> None:
    saved = run_distributed(save, 2, tmp_path, [Setup(3)])
    assert saved
    [checkpoint] = (tmp_path / "0").glob("step-*")
    (checkpoint / "offloaded_tensors").mkdir()
    shutil.rmtree(checkpoint / UNIVERSAL, ignore_errors=True)
    with pytest.raises(AssertionError, match=r"start 2 processes; set deepspeed\.zero_stage to 3"):
        run_distributed(load_all, 2, tmp_path, [(0, Setup(2))])
