"""Version, changelog, citation, issue forms and indexes agree with the tree; wheel and sdist work outside the clone."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
import venv
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.project.commands import ROOT, check_command, shell_commands

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
INDEXES = ("AGENTS.md", "llms.txt")
FORMS = sorted((ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml"))


def text_of(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def test_the_changelog_begins_with_this_version() -> None:
    sections = re.findall(r"^## \[(.+?)\](?: - (\d{4}-\d\d-\d\d))?$", text_of("CHANGELOG.md"), flags=re.MULTILINE)
    assert sections[0] == ("Unreleased", "")
    assert sections[1][0] == PROJECT["version"] and sections[1][1]


def test_a_tag_of_this_commit_is_the_version() -> None:
    git = subprocess.run(["git", "tag", "--points-at", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False)
    versions = [tag for tag in git.stdout.split() if re.fullmatch(r"v\d+\.\d+\.\d+", tag)]
    assert versions in ([], [f"v{PROJECT['version']}"])


def test_the_citation_has_the_fields_of_its_schema() -> None:
    """The required fields and the value lists of schema 1.2.0."""
    citation = yaml.safe_load(text_of("CITATION.cff"))
    assert citation["cff-version"] == "1.2.0"
    assert {"authors", "cff-version", "message", "title"} <= set(citation)
    known = {"type", "version", "license", "keywords", "references", "abstract", "url", "repository-code", "doi"}
    assert set(citation) <= known | {"authors", "cff-version", "message", "title"}
    assert (citation["type"], citation["version"]) == ("software", PROJECT["version"])
    assert citation["license"] == PROJECT["license"]
    for reference in citation["references"]:
        assert {"authors", "title", "type"} <= set(reference)
    for entry in (citation, *citation["references"]):
        for author in entry["authors"]:
            person, entity = {"family-names", "given-names"}, {"name"}
            assert set(author) in (person, entity), author


@pytest.mark.parametrize("path", FORMS, ids=lambda path: path.name)
def test_an_issue_form_is_valid(path: Path) -> None:
    form = yaml.safe_load(path.read_text(encoding="utf-8"))
    if path.name == "config.yml":
        assert set(form) <= {"blank_issues_enabled", "contact_links"}
        return
    assert {"name", "description", "body"} <= set(form)
    ids = [item["id"] for item in form["body"] if item["type"] != "markdown"]
    assert len(ids) == len(set(ids))
    for item in form["body"]:
        assert item["type"] in ("markdown", "textarea", "input", "dropdown", "checkboxes")
        assert item["type"] == "markdown" or item["attributes"]["label"]


@pytest.mark.parametrize(
    "name", [*INDEXES, "SECURITY.md", "tests/verification/README.md", ".github/pull_request_template.md"]
)
def test_files_that_a_page_names_exist(name: str) -> None:
    text = text_of(name)
    linked = re.findall(r"\]\(([\w./-]+)\)", text)
    rooms = "configs|csrc|docs|launch_scripts|model|tests|trainer"
    coded = re.findall(rf"`((?:{rooms})/[\w./-]*)`", text)
    assert [path for path in [*linked, *coded] if not (ROOT / path).exists()] == []
    modules = set(re.findall(r"python -m ([\w.]+)", text)) | set(re.findall(r"`(trainer\.\w+)", text))
    files = [ROOT / module.replace(".", "/") for module in modules]
    assert [str(file) for file in files if not (file.with_suffix(".py").exists() or file.is_dir())] == []


@pytest.mark.parametrize("name", [*INDEXES, "tests/verification/README.md"])
def test_commands_of_a_page_would_work(name: str) -> None:
    for command in shell_commands(text_of(name)):
        check_command(command)


def test_llms_txt_has_the_layout_of_its_proposal() -> None:
    lines = text_of("llms.txt").splitlines()
    assert lines[0] == f"# {PROJECT['name']}"
    assert lines[2].startswith("> ")
    entries = [line for line in lines if line.startswith("- ")]
    assert len(entries) > 15
    assert [line for line in entries if not re.match(r"- \[.+?\]\(.+?\): .", line)] == []


def run(command: list[Any], folder: Path, **more: str) -> str:
    """Run a command outside the clone and return its output."""
    inherited = {key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "VIRTUAL_ENV"))}
    environment = inherited | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"} | more
    done = subprocess.run(
        [str(word) for word in command], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, f"{command}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done.stdout + done.stderr


def clean_clone(folder: Path) -> Path:
    """Copy the files of the clone that git knows or would add, as a new clone has them."""
    listed = run(["git", "ls-files", "--cached", "--others", "--exclude-standard"], ROOT).splitlines()
    for name in listed:
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)
    return folder


def environment_beside(folder: Path) -> Path:
    """Make an environment without this project, and return its Python.

    It finds the dependencies in the environment of the tests, because installing them takes gigabytes. It does not find
    the editable installation there: Python runs no ``.pth`` file of a folder that a ``.pth`` file names.
    """
    venv.create(folder, with_pip=False)
    (packages,) = folder.glob("lib/python*/site-packages")
    (ours,) = {path for path in map(Path, sys.path) if path.name == "site-packages" and (path / "torch").is_dir()}
    (packages / "dependencies.pth").write_text(f"{ours}\n")
    return folder / "bin" / "python"


@pytest.mark.long
@pytest.mark.timeout(3600)
def test_wheel_and_sdist_of_a_clean_clone_work_elsewhere(tmp_path: Path) -> None:
    clone, outside = clean_clone(tmp_path / "clone"), tmp_path / "outside"
    outside.mkdir()
    build = "from setuptools import build_meta as b; import sys; print(getattr(b, sys.argv[1])(sys.argv[2]))"
    run([sys.executable, "-c", build, "build_sdist", tmp_path], clone)
    (sdist,) = tmp_path.glob("*.tar.gz")
    run(["tar", "-xzf", sdist, "-C", tmp_path], tmp_path)
    unpacked = tmp_path / sdist.name.removesuffix(".tar.gz")
    run([sys.executable, "-c", build, "build_wheel", tmp_path], unpacked, FLAMINGO_BUILD="cpu")
    (wheel,) = tmp_path.glob("*.whl")
    assert f"-{PROJECT['version']}-cp311-abi3-" in wheel.name
    python = environment_beside(tmp_path / "environment")
    target = next((tmp_path / "environment").glob("lib/python*/site-packages"))
    run([sys.executable, "-m", "pip", "install", "--no-deps", "--no-index", "--target", target, wheel], outside)

    where = run([python, "-c", "import trainer, model.ops; print(trainer.__file__, model.ops.__file__)"], outside)
    assert str(ROOT) not in where and str(target) in where
    doctor = run([python, "-m", "trainer.doctor"], outside)
    assert "Training is possible here." in doctor
    assert re.search(r"ok +masked_cross_attention +fused on cpu", doctor), "the sdist has the sources of csrc"
    reasons = json.loads((target / "model" / "ops" / "_build_report.json").read_text())
    assert reasons == {"cuda": "built with FLAMINGO_BUILD=cpu"}  # trainer.doctor shows it where there is a GPU
    planned = run([python, "-m", "trainer.plan", clone / "configs/flamingo-3b.yaml"], outside)
    assert "of a device" in planned
    # A run from raw data to a text: convert, train, generate.
    run([python, "-c", PICTURES], outside)
    run([python, "-m", "trainer.convert", "folder", "pictures", "--output", "data"], outside)
    (outside / "run.yaml").write_text(RUN)
    run([python, "-m", "trainer.train", "run.yaml"], outside)
    run([python, "-m", "trainer.generate", "run/export", "--image", "pictures/0.png"], outside)


PICTURES = """
from pathlib import Path
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
Path("pictures").mkdir()
for i in range(16):
    Image.new("RGB", (32, 32), (10 * i, 0, 0)).save(f"pictures/{i}.png")
    Path(f"pictures/{i}.txt").write_text("a red square")
words = ["<unk>", "<s>", "</s>", "a", "red", "square"]
backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
backend.pre_tokenizer = pre_tokenizers.Whitespace()
PreTrainedTokenizerFast(
    tokenizer_object=backend, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
).save_pretrained("tokenizer")
"""
RUN = """
run_dir: run
model:
  preset: debug
  language_model: {tokenizer: tokenizer}
data:
  sources: [{type: image_text, name: pictures, manifest: data/manifest.npz, batch_size: 4, max_tokens: 16}]
  shuffle_window: 4
  read_block: 4
training: {steps: 3, dtype: float32}
schedule: {warmup_steps: 1}
deepspeed: {zero_stage: 2}
checkpoint: {every: 3}
logging: {tensorboard: false}
"""
