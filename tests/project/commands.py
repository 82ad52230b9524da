"""Find the shell commands of a Markdown file and check that each would work.

Nothing expensive runs: entry points answer ``--help``, configurations with their overrides are loaded, launcher
arguments go through the launcher's own parser, and files must exist. A command of an unknown kind is an error, so a new
kind in the README needs a checker here.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

from trainer.config.evaluation_config import EvaluationConfig
from trainer.config.loader import load_config
from trainer.config.run_config import ContrastiveRunConfig, FlamingoRunConfig, LanguageModelRunConfig

ROOT = Path(__file__).parents[2]
SCHEMAS: dict[str, type[Any]] = {
    "trainer.train": FlamingoRunConfig,
    "trainer.pretrain_lm": LanguageModelRunConfig,
    "trainer.pretrain_vision": ContrastiveRunConfig,
    "trainer.evaluate": EvaluationConfig,
    "trainer.zero_shot": ContrastiveRunConfig,
}
WITH_SUBCOMMANDS = ("trainer.benchmark", "trainer.checkpoint")


class UncheckedCommandError(AssertionError):
    """A command has no checker."""


def shell_commands(markdown: str) -> list[str]:
    """Return the commands of the fenced ``sh`` blocks, without comments and with continued lines joined."""
    commands = []
    for block in re.findall(r"^```sh\n(.*?)^```", markdown, flags=re.DOTALL | re.MULTILINE):
        for line in block.replace("\\\n", " ").splitlines():
            words = line.split(" #")[0].strip()
            if words and not words.startswith("#"):
                commands.append(words)
    return commands


def check_command(command: str) -> None:
    """Check that a command would work.

    Raises:
        UncheckedCommandError: No checker knows the command.
        AssertionError: The command would fail; some checkers raise the command's own error instead.
    """
    words = shlex.split(command)
    while words and re.fullmatch(r"[A-Z_]+=\S*", words[0]):
        words.pop(0)
    program, arguments = words[0], words[1:]
    if program.startswith("launch_scripts/"):
        check_script(program, arguments)
    elif program in CHECKERS:
        CHECKERS[program](arguments)
    else:
        raise UncheckedCommandError(f"{command!r} has no checker: add one to tests/project/commands.py")


def check_script(program: str, arguments: list[str]) -> None:
    """Check a launch script: it is executable, parses, documents the options, and its configuration loads."""
    path = ROOT / program
    assert path.is_file(), f"{program} does not exist"
    assert os.access(path, os.X_OK), f"{program} is not executable"
    subprocess.run(["bash", "-n", path], check=True)
    usage = "\n".join(line for line in path.read_text().splitlines() if line.startswith("#"))
    for position, option in enumerate(arguments):
        if option.endswith(".yaml"):
            check_run("trainer.train", arguments[position:])
            return
        assert option in usage, f"{program} documents no {option}"


def check_python(arguments: list[str]) -> None:
    """Check ``python -m MODULE`` or ``python docs/FILE.py``: its help shows every option, its configuration loads."""
    if arguments[0].startswith("docs/"):
        text = help_of(arguments[0])
        assert [word for word in arguments[1:] if word.startswith("--") and word not in text] == []
        return
    assert arguments[0] == "-m", f"documents run python only with -m, apart from docs/: {arguments}"
    module, rest = arguments[1], arguments[2:]
    if module == "pytest":
        check_pytest(rest)
        return
    text = help_of(module, *rest[:1] if module in WITH_SUBCOMMANDS else ())
    if module in SCHEMAS and rest[:1] != ["compare"]:
        check_run(module, rest)
        return
    if "--" in rest:
        end = rest.index("--")
        check_run("trainer.train", rest[end + 1 :])
        rest = rest[:end]
    if settings := [at for at, word in enumerate(rest) if re.match(r"--\w+\.", word)]:
        # Settings of the run whose configuration comes first, each with its value.
        check_run("trainer.train", [rest[0], *(word for at in settings for word in rest[at : at + 2])])
        rest = [word for at, word in enumerate(rest) if at not in settings]
    for word in rest:
        if word.startswith("--"):
            assert word.partition("=")[0] in text, f"{module} --help shows no {word}"


def check_run(module: str, arguments: list[str]) -> None:
    """Load a configuration of the repository with its overrides, as the entry point would."""
    overrides = [word for word in arguments[1:] if word != "--help"]
    load_config(ROOT / arguments[0], overrides, SCHEMAS[module], check_files=False)


@cache
def help_of(module: str, *subcommand: str) -> str:
    """Return the output of ``python -m MODULE [SUBCOMMAND] --help``, which must exit with 0; of a file likewise."""
    program = [module] if module.endswith(".py") else ["-m", module]
    done = subprocess.run(
        [sys.executable, *program, *subcommand, "--help"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env={**os.environ, "DS_ACCELERATOR": "cpu"},
    )
    assert done.returncode == 0, f"python {' '.join(program)} --help: {done.stderr[-2000:]}"
    return done.stdout


def check_sbatch(arguments: list[str]) -> None:
    """Check that the job script parses and its configuration loads."""
    position = next(index for index, word in enumerate(arguments) if word.startswith("launch_scripts/"))
    subprocess.run(["bash", "-n", ROOT / arguments[position]], check=True)
    check_run("trainer.train", arguments[position + 1 :])


def check_deepspeed(arguments: list[str]) -> None:
    """Check launcher arguments with the launcher's own parser, and the run behind them."""
    from deepspeed.launcher.runner import parse_args

    parsed = parse_args(arguments)
    assert parsed.module, "the launcher starts trainers with --module"
    check_run(parsed.user_script, parsed.user_args)


def check_pytest(arguments: list[str]) -> None:
    """Check that test paths exist and that pyproject.toml declares the markers of ``-m``."""
    for word in arguments:
        if word.startswith("tests"):
            assert (ROOT / word.split("::")[0]).exists(), f"{word} does not exist"
    if "-m" in arguments:
        expression = arguments[arguments.index("-m") + 1]
        unknown = set(re.findall(r"\w+", expression)) - {"and", "or", "not"} - declared_markers()
        assert not unknown, f"pyproject.toml declares no marker {sorted(unknown)}"


def declared_markers() -> set[str]:
    """Return the names of pytest's markers in pyproject.toml."""
    tool = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]
    return {marker.partition(":")[0] for marker in tool["pytest"]["ini_options"]["markers"]}


def check_source(arguments: list[str]) -> None:
    """Check that ``source`` activates the environment that setup.sh makes."""
    assert arguments == [".venv/bin/activate"]


def check_tool(name: str) -> Callable[[list[str]], None]:
    """Return a checker for a development tool: it must be pinned, and its path arguments must exist."""

    def check(arguments: list[str]) -> None:
        assert f"\n{name}==" in (ROOT / "requirements-dev.txt").read_text(), f"{name} is not in requirements-dev.txt"
        for word in arguments:
            if "/" in word:
                assert (ROOT / word).exists(), f"{word} does not exist"

    return check


def check_container(arguments: list[str]) -> None:
    """Check a call of docker, apptainer or srun: its files and build arguments exist, and its command would work."""
    recipe = (ROOT / "Dockerfile").read_text()
    for position, word in enumerate(arguments):
        if word.endswith(".def"):
            assert (ROOT / word).is_file(), f"{word} does not exist"
        if word == "--build-arg":
            name = arguments[position + 1].partition("=")[0]
            assert re.search(rf"^ARG {name}\b", recipe, flags=re.MULTILINE), f"the Dockerfile has no argument {name}"
        if word in ("python", "deepspeed"):
            CHECKERS[word](arguments[position + 1 :])
            return


CHECKERS: dict[str, Callable[[list[str]], None]] = {
    "python": check_python,
    "deepspeed": check_deepspeed,
    "sbatch": check_sbatch,
    "docker": check_container,
    "apptainer": check_container,
    "srun": check_container,
    "source": check_source,
    "pytest": check_pytest,
    "ruff": check_tool("ruff"),
    "mypy": check_tool("mypy"),
    "lint-imports": check_tool("import-linter"),
    "pre-commit": check_tool("pre-commit"),
}


def project_metadata() -> dict[str, Any]:
    """Return the ``[project]`` table of pyproject.toml."""
    table: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    return table
