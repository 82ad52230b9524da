"""Test which checkpoints are found, refused and kept, with small tensors instead of a model."""

from __future__ import annotations

import re
import resource
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.checkpoint.damage import delete, flip_a_bit, truncate
from tests.distributed.processes import run_distributed
from trainer.checkpoint import shard_files
from trainer.checkpoint.catalog import find_checkpoint, problems_of, read_state
from trainer.checkpoint.errors import CheckpointError
from trainer.checkpoint.layout import LATEST, MANIFEST, tag_of
from trainer.checkpoint.load import check_fits
from trainer.checkpoint.save import Checkpoints, WriteTensors
from trainer.checkpoint.training_state import TrainingState
from trainer.config.run_config import CheckpointConfig
from trainer.runtime.distributed import World

FROZEN = {"lm.weight": "f" * 64}
MODEL = {"resampler": {"num_layers": 2}, "name": "small"}


def state(step: int) -> TrainingState:
    return TrainingState(step, world_size=1, data={"seed": 1}, frozen=FROZEN, model=MODEL)


def hand_over(folder: Path, tag: str, write: WriteTensors) -> None:
    """Write a shard of 1 MB for each rank, as ``Engine.save`` does."""
    write({"weight": torch.full((250_000,), 1.0), "step": 3}, folder / tag / f"shard-{torch.distributed.get_rank()}.pt")


def save_steps(world: World, folder: Path, steps: list[int], config: CheckpointConfig) -> list[str]:
    """Save a checkpoint for each step and return the names of those that are kept."""
    checkpoints = Checkpoints(folder, config, world)
    for step in steps:
        checkpoints.save(state(step), "run_dir: here\n", hand_over)
    checkpoints.wait()
    return sorted(path.name for path in folder.iterdir() if path.is_dir())


def save_with_too_small_a_disk(world: World, folder: Path, asynchronous: bool) -> tuple[str, float]:
    """Limit the files of rank 1 to 500 KB; return the error and the seconds until it came."""
    checkpoints = Checkpoints(folder, CheckpointConfig(asynchronous=asynchronous), world)
    checkpoints.save(state(1), "run_dir: here\n", hand_over)
    checkpoints.wait()
    if world.rank == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (500_000, resource.RLIM_INFINITY))
    start = time.monotonic()
    try:
        checkpoints.save(state(2), "run_dir: here\n", hand_over)
        checkpoints.wait()
    except CheckpointError as error:
        return str(error), time.monotonic() - start
    return "no error", 0.0


def save_into_a_file(world: World, folder: Path) -> str:
    """Save where the folder of checkpoints is a file, and return the error."""
    try:
        Checkpoints(folder / "file", CheckpointConfig(), world).save(state(2), "", hand_over)
    except CheckpointError as error:
        return str(error)
    return "no error"


def save_while_training(world: World, folder: Path) -> tuple[bool, float, float]:
    """Stop the disk of rank 1 until the steps after the save are done.

    Returns:
        Whether ``latest`` still named the first checkpoint meanwhile, and the mean weight in both checkpoints.
    """
    from trainer.checkpoint import save

    disk = threading.Event()

    def write_tensors(path: Path, value: Any) -> shard_files.Entry:
        assert disk.wait(60)
        return shard_files.write_tensors(path, value)

    save.write_tensors = write_tensors
    weight, shard = torch.zeros(1000), f"shard-{world.rank}.pt"
    checkpoints = Checkpoints(folder, CheckpointConfig(), world)

    def hand_over_weight(folder: Path, tag: str, write: WriteTensors) -> None:
        write({"weight": weight}, folder / tag / shard)

    for step in (1, 2):  # the second save reuses the memory of the first one
        disk.set()
        checkpoints.wait()
        if world.rank == 1:
            disk.clear()
        checkpoints.save(state(step), "run_dir: here\n", hand_over_weight)
        for _ in range(3):
            weight.add_(1)
            checkpoints.poll()
    unfinished = (folder / LATEST).read_text() == tag_of(1)
    disk.set()
    checkpoints.wait()
    first, second = (float(torch.load(folder / tag_of(step) / shard)["weight"].mean()) for step in (1, 2))
    return unfinished, first, second


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved") / "checkpoints"
    run_distributed(save_steps, 1, folder, [10, 20], CheckpointConfig())
    return folder


@pytest.fixture
def checkpoints(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "checkpoints"))


def test_the_newest_checkpoint_is_found_and_reads_back(checkpoints: Path) -> None:
    found = find_checkpoint(checkpoints)
    assert found == checkpoints / tag_of(20)
    assert read_state(found) == state(20)


def test_a_new_run_has_no_checkpoint(tmp_path: Path) -> None:
    assert find_checkpoint(tmp_path / "nothing") is None


@pytest.mark.parametrize("damage", [delete, truncate, flip_a_bit])
def test_any_damaged_file_is_found_and_the_older_checkpoint_is_used(
    checkpoints: Path, damage: Callable[[Path], None], caplog: pytest.LogCaptureFixture
) -> None:
    names = sorted(path.name for path in (checkpoints / tag_of(20)).iterdir())
    assert {"shard-0.pt", "state.json", "config.yaml", MANIFEST} < set(names)
    for name in names:
        broken = checkpoints / "broken" / tag_of(20)
        shutil.copytree(checkpoints / tag_of(20), broken, dirs_exist_ok=True)
        damage(broken / name)
        problem = next(problems_of(broken), None)
        assert problem is not None and name in problem
    damage(checkpoints / tag_of(20) / "shard-0.pt")
    shutil.rmtree(checkpoints / "broken")
    assert find_checkpoint(checkpoints) == checkpoints / tag_of(10)
    assert "shard-0.pt" in caplog.text


def test_a_run_without_a_good_checkpoint_fails_instead_of_starting_anew(checkpoints: Path) -> None:
    for step in (10, 20):
        truncate(checkpoints / tag_of(step) / "shard-0.pt")
    with pytest.raises(CheckpointError, match=re.escape(f"no good checkpoint in {checkpoints}")):
        find_checkpoint(checkpoints)


def test_an_incomplete_checkpoint_is_ignored(checkpoints: Path) -> None:
    (checkpoints / tag_of(30)).mkdir()
    (checkpoints / tag_of(30) / "shard-0.pt").write_bytes(b"half")
    assert find_checkpoint(checkpoints) == checkpoints / tag_of(20)
    shutil.rmtree(checkpoints / tag_of(10))
    shutil.rmtree(checkpoints / tag_of(20))
    (checkpoints / LATEST).unlink()
    assert find_checkpoint(checkpoints) is None, "a run that died before its first checkpoint starts anew"


@pytest.mark.distributed
@pytest.mark.parametrize("asynchronous", [True, False])
def test_a_full_disk_on_one_rank_is_an_error_on_all_ranks(tmp_path: Path, asynchronous: bool) -> None:
    folder = tmp_path / "checkpoints"
    for message, seconds in run_distributed(save_with_too_small_a_disk, 2, folder, asynchronous):
        assert "rank 1: OSError" in message and "File too large" in message
        assert f"cannot write {folder / tag_of(2)}" in message and "start again" in message
        assert seconds < 30, "a rank waited for the timeout of a collective"
    assert (folder / LATEST).read_text() == tag_of(1)
    assert find_checkpoint(folder) == folder / tag_of(1)


@pytest.mark.distributed
def test_training_continues_while_a_checkpoint_is_written(tmp_path: Path) -> None:
    for unfinished, first, second in run_distributed(save_while_training, 2, tmp_path / "checkpoints"):
        assert unfinished, "latest moved before rank 1 had written its part"
        assert (first, second) == (0, 3), "a checkpoint holds the weights of the moment of its save"
    assert find_checkpoint(tmp_path / "checkpoints") == tmp_path / "checkpoints" / tag_of(2)


@pytest.mark.distributed
def test_a_folder_that_cannot_be_written_is_an_error_on_all_ranks(tmp_path: Path) -> None:
    (tmp_path / "file").touch()  # root may write into read-only folders, but not into a file as if it were a folder
    for message in run_distributed(save_into_a_file, 2, tmp_path):
        assert "rank 0: NotADirectoryError" in message and "make" in message and "writable" in message


def test_retention_keeps_the_newest_and_every_nth_checkpoint(tmp_path: Path) -> None:
    config = CheckpointConfig(keep_last=2, keep_every=20)
    kept = run_distributed(save_steps, 1, tmp_path / "checkpoints", [10, 20, 30, 40, 50], config)[0]
    assert kept == [tag_of(step) for step in (20, 40, 50)]


def test_a_checkpoint_that_does_not_fit_is_refused_with_all_differences() -> None:
    check_fits(state(5), model=MODEL, frozen=FROZEN, layout={})
    with pytest.raises(CheckpointError, match=r"model\.name, model\.resampler\.num_layers"):
        check_fits(state(5), model={"resampler": {"num_layers": 6}, "name": "large"}, frozen=FROZEN, layout={})
    with pytest.raises(CheckpointError, match=r"frozen.*lm\.weight"):
        check_fits(state(5), model=MODEL, frozen={"lm.weight": "0" * 64}, layout={})
