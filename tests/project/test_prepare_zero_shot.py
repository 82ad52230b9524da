"""launch_scripts/prepare_zero_shot.py writes a folder for each caption, from shards and from VQAv2's layout."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from tests.data.helpers import write_shard
from tests.project.commands import ROOT


def prepare(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "launch_scripts/prepare_zero_shot.py"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_images_lie_in_the_folders_of_their_captions(tmp_path: Path) -> None:
    write_shard(tmp_path / "0.tar", [("a", {"png": b"1", "txt": b"a red cat "}), ("b", {"png": b"2", "txt": b"a dog"})])
    vqa = tmp_path / "vqa"
    (vqa / "images").mkdir(parents=True)
    for number in (7, 8):
        (vqa / "images" / f"{number}.png").write_bytes(b"3")
    facts = [(7, "color", "teal"), (7, "shape", "circle"), (8, "color", "red")]
    annotations = [{"image_id": i, "question_type": kind, "multiple_choice_answer": text} for i, kind, text in facts]
    (vqa / "annotations.json").write_text(json.dumps({"annotations": annotations}))
    done = prepare("--output", tmp_path / "out", tmp_path / "0.tar", vqa)
    assert done.returncode == 0 and "3 images of 3 captions" in done.stdout
    written = {str(path.relative_to(tmp_path / "out")) for path in (tmp_path / "out").rglob("*.png")}
    assert written == {"a_red_cat/0-a.png", "a_dog/0-b.png", "a_teal_circle/7.png"}


def test_a_source_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    failed = prepare("--output", tmp_path / "out", tmp_path / "none.tar")
    assert failed.returncode == 1 and "none.tar" in failed.stderr
    write_shard(tmp_path / "0.tar", [("a", {"png": b"1"})])
    failed = prepare("--output", tmp_path / "out", tmp_path / "0.tar")
    assert failed.returncode == 1 and "a.png has no caption" in failed.stderr
