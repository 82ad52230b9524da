"""Test ``python -m trainer.checkpoint`` on small folders."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from trainer.checkpoint.__main__ import main
from trainer.checkpoint.catalog import steps_in, write_manifest
from trainer.checkpoint.layout import LATEST, MANIFEST, STATE, UNIVERSAL, tag_of
from trainer.checkpoint.shard_files import write_bytes
from trainer.checkpoint.training_state import TrainingState
from trainer.runtime.files import canonical_json


def make_checkpoint(folder: Path, step: int, *, complete: bool = True, universal: bool = False) -> Path:
    """Write a checkpoint with one small shard."""
    checkpoint = folder / tag_of(step)
    checkpoint.mkdir(parents=True)
    state = TrainingState(step, 2, {}, {}, {})
    entries = {
        STATE: write_bytes(checkpoint / STATE, canonical_json(state.to_json()).encode()),
        "shard.pt": write_bytes(checkpoint / "shard.pt", b"x" * 1000),
    }
    if complete:
        write_manifest(checkpoint, entries)
        (folder / LATEST).write_text(tag_of(step))
    if universal:
        part = checkpoint / UNIVERSAL
        part.mkdir()
        write_manifest(part, {"fp32.pt": write_bytes(part / "fp32.pt", b"y" * 500)})
    return checkpoint


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """Make checkpoints 10 to 50: 20 is converted, 30 has the lowest loss before it, 50 is incomplete."""
    for step in (10, 20, 30, 40):
        make_checkpoint(tmp_path / "checkpoints", step, universal=step == 20)
    make_checkpoint(tmp_path / "checkpoints", 50, complete=False)
    with (tmp_path / "metrics.jsonl").open("w") as file:
        for step in range(1, 45):
            loss = None if step == 30 else abs(step - 30) * (1 if step <= 30 else 100)
            file.write(json.dumps({"step": step, "loss": loss, "step_skipped": step == 29}) + "\n")
        file.write('{"step": 45, "lo')
    return tmp_path


def test_verify_names_every_damaged_file(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = run_dir / "checkpoints"
    assert main(["verify", str(folder / tag_of(20))]) == 0
    assert "good" in capsys.readouterr().out
    (folder / tag_of(20) / "shard.pt").unlink()
    (folder / tag_of(20) / STATE).write_text("{}")
    (folder / tag_of(20) / UNIVERSAL / "fp32.pt").write_bytes(b"y" * 499 + b"z")
    assert main(["verify", str(run_dir)]) == 1
    said = capsys.readouterr().out
    for problem in ("shard.pt is missing", "state.json has 2 bytes", "universal: fp32.pt has another checksum"):
        assert problem in said
    assert f"{folder / tag_of(10)}: good" in said and f"{folder / tag_of(50)}: DAMAGED" in said


def test_list_shows_every_checkpoint(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list", str(run_dir)]) == 0
    rows = {line.split()[0]: line for line in capsys.readouterr().out.splitlines()}
    assert rows["40"].endswith("complete, latest") and rows["50"].endswith("incomplete")
    assert " yes " in rows["20"] and " no " in rows["10"] and " 0 min " in rows["10"]


def test_prune_keeps_what_its_options_name(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = run_dir / "checkpoints"
    command = ["prune", str(run_dir), "--keep-last", "1", "--keep-best", "1", "--keep-every", "20"]
    assert main([*command, "--dry-run"]) == 0
    assert f"{folder / tag_of(10)} would be removed" in capsys.readouterr().out
    assert steps_in(folder) == [10, 20, 30, 40, 50]
    assert main(command) == 0
    assert f"{folder / tag_of(50)} is incomplete" in capsys.readouterr().out
    assert steps_in(folder) == [20, 30, 40, 50]
    for path in (folder / tag_of(50), *(folder / tag_of(50)).iterdir()):
        os.utime(path, (1, 1))
    assert main(command) == 0
    assert steps_in(folder) == [20, 30, 40]


def test_prune_keeps_the_checkpoint_that_latest_names(run_dir: Path) -> None:
    folder = run_dir / "checkpoints"
    (folder / LATEST).write_text(tag_of(10))
    assert main(["prune", str(run_dir), "--keep-last", "1"]) == 0
    assert {10, 40} <= set(steps_in(folder))


def test_convert_refuses_a_damaged_checkpoint(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (run_dir / "checkpoints" / tag_of(40) / "shard.pt").unlink()
    assert main(["convert", str(run_dir)]) == 1
    assert "shard.pt is missing" in capsys.readouterr().err


def test_a_folder_without_checkpoints_is_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", str(tmp_path)]) == 1
    assert f"no checkpoints in {tmp_path}" in capsys.readouterr().err


def test_list_works_without_torch(run_dir: Path) -> None:
    script = (
        "import sys; sys.modules['torch'] = None; from trainer.checkpoint.__main__ import main; "
        f"sys.exit(main(['list', {str(run_dir)!r}]))"
    )
    subprocess.run([sys.executable, "-c", script], check=True)
    assert (run_dir / "checkpoints" / tag_of(10) / MANIFEST).exists()
