"""setup.sh, test.sh and local.sh call the right programs; stand-ins replace pip, the linters and the launcher."""

from __future__ import annotations

import ast
import importlib
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.project.commands import ROOT

SCRIPTS = ("launch_scripts/setup.sh", "launch_scripts/test.sh", "launch_scripts/local.sh", ".ci/run")


class Clone:
    """A folder with the scripts, in which stand-ins for programs record their arguments."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        for name in (*SCRIPTS, "launch_scripts/job.sh", "requirements.txt", "requirements-dev.txt", "pyproject.toml"):
            (folder / name).parent.mkdir(exist_ok=True)
            shutil.copy(ROOT / name, folder / name)
        self.bin = folder / ".venv" / "bin"
        self.bin.mkdir(parents=True)
        self.calls = folder / "calls"
        self.stand_in("python", f'[ "$2" = pip ] || [ "$2" = pytest ] || exec {sys.executable} "$@"')

    def stand_in(self, name: str, first: str = "", exit_code: int = 0) -> None:
        """Write a program that runs ``first``, records its arguments, and exits."""
        path = self.bin / name
        note = f'echo "{name} $*" >>{self.calls}'
        path.write_text(f"#!/usr/bin/env bash\n{first}\n{note}\nexit {exit_code}\n")
        path.chmod(0o755)

    def run(self, *command: str, **environment: str) -> subprocess.CompletedProcess[str]:
        """Run a script of the clone to its end, after forgetting earlier calls."""
        inherited = {key: value for key, value in os.environ.items() if key not in ("VENV", "PYTHON", "PROCESSES")}
        self.calls.write_text("")
        return subprocess.run(
            [str(self.folder / command[0]), *command[1:]],
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
            cwd="/",  # the scripts must find the clone themselves
            env=inherited | {"SYSTEM_PACKAGES": "0"} | environment,
        )

    def called(self) -> list[str]:
        """Return the calls of stand-ins since the script started."""
        return self.calls.read_text().splitlines()


@pytest.fixture
def clone(tmp_path: Path) -> Clone:
    return Clone(tmp_path)


@pytest.mark.parametrize("script", [*SCRIPTS, "launch_scripts/quickstart.sh", "launch_scripts/multinode.sh"])
def test_scripts_are_executable_and_parse(script: str) -> None:
    assert os.access(ROOT / script, os.X_OK)
    subprocess.run(["bash", "-n", ROOT / script], check=True)


def test_the_names_that_embedded_python_imports_exist() -> None:
    imported = []
    for path in sorted((ROOT / "launch_scripts").glob("*.sh")):
        for program in re.findall(r"<<'PYTHON'.*?\n(.*?)^PYTHON$", path.read_text(), flags=re.DOTALL | re.MULTILINE):
            for node in ast.walk(ast.parse(program)):
                if isinstance(node, ast.ImportFrom):
                    module = importlib.import_module(node.module or "")
                    imported += [(path.name, alias.name, hasattr(module, alias.name)) for alias in node.names]
    assert ("multinode.sh", "read_hostfile", True) in imported
    assert [name for name in imported if not name[2]] == []


def test_setup_installs_once_and_again_after_a_change(clone: Clone) -> None:
    install = "python -m pip install -r requirements-dev.txt"
    project = "python -m pip install --no-build-isolation --no-deps -e ."
    first = clone.run("launch_scripts/setup.sh", "--dev")
    assert first.returncode == 0, first.stderr
    assert clone.called() == [install, project]
    for arguments in (["--dev"], []):  # --dev has installed everything that the call without it does
        assert clone.run("launch_scripts/setup.sh", *arguments).returncode == 0
        assert clone.called() == []
    with (clone.folder / "pyproject.toml").open("a") as file:
        file.write("# changed\n")
    clone.run("launch_scripts/setup.sh", "--dev")
    assert clone.called() == [project]
    (clone.folder / "csrc").mkdir()
    (clone.folder / "csrc" / "new.cpp").touch()
    clone.run("launch_scripts/setup.sh", "--dev")
    assert clone.called() == [project]
    with (clone.folder / "requirements.txt").open("a") as file:
        file.write("# changed\n")
    clone.run("launch_scripts/setup.sh", "--dev")
    assert clone.called() == [install]


def test_a_failed_installation_is_shown_and_repeated(clone: Clone) -> None:
    good = (clone.bin / "python").read_text()
    clone.stand_in("python", f'[ "$2" = pip ] || exec {sys.executable} "$@"\necho no such package', exit_code=1)
    failed = clone.run("launch_scripts/setup.sh")
    assert failed.returncode == 1
    assert "no such package" in failed.stderr
    assert "setup: failed" in failed.stderr
    (clone.bin / "python").write_text(good)
    assert clone.run("launch_scripts/setup.sh").returncode == 0
    assert len(clone.called()) == 2


def fake_python(folder: Path, body: str) -> str:
    """Write an interpreter that runs a shell script, and return its path."""
    path = folder / "some-python"
    path.write_text(f"#!/usr/bin/env bash\n{body}\n")
    path.chmod(0o755)
    return str(path)


def test_setup_refuses_an_old_python(clone: Clone, tmp_path: Path) -> None:
    shutil.rmtree(clone.folder / ".venv")
    done = clone.run("launch_scripts/setup.sh", PYTHON=fake_python(tmp_path, "exit 1"))
    assert done.returncode == 1
    assert "Python 3.11" in done.stderr
    assert not (clone.folder / ".venv").exists()


def test_setup_says_how_to_install_a_missing_venv_module(clone: Clone, tmp_path: Path) -> None:
    shutil.rmtree(clone.folder / ".venv")
    python = fake_python(tmp_path, '[[ "$2" != *venv* ]]')
    done = clone.run("launch_scripts/setup.sh", PYTHON=python)
    assert done.returncode == 1
    assert "apt install python3-venv" in done.stderr


def test_setup_refuses_an_unknown_argument(clone: Clone) -> None:
    assert clone.run("launch_scripts/setup.sh", "--develop").returncode == 2


@pytest.mark.parametrize("failing", [None, "mypy", "ruff"])
def test_the_suite_runs_every_stage_and_fails_if_one_fails(clone: Clone, failing: str | None) -> None:
    for name in ("ruff", "mypy", "lint-imports"):
        clone.stand_in(name, exit_code=int(name == failing))
    done = clone.run(".ci/run", "-m", "not slow")
    expected = ["ruff check .", "ruff format --check .", "mypy ", "lint-imports "]
    single, several = (f"python -m pytest --part {part}" for part in ("single", "distributed"))
    *linters, first, second = clone.called()[2:]  # the first two calls are the setup's
    assert linters == expected
    assert first.startswith(single) and first.endswith(" -m not slow") and second == f"{several} -m not slow"
    assert done.returncode == (1 if failing else 0)
    assert ("FAILED" in done.stderr) == bool(failing)
    assert "== timings" in done.stdout


@pytest.mark.parametrize(("codes", "expected"), [((0, 5), 0), ((5, 0), 0), ((5, 5), 1), ((1, 0), 1), ((0, 1), 1)])
def test_one_part_of_the_suite_may_have_no_test(clone: Clone, codes: tuple[int, int], expected: int) -> None:
    for name in ("ruff", "mypy", "lint-imports"):
        clone.stand_in(name)
    single, several = codes
    body = f'case "$*" in *"--part single"*) exit {single} ;; *"--part distributed"*) exit {several} ;; esac'
    clone.stand_in("python", body + f'; [ "$2" = pip ] || exec {sys.executable} "$@"')
    assert clone.run("launch_scripts/test.sh", "tests/model").returncode == expected


def test_the_suite_stops_if_the_setup_fails(clone: Clone) -> None:
    clone.stand_in("python", f'[ "$2" = pip ] || exec {sys.executable} "$@"', exit_code=1)
    done = clone.run("launch_scripts/test.sh")
    assert done.returncode == 1
    assert "== pytest" not in done.stdout


def test_local_starts_the_launcher(clone: Clone) -> None:
    clone.stand_in("deepspeed")
    clone.stand_in("nvidia-smi", exit_code=1)
    done = clone.run("launch_scripts/local.sh", "run.yaml", "--training.steps", "5", PROCESSES="3", MASTER_PORT="1234")
    assert done.returncode == 0, done.stderr
    launched = clone.called()[-1]
    assert launched == (
        "deepspeed --num_accelerators 3 --master_port 1234 --module trainer.train run.yaml --training.steps 5"
    )


def test_local_starts_a_process_for_each_gpu(clone: Clone) -> None:
    clone.stand_in("deepspeed")
    clone.stand_in("nvidia-smi", "echo GPU 0; echo GPU 1; exit")
    assert clone.run("launch_scripts/local.sh", "run.yaml", TRAINER="trainer.pretrain_lm").returncode == 0
    assert "--num_accelerators 2 " in clone.called()[-1]
    assert "--module trainer.pretrain_lm run.yaml" in clone.called()[-1]


def test_local_without_a_configuration_prints_its_usage(clone: Clone) -> None:
    done = clone.run("launch_scripts/local.sh")
    assert done.returncode == 2
    assert "local.sh CONFIG.yaml" in done.stderr
