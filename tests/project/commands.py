"""The shell commands of a Markdown file, and for each kind of command a check that it would work.

Nothing expensive runs here: entry points answer ``--help``, configurations with their overrides are loaded, launcher
arguments go through the launcher's own parser, files have to exist. A command of no known kind is an error, so that
whoever writes a new one into the README says how it is checked.
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

from trainer.config.loader import load_config
from trainer.config.run_config import ContrastiveRunConfig, FlamingoRunConfig, LanguageModelRunConfig

ROOT = Path(__file__).parents[2]
SCHEMAS: dict[str, type[Any]] = {
    "trainer.train": FlamingoRunConfig,
    "trainer.pretrain_lm": LanguageModelRunConfig,
    "trainer.pretrain_vision": ContrastiveRunConfig,
}
WITH_SUBCOMMANDS = ("trainer.benchmark", "trainer.checkpoint")


class UncheckedCommandError(AssertionError):
    """A command that nothing here knows how to check."""


def shell_commands(markdown: str) -> list[str]:
    """The commands in the fenced ``sh`` blocks, without comments, continued lines joined."""
    commands = []
    for block in re.findall(r"^```sh\n(.*?)^```", markdown, flags=re.DOTALL | re.MULTILINE):
        for line in block.replace("\\\n", " ").splitlines():
            words = line.split(" #")[0].strip()
            if words and not words.startswith("#"):
                commands.append(words)
    return commands


def check_command(command: str) -> None:
    """Raise AssertionError (or the command's own error) when it would not work."""
    words = shlex.split(command)
    while words and re.fullmatch(r"[A-Z_]+=\S*", words[0]):
        words.pop(0)
    program, arguments = words[0], words[1:]
    if program.startswith("launch_scripts/"):
        check_script(program, arguments)
    elif program in CHECKERS:
        CHECKERS[program](arguments)
    else:
        raise UncheckedCommandError(f"no test knows how to check {command!r}; add it to tests/project/commands.py")


def check_script(program: str, arguments: list[str]) -> None:
    path = ROOT / program
    assert path.is_file(), f"{program} is not there"
    assert os.access(path, os.X_OK), f"{program} is not executable"
    subprocess.run(["bash", "-n", path], check=True)
    usage = "\n".join(line for line in path.read_text().splitlines() if line.startswith("#"))
    for position, option in enumerate(arguments):
        if option.endswith(".yaml"):
            check_run("trainer.train", arguments[position:])
            return
        assert option in usage, f"{program} documents no {option}"


def check_python(arguments: list[str]) -> None:
    assert arguments[0] == "-m", f"README runs python only with -m: {arguments}"
    module, rest = arguments[1], arguments[2:]
    if module == "pytest":
        check_pytest(rest)
        return
    text = help_of(module, *rest[:1] if module in WITH_SUBCOMMANDS else ())
    if module in SCHEMAS:
        check_run(module, rest)
        return
    if "--" in rest:
        end = rest.index("--")
        check_run("trainer.train", rest[end + 1 :])
        rest = rest[:end]
    for word in rest:
        if word.startswith("--"):
            assert word.partition("=")[0] in text, f"{module} --help shows no {word}"


def check_run(module: str, arguments: list[str]) -> None:
    """A configuration in the repository and its overrides, as the entry point would read them."""
    overrides = [word for word in arguments[1:] if word != "--help"]
    load_config(ROOT / arguments[0], overrides, SCHEMAS[module], check_files=False)


@cache
def help_of(module: str, *subcommand: str) -> str:
    """What ``python -m MODULE [SUBCOMMAND] --help`` prints; it has to exit with 0."""
    done = subprocess.run(
        [sys.executable, "-m", module, *subcommand, "--help"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env={**os.environ, "DS_ACCELERATOR": "cpu"},
    )
    assert done.returncode == 0, f"python -m {module} --help: {done.stderr[-2000:]}"
    return done.stdout


def check_sbatch(arguments: list[str]) -> None:
    position = next(index for index, word in enumerate(arguments) if word.startswith("launch_scripts/"))
    subprocess.run(["bash", "-n", ROOT / arguments[position]], check=True)
    check_run("trainer.train", arguments[position + 1 :])


def check_deepspeed(arguments: list[str]) -> None:
    from deepspeed.launcher.runner import parse_args

    parsed = parse_args(arguments)
    assert parsed.module, "the trainers are started with --module"
    check_run(parsed.user_script, parsed.user_args)


def check_pytest(arguments: list[str]) -> None:
    for word in arguments:
        if word.startswith("tests"):
            assert (ROOT / word.split("::")[0]).exists(), f"{word} is not there"


def check_source(arguments: list[str]) -> None:
    assert arguments == [".venv/bin/activate"]


def check_tool(name: str) -> Callable[[list[str]], None]:
    """A development tool: it has to be pinned, and its path arguments have to exist."""

    def check(arguments: list[str]) -> None:
        assert f"\n{name}==" in (ROOT / "requirements-dev.txt").read_text(), f"{name} is not in requirements-dev.txt"
        for word in arguments:
            if "/" in word:
                assert (ROOT / word).exists(), f"{word} is not there"

    return check


CHECKERS: dict[str, Callable[[list[str]], None]] = {
    "python": check_python,
    "deepspeed": check_deepspeed,
    "sbatch": check_sbatch,
    "source": check_source,
    "pytest": check_pytest,
    "ruff": check_tool("ruff"),
    "mypy": check_tool("mypy"),
    "lint-imports": check_tool("import-linter"),
    "pre-commit": check_tool("pre-commit"),
}


def project_metadata() -> dict[str, Any]:
    """The ``[project]`` table of pyproject.toml."""
    table: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    return table
