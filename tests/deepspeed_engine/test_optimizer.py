"""Test the parameter groups and the learning-rate schedule."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from model.config import TrainableConfig
from tests.model.builders import tiny_flamingo
from trainer.config.run_config import OptimizerConfig, PartOptimizerConfig, PartsOptimizerConfig, ScheduleConfig
from trainer.deepspeed_engine.optimizer import (
    build_optimizer,
    learning_rate_factor,
    parameter_groups,
    set_learning_rate,
)


def group_settings(config: OptimizerConfig, **changes: Any) -> dict[str, dict[str, float]]:
    """Return the settings of each trainable parameter of a tiny Flamingo, by name."""
    model = tiny_flamingo(**changes)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    groups = parameter_groups(model.named_parameters(), config)
    found = {
        names[id(parameter)]: {key: group[key] for key in ("weight_decay", "lr_multiplier")}
        for group in groups
        for parameter in group["params"]
    }
    assert set(found) == {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    return found


def test_only_matrices_of_cross_attention_decay() -> None:
    groups = group_settings(OptimizerConfig(weight_decay=0.1, gate_lr_multiplier=15))
    decaying = {name for name, group in groups.items() if group["weight_decay"] == 0.1}
    assert decaying, "nothing decays"
    for name, group in groups.items():
        matrix = name.startswith("cross_attention.") and name.endswith(
            ("query.weight", "key_value.weight", "output.weight", "up.weight", "down.weight")
        )
        assert (name in decaying) == matrix, name
        assert group["lr_multiplier"] == (15 if name.endswith("_gate") else 1), name


def test_the_resampler_decays_on_request() -> None:
    groups = group_settings(OptimizerConfig(no_decay_resampler=False))
    resampler = {name: group["weight_decay"] for name, group in groups.items() if name.startswith("resampler.")}
    assert set(resampler.values()) == {0.0, 0.1}
    assert all(decay == 0 for name, decay in resampler.items() if "norm" in name)


def test_a_partitioned_matrix_decays() -> None:
    parameter = nn.Parameter(torch.empty(0))
    parameter.ds_shape = torch.Size([4, 4])  # type: ignore[attr-defined]  # as ZeRO-3 leaves it
    [group] = parameter_groups([("cross_attention.0.weight", parameter)], OptimizerConfig(weight_decay=0.1))
    assert group["weight_decay"] == 0.1


def test_the_multiplier_reaches_the_optimizer() -> None:
    gate, weight = nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(2, 2))
    config = OptimizerConfig(lr=1.0, gate_lr_multiplier=3)
    optimizer = build_optimizer(parameter_groups([("a_gate", gate), ("weight", weight)], config), config)
    set_learning_rate(optimizer.param_groups, 0.5)
    rates = {id(parameter): group["lr"] for group in optimizer.param_groups for parameter in group["params"]}
    assert rates == {id(gate): 1.5, id(weight): 0.5}


def test_parts_have_learning_rates_and_weight_decay_of_their_own() -> None:
    parts = PartsOptimizerConfig(vision=PartOptimizerConfig(0.1), cross_attention=PartOptimizerConfig(weight_decay=0.5))
    config = OptimizerConfig(weight_decay=0.2, gate_lr_multiplier=15, parts=parts)
    groups = group_settings(config, trainable=TrainableConfig(vision="full", language_model="full"))
    for name, group in groups.items():
        rate = 0.1 if name.startswith("vision_encoder.") else 15 if name.endswith("_gate") else 1
        assert group["lr_multiplier"] == pytest.approx(rate), name
        if group["weight_decay"]:
            assert group["weight_decay"] == (0.5 if name.startswith("cross_attention.") else 0.2), name
    assert groups["language_model.lm.model.layers.0.mlp.up_proj.weight"]["weight_decay"] == 0.2
    assert groups["language_model.lm.model.embed_tokens.weight"]["weight_decay"] == 0


@pytest.mark.parametrize(
    ("decay", "middle", "last"),
    [("constant", 1.0, 1.0), ("linear", 0.55, 0.1), ("cosine", 0.55, 0.1), ("exponential", 0.1**0.5, 0.1)],
)
def test_the_schedule_warms_up_and_decays(decay: str, middle: float, last: float) -> None:
    schedule = ScheduleConfig(warmup_steps=10, decay=decay, final_lr_ratio=0.1)  # type: ignore[arg-type]
    factors = [learning_rate_factor(step, 111, schedule) for step in range(111)]
    assert factors[:10] == pytest.approx([(step + 1) / 10 for step in range(10)])
    assert factors[10] == 1.0
    assert factors[60] == pytest.approx(middle)
    assert factors[110] == pytest.approx(last)
    assert factors[10:] == sorted(factors[10:], reverse=True)


def test_a_run_without_warmup_starts_at_the_peak() -> None:
    assert learning_rate_factor(0, 10, ScheduleConfig(warmup_steps=0)) == 1.0


def test_gains_of_weight_standardized_convolutions_do_not_decay() -> None:
    from timm.layers import ScaledStdConv2d

    convolution = ScaledStdConv2d(3, 4, 3)
    decays = {
        id(parameter): group["weight_decay"] > 0
        for group in parameter_groups(convolution.named_parameters(prefix="conv"), OptimizerConfig(weight_decay=0.1))
        for parameter in group["params"]
    }
    named = {name: decays[id(parameter)] for name, parameter in convolution.named_parameters()}
    assert named == {"weight": True, "gain": False, "bias": False}
