"""quickstart.sh, easy_vqa.sh and in_context.sh: their configurations, their seeds, and what they reach.

The scripts themselves take minutes on a quiet machine, so they run only if ``RUN_DEMONSTRATIONS`` names the seeds:

    RUN_DEMONSTRATIONS=0,1 pytest tests/project/test_demonstrations.py
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

from tests.project.commands import ROOT
from tests.project.test_scripts import Clone
from trainer.config.loader import load_config, schema_of
from trainer.config.yaml_file import read_yaml

NAMES = ("quickstart", "easy_vqa", "in_context")
SEEDS = [int(seed) for seed in os.environ.get("RUN_DEMONSTRATIONS", "").split(",") if seed]
MOST_SECONDS = 900  # on two cores, without the installation


@pytest.mark.parametrize("name", NAMES)
def test_the_script_names_its_settings_and_uses_every_configuration(name: str) -> None:
    script = (ROOT / "launch_scripts" / f"{name}.sh").read_text()
    assert "PROCESSES=2 " in script
    assert "SEED=0 " in script
    files = {path.name for path in (ROOT / "configs" / name).glob("*.yaml")} - {"validate.yaml"}
    assert set(re.findall(r"\w+\.yaml", script)) == files


def paths_in(values: Any) -> set[str]:
    """Return all texts of a configuration that name folders of data or runs."""
    if isinstance(values, dict | list):
        inner = values.values() if isinstance(values, dict) else values
        return set().union(*map(paths_in, inner)) if inner else set()
    return set(re.findall(r"(?:data|runs)/[^/]+", values)) if isinstance(values, str) else set()


@pytest.fixture
def clone(tmp_path: Path) -> Clone:
    """Return a clone whose setup and launcher are stand-ins."""
    made = Clone(tmp_path)
    for path in (ROOT / "launch_scripts").glob("*.sh"):
        (tmp_path / "launch_scripts" / path.name).write_text(path.read_text())
    (tmp_path / "launch_scripts" / "setup.sh").write_text("#!/usr/bin/env bash\n")
    for path in tmp_path.glob("launch_scripts/*.sh"):
        path.chmod(0o755)
    for name in NAMES:
        for path in (ROOT / "configs" / name).glob("*.yaml"):
            copy = tmp_path / path.relative_to(ROOT)
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_text(path.read_text())
    for program in ("python", "deepspeed"):
        made.stand_in(program)
    made.stand_in("nvidia-smi", exit_code=1)
    return made


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("seed", [0, 3])
def test_a_seed_has_its_own_folders(clone: Clone, name: str, seed: int) -> None:
    done = clone.run(f"launch_scripts/{name}.sh", SEED=str(seed), PROCESSES="1")
    assert done.returncode == 0, done.stderr
    own = name if seed == 0 else f"{name}-seed-{seed}"
    data, *launched = [call for call in clone.called() if not call.startswith("nvidia-smi")]
    assert data.endswith(f"--output data/{own} --seed {seed}")
    assert len(launched) == 4
    for call in launched:
        (config,) = re.findall(r"\S+\.yaml", call)
        assert "--num_accelerators 1 " in call or "python" in call
        assert paths_in(read_yaml(clone.folder / config).values) <= {f"data/{own}", f"runs/{own}"}
        values = read_yaml(clone.folder / config).values
        load_config(clone.folder / config, [], schema_of(values), check_files=False)
    assert all(call.endswith(f"--training.seed {seed} --data.seed {seed}") for call in launched[:3])


def test_a_failing_part_ends_the_script(clone: Clone) -> None:
    clone.stand_in("deepspeed", exit_code=3)
    done = clone.run("launch_scripts/easy_vqa.sh")
    assert done.returncode == 3
    assert sum("deepspeed" in call for call in clone.called()) == 1
    assert "3/6" in done.stdout
    assert "4/6" not in done.stdout


@pytest.mark.skipif(not SEEDS, reason="takes minutes; RUN_DEMONSTRATIONS=0,1 runs it")
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("seed", SEEDS or [0])
@pytest.mark.parametrize("name", ["easy_vqa", "in_context"])
def test_the_whole_script_reaches_its_bounds(name: str, seed: int) -> None:
    start = time.monotonic()
    environment = {**os.environ, "SEED": str(seed)}
    subprocess.run([ROOT / "launch_scripts" / f"{name}.sh"], check=True, env=environment)
    suffix = f"-seed-{seed}" if seed else ""
    folder = ROOT / "runs" / f"{name}{suffix}"
    report = json.loads((folder / "report.json").read_text())
    assert report["bounds"]
    assert [bound for bound in report["bounds"] if not bound["met"]] == []
    assert (folder / "report.html").is_file()
    assert time.monotonic() - start <= MOST_SECONDS
