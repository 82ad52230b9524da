"""Test the budgets of the kernels' machine code: complete, the same in csrc/README.md, and with enough blocks."""

from __future__ import annotations

import pytest

from tests.ops.sass_budgets import ARCHITECTURES, INSTANTIATIONS, read, short_name, table, table_in_readme
from trainer.benchmark.sass import Kernel

BUDGETS = read()[1]


def test_every_instantiation_has_budgets_for_every_architecture() -> None:
    assert set(BUDGETS) == {f"{name} {architecture}" for name in INSTANTIATIONS for architecture in ARCHITECTURES}
    assert all(
        "attention_forward" in kernels and len(kernels) == (7 if "resampler" in name else 6)
        for name, kernels in BUDGETS.items()
    )


def test_the_table_of_the_readme_is_that_of_the_budgets() -> None:
    assert table_in_readme() == table(BUDGETS), "run python -m tests.ops.sass_budgets"


@pytest.mark.parametrize("name", [name for name in INSTANTIATIONS if "_64_" in name])
def test_head_dim_64_leaves_room_for_more_blocks(name: str) -> None:
    for kernel, (registers, blocks, *_) in BUDGETS[f"{name} sm_90a"].items():
        if "forward" in kernel:
            assert registers <= 96 and blocks == 5
        else:
            assert registers <= 168 and blocks == 3


@pytest.mark.parametrize("name", [name for name in INSTANTIATIONS if "_64_" not in name])
def test_wide_forwards_leave_room_for_three_blocks(name: str) -> None:
    for kernel, (registers, blocks, *_) in BUDGETS[f"{name} sm_90a"].items():
        if "forward" in kernel:
            assert registers <= 168 and blocks == 3


def test_short_names() -> None:
    names = {
        "_ZN13backward_rowsILi64ELb1ELb1EEEv": "backward_rows alone split",
        "_ZN29cross_attention_backward_keysILi64ELb1ELb0EEEv": "backward_keys alone",
        "_ZN23resampler_backward_keysILi64EEEv": "backward_keys",
        "_ZN17attention_forwardILi64ELb1EEEv": "attention_forward split",
    }
    assert {name: short_name(Kernel(name, 1, 0, ())) for name in names} == names
