"""The commands work as users type them: under the deepspeed launcher, after kill -9, with their exit codes."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
from pathlib import Path

import pytest

from tests.data.helpers import image_bytes
from tests.distributed.launched import finish, forked, kill_rank_1, python, start, wait_for_step
from tests.distributed.small_run import losses, read_events, read_ledger, run_settings, write_settings

pytestmark = pytest.mark.distributed


def launch(config: Path, port: int, processes: int = 2, module: str = "trainer.train") -> subprocess.Popen[str]:
    """Start a run under the deepspeed launcher."""
    where = ["--num_accelerators", str(processes), "--master_port", str(port)]
    return start(["deepspeed", *where, "--module", module, config])


def test_a_run_killed_under_the_launcher_completes_when_started_again(assets: Path, tmp_path: Path, port: int) -> None:
    # With this many steps, the kill arrives before the last one.
    whole = write_settings(tmp_path / "whole.yaml", run_settings(assets, tmp_path / "whole", steps=40))
    code, output = finish(launch(whole, port))
    assert code == 0, output
    assert (tmp_path / "whole" / "complete").exists()

    killed = write_settings(tmp_path / "killed.yaml", run_settings(assets, tmp_path / "killed", steps=40))
    launched = launch(killed, port)
    wait_for_step(launched, tmp_path / "killed", 5)
    kill_rank_1(launched)
    code, output = finish(launched)
    assert code != 0, "a killed run must not look complete"
    assert not (tmp_path / "killed" / "complete").exists()

    code, output = finish(launch(killed, port))
    assert code == 0, output
    assert read_events(tmp_path / "killed", "resumed")
    assert losses(tmp_path / "killed") == losses(tmp_path / "whole"), "bit for bit"
    assert read_ledger(tmp_path / "killed") == read_ledger(tmp_path / "whole")

    again = python("trainer.train", str(killed))
    assert again.returncode == 0 and f"{tmp_path / 'killed'} is complete" in again.stdout
    weights = [(tmp_path / run / "export" / "model.safetensors").read_bytes() for run in ("killed", "whole")]
    assert weights[0] == weights[1]

    picture = tmp_path / "a.png"
    picture.write_bytes(image_bytes((10, 200, 30), size=(40, 20)))
    check_success(python("trainer.generate", str(tmp_path / "whole" / "export"), "--image", str(picture)))
    check_evaluation(assets, tmp_path / "whole" / "export", tmp_path)
    check_success(forked("trainer.export", str(tmp_path / "whole"), "--output", str(tmp_path / "again")))
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == weights[1]
    options = ("--format", "huggingface", "--include-frozen", "--output", str(tmp_path / "hub"))
    check_success(forked("trainer.export", str(tmp_path / "whole"), *options))
    assert (tmp_path / "hub" / "model.safetensors").is_file() and (tmp_path / "hub" / "modeling_flamingo.py").is_file()
    assert "40 steps on" in (tmp_path / "hub" / "README.md").read_text()


def check_success(done: subprocess.CompletedProcess[str]) -> None:
    assert done.returncode == 0, done.stderr


def test_the_launcher_passes_a_request_to_stop_on(assets: Path, tmp_path: Path, port: int) -> None:
    config = write_settings(tmp_path / "run.yaml", run_settings(assets, tmp_path / "run", steps=500))
    launched = launch(config, port)
    wait_for_step(launched, tmp_path / "run", 3)
    second = python("trainer.train", str(config))
    assert second.returncode == 1
    assert "RunLockedError" in second.stderr and str(tmp_path / "run") in second.stderr
    # A scheduler and a terminal also signal the whole group; the launcher itself passes no signal on.
    os.killpg(launched.pid, signal.SIGTERM)
    code, output = finish(launched)
    assert code != 0 and read_events(tmp_path / "run", "preempted"), output
    saved = (tmp_path / "run" / "checkpoints" / "latest").read_text()
    assert saved == f"step-{len(losses(tmp_path / 'run')):08d}", "the checkpoint is of the last step logged"


def check_evaluation(assets: Path, model: Path, folder: Path) -> None:
    """Check that the report holds every task, and that a missed bound or a wrong model gives exit code 1."""
    pairs, documents = (str(assets / "data" / name / "manifest.npz") for name in ("pairs", "documents"))
    common = {"type": "shards", "num_queries": 4, "max_new_tokens": 6}
    first = {"name": "first", "manifest": documents, "samples": "interleaved", "controls": ["shuffled_query"]}
    settings = {
        "model": str(model),
        "output": str(folder / "evaluation"),
        "prompt_style": "plain",
        "zero_shot_examples": 0,
        "tasks": [
            {"name": "pairs", "manifest": pairs, "controls": ["no_images"], "bounds": [{"minimum": 0.0}], **common},
            {**first, "bounds": [{"control": "shuffled_query", "maximum": 1.0}], **common},
        ],
    }
    config = write_settings(folder / "evaluate.yaml", settings)
    check_success(forked("trainer.evaluate", str(config)))
    assert set(json.loads((folder / "evaluation" / "report.json").read_text())["tasks"]) == {"pairs", "first"}
    result = forked("trainer.evaluate", str(config), "--tasks.pairs.bounds.0.minimum", "1.0")
    assert result.returncode == 1 and "pairs" in result.stderr
    result = forked("trainer.evaluate", str(config), "--model", str(folder))
    assert result.returncode == 1 and str(folder) in result.stderr


def test_all_errors_of_a_configuration_are_reported_with_exit_code_2(assets: Path, tmp_path: Path) -> None:
    settings = run_settings(assets, tmp_path / "run")
    settings["trainning"] = {"steps": 3}
    settings["data"]["sources"][0]["batch_sise"] = 3
    settings["data"]["sources"][1]["manifest"] = str(tmp_path / "nowhere.npz")
    result = python("trainer.train", str(write_settings(tmp_path / "wrong.yaml", settings)))
    assert result.returncode == 2
    for expected in ("trainning", "training", "batch_sise", "batch_size", "nowhere.npz"):
        assert expected in result.stderr
    assert not (tmp_path / "run").exists()


def test_a_world_size_that_does_not_divide_the_batch_is_refused(assets: Path, tmp_path: Path, port: int) -> None:
    settings = run_settings(assets, tmp_path / "run")
    settings["data"]["sources"][1]["batch_size"] = 3
    code, output = finish(launch(write_settings(tmp_path / "odd.yaml", settings), port))
    assert code != 0
    assert "documents" in output and "1" in output and not (tmp_path / "run" / "metrics.jsonl").exists()


def test_the_error_for_a_missing_shard_names_it(assets: Path, tmp_path: Path) -> None:
    mine = Path(shutil.copytree(assets, tmp_path / "assets"))
    for shard in (mine / "data" / "pairs").glob("*.tar"):
        shard.unlink()
    result = python("trainer.train", str(write_settings(tmp_path / "run.yaml", run_settings(mine, tmp_path / "run"))))
    assert result.returncode == 1
    assert ".tar" in result.stderr and "manifest.npz" in result.stderr
