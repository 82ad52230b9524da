"""Run trainer.doctor here, and with packages, programs and settings that are missing or wrong."""

from __future__ import annotations

import importlib.metadata
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.project.commands import ROOT
from trainer import doctor
from trainer.doctor import Finding, main


@pytest.fixture(autouse=True)
def _in_the_clone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


def only(monkeypatch: pytest.MonkeyPatch, *checks: object) -> None:
    """Replace the checks, most of which take seconds."""
    monkeypatch.setattr(doctor, "CHECKS", tuple(("Check", check) for check in checks))


def test_training_is_possible_where_the_tests_run(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    text = capsys.readouterr().out
    for words in (
        "python",
        "torch 2.",
        "CPU",
        "masked_cross_attention",
        "training.cpu_matmul",
        "adamw",
        "Training is possible here.",
    ):
        assert words in text
    assert "missing " not in text


def test_a_missing_package_prevents_training(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real = importlib.metadata.version

    def version(name: str) -> str:
        if name == "deepspeed":
            raise importlib.metadata.PackageNotFoundError
        return "0.1" if name == "transformers" else real(name)

    monkeypatch.setattr(doctor.importlib.metadata, "version", version)
    only(monkeypatch, doctor._check_packages)
    assert main([]) == 1
    text = capsys.readouterr().out
    assert "Training is NOT possible here: deepspeed, transformers" in text
    assert "0.1 is installed" in text


def test_an_exception_in_a_check_is_a_finding(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def _check_something() -> Iterator[Finding]:
        yield Finding("ok", "first", "")
        raise OSError("libsomething.so: cannot open")

    only(monkeypatch, _check_something)
    assert main([]) == 1
    assert "OSError: libsomething.so: cannot open" in capsys.readouterr().out


def test_an_absent_program_does_not_prevent_training(monkeypatch: pytest.MonkeyPatch) -> None:
    only(monkeypatch, lambda: iter([Finding("absent", "nvcc", "")]))
    assert main([]) == 0


def test_a_configuration_is_checked(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    only(monkeypatch)
    wrong = tmp_path / "wrong.yaml"
    wrong.write_text("run_dir: runs/x\ntrainings: {}\n")
    assert main([str(wrong)]) == 2
    assert "did you mean training?" in capsys.readouterr().out

    (tmp_path / "manifest.npz").touch()
    right = tmp_path / "right.yaml"
    source = f"{{type: text, name: a, manifest: {tmp_path}/manifest.npz, batch_size: 6}}"
    right.write_text(
        f"run_dir: runs/x\narchitecture: {{model_type: llama}}\ndata: {{sources: [{source}]}}\n"
        "training: {steps: 10}\nschedule: {warmup_steps: 1}\n"
    )
    assert main([str(right)]) == 0
    assert "numbers of processes that fit: 1, 2, 3, 6" in capsys.readouterr().out
    assert main([str(right), "--training.steps", "0"]) == 2


def test_missing_nvidia_software_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor.shutil, "which", lambda name: None)
    findings = {finding.name: finding for finding in doctor._check_compilers()}
    assert findings["nvcc"].verdict == "absent"
    assert "plain torch on the GPU" in findings["nvcc"].detail


@pytest.mark.slow
def test_it_works_from_an_installed_package(tmp_path: Path) -> None:
    """Without the clone, the requirements come from the installed metadata."""
    for name in ("model", "trainer"):
        shutil.copytree(ROOT / name, tmp_path / "site" / name, ignore=shutil.ignore_patterns("__pycache__"))
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "site")}
    command = [sys.executable, "-m", "trainer.doctor"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "missing " not in done.stdout


def test_installed_requirements_are_those_of_the_project(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from packaging.requirements import Requirement

    in_clone = {Requirement(text).name for text in doctor._requirements()}
    monkeypatch.setattr(doctor, "PROJECT", tmp_path / "pyproject.toml")
    assert {Requirement(text).name for text in doctor._requirements()} == in_clone
