"""Check that an install succeeds everywhere, and records why it left out a library."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.skipif(not (ROOT / "setup.py").exists(), reason="setup.py is not part of this tree")


def build(folder: Path, **environment: str) -> dict[str, str]:
    """Run setup.py's build into ``folder`` and return its report."""
    command = [sys.executable, str(ROOT / "setup.py"), "build_ext", "--build-lib", str(folder), "--build-temp"]
    result = subprocess.run(
        [*command, str(folder / "objects")],
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr[-2000:]
    report: dict[str, str] = json.loads((folder / "model" / "ops" / "_build_report.json").read_text())
    return report


def program(folder: Path, name: str, script: str) -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return path


def test_nothing_is_built_on_request(tmp_path: Path) -> None:
    assert build(tmp_path, FLAMINGO_BUILD="0") == dict.fromkeys(("cpu", "cuda"), "built with FLAMINGO_BUILD=0")


def test_missing_compilers_are_reported(tmp_path: Path) -> None:
    report = build(tmp_path, PATH=str(tmp_path), CXX="none", CUDA_HOME=str(tmp_path), CUDA_PATH=str(tmp_path))
    assert "no C++ compiler" in report["cpu"]
    assert "no nvcc" in report["cuda"]


def test_failing_compilers_are_reported(tmp_path: Path) -> None:
    failing = "case $1 in --version) exit 0;; esac\necho 'fatal error: cusparse.h: No such file' >&2; exit 1"
    compiler = program(tmp_path, "failing-c++", failing)
    program(tmp_path / "cuda", "bin/nvcc", failing)
    report = build(tmp_path / "out", CXX=str(compiler), CUDA_HOME=str(tmp_path / "cuda"))
    assert "cusparse.h" in report["cpu"]
    assert "cusparse.h" in report["cuda"] or "has no CUDA" in report["cuda"]


def test_missing_torch_is_reported(tmp_path: Path) -> None:
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text("raise ImportError('hidden by the test')\n")
    report = build(tmp_path / "out", PYTHONPATH=str(tmp_path))
    assert all("no usable torch when flamingo-trainer was built (hidden by the test)" in report[x] for x in report)
    assert set(report) == {"cpu", "cuda"}


def test_an_unknown_architecture_is_reported(tmp_path: Path) -> None:
    nvcc = program(tmp_path / "cuda", "bin/nvcc", "exit 0")
    failing = program(tmp_path, "failing-c++", "exit 1")
    report = build(
        tmp_path / "out", CXX=str(failing), CUDA_HOME=str(nvcc.parents[1]), TORCH_CUDA_ARCH_LIST="8.0 Hopper"
    )
    assert "'Hopper'" in report["cuda"] or "has no CUDA" in report["cuda"]
