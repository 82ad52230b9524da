"""The commands as users type them: the real deepspeed launcher, a real kill -9, real exit codes."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from tests.data.helpers import image_bytes
from tests.distributed.launched import finish, wait_for_step
from tests.distributed.processes import free_port
from tests.distributed.small_run import losses, read_ledger, run_settings, write_settings

pytestmark = pytest.mark.distributed
ROOT = Path(__file__).parents[2]
ENVIRONMENT = {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}


def launch(config: Path, processes: int = 2) -> subprocess.Popen[str]:
    launcher = str(Path(sys.executable).with_name("deepspeed"))
    command = [launcher, "--num_accelerators", str(processes), "--master_port", str(free_port())]
    return start([*command, "--module", "trainer.train", str(config)])


def start(command: list[str]) -> subprocess.Popen[str]:
    environment = {**ENVIRONMENT, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    return subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def python(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", *arguments],
        cwd=ROOT,
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=180,
        check=False,
    )


def kill_a_rank_at_step(launched: subprocess.Popen[str], run_dir: Path, step: int) -> None:
    """kill -9 for one of the training processes, once the run has logged that many steps."""
    wait_for_step(launched, run_dir, step)
    ranks = [
        child for child in psutil.Process(launched.pid).children(recursive=True) if "--local_rank=1" in child.cmdline()
    ]
    assert len(ranks) == 1
    ranks[0].send_signal(signal.SIGKILL)


def test_killed_under_the_launcher_and_started_again(assets: Path, tmp_path: Path) -> None:
    # Enough steps that the kill arrives in the middle of them.
    whole = write_settings(tmp_path / "whole.yaml", run_settings(assets, tmp_path / "whole", steps=40))
    code, output = finish(launch(whole))
    assert code == 0, output
    assert (tmp_path / "whole" / "complete").exists()

    killed = write_settings(tmp_path / "killed.yaml", run_settings(assets, tmp_path / "killed", steps=40))
    launched = launch(killed)
    kill_a_rank_at_step(launched, tmp_path / "killed", 5)
    code, output = finish(launched)
    assert code != 0, "a run that was killed must not look complete"
    assert not (tmp_path / "killed" / "complete").exists()

    code, output = finish(launch(killed))
    assert code == 0, output
    assert "resumed" in output
    assert losses(tmp_path / "killed") == losses(tmp_path / "whole"), "bit for bit"
    assert read_ledger(tmp_path / "killed") == read_ledger(tmp_path / "whole")

    again = python("trainer.train", str(killed))
    assert again.returncode == 0 and "is complete" in again.stdout
    weights = [(tmp_path / run / "export" / "model.safetensors").read_bytes() for run in ("killed", "whole")]
    assert weights[0] == weights[1]

    (tmp_path / "a.png").write_bytes(image_bytes((10, 200, 30), size=(40, 20)))
    said = python("trainer.generate", str(tmp_path / "whole" / "export"), "--image", str(tmp_path / "a.png"))
    assert said.returncode == 0, said.stderr
    check_evaluation(assets, tmp_path / "whole" / "export", tmp_path)
    exported = python("trainer.export", str(tmp_path / "whole"), "--output", str(tmp_path / "again"))
    assert exported.returncode == 0, exported.stderr
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == weights[1]


def test_the_launcher_passes_a_request_to_stop_on(assets: Path, tmp_path: Path) -> None:
    config = write_settings(tmp_path / "run.yaml", run_settings(assets, tmp_path / "run", steps=500))
    launched = launch(config)
    wait_for_step(launched, tmp_path / "run", 3)
    second = python("trainer.train", str(config))
    assert second.returncode == 1 and "is in use by another job" in second.stderr
    # As a scheduler or a terminal does: the launcher's outermost process passes nothing on by itself.
    os.killpg(launched.pid, signal.SIGTERM)
    code, output = finish(launched)
    assert code != 0 and "asked to stop: saved update" in output
    saved = (tmp_path / "run" / "checkpoints" / "latest").read_text()
    assert saved == f"step-{len(losses(tmp_path / 'run')):08d}", "the last update that was logged is the one saved"


def check_evaluation(assets: Path, model: Path, folder: Path) -> None:
    """The report holds every figure, and a missed bound is an exit code."""
    pairs, documents = (str(assets / "data" / name / "manifest.npz") for name in ("pairs", "documents"))
    settings = {
        "model": str(model),
        "report": str(folder / "report.json"),
        "samples": 4,
        "max_new_tokens": 6,
        "tasks": [
            {"name": "pairs", "manifest": pairs},
            {"name": "first", "manifest": documents, "type": "interleaved", "control": "shuffled", "maximum": 1.0},
            {"name": "blind", "manifest": pairs, "control": "without_images"},
        ],
    }
    config = write_settings(folder / "evaluate.yaml", settings)
    result = python("trainer.evaluate", str(config))
    assert result.returncode == 0, result.stderr
    assert set(json.loads((folder / "report.json").read_text())) == {"pairs", "first", "blind"}
    result = python("trainer.evaluate", str(config), "--tasks.pairs.minimum", "1.0")
    assert result.returncode == 1 and "missed: pairs" in result.stderr
    result = python("trainer.evaluate", str(config), "--model", str(folder))
    assert result.returncode == 1 and "is not an exported Flamingo" in result.stderr


def test_a_wrong_configuration_is_told_at_once_with_code_2(assets: Path, tmp_path: Path) -> None:
    settings = run_settings(assets, tmp_path / "run")
    settings["trainning"] = {"steps": 3}
    settings["data"]["sources"][0]["batch_sise"] = 3
    settings["data"]["sources"][1]["manifest"] = str(tmp_path / "nowhere.npz")
    started = time.monotonic()
    result = python("trainer.train", str(write_settings(tmp_path / "wrong.yaml", settings)))
    assert result.returncode == 2
    for expected in ("trainning", "training", "batch_sise", "batch_size", "nowhere.npz"):
        assert expected in result.stderr
    assert time.monotonic() - started < 60 and not (tmp_path / "run").exists()


def test_a_world_size_that_does_not_fit_is_refused_with_those_that_do(assets: Path, tmp_path: Path) -> None:
    settings = run_settings(assets, tmp_path / "run")
    settings["data"]["sources"][1]["batch_size"] = 3
    code, output = finish(launch(write_settings(tmp_path / "odd.yaml", settings)))
    assert code != 0
    assert "documents" in output and "1" in output and not (tmp_path / "run" / "metrics.jsonl").exists()


def test_a_missing_shard_ends_the_run_with_its_name(assets: Path, tmp_path: Path) -> None:
    mine = Path(shutil.copytree(assets, tmp_path / "assets"))
    for shard in (mine / "data" / "pairs").glob("*.tar"):
        shard.unlink()
    result = python("trainer.train", str(write_settings(tmp_path / "run.yaml", run_settings(mine, tmp_path / "run"))))
    assert result.returncode == 1
    assert ".tar" in result.stderr and "manifest.npz" in result.stderr
