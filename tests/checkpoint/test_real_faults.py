"""A disk that is really full and a mount that is really read-only: a clear error, and nothing older is touched.

The file system is mounted in a namespace of its own, which the ranks enter and which ends with the test.
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
from trainer.checkpoint.load import resume_point
from trainer.checkpoint.save import Checkpoints
from trainer.checkpoint.training_state import LATEST, CheckpointError, tag_of
from trainer.config.run_config import CheckpointConfig
from trainer.runtime.distributed import World, barrier

pytestmark = pytest.mark.distributed
_CLONE_FS, _CLONE_NEWNS = 0x200, 0x20000
# Two ranks write 1 MB each: one checkpoint fits, of the next one a part.
_MOUNT = "mount -t tmpfs -o size=3m tmpfs {folder} && echo mounted && read -r the_end"
_REMOUNTED = {"full": "size=3m", "read-only": "ro"}
_REASONS = {"full": "No space left on device", "read-only": "Read-only file system"}


@pytest.fixture
def namespace(tmp_path: Path) -> Iterator[int]:
    """The process whose mount namespace has a small file system at ``tmp_path / "checkpoints"``."""
    nodes.require()
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    command = ["setpriv", "--pdeathsig", "KILL", "unshare", "--mount", "sh", "-c", _MOUNT.format(folder=folder)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None and holder.stdout.readline() == "mounted\n"
        yield holder.pid
        holder.kill()


def enter(process: int) -> None:
    """Have this thread, and those that it starts, see the mounts of another process."""
    libc = ctypes.CDLL(None, use_errno=True)
    with open(f"/proc/{process}/ns/mnt") as handle:
        for failed in (libc.unshare(_CLONE_FS), libc.setns(handle.fileno(), _CLONE_NEWNS)):
            assert not failed, os.strerror(ctypes.get_errno())


def remount(folder: Path, options: str, world: World) -> None:
    """With other options, between what the ranks did before and do after."""
    barrier()
    if world.is_main:
        subprocess.run(["mount", "-o", f"remount,{options}", folder], check=True)
    barrier()


def save_twice(world: World, folder: Path, namespace: int, fault: str) -> str:
    """A good save, then one into the fault; what it said, when the first checkpoint is as it was."""
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
    remount(folder, "rw,size=8m", world)  # what the message asks for
    again = Checkpoints(folder, CheckpointConfig(keep_last=2), world)
    again.save(state(2), "run_dir: here\n", hand_over)
    again.wait()
    assert find_checkpoint(folder) == folder / tag_of(2)
    return message


@pytest.mark.parametrize("fault", ["full", "read-only"])
def test_the_error_says_what_to_do_and_the_last_checkpoint_is_good(tmp_path: Path, namespace: int, fault: str) -> None:
    folder = tmp_path / "checkpoints"
    for message in run_distributed(save_twice, 2, folder, namespace, fault):
        assert f"cannot write {folder / tag_of(2)}" in message and _REASONS[fault] in message, message
        assert f"make {folder} writable with space for another checkpoint, and start again" in message
