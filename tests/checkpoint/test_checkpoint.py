"""Checkpoints without tensors of a model: what is found, what is refused, what is kept."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.distributed.processes import run_distributed
from trainer.checkpoint.load import check_fits, find_checkpoint, read_state, verify_checkpoint
from trainer.checkpoint.save import prune_checkpoints, save_checkpoint
from trainer.checkpoint.state import LATEST, MANIFEST, CheckpointError, TrainingState, tag_of
from trainer.config.schema import CheckpointConfig
from trainer.distributed import World

FROZEN = {"lm.weight": "f" * 64}
MODEL = {"resampler": {"layers": 2}, "name": "small"}


def state(step: int) -> TrainingState:
    return TrainingState(step, world_size=1, data={"seed": 1}, frozen=FROZEN, model=MODEL)


def write_shard(folder: Path, tag: str) -> None:
    (folder / tag / "shard.pt").write_bytes(tag.encode() * 100)


def save_steps(world: World, folder: Path, steps: list[int], config: CheckpointConfig | None = None) -> list[str]:
    for step in steps:
        save_checkpoint(folder, state(step), "run_dir: here\n", write_shard, world)
        if config is not None:
            prune_checkpoints(folder, config, world)
    return sorted(path.name for path in folder.iterdir() if path.is_dir())


def save_with_a_failing_shard(world: World, folder: Path) -> str:
    def fail(folder: Path, tag: str) -> None:
        raise OSError(28, "No space left on device")

    save_checkpoint(folder, state(1), "run_dir: here\n", write_shard, world)
    try:
        save_checkpoint(folder, state(2), "run_dir: here\n", fail, world)
    except OSError as error:
        return str(error)
    return "no error"


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved") / "checkpoints"
    run_distributed(save_steps, 1, folder, [10, 20])
    return folder


@pytest.fixture
def checkpoints(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "checkpoints"))


def test_the_newest_is_found_and_reads_back(checkpoints: Path) -> None:
    found = find_checkpoint(checkpoints)
    assert found == checkpoints / tag_of(20)
    assert read_state(found) == state(20)


def test_a_new_run_has_none(tmp_path: Path) -> None:
    assert find_checkpoint(tmp_path / "nothing") is None


def delete(path: Path) -> None:
    path.unlink()


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(bytes(content))


@pytest.mark.parametrize("damage", [delete, truncate, flip_a_bit])
def test_any_damaged_file_is_found_and_the_older_checkpoint_taken(
    checkpoints: Path, damage: Callable[[Path], None], caplog: pytest.LogCaptureFixture
) -> None:
    names = sorted(path.name for path in (checkpoints / tag_of(20)).iterdir())
    assert {"shard.pt", "state.json", "config.yaml", MANIFEST} < set(names)
    for name in names:
        broken = checkpoints / "broken" / tag_of(20)
        shutil.copytree(checkpoints / tag_of(20), broken, dirs_exist_ok=True)
        damage(broken / name)
        problem = verify_checkpoint(broken)
        assert problem is not None and name in problem
    damage(checkpoints / tag_of(20) / "shard.pt")
    shutil.rmtree(checkpoints / "broken")
    assert find_checkpoint(checkpoints) == checkpoints / tag_of(10)
    assert "shard.pt" in caplog.text


def test_no_good_checkpoint_is_an_error_and_no_new_start(checkpoints: Path) -> None:
    for step in (10, 20):
        truncate(checkpoints / tag_of(step) / "shard.pt")
    with pytest.raises(CheckpointError, match="no good checkpoint"):
        find_checkpoint(checkpoints)


def test_what_a_crash_left_half_written_is_passed_over(checkpoints: Path) -> None:
    (checkpoints / tag_of(30)).mkdir()
    (checkpoints / tag_of(30) / "shard.pt").write_bytes(b"half")
    assert find_checkpoint(checkpoints) == checkpoints / tag_of(20)
    shutil.rmtree(checkpoints / tag_of(10))
    shutil.rmtree(checkpoints / tag_of(20))
    (checkpoints / LATEST).unlink()
    assert find_checkpoint(checkpoints) is None, "a run that died before its first checkpoint starts anew"


def test_a_failed_save_leaves_latest_alone(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    assert "No space left" in run_distributed(save_with_a_failing_shard, 1, folder)[0]
    assert (folder / LATEST).read_text() == tag_of(1)
    assert find_checkpoint(folder) == folder / tag_of(1)


def test_retention(tmp_path: Path) -> None:
    config = CheckpointConfig(keep_last=2, keep_every=20)
    kept = run_distributed(save_steps, 1, tmp_path / "checkpoints", [10, 20, 30, 40, 50], config)[0]
    assert kept == [tag_of(step) for step in (20, 40, 50)]


def test_what_does_not_fit_is_refused_with_everything_that_differs() -> None:
    check_fits(state(5), world_size=1, model=MODEL, frozen=FROZEN)
    with pytest.raises(CheckpointError, match=r"model\.resampler\.layers.*1 processes and this run has 4"):
        other = {"resampler": {"layers": 6}, "name": "small"}
        check_fits(state(5), world_size=4, model=other, frozen=FROZEN)
    with pytest.raises(CheckpointError, match=r"other frozen weights.*lm\.weight"):
        check_fits(state(5), world_size=1, model=MODEL, frozen={"lm.weight": "0" * 64})
