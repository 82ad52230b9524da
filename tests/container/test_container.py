"""The Dockerfile and the Apptainer definition copy files that exist, install the pins, and take the same steps."""

from __future__ import annotations

import fnmatch
import importlib.util
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.project.commands import ROOT, check_command

DOCKERFILE = (ROOT / "Dockerfile").read_text(encoding="utf-8")
DEFINITION = (ROOT / "launch_scripts" / "apptainer.def").read_text(encoding="utf-8")
PINS = (ROOT / "requirements.txt").read_text(encoding="utf-8")


def instructions() -> list[tuple[str, str]]:
    """Return the instructions of the Dockerfile: name and the rest, without comments and continued lines."""
    lines = "\n".join(line for line in DOCKERFILE.splitlines() if not line.lstrip().startswith("#"))
    joined = re.sub(r"\\\n\s*", "", lines)
    return [(name, rest) for name, _, rest in (line.partition(" ") for line in joined.splitlines() if line)]


def copied_into_the_image() -> list[str]:
    """Return the files and folders of the clone that the Dockerfile copies."""
    copies = [shlex.split(rest) for name, rest in instructions() if name == "COPY"]
    return [word for words in copies if not words[0].startswith("--from") for word in words[:-1]]


def section(name: str) -> list[str]:
    """Return the lines of a section of the Apptainer definition."""
    body = re.search(rf"^%{name}\n(.*?)(?=^%|\Z)", DEFINITION, flags=re.DOTALL | re.MULTILINE)
    assert body is not None, name
    return [line.strip() for line in body[1].splitlines() if line.strip()]


def test_every_instruction_is_one_of_docker() -> None:
    known = {"ARG", "CMD", "COPY", "ENTRYPOINT", "ENV", "FROM", "RUN", "USER", "WORKDIR"}
    assert {name for name, _ in instructions()} == known


def test_every_base_has_a_default_and_every_stage_exists() -> None:
    arguments = {rest.partition("=")[0] for name, rest in instructions() if name == "ARG" and "=" in rest}
    stages: set[str] = set()
    for name, rest in instructions():
        used = set(re.findall(r"\$\{(\w+)\}", rest)) if name == "FROM" else set()
        assert used <= arguments, rest
        if name == "FROM":
            base, _, stage = rest.partition(" AS ")
            for device in ("cuda", "cpu"):
                plain = base.replace("${DEVICE}", device)
                assert plain.startswith("${") or plain in stages, base
            stages.add(stage)
        if name == "COPY" and rest.startswith("--from="):
            assert rest.split()[0].removeprefix("--from=") in stages


def test_what_it_copies_exists_and_is_not_ignored() -> None:
    patterns = [
        line
        for line in (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
        if line and not line.startswith("#")
    ]
    kept = {pattern[1:] for pattern in patterns if pattern.startswith("!")}
    copied = copied_into_the_image()
    assert {"csrc", "model", "trainer", "requirements.txt"} <= set(copied)
    assert [name for name in copied if not (ROOT / name).exists()] == []
    assert set(copied) == kept
    assert any(fnmatch.fnmatch("model/ops/_C.abi3.so", pattern.replace("**/", "*")) for pattern in patterns)


def test_the_container_runs_without_rights_and_answers() -> None:
    last = dict(instructions())
    assert last["USER"] == "flamingo"
    assert "trainer.doctor" in last["CMD"]
    assert [name for name, _ in instructions()].index("USER") > [name for name, _ in instructions()].index("RUN")
    assert "tini" in last["ENTRYPOINT"]


def test_both_install_the_pins_and_nothing_else_of_python() -> None:
    post = "\n".join(section("post"))
    for text in (DOCKERFILE, post):
        assert "pip install -r /source/pins.txt" in text
        assert "pip install --no-build-isolation --no-deps /source" in text
        installed = re.findall(r"pip install (?!-r|--no-build-isolation|--index-url)", text)
        assert installed == []
    assert re.search(r"^mpi4py==", PINS, flags=re.MULTILINE), "both leave this pin out by its name"


def test_both_have_the_same_base_with_the_cuda_of_the_pinned_torch() -> None:
    bases = set(re.findall(r"nvidia/cuda:([\d.]+)-(?:devel|base)-(\w+[\d.]+)", DOCKERFILE + DEFINITION))
    assert len(bases) == 1
    spec = importlib.util.find_spec("torch")  # importing it takes seconds
    assert spec is not None and spec.origin is not None
    torch = dict(
        re.findall(r"^(\w+)(?:: \w+[^=]*)? = '(.+)'$", Path(spec.origin).with_name("version.py").read_text(), re.M)
    )
    pinned = re.search(r"^torch==(\S+)", PINS, flags=re.MULTILINE)
    if "cuda" not in torch or pinned is None or torch["__version__"].partition("+")[0] != pinned[1]:
        pytest.skip("the torch here is not the pinned one with CUDA")
    ((version, _),) = bases
    assert version.startswith(f"{torch['cuda']}.")


def test_the_definition_copies_what_the_dockerfile_copies_and_it_exists() -> None:
    copied = [line.split()[0] for line in section("files")]
    assert [name for name in copied if not (ROOT / name).exists()] == []
    assert set(copied) | {"configs", "launch_scripts"} == set(copied_into_the_image())


def test_the_scripts_of_the_definition_parse() -> None:
    for name in ("post", "environment", "runscript", "test"):
        subprocess.run(["sh", "-n"], input="\n".join(section(name)), text=True, check=True)


@pytest.mark.long
@pytest.mark.timeout(7200)
def test_the_cpu_image_builds_and_runs(tmp_path: Path) -> None:
    missing = [program for program in ("podman", "buildah", "debootstrap", "crun") if shutil.which(program) is None]
    if missing:
        pytest.skip(f"needs {', '.join(missing)}")
    script = ROOT / "tests" / "container" / "build_image.sh"
    done = subprocess.run([script, "cpu", tmp_path], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "Training is possible here." in done.stdout
    assert "user flamingo" in done.stdout


@pytest.mark.parametrize("text", [DOCKERFILE, DEFINITION], ids=["Dockerfile", "apptainer.def"])
def test_the_commands_in_the_comments_would_work(text: str) -> None:
    comments = re.sub(r"\\\n# +", "", "\n".join(line for line in text.splitlines() if line.startswith("#")))
    commands = re.findall(r"^# {3}((?:docker|apptainer|srun) .+)$", comments, flags=re.MULTILINE)
    assert len(commands) >= 2
    for command in commands:
        check_command(re.split(r" {3,}", command)[0].replace("CONFIG.yaml", "configs/debug.yaml"))
