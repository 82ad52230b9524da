"""Test saves to a disk that is really full and to a mount that is really read-only.

The file system is mounted in its own mount namespace, which the ranks enter and which ends with the test.
"""

from __future__ import annotations

import ctypes
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.checkpoint.test_checkpoint import hand_over, state
from tests.distributed import nodes
from tests.distributed.processes import run_distributed
from trainer.checkpoint.catalog import find_checkpoint, problems_of
from trainer.checkpoint.errors import CheckpointError
from trainer.checkpoint.layout import LATEST, tag_of
from trainer.checkpoint.load import resume_point
from trainer.checkpoint.save import Checkpoints
from trainer.config.run_config import CheckpointConfig
from trainer.runtime.distributed import World, barrier

pytestmark = pytest.mark.distributed
_CLONE_FS, _CLONE_NEWNS = 0x200, 0x20000
# Two ranks write 1 MB each: one checkpoint fits, and a part of the next one.
_MOUNT = "mount -t tmpfs -o size=3m tmpfs {folder} && echo mounted && read -r the_end"
_REMOUNTED = {"full": "size=3m", "read-only": "ro"}
_REASONS = {"full": "No space left on device", "read-only": "Read-only file system"}


@pytest.fixture
def namespace(tmp_path: Path) -> Iterator[int]:
    """Yield a process whose mount namespace has a small file system at ``tmp_path / "checkpoints"``."""
    nodes.require()
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    command = ["setpriv", "--pdeathsig", "KILL", "unshare", "--mount", "sh", "-c", _MOUNT.format(folder=folder)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None and holder.stdout.readline() == "mounted\n"
        yield holder.pid
        holder.kill()


def enter(process: int) -> None:
    """Let this thread, and those that it starts, see the mounts of another process."""
    libc = ctypes.CDLL(None, use_errno=True)
    with open(f"/proc/{process}/ns/mnt") as handle:
        for failed in (libc.unshare(_CLONE_FS), libc.setns(handle.fileno(), _CLONE_NEWNS)):
            assert not failed, os.strerror(ctypes.get_errno())


def remount(folder: Path, options: str, world: World) -> None:
    """Mount the folder with other options, between two barriers."""
    barrier()
    if world.is_main:
        subprocess.run(["mount", "-o", f"remount,{options}", folder], check=True)
    barrier()


def save_twice(world: World, folder: Path, namespace: int, fault: str) -> str:
    """Save once, save again into the fault, and return the error after checking that the first checkpoint is intact."""
    enter(namespace)
    checkpoints = Checkpoints(folder, CheckpointConfig(keep_last=2), world)
    checkpoints.save(state(1), "run_dir: here\n", hand_over)
    checkpoints.wait()
    remount(folder, _REMOUNTED[fault], world)
    try:
        checkpoints.save(state(2), "run_dir: here\n", hand_over)
        checkpoints.wait()
    except CheckpointError as error:
        message = str(error)
    assert (folder / LATEST).read_text() == tag_of(1)
    assert list(problems_of(folder / tag_of(1))) == []
    assert resume_point(folder, world) == (folder / tag_of(1), state(1))
    assert torch.load(folder / tag_of(1) / f"shard-{world.rank}.pt")["weight"].sum() == 250_000
    remount(folder, "rw,size=8m", world)  # as the message says
    again = Checkpoints(folder, CheckpointConfig(keep_last=2), world)
    again.save(state(2), "run_dir: here\n", hand_over)
    again.wait()
    assert find_checkpoint(folder) == folder / tag_of(2)
    return message


@pytest.mark.parametrize("fault", ["full", "read-only"])
def test_the_error_names_the_remedy_and_the_last_checkpoint_stays_good(
    tmp_path: Path, namespace: int, fault: str
) -> None:
    folder = tmp_path / "checkpoints"
    for message in run_distributed(save_twice, 2, folder, namespace, fault):
        assert f"cannot write {folder / tag_of(2)}" in message and _REASONS[fault] in message, message
        assert f"make {folder} writable with space for another checkpoint, and start again" in message
