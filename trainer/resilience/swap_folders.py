"""Hold the folders on a drive that offloaded tensors lie in (``device: nvme``), for one run."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from trainer.config.run_config import DeepSpeedConfig
from trainer.errors import TrainerError
from trainer.resilience.run_lock import hold_lock

_SWAPPED = "zero_stage_3"  # DeepSpeed's name for its folder


class DriveError(TrainerError):
    """Report that a folder cannot hold offloaded tensors."""


@contextmanager
def swap_folders(settings: DeepSpeedConfig, rank: int) -> Iterator[None]:
    """Hold this process's part of each folder for offloaded tensors, and remove what is left in it at the end.

    DeepSpeed names files by rank, so a second run would overwrite them. A killed run leaves its files. The next one in
    the same folder overwrites them.

    Raises:
        DriveError: The folder's file system has no direct I/O.
        RunLockedError: Another run uses the folder.
        OSError: The folder cannot be written.
    """
    offloads = (settings.offload_param, settings.offload_optimizer)
    folders = {offload.path for offload in offloads if offload.device == "nvme" and offload.path is not None}
    with ExitStack() as stack:
        for folder in sorted(folders):
            _require_direct_io(folder, rank)
            lock, advice = folder / f"rank{rank}.lock", "choose another deepspeed.offload_*.path"
            stack.enter_context(hold_lock(lock, folder, advice))
            stack.callback(_remove_swapped, folder, rank)
        yield


def _require_direct_io(folder: Path, rank: int) -> None:
    """Try what DeepSpeed does: it opens every file past the page cache."""
    probe = folder / f"rank{rank}.probe"
    try:
        os.close(os.open(probe, os.O_WRONLY | os.O_CREAT | os.O_DIRECT, 0o600))
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        raise DriveError(
            f"the file system of {folder} has no direct I/O (O_DIRECT), which DeepSpeed needs; set deepspeed.offload_*."
            "path to a folder on a local drive, or take device: cpu"
        ) from error
    finally:
        probe.unlink(missing_ok=True)


def swapped_bytes(folder: Path) -> int:
    """Return the bytes that a killed run left in a folder; the next run overwrites them."""
    return sum(path.stat().st_size for path in (folder / _SWAPPED).rglob("*.swp"))


def _remove_swapped(folder: Path, rank: int) -> None:
    for kind in (folder / _SWAPPED).glob("*"):
        shutil.rmtree(kind / f"rank{rank}", ignore_errors=True)
