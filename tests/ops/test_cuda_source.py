"""Check the machine code of the CUDA kernels for both architectures: no spills, no local memory, budgets kept.

The tests need nvcc and a disassembler, but no GPU.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.ops.sass_budgets import ARCHITECTURES, INSTANTIATIONS, assert_within_budget
from trainer.benchmark import sass

CUDA = Path(__file__).parents[2] / "csrc" / "cuda"


def find_nvcc() -> str:
    try:
        return sass.find_nvcc()
    except sass.ToolMissingError as error:
        pytest.skip(str(error))


def compile_kernels(source: Path, architecture: str, folder: Path) -> tuple[str, Path]:
    """Return the report of ptxas, and the machine code; skip the test where a tool is missing."""
    code = folder / "kernels.cubin"
    try:
        sass.find_disassembler()
        return sass.compile_source(source, architecture, code), code
    except sass.ToolMissingError as error:
        pytest.skip(str(error))


def spilled_bytes(report: str) -> list[int]:
    """Return the stack frames, spill stores and spill loads of all kernels in a report of ptxas."""
    pattern = r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads"
    return [int(number) for kernel in re.findall(pattern, report) for number in kernel]


def instructions(kernels: Sequence[sass.Kernel]) -> set[str]:
    """Return the names of the instructions of kernels, without modifiers: LDSM, HMMA, ..."""
    return {instruction.name for kernel in kernels for instruction in kernel.code}


def test_every_op_head_dim_and_type_is_instantiated() -> None:
    ops, head_dims, types = ("masked_cross_attention", "resampler_attention"), (64, 96, 128), ("bf16", "fp16")
    assert sorted(f"{op}_{head_dim}_{name}" for op in ops for head_dim in head_dims for name in types) == INSTANTIATIONS


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("name", INSTANTIATIONS)
def test_no_spills_no_local_memory_and_budgets_kept(name: str, architecture: str, tmp_path: Path) -> None:
    report, code = compile_kernels(CUDA / f"{name}.cu", architecture, tmp_path)
    numbers = spilled_bytes(report)
    assert len(numbers) >= 3 * 4, "ptxas reports on at least four kernels"
    assert set(numbers) == {0}, report
    kernels = sass.read_kernels(report, code)
    used = instructions(kernels)
    products = {"sm_80": {"HMMA", "LDSM"}, "sm_90a": {"HGMMA"}}
    assert {"LDGSTS", *products[architecture]} <= used, "tensor cores and asynchronous copies are used"
    assert not (products["sm_80"] | products["sm_90a"]) - products[architecture] & used, "and all products alike"
    assert "serialized" not in report, "ptxas lets products of a warpgroup run one after the other"
    assert not {name for name in used if name.startswith(("LDL", "STL"))}
    assert_within_budget(name, architecture, kernels)


def test_a_kernel_with_local_memory_is_noticed(tmp_path: Path) -> None:
    source = tmp_path / "spills.cu"
    source.write_text(
        "__global__ void kernel(float* p, int n) {\n"
        "  float x[64] = {};\n"
        "  for (int i = 0; i < n; ++i) x[static_cast<int>(p[i]) & 63] += p[i];\n"
        "  for (int i = 0; i < 64; ++i) p[i] = x[i];\n"
        "}\n"
    )
    report, code = compile_kernels(source, ARCHITECTURES[0], tmp_path)
    assert set(spilled_bytes(report)) != {0}
    assert {"LDL", "STL"} <= instructions(sass.read_kernels(report, code))


def test_kernel_headers_do_not_include_torch() -> None:
    for header in (*CUDA.glob("*.cuh"), CUDA / "params.h", CUDA / "launch.h"):
        assert not re.search(r"#include\s+[<\"](torch|ATen|c10)", header.read_text()), header.name
