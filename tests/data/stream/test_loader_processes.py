"""Test that loader processes without room, sockets or descriptors end soon, with the cause."""

from __future__ import annotations

import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.data.helpers import step_loader, text_builder, text_shards
from trainer.config.data_config import DataConfig, TextSource
from trainer.data.errors import DataError
from trainer.data.stream import loader_processes
from trainer.data.stream.loader_processes import explain_failures, micro_batches_ahead

SCRIPT = """
import sys
from pathlib import Path
from tests.data.helpers import step_loader, text_builder
from trainer.config.data_config import DataConfig, TextSource
from trainer.data.errors import DataError

source = TextSource("text", Path(sys.argv[1]), 64, max_tokens=4096, micro_batch_size=32)
data = DataConfig((source,), num_workers=2, shuffle_window=10)
try:
    for step in step_loader(data, {"text": text_builder(max_tokens=4096)}, stop=8):
        pass
except DataError as error:
    sys.exit(f"told: {error}")
print("done")
"""
SECONDS = 400  # importing torch takes long on a busy machine; a hang would last for ever


def load(manifest: Path, prefix: tuple[str, ...] = (), **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*prefix, sys.executable, "-c", SCRIPT, str(manifest)],
        env={**os.environ, **environment},
        cwd=Path(__file__).parents[3],
        capture_output=True,
        text=True,
        timeout=SECONDS,
        check=False,
    )


@pytest.fixture
def manifest(tmp_path: Path) -> Path:
    return text_shards(tmp_path, [200])


def mounts_allowed() -> bool:
    command = ["unshare", "-m", "mount", "-t", "tmpfs", "-o", "size=4k", "tmpfs", "/dev/shm"]
    if shutil.which("unshare") is None:
        return False
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


@pytest.mark.slow
@pytest.mark.parametrize("mount", ["size=4k tmpfs", "size=64k tmpfs", "ro,size=1m tmpfs"])
def test_shared_memory_that_is_too_small(manifest: Path, mount: str) -> None:
    if not mounts_allowed():
        pytest.skip("mounting needs root")
    prefix = ("unshare", "-m", "bash", "-c", f'mount -t tmpfs -o {mount} /dev/shm && exec "$@"', "small")
    result = load(manifest, prefix)
    assert result.returncode == 1
    assert "told: " in result.stderr and "/dev/shm" in result.stderr and "data.num_workers" in result.stderr


@pytest.mark.slow
def test_a_temporary_folder_with_a_name_too_long_for_a_socket(manifest: Path, tmp_path: Path) -> None:
    folder = tmp_path / ("x" * 60) / ("y" * 60)
    folder.mkdir(parents=True)
    result = load(manifest, TMPDIR=str(folder))
    if result.returncode == 0:  # Python 3.14 and later take another folder for their sockets
        assert result.stdout == "done\n"
        return
    assert "told: " in result.stderr and str(folder) in result.stderr and "data.num_workers" in result.stderr


@pytest.mark.slow
def test_few_descriptors(manifest: Path) -> None:
    """A limit that cannot be raised makes the processes prepare less ahead."""
    result = load(manifest, ("bash", "-c", 'ulimit -n 128 && exec "$@"', "few"))
    assert result.stdout == "done\n", result.stderr


@pytest.mark.parametrize(
    ("limits", "wanted", "expected", "raised"),
    [
        ((1024, 1024), 4, 4, 1024),
        ((1024, 4096), 100, 100, 3200),
        ((1024, 2048), 1000, 64, 2048),
        ((64, 64), 1000, 2, 64),
        ((1024, resource.RLIM_INFINITY), 1000, 1000, 32_000),
        ((resource.RLIM_INFINITY, resource.RLIM_INFINITY), 1000, 1000, resource.RLIM_INFINITY),
    ],
)
def test_batches_in_flight_fit_under_ulimit(
    monkeypatch: pytest.MonkeyPatch, limits: tuple[int, int], wanted: int, expected: int, raised: int
) -> None:
    state = [limits]
    monkeypatch.setattr(resource, "getrlimit", lambda _: state[0])
    monkeypatch.setattr(resource, "setrlimit", lambda _, new: state.__setitem__(0, new))
    assert micro_batches_ahead(wanted, num_workers=2) == expected
    assert state[0][0] == raised


@pytest.mark.parametrize(
    ("error", "word"),
    [
        (OSError(28, "No space left on device"), "/dev/shm"),
        (OSError(38, "Function not implemented"), "/dev/shm"),
        (RuntimeError("unable to allocate shared memory(shm) for file </torch_1>"), "/dev/shm"),
        (RuntimeError("DataLoader worker (pid 1) is killed by signal: Bus error."), "/dev/shm"),
        (RuntimeError("DataLoader worker (pid 1) is killed by signal: Killed."), "memory"),
        (OSError(24, "Too many open files"), "ulimit -n"),
        (RuntimeError("received 0 items of ancdata"), "ulimit -n"),
        (OSError(11, "Resource temporarily unavailable"), "ulimit -u"),
        (FileNotFoundError(2, "No such file or directory"), "TMPDIR"),
    ],
)
def test_failures_have_their_cause(error: Exception, word: str) -> None:
    def fail() -> None:
        raise error

    with pytest.raises(DataError, match=r"data\.num_workers = 3") as caught:
        explain_failures(fail, 3)
    assert word in str(caught.value)


def test_defects_keep_their_traceback() -> None:
    def fail() -> None:
        raise RuntimeError(
            "Caught ValueError in DataLoader worker process 0.\nOriginal Traceback (most recent call last)"
        )

    with pytest.raises(RuntimeError, match="Original Traceback"):
        explain_failures(fail, 1)


def test_without_loader_processes_nothing_is_checked(manifest: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(num_workers: int) -> None:
        raise AssertionError(num_workers)

    monkeypatch.setattr(loader_processes, "check_hand_over", refuse)
    data = DataConfig((TextSource("text", manifest, 4, max_tokens=30),), shuffle_window=10)
    assert len(list(step_loader(data, {"text": text_builder(max_tokens=30)}, stop=3))) == 3
