"""Test the page that an evaluation writes: its examples, and in a browser if there is one."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from tests.evaluation import layouts
from tests.evaluation.test_page import Parsed
from trainer.evaluation import command
from trainer.evaluation.ranks import Ranks

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page of two tasks, of generated and of ranked answers."""
    folder, threads = tmp_path_factory.mktemp("page"), torch.get_num_threads()
    vqa = layouts.write_vqa(folder / "vqa")
    support = {"support_questions": vqa["questions"], "support_annotations": vqa["annotations"]}
    tasks = [
        {"name": "vqa", "type": "vqa", **vqa, **support, "controls": ["blank", "no_images"]},
        {"name": "classes", "type": "image_folder", **layouts.write_classes(folder), "shots": [0]},
    ]
    export = layouts.write_export(folder / "export")
    config = layouts.evaluation(folder, export, tasks, shots=[0, 2], html=True, zero_shot_examples=0)
    assert command.evaluate(config, Ranks) == 0
    torch.set_num_threads(threads)
    return config.output


def test_examples_have_images_answers_and_attention(written: Path) -> None:
    text = (written / "report.html").read_text(encoding="utf-8")
    found = Parsed(text)
    classes = [attributes.get("class") or "" for _, attributes in found.elements]
    assert sum(name.startswith("example") for name in classes) == 12
    assert text.count("background-image") == 6 * 3 + 6  # two demonstrations and the query; the query alone
    assert text.count("attention of each token") >= 6
    assert "100 %" in text and "candidate" in text
    lines = [json.loads(line) for line in (written / "predictions.jsonl").read_text().splitlines()]
    shown = [line for line in lines if (line["shots"], line["control"]) == (2, "none")]
    assert all(line["answer"] in "".join(found.texts) for line in shown)
    assert "<|endofchunk|>" in "".join(found.texts)


@pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium")
def test_a_browser_shows_it_without_a_network(written: Path, tmp_path: Path) -> None:
    picture = tmp_path / "page.png"
    command_line = [
        *(str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", "--window-size=1200,2400"),
        *("--enable-logging=stderr", "--host-resolver-rules=MAP * ~NOTFOUND"),
        *(f"--user-data-dir={tmp_path / 'profile'}", f"--screenshot={picture}"),
        (written / "report.html").as_uri(),
    ]
    done = subprocess.run(command_line, capture_output=True, text=True, timeout=120, check=False)
    assert picture.is_file(), done.stderr
    assert "CONSOLE" not in done.stderr  # neither a refused request nor an error
