"""Start launch_scripts/local.sh with stubs of nvidia-smi and deepspeed, and look at what the launcher gets."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.project.commands import ROOT

Start = Callable[..., subprocess.CompletedProcess[str]]
GPUS = "\n".join(f"GPU {number}: stub (UUID: GPU-{number}{number}-aa)" for number in range(8))


def program(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)


@pytest.fixture
def start(tmp_path: Path) -> Start:
    """Return a function that starts local.sh on a machine with 8 GPUs; the launcher prints its arguments."""
    program(tmp_path / "bin/nvidia-smi", f"cat <<'END'\n{GPUS}\nEND")
    program(tmp_path / "venv/bin/deepspeed", 'printf "%s\\n" "$@" "CUDA_VISIBLE_DEVICES=$CUDA_VISIBLE_DEVICES"')
    program(tmp_path / "venv/bin/python", f'exec {sys.executable} "$@"')
    (tmp_path / "caller").mkdir()

    def run(*arguments: str, cwd: Path = ROOT, **variables: str) -> subprocess.CompletedProcess[str]:
        ignored = ("DS_ACCELERATOR", "CUDA_VISIBLE_DEVICES", "PROCESSES", "MASTER_PORT", "TRAINER")
        environment = {name: value for name, value in os.environ.items() if name not in ignored}
        environment |= {"PATH": f"{tmp_path}/bin:{os.environ['PATH']}", "VENV": f"{tmp_path}/venv", **variables}
        command = [str(ROOT / "launch_scripts/local.sh"), *(arguments or ("configs/debug.yaml",))]
        return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, check=False)

    return run


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({}, ["--num_accelerators", "8"]),
        ({"PROCESSES": "2"}, ["--num_accelerators", "2"]),
        ({"CUDA_VISIBLE_DEVICES": "2,3"}, ["--include", "localhost:2,3"]),
        ({"CUDA_VISIBLE_DEVICES": "2, 3, 5", "PROCESSES": "2"}, ["--include", "localhost:2,3"]),
        ({"CUDA_VISIBLE_DEVICES": "GPU-44-aa,GPU-1"}, ["--include", "localhost:4,1"]),
        ({"CUDA_VISIBLE_DEVICES": ""}, ["--num_accelerators", "1"]),
        ({"CUDA_VISIBLE_DEVICES": "-1"}, ["--num_accelerators", "1"]),
        ({"CUDA_VISIBLE_DEVICES": "2,3", "DS_ACCELERATOR": "cpu"}, ["--num_accelerators", "8"]),
    ],
)
def test_the_launcher_gets_the_visible_devices(start: Start, variables: dict[str, str], expected: list[str]) -> None:
    done = start(**variables)
    assert done.returncode == 0, done.stderr
    words = done.stdout.splitlines()
    assert words[:2] == expected
    if expected[0] == "--include":
        assert words[-1] == "CUDA_VISIBLE_DEVICES="  # DeepSpeed would print that it ignores the variable


@pytest.mark.parametrize(
    ("variables", "words"),
    [
        ({"CUDA_VISIBLE_DEVICES": "2,9"}, ["CUDA_VISIBLE_DEVICES=2,9", "9 is none of"]),
        ({"CUDA_VISIBLE_DEVICES": "MIG-1"}, ["MIG-1 is none of"]),
        ({"CUDA_VISIBLE_DEVICES": "GPU-x"}, ["GPU-x is none of"]),
        ({"CUDA_VISIBLE_DEVICES": "2,3", "PROCESSES": "3"}, ["PROCESSES=3 is more than the 2 GPUs"]),
    ],
)
def test_devices_that_do_not_fit_are_refused(start: Start, variables: dict[str, str], words: list[str]) -> None:
    done = start(**variables)
    assert done.returncode == 2
    assert done.stdout == ""
    assert all(word in done.stderr for word in words)


def test_paths_are_relative_to_the_caller(start: Start, tmp_path: Path) -> None:
    caller = tmp_path / "caller"
    shutil.copy(ROOT / "configs/debug.yaml", caller / "mine.yaml")
    done = start("mine.yaml", "--run_dir", "try #2", "--training.steps", "4", cwd=caller)
    expected = [f"{caller}/mine.yaml", "--run_dir", f"{caller}/try #2", "--training.steps", "4"]
    assert done.stdout.splitlines()[-6:-1] == expected
    done = start("configs/debug.yaml", cwd=caller)
    assert done.stdout.splitlines()[-2] == "configs/debug.yaml"  # the clone's own
