"""Retention removes no file behind a symbolic link, and a checkpoint that stays is no error."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.checkpoint.test_checkpoint import save_steps
from tests.distributed.processes import run_distributed
from trainer.checkpoint.catalog import problems_of, steps_in
from trainer.checkpoint.layout import tag_of
from trainer.checkpoint.retention import remove
from trainer.config.run_config import CheckpointConfig
from trainer.runtime.distributed import World


def link_elsewhere(checkpoint: Path, elsewhere: Path) -> Path:
    """Move a checkpoint to another folder and leave a link in its place; return where it is now."""
    elsewhere.mkdir(exist_ok=True)
    target = checkpoint.rename(elsewhere / checkpoint.name)
    checkpoint.symlink_to(target)
    return target


def test_only_the_link_is_removed(tmp_path: Path) -> None:
    checkpoint = tmp_path / tag_of(10)
    checkpoint.mkdir()
    (checkpoint / "manifest.json").write_text("{}")
    target = link_elsewhere(checkpoint, tmp_path / "kept")
    remove(checkpoint)
    assert not checkpoint.is_symlink() and (target / "manifest.json").exists()
    checkpoint.symlink_to(tmp_path / "nowhere")
    remove(checkpoint)
    assert not checkpoint.is_symlink()


def save_over_links(world: World, folder: Path) -> list[list[str]]:
    """Save, put links in the place of checkpoints, save more and save one of them again."""
    save_steps(world, folder, [10, 20], CheckpointConfig(keep_last=2))
    targets = [link_elsewhere(folder / tag_of(step), folder.parent / "kept") for step in (10, 20)]
    save_steps(world, folder, [20, 30, 40], CheckpointConfig(keep_last=2))
    return [list(problems_of(target)) for target in targets]


@pytest.mark.distributed
def test_retention_and_a_second_save_leave_what_links_point_to(tmp_path: Path) -> None:
    assert run_distributed(save_over_links, 1, tmp_path / "checkpoints") == [[[], []]]
    assert steps_in(tmp_path / "checkpoints") == [30, 40]


def save_beside_one_that_stays(world: World, folder: Path) -> None:
    def refuse(checkpoint: Path) -> None:
        raise PermissionError(13, "Permission denied", str(checkpoint))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("trainer.checkpoint.save.remove", refuse)
        save_steps(world, folder, [10, 20, 30], CheckpointConfig(keep_last=1))


@pytest.mark.distributed
def test_a_checkpoint_that_cannot_be_removed_does_not_end_the_run(tmp_path: Path) -> None:
    run_distributed(save_beside_one_that_stays, 1, tmp_path / "checkpoints")
    assert steps_in(tmp_path / "checkpoints") == [10, 20, 30]
