"""Check what every source file keeps: documentation, size, dependencies, spelling, no paths of one machine.

``test_language.py`` checks the sentences.
"""

from __future__ import annotations

import ast
import re
import statistics
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from tests.project.commands import ROOT, project_metadata
from trainer.config.validation import setting_paths

# Names of distributions that differ from the package they hold.
DISTRIBUTIONS = {
    "PIL": "Pillow",
    "faiss": "faiss-cpu",
    "open_clip": "open_clip_torch",
    "sklearn": "scikit-learn",
    "yaml": "PyYAML",
}
# Used if installed, never required (NVIDIA apex is not on PyPI; torch brings triton).
OPTIONAL = {"apex", "flash_attn", "amp_C", "triton"}
# Private by their underscore only: the standard library documents them.
DOCUMENTED_PRIVATE_NAMES = {"_exit", "_replace"}
SKIPPED = {".venv", ".git", "runs", "data", "build", "wandb"}


@cache
def python_files(*folders: str) -> tuple[Path, ...]:
    return tuple(path for folder in folders for path in sorted((ROOT / folder).rglob("*.py")))


@cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def public_functions(path: Path) -> Iterator[tuple[str, ast.FunctionDef | ast.AsyncFunctionDef]]:
    """Yield functions and methods; neither they nor their classes have a leading underscore."""

    def visit(body: list[ast.stmt], prefix: str) -> Iterator[tuple[str, ast.FunctionDef | ast.AsyncFunctionDef]]:
        for node in body:
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and not node.name.startswith("_"):
                yield f"{prefix}{node.name}", node
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                yield from visit(node.body, f"{prefix}{node.name}.")

    yield from visit(tree_of(path).body, f"{path.relative_to(ROOT)}:")


def is_documented_elsewhere(node: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    """Return whether a function is a setter, overload or override."""
    names = {ast.unparse(decorator).rpartition(".")[2] for decorator in node.decorator_list}
    return bool(names & {"setter", "overload", "override"})


def test_public_functions_have_docstrings_and_annotations() -> None:
    lacking = []
    for path in python_files("model", "trainer"):
        for name, node in public_functions(path):
            arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
            bare = [a.arg for a in arguments if a.annotation is None and a.arg not in ("self", "cls")]
            if bare or node.returns is None:
                lacking.append(f"{name}: annotations")
            if not ast.get_docstring(node) and not is_documented_elsewhere(node):
                lacking.append(f"{name}: docstring")
    assert lacking == []


def test_modules_and_public_classes_have_docstrings() -> None:
    lacking = []
    for path in python_files("model", "trainer"):
        tree = tree_of(path)
        if tree.body and not ast.get_docstring(tree):
            lacking.append(str(path.relative_to(ROOT)))
        classes = [n for n in tree.body if isinstance(n, ast.ClassDef) and not n.name.startswith("_")]
        lacking += [f"{path.relative_to(ROOT)}:{node.name}" for node in classes if not ast.get_docstring(node)]
    assert lacking == []


def test_files_are_short() -> None:
    lengths = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in python_files("model", "trainer")}
    everything = python_files("model", "trainer", "tests", "launch_scripts")
    long = [str(path) for path in everything if len(path.read_text(encoding="utf-8").splitlines()) > 450]
    assert long == []
    assert statistics.median(length for length in lengths.values() if length > 1) <= 200


def test_functions_fit_a_screen() -> None:
    nodes = (node for path in python_files("model", "trainer") for node in ast.walk(tree_of(path)))
    lengths = [
        (node.end_lineno or 0) - node.lineno + 1
        for node in nodes
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    ]
    assert statistics.quantiles(lengths, n=100)[98] <= 60


def test_the_room_of_the_data_has_few_doors() -> None:
    names = {path.name for path in (ROOT / "trainer/data").iterdir()} - {"__init__.py", "__pycache__"}
    assert len(names) <= 8, sorted(names)


def documented_attributes(node: ast.ClassDef) -> set[str]:
    """Return the names under ``Attributes:`` in the docstring of a class."""
    section = (ast.get_docstring(node) or "").partition("\nAttributes:\n")[2]
    return set(re.findall(r"^    (\w+): \S", section, flags=re.MULTILINE))


def test_every_setting_is_documented() -> None:
    """``--help`` prints the entries of ``Attributes:`` beside the options."""
    wrong = []
    for path in (*sorted((ROOT / "trainer/config").glob("*_config.py")), ROOT / "model/config.py"):
        for node in tree_of(path).body:
            if isinstance(node, ast.ClassDef):
                fields = {ast.unparse(field.target) for field in node.body if isinstance(field, ast.AnnAssign)}
                wrong += [f"{node.name}.{name}" for name in sorted(fields ^ documented_attributes(node))]
    assert wrong == []


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def our_private_names() -> set[str]:
    """Return every private name that the code here defines: functions, classes, variables and attributes."""
    names: set[str] = set()
    for path in python_files("model", "trainer"):
        for node in ast.walk(tree_of(path)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                names.add(node.name)
            elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and is_self(node.value):
                names.add(node.attr)
            elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                names.add(node.id)
    return {name for name in names if is_private(name)}


def is_self(node: ast.expr) -> bool:
    return isinstance(node, ast.Name) and node.id in ("self", "cls")


def foreign_private_names(path: Path, ours: set[str]) -> Iterator[str]:
    """Yield the private names of other packages that a file uses."""
    for node in ast.walk(tree_of(path)):
        names: list[str] = []
        if isinstance(node, ast.Attribute) and node.attr not in DOCUMENTED_PRIVATE_NAMES | ours:
            names = [node.attr]
        elif isinstance(node, ast.ImportFrom) and not (node.module or "").startswith(("model", "trainer")):
            names = [*(node.module or "").split("."), *(alias.name for alias in node.names)]
        if isinstance(node, ast.expr | ast.stmt) and any(map(is_private, names)):
            yield f"{path.relative_to(ROOT)}:{node.lineno} {ast.unparse(node)}"


def test_private_names_of_other_packages_stay_in_the_internals() -> None:
    ours = our_private_names()
    files = [path for path in python_files("model", "trainer") if "internals" not in path.stem]
    assert [name for path in files for name in foreign_private_names(path, ours)] == []


def imported_packages(path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            names.add(node.module.partition(".")[0])
    return names


def declared() -> dict[str, set[str]]:
    """Return the distributions in pyproject.toml: required ones, and those of all extras."""
    project = project_metadata()
    extras = [text for texts in project["optional-dependencies"].values() for text in texts]

    def names(texts: list[str]) -> set[str]:
        return {Requirement(text).name.lower().replace("_", "-") for text in texts}

    return {"required": names(project["dependencies"]), "extras": names(extras)}


def test_every_import_is_a_declared_dependency() -> None:
    known = declared()
    allowed = known["required"] | known["extras"]
    undeclared = set()
    for path in python_files("model", "trainer", "tests", "launch_scripts"):
        for package in imported_packages(path) - set(sys.stdlib_module_names) - OPTIONAL:
            is_ours = (
                package in ("model", "trainer", "tests", "launch_scripts") or path.with_name(f"{package}.py").is_file()
            )
            name = DISTRIBUTIONS.get(package, package).lower().replace("_", "-")
            if not is_ours and name not in allowed:
                undeclared.add(f"{path.relative_to(ROOT)}: {package}")
    assert sorted(undeclared) == []


def pins(name: str) -> dict[str, str]:
    lines = (ROOT / name).read_text().splitlines()
    parsed = [line.split("==") for line in lines if line and not line.startswith(("#", "-r"))]
    return {package.lower().replace("_", "-"): version for package, version in parsed}


def test_every_dependency_is_pinned_within_its_range() -> None:
    pinned = pins("requirements.txt") | pins("requirements-dev.txt")
    project = project_metadata()
    extras = [text for texts in project["optional-dependencies"].values() for text in texts]
    for requirement in map(Requirement, [*project["dependencies"], *extras]):
        name = requirement.name.lower().replace("_", "-")
        if name in ("flamingo-trainer", "wandb", "lm-eval", "lmms-eval", "filelock"):
            continue  # the tests replace wandb and lmms_eval by doubles, and skip what needs lm_eval
        assert name in pinned, f"{name} has no pin"
        assert requirement.specifier.contains(pinned[name]), f"{name}=={pinned[name]} is not {requirement.specifier}"


def tracked_text_files() -> list[Path]:
    """Return the files that git would commit; without git (in an archive), all files outside generated folders."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode == 0 and done.stdout:
        paths = [ROOT / name for name in done.stdout.splitlines()]
    else:
        paths = [path for path in ROOT.rglob("*") if not SKIPPED & set(path.relative_to(ROOT).parts)]
    suffixes = {".py", ".sh", ".md", ".yaml", ".toml", ".txt", ".json", ".cpp", ".cu", ".cuh", ".h", ".cfg", ""}
    return [path for path in paths if path.is_file() and path.suffix in suffixes]


def test_no_file_names_this_machine() -> None:
    homes = (str(ROOT), str(Path.home()), sys.prefix, sys.base_prefix)
    needles = {path for path in homes if path.count("/") > 1}
    pattern = re.compile(
        "|".join([*map(re.escape, needles), r"/home/\w+/", r"/Users/\w+/", r"https?://[\w.]*pypi[\w.]*/"])
    )
    found = []
    for path in tracked_text_files():
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        hits = pattern.findall(text)
        if hits and path != Path(__file__):
            found.append(f"{path.relative_to(ROOT)}: {hits[0]}")
    assert found == []


def test_the_license_is_apache_2() -> None:
    assert project_metadata()["license"] == "Apache-2.0"
    text = (ROOT / "LICENSE").read_text()
    assert "Apache License" in text
    assert "Version 2.0, January 2004" in text
    assert "END OF TERMS AND CONDITIONS" in text


@pytest.mark.parametrize("path", ["training.steps", "data.sources.0.batch_size", "model.resampler.num_latents"])
def test_setting_paths_reach_the_leaves(path: str) -> None:
    from trainer.config.run_config import FlamingoRunConfig

    assert path in set(setting_paths(FlamingoRunConfig))
