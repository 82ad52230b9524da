"""Check the machine code of the CUDA kernels for both architectures: no spills and no local memory.

The tests need nvcc and a disassembler, but no GPU.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

CUDA = Path(__file__).parents[2] / "csrc" / "cuda"
INSTANTIATIONS = sorted(path.stem for path in CUDA.glob("*_*_*_[bf]*16.cu"))
ARCHITECTURES = ["sm_80", "sm_90a"]


def find_nvcc() -> str:
    home = Path(os.environ.get("CUDA_HOME", "/usr/local/cuda"))
    nvcc = shutil.which("nvcc") or str(home / "bin" / "nvcc")
    if not os.access(nvcc, os.X_OK):
        pytest.skip("no nvcc: set CUDA_HOME to a CUDA toolkit to compile the kernels")
    return nvcc


def find_disassembler() -> str:
    """Return nvdisasm of the toolkit, or the one inside triton."""
    found = shutil.which("nvdisasm")
    triton = importlib.util.find_spec("triton")
    if found is None and triton is not None and triton.origin is not None:
        candidate = Path(triton.origin).parent / "backends" / "nvidia" / "bin" / "nvdisasm"
        found = str(candidate) if candidate.exists() else None
    if found is None:
        pytest.skip("no nvdisasm: neither the CUDA toolkit nor triton has one")
    return found


def compile_kernels(source: Path, architecture: str, folder: Path) -> tuple[str, Path]:
    """Return the report of ptxas, and the machine code."""
    code = folder / "kernels.cubin"
    command = [find_nvcc(), "-std=c++17", "-O3", f"-arch={architecture}", "-cubin", "-Xptxas=-v"]
    result = subprocess.run([*command, "-o", str(code), str(source)], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return result.stderr, code


def spilled_bytes(report: str) -> list[int]:
    """Return the stack frames, spill stores and spill loads of all kernels in a report of ptxas."""
    pattern = r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads"
    return [int(number) for kernel in re.findall(pattern, report) for number in kernel]


def instructions(code: Path) -> set[str]:
    """Return the names of the instructions in machine code, without modifiers: LDSM, HMMA, ..."""
    text = subprocess.run([find_disassembler(), "-c", str(code)], capture_output=True, text=True, check=True).stdout
    return set(re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9]*)", text))


def test_every_op_head_dim_and_type_is_instantiated() -> None:
    ops, head_dims, types = ("masked_cross_attention", "resampler_attention"), (64, 96, 128), ("bf16", "fp16")
    assert sorted(f"{op}_{head_dim}_{name}" for op in ops for head_dim in head_dims for name in types) == INSTANTIATIONS


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("name", INSTANTIATIONS)
def test_no_spills_and_no_local_memory(name: str, architecture: str, tmp_path: Path) -> None:
    report, code = compile_kernels(CUDA / f"{name}.cu", architecture, tmp_path)
    numbers = spilled_bytes(report)
    assert len(numbers) >= 3 * 4, "ptxas reports on at least four kernels"
    assert set(numbers) == {0}, report
    used = instructions(code)
    assert {"HMMA", "LDSM", "LDGSTS"} <= used, "tensor cores, matrix loads and asynchronous copies are used"
    assert not {name for name in used if name.startswith(("LDL", "STL"))}


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
    assert {"LDL", "STL"} <= instructions(code)


def test_kernel_headers_do_not_include_torch() -> None:
    for header in (*CUDA.glob("*.cuh"), CUDA / "params.h", CUDA / "launch.h"):
        assert not re.search(r"#include\s+[<\"](torch|ATen|c10)", header.read_text()), header.name
