"""metrics.jsonl that cannot be written is an error with its path; any other sink is left out with a warning."""

from __future__ import annotations

import errno
import json
import os
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.metrics.test_metrics import step as metrics
from trainer.config.run_config import LoggingConfig
from trainer.metrics import sinks
from trainer.metrics.errors import RecordError
from trainer.metrics.jsonl import JsonLinesWriter
from trainer.metrics.sinks import MetricsWriter
from trainer.runtime.run_folder import RunFolder


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """Let no file of this process grow beyond a size, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_file_that_takes_only_a_part_is_named_and_its_whole_lines_stay(tmp_path: Path) -> None:
    writer = JsonLinesWriter(tmp_path / "x.jsonl", 0)
    writer.write([{"step": 1}])
    with largest_file(20), pytest.raises(RecordError, match=rf"{tmp_path}/x\.jsonl.*{os.strerror(errno.EFBIG)}"):
        writer.write([{"step": 2}, {"step": 3}])
    writer.close()
    JsonLinesWriter(tmp_path / "x.jsonl", 3).close()
    assert [json.loads(line)["step"] for line in (tmp_path / "x.jsonl").read_text().splitlines()] == [1]


def test_a_folder_that_takes_no_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "ledger").touch()
    with pytest.raises(RecordError, match="ledger/rank-0"):
        JsonLinesWriter(tmp_path / "ledger" / "rank-0.jsonl", 0)


def test_tensorboard_without_a_folder_is_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "tensorboard").touch()
    with MetricsWriter(RunFolder(tmp_path), LoggingConfig(), total_steps=2, is_main=True) as writer:
        writer.write(metrics(1))
    assert str(tmp_path / "tensorboard") in caplog.text
    assert (tmp_path / "metrics.jsonl").read_text().count("\n") == 1


@pytest.mark.parametrize("method", ["write", "close"])
def test_a_sink_that_fails_is_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, method: str
) -> None:
    calls = []

    def fail(self: object, *arguments: object) -> None:
        calls.append(method)
        raise RuntimeError("the disk is full")

    monkeypatch.setattr(sinks.TensorBoardSink, method, fail)
    writer = MetricsWriter(RunFolder(tmp_path), LoggingConfig(), total_steps=2, is_main=True)
    for step in (1, 2):
        writer.write(metrics(step))
    writer.close()
    assert calls == [method] and "the disk is full" in caplog.text
    assert (tmp_path / "metrics.jsonl").read_text().count("\n") == 2
