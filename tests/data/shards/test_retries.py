"""Test which failed reads are repeated, how long, and what is logged."""

from __future__ import annotations

import errno
import logging
import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.data.helpers import text_shards
from trainer.data.errors import ShardError
from trainer.data.shards import retries
from trainer.data.shards.manifest import load_manifest
from trainer.data.shards.reader import ShardReader
from trainer.data.shards.retries import (
    PassingFailure,
    PermanentFailure,
    RetryPolicy,
    UnreachableFailure,
    repeat,
    repeat_disk,
)
from trainer.data.shards.storage_settings import StorageSettings

QUICK = RetryPolicy(retries=3, first_wait_seconds=0.001)


def failing(*failures: Exception) -> Callable[..., str]:
    """Return a read that raises these errors one by one and then succeeds."""
    left = list(failures)

    def read(*_: float) -> str:
        if left:
            raise left.pop(0)
        return "read"

    return read


def test_passing_failures_are_repeated_and_logged(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        assert repeat(failing(PassingFailure("busy", "later"), PassingFailure("cut", "x")), QUICK, "a.tar") == "read"
    assert [record.getMessage().split(" in ")[0] for record in caplog.records] == [
        "a.tar: busy: later; retry 1 of 3",
        "a.tar: cut: x; retry 2 of 3",
    ]


def test_permanent_failures_are_not_repeated() -> None:
    with pytest.raises(PermanentFailure):
        repeat(failing(PermanentFailure("gone", "")), QUICK, "a.tar")


def test_a_storage_that_never_answered_is_given_up_soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retries, "FIRST_CONTACT_SECONDS", 0.1)
    policy = RetryPolicy(retries=1000, first_wait_seconds=0.02, longest_wait_seconds=0.02)
    silent = [UnreachableFailure("connection", "refused")] * 20
    start = time.monotonic()
    with pytest.raises(UnreachableFailure, match="gave up"):
        repeat(failing(*silent, *silent), policy, "host", answered_before=False)
    assert time.monotonic() - start < 10
    assert repeat(failing(*silent), policy, "host", answered_before=True) == "read"


@pytest.mark.parametrize("code", [errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.ESHUTDOWN, errno.EREMOTEIO])
def test_passing_errors_of_a_disk(code: int) -> None:
    error = OSError(code, os.strerror(code))
    assert repeat_disk(failing(error, error), QUICK, "a.tar") == "read"
    with pytest.raises(OSError, match=r"gave up after 4 attempts.*data\.read_retries") as caught:
        repeat_disk(failing(*[error] * 9), QUICK, "a.tar")
    assert caught.value.errno == code


@pytest.mark.parametrize("code", [errno.ENOENT, errno.EACCES, errno.EISDIR])
def test_errors_of_a_disk_that_do_not_pass(code: int) -> None:
    with pytest.raises(OSError) as caught:
        repeat_disk(failing(OSError(code, os.strerror(code))), QUICK, "a.tar")
    assert (caught.value.errno, caught.value.strerror) == (code, os.strerror(code))


@pytest.mark.parametrize("code", [errno.EIO, errno.ESTALE])
def test_a_local_shard_is_read_again_after_an_error_that_passes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    manifest = load_manifest(text_shards(tmp_path, [4]))
    reader = ShardReader(manifest, storage=StorageSettings(retry=QUICK))
    real, failures = os.pread, [0]

    def pread(descriptor: int, length: int, offset: int) -> bytes:
        failures[0] += 1
        if failures[0] <= 2:
            raise OSError(code, os.strerror(code))
        return real(descriptor, length, offset)

    monkeypatch.setattr(os, "pread", pread)
    assert reader.read(0, 1)[1]["txt"] == b"0/1"
    failures[0] = -1000
    monkeypatch.setattr(os, "pread", failing(*[OSError(code, os.strerror(code))] * 9))
    with pytest.raises(ShardError, match=rf"0000\.tar.*{os.strerror(code)}.*data\.read_retries"):
        reader.read(0, 2)


def test_a_stale_handle_is_opened_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A handle that became stale stays stale, however often it is read."""
    reader = ShardReader(load_manifest(text_shards(tmp_path, [4])), storage=StorageSettings(retry=QUICK))
    reader.read(0, 0)
    real, real_open, fresh = os.pread, os.open, [False]

    def pread(descriptor: int, length: int, offset: int) -> bytes:
        if not fresh[0]:
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))
        return real(descriptor, length, offset)

    def opened(*arguments: object, **more: object) -> int:
        fresh[0] = True
        return real_open(*arguments, **more)  # type: ignore[arg-type]

    monkeypatch.setattr(os, "pread", pread)
    monkeypatch.setattr(os, "open", opened)
    assert reader.read(0, 3)[1]["txt"] == b"0/3"


def test_an_index_is_read_again_after_an_error_that_passes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reader = ShardReader(load_manifest(text_shards(tmp_path, [4])), storage=StorageSettings(retry=QUICK))
    real, errors = Path.read_bytes, [OSError(errno.EIO, "Input/output error")]

    def read_bytes(path: Path) -> bytes:
        if errors:
            raise errors.pop()
        return real(path)

    monkeypatch.setattr(Path, "read_bytes", read_bytes)
    assert reader.read(0, 3)[1]["txt"] == b"0/3"
