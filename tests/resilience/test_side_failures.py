"""A console, an event log or a lock that fails is a warning; training goes on."""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from trainer.errors import TrainerError
from trainer.resilience.events import EventLog
from trainer.resilience.pending_error import PendingError
from trainer.resilience.restarts import read_events
from trainer.resilience.run_lock import run_lock
from trainer.runtime.console import LastingStream, lasting_console
from trainer.runtime.distributed import World
from trainer.runtime.run_folder import RunFolder

ROOT = Path(__file__).parents[2]


def test_a_full_disk_behind_the_console_is_no_error() -> None:
    with open("/dev/full", "w") as full, pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stdout", full)
        patch.setattr(sys, "stderr", full)
        with lasting_console():
            print("a line", flush=True)
            sys.stderr.writelines(["a\n", "b\n"])
            sys.stderr.flush()
            assert not sys.stdout.isatty()
        assert sys.stdout is full
        patch.undo()
        with pytest.raises(OSError, match="No space left"):
            full.close()


def test_a_stream_that_works_gets_everything(tmp_path: Path) -> None:
    with (tmp_path / "out").open("w") as file:
        stream = LastingStream(file)
        assert stream.write("é") == 1
        stream.writelines(["b", "c"])
        stream.flush()
        assert (tmp_path / "out").read_text() == "ébc"
        assert stream.fileno() == file.fileno()


def test_a_reader_that_goes_away_does_not_change_the_exit_code() -> None:
    program = """
import logging, sys
from trainer.entry import exit_now
from trainer.runtime.console import lasting_console
with lasting_console():
    print("first", flush=True)
    sys.stdin.readline()
    logging.basicConfig(stream=sys.stderr)
    logging.error("nobody reads this")
    print("nor this")
exit_now(7)
"""
    with subprocess.Popen(
        [sys.executable, "-c", program], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stdin is not None and process.stdout is not None and process.stderr is not None
        assert process.stdout.readline() == b"first\n"
        process.stdout.close()
        process.stderr.close()
        process.stdin.write(b"go on\n")
        process.stdin.close()
        assert process.wait(timeout=60) == 7


def test_events_that_cannot_be_written_are_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "events.jsonl").mkdir()
    EventLog(RunFolder(tmp_path)).write("spike", 4)
    assert str(tmp_path / "events.jsonl") in caplog.text and "the event spike is left out" in caplog.text


def test_a_line_that_was_cut_off_costs_only_itself(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    EventLog(folder).write("resumed", 1)
    with folder.events.open("a") as file:
        file.write('{"time": "2026-01-01", "event": "spi')
    EventLog(folder).write("preempted", 3)
    assert [event["event"] for event in read_events(folder)] == ["resumed", "preempted"]


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_a_warning_with_the_remedy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, number: int
) -> None:
    def refuse(descriptor: int, operation: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", refuse)
    with caplog.at_level(logging.WARNING), run_lock(RunFolder(tmp_path)):
        pass
    assert str(tmp_path) in caplog.text and "-o flock" in caplog.text


def test_another_error_of_the_lock_is_raised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(descriptor: int, operation: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(fcntl, "flock", fail)
    with pytest.raises(OSError, match="Input/output error"), run_lock(RunFolder(tmp_path)):
        pass


def test_the_first_error_is_kept_and_later_records_are_left_out() -> None:
    pending = PendingError(World(0, 1, 0, torch.device("cpu")))
    done: list[str] = []

    def fail() -> None:
        raise TrainerError("the disk is full")

    pending.attempt(lambda: done.append("step 1"))
    assert not pending.exists
    pending.attempt(fail)
    pending.attempt(lambda: done.append("step 3"))
    assert pending.exists and done == ["step 1"]


def test_an_event_is_one_line_of_json(tmp_path: Path) -> None:
    EventLog(RunFolder(tmp_path)).write("settings_changed", 5, settings={"optimizer.lr": {"old": 1, "new": 2}})
    [line] = (tmp_path / "events.jsonl").read_text().splitlines()
    assert json.loads(line)["settings"] == {"optimizer.lr": {"old": 1, "new": 2}}
