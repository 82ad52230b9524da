"""A run that resumes on another number of processes keeps its losses and samples, whenever it was killed."""

from __future__ import annotations

import os
import random
import shutil
import signal
import threading
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from tests.data.helpers import build_manifest, image_bytes, write_shard
from tests.distributed.processes import run_distributed
from tests.distributed.small_run import losses, make_assets, read_metrics, run_settings
from tests.distributed.test_packing import read_ledger
from tests.distributed.train_in_process import train_run
from trainer.checkpoint import shard_files
from trainer.checkpoint.shard_files import Entry
from trainer.runtime.distributed import World

pytestmark = pytest.mark.distributed

STEPS = 8


@pytest.fixture(scope="module")
def assets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make the assets of other runs, and ``data/bad``: pairs of which every seventh has no valid image."""
    folder = tmp_path_factory.mktemp("assets")
    make_assets(folder)
    for shard in range(2):
        samples = []
        for i in range(14):
            color = (20 * i, 255 - 10 * i, 100 * shard)
            picture = b"no image" if i % 7 == 3 else image_bytes(color, size=(16, 16))
            samples.append(
                (f"b{i}", {"png": picture, "txt": f"a {'red green blue dark light'.split()[i % 5]} sky".encode()})
            )
        write_shard(folder / "data" / "bad" / f"{shard}.tar", samples)
    build_manifest(folder / "data" / "bad")
    return folder


def settings_of(assets: Path, run_dir: Path) -> dict[str, Any]:
    """Return settings of packed and unpacked sources that 1, 2, 3 and 4 processes divide.

    The run takes more than an epoch of the bad pairs.
    """
    settings = run_settings(assets, run_dir, steps=STEPS)
    bad, documents, texts = settings["data"]["sources"]
    bad |= {"name": "bad", "manifest": str(assets / "data/bad/manifest.npz"), "batch_size": 12}
    documents |= {"batch_size": 12}
    texts |= {"batch_size": 12, "packing": True, "max_tokens": 40}
    settings["data"] |= {"max_bad_fraction": 0.5}
    return settings


@pytest.fixture(scope="module")
def uninterrupted(assets: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a run that two processes trained without a break."""
    run_dir = tmp_path_factory.mktemp("runs") / "uninterrupted"
    run_distributed(train_run, 2, settings_of(assets, run_dir))
    return run_dir


def test_a_run_killed_and_resumed_on_other_numbers_of_processes_is_the_same_run(
    assets: Path, uninterrupted: Path, tmp_path: Path
) -> None:
    draw = random.Random(0)
    settings = settings_of(assets, tmp_path / "run")
    settings["checkpoint"] |= {"every": 1}
    sizes = draw.sample([1, 2, 3, 4], 4)
    stops = [*sorted(draw.sample(range(2, STEPS), 3)), None]
    for world_size, stop_after in zip(sizes, stops, strict=True):
        run_distributed(train_run, world_size, settings, stop_after)
    assert losses(tmp_path / "run") == pytest.approx(losses(uninterrupted), rel=1e-5)
    assert read_ledger(tmp_path / "run") == read_ledger(uninterrupted)
    consumed = sum(n for sample, n in read_ledger(uninterrupted).items() if sample[1] == "bad")
    assert consumed > 2 * 14, "the run must take more than an epoch"
    assert any(line["replaced_samples"] for line in read_metrics(uninterrupted)), "the run must meet bad samples"


def train_until_killed(world: World, settings: dict[str, Any], victim: int, moment: float | str, proof: Path) -> None:
    """Train until one process kills itself by SIGKILL.

    Args:
        world: This process.
        settings: Of the run.
        victim: Rank of the process.
        moment: Seconds after which to kill it; or the file whose writing to interrupt: "save 3" is the third file that
            it writes for checkpoints, "universal 5" the fifth that it writes for conversions.
        proof: File that says what the process was doing; written just before the kill.
    """
    from trainer.checkpoint import save, universal

    def kill() -> None:
        works = {thread.name.split()[1] for thread in threading.enumerate() if thread.name.startswith("cannot ")}
        proof.write_text(" and ".join(sorted(works)) or "train")
        os.kill(os.getpid(), signal.SIGKILL)

    if world.rank == victim and isinstance(moment, str):
        module, left = {"save": save, "universal": universal}[moment.split()[0]], int(moment.split()[1])

        def write_tensors(path: Path, value: Any) -> Entry:
            nonlocal left
            left -= 1
            if left == 0:
                path.write_bytes(b"half")
                kill()
            return shard_files.write_tensors(path, value)

        module.write_tensors = write_tensors  # type: ignore[attr-defined]  # the process belongs to this test
    elif world.rank == victim:
        timer = threading.Timer(float(moment), kill)
        timer.daemon = True
        timer.start()
    train_run(world, settings)


def any_moment(draw: random.Random) -> float | str:
    """Return a moment: half of them by the clock, the others while a file is written."""
    if draw.random() < 0.5:
        return draw.uniform(0.5, 6)
    return draw.choice([f"save {draw.randint(1, 8)}", f"universal {draw.randint(1, 15)}"])


def test_a_kill_at_any_moment_loses_nothing(
    assets: Path, uninterrupted: Path, tmp_path: Path, pytestconfig: pytest.Config
) -> None:
    """Kill ``--kills`` times; compare each run that completes in between, and begin another."""
    wanted, proof = pytestconfig.getoption("--kills"), tmp_path / "killed"
    kills, runs, draw = Counter[str](), 0, random.Random(wanted)
    while kills.total() < wanted:
        run_dir = tmp_path / f"run-{runs}"
        settings, finished, world_size = settings_of(assets, run_dir), False, 0
        settings["checkpoint"] |= {"every": 1}
        while not finished:
            world_size = draw.choice([size for size in (1, 2, 3, 4) if size != world_size])
            moment = any_moment(draw) if kills.total() < wanted else 1000.0
            try:
                run_distributed(train_until_killed, world_size, settings, draw.randrange(world_size), moment, proof)
                finished = True
            except AssertionError:
                if not proof.exists():
                    raise
                kills[proof.read_text()] += 1
                proof.unlink()
        runs += 1
        assert losses(run_dir) == pytest.approx(losses(uninterrupted), rel=1e-5)
        assert read_ledger(run_dir) == read_ledger(uninterrupted)
        shutil.rmtree(run_dir)
    print(f"{kills.total()} kills, {runs} runs completed, 0 lost; killed during: {dict(kills)}")
