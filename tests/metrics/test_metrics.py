"""metrics.jsonl, the ledger, the console line and the other sinks."""

from __future__ import annotations

import io
import json
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from trainer.config.run_config import LoggingConfig
from trainer.errors import ConfigError
from trainer.metrics import jsonl
from trainer.metrics.jsonl import JsonLinesWriter, drop_steps_after
from trainer.metrics.ledger import LedgerWriter
from trainer.metrics.sinks import ConsoleSink, MetricsWriter, console_line
from trainer.metrics.step_metrics import StepMetrics
from trainer.metrics.throughput import Throughput, format_count, format_duration

QUIET = LoggingConfig(tensorboard=False)


def step(number: int, **changes: Any) -> StepMetrics:
    values = StepMetrics(
        step=number,
        loss=2.5,
        losses={"pairs": 2.0, "documents": 3.0},
        grad_norm=0.75,
        lr=1e-4,
        samples={"pairs": 16, "documents": 8},
        tokens=1000,
        step_seconds=0.5,
        data_seconds=0.1,
        step_skipped=False,
        images=32,
    )
    return replace(values, **changes)


def records(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_the_promised_fields() -> None:
    expected = {
        "step": 7,
        "loss": 2.5,
        "loss/pairs": 2.0,
        "loss/documents": 3.0,
        "grad_norm": 0.75,
        "lr": 1e-4,
        "samples/pairs": 16,
        "samples/documents": 8,
        "tokens": 1000,
        "step_seconds": 0.5,
        "data_seconds": 0.1,
        "step_skipped": False,
        "images": 32,
        "replaced_samples": 0,
        "padding": 0.0,
    }
    assert step(7).to_json() == expected


def test_numbers_that_are_not_finite_stay_json(tmp_path: Path) -> None:
    with MetricsWriter(tmp_path, QUIET, 10, is_main=True) as writer:
        writer.write(step(1, loss=float("nan"), grad_norm=float("inf"), step_skipped=True))
    text = (tmp_path / "metrics.jsonl").read_text()
    assert "NaN" not in text
    assert "Infinity" not in text
    (record,) = records(tmp_path / "metrics.jsonl")
    assert (record["loss"], record["grad_norm"], record["step_skipped"]) == (None, None, True)


def test_each_step_stands_there_once_however_often_the_run_was_killed(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    for resume_step, stop in ((0, 7), (5, 9), (5, 6), (5, 12)):
        writer = MetricsWriter(tmp_path, QUIET, 12, is_main=True, resume_step=resume_step)
        for number in range(resume_step + 1, stop + 1):
            writer.write(step(number, loss=float(stop)))
        with path.open("a") as file:
            file.write('{"step": 13, "lo')  # killed in mid-write: the file is not closed
    writer.close()
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:-1]))
    assert [record["step"] for record in records(path)] == list(range(1, 13))
    assert [record["loss"] for record in records(path)] == [7.0] * 5 + [12.0] * 7


def test_every_line_is_on_disk_before_the_next_step(tmp_path: Path) -> None:
    writer = MetricsWriter(tmp_path, QUIET, 10, is_main=True)
    for number in (1, 2, 3):
        writer.write(step(number))
        assert len(records(tmp_path / "metrics.jsonl")) == number
    writer.close()


def test_a_new_run_in_an_old_folder_starts_over(tmp_path: Path) -> None:
    MetricsWriter(tmp_path, QUIET, 10, is_main=True).write(step(1))
    MetricsWriter(tmp_path, QUIET, 10, is_main=True).close()
    assert records(tmp_path / "metrics.jsonl") == []


def test_only_the_main_process_writes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with MetricsWriter(tmp_path, QUIET, 10, is_main=False) as writer:
        writer.write(step(1))
    assert list(tmp_path.iterdir()) == []
    assert capsys.readouterr().err == ""


def test_dropping_is_atomic(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "metrics.jsonl"
    text = "".join(json.dumps({"step": number}) + "\n" for number in range(1, 6)) + "not json\n" + '{"step": 6'
    path.write_text(text)

    def killed(*arguments: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(jsonl.os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        drop_steps_after(path, 3)
    assert path.read_text() == text
    monkeypatch.undo()
    assert drop_steps_after(path, 3) == 4
    assert [record["step"] for record in records(path)] == [1, 2, 3]
    assert drop_steps_after(path, 3) == 0
    assert [entry.name for entry in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_a_file_that_is_not_there_needs_no_dropping(tmp_path: Path) -> None:
    assert drop_steps_after(tmp_path / "absent.jsonl", 3) == 0


def test_lines_keep_their_text(tmp_path: Path) -> None:
    writer = JsonLinesWriter(tmp_path / "a" / "x.jsonl", 0)
    writer.write([{"step": 1, "key": "naïve/été"}])
    writer.close()
    JsonLinesWriter(tmp_path / "a" / "x.jsonl", 1).close()
    assert records(tmp_path / "a" / "x.jsonl") == [{"step": 1, "key": "naïve/été"}]


@dataclass
class Sample:
    source: str = "pairs"
    shard: str = "shard-0.tar"
    index: int = 3
    key: str = "0003"


def test_the_ledger(tmp_path: Path) -> None:
    for rank in range(4):
        ledger = LedgerWriter(tmp_path, rank, 0, world_size=4)
        for number in (1, 2, 3):
            ledger.write(number, [Sample(index=rank), Sample(index=rank + 10)])
        ledger.close()
    expected = {"step": 1, "source": "pairs", "shard": "shard-0.tar", "index": 2, "key": "0003"}
    assert records(tmp_path / "ledger" / "rank-2.jsonl")[0] == expected

    for rank in range(2):  # resumed from step 1 with half as many processes
        LedgerWriter(tmp_path, rank, 1, world_size=2).close()
    for rank in range(4):
        assert [record["step"] for record in records(tmp_path / "ledger" / f"rank-{rank}.jsonl")] == [1, 1]


def test_rates_leave_out_the_first_step() -> None:
    throughput = Throughput(total_steps=10, window=3)
    assert throughput.update(step(1, step_seconds=60.0)).seconds_left == pytest.approx(540)
    rates = throughput.update(step(2))
    assert rates.tokens == pytest.approx(2000)
    assert rates.samples == pytest.approx(48)
    assert rates.images == pytest.approx(64)
    assert rates.data_fraction == pytest.approx(0.2)
    assert rates.seconds_left == pytest.approx(4)
    for number in (3, 4, 5):
        rates = throughput.update(step(number, step_seconds=1.0))
    assert rates.tokens == pytest.approx(1000)  # the window has forgotten the half second
    assert throughput.update(step(10)).seconds_left == 0


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.4, "0s"), (59, "59s"), (61, "1m 01s"), (3599.6, "1h 00m"), (7500, "2h 05m"), (277_000, "3d 04h")],
)
def test_durations(seconds: float, text: str) -> None:
    assert format_duration(seconds) == text


@pytest.mark.parametrize(("value", "text"), [(9.5, "9.5"), (950, "950"), (12_345, "12.3k"), (4.56e6, "4.56M")])
def test_counts(value: float, text: str) -> None:
    assert format_count(value) == text


def test_the_console_line_says_everything() -> None:
    throughput = Throughput(500)
    throughput.update(step(6, step_seconds=60.0))
    rates = throughput.update(step(7))
    line = console_line(step(7), rates, 500)
    assert line == (
        "step   7/500  loss 2.5000 (pairs 2.0000, documents 3.0000)  lr 1.00e-04  grad norm 0.75  2k tokens/s  "
        "48 samples/s  data wait 20%  4m 06s left"
    )
    step_skipped = console_line(step(7, step_skipped=True, replaced={"corrupt_image": 2}), rates, 500)
    assert step_skipped.endswith("SKIPPED (gradient not finite)  2 bad samples replaced")


def test_console_lines_come_every_so_often_and_at_the_end() -> None:
    stream = io.StringIO()
    sink = ConsoleSink(total_steps=8, every=3, stream=stream)
    throughput = Throughput(8)
    for number in range(1, 9):
        sink.write(step(number, step_skipped=number == 4), throughput.update(step(number)))
    sink.close()
    assert [int(line.split()[1].split("/")[0]) for line in stream.getvalue().splitlines()] == [3, 4, 6, 8]
    assert "\x1b" not in stream.getvalue()  # no terminal, no escape sequences


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_terminal_also_gets_a_progress_bar() -> None:
    stream = Terminal()
    sink = ConsoleSink(total_steps=8, every=1, stream=stream)
    sink.write(step(2), Throughput(8).update(step(2)))
    sink.close()
    assert "loss 2.5000" in stream.getvalue()
    assert "2/8" in stream.getvalue()


def test_tensorboard_curves_continue_after_a_resume(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for resume_step, stop in ((0, 4), (2, 6)):
        with MetricsWriter(tmp_path, LoggingConfig(), 6, is_main=True, resume_step=resume_step) as writer:
            for number in range(resume_step + 1, stop + 1):
                writer.write(step(number))
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Scalars("loss/pairs")] == [1, 2, 3, 4, 5, 6]
    assert {"loss", "grad_norm", "lr", "per_second/tokens"} <= set(events.Tags()["scalars"])


@pytest.mark.parametrize(
    ("module", "logging", "setting"),
    [
        ("wandb", LoggingConfig(tensorboard=False, wandb_project="flamingo"), "logging.wandb_project"),
        ("torch.utils.tensorboard", LoggingConfig(), "logging.tensorboard"),
    ],
)
def test_a_missing_library_is_a_clear_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: str, logging: LoggingConfig, setting: str
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ConfigError, match=setting):
        MetricsWriter(tmp_path, logging, 10, is_main=True)


class FakeWandb:
    """Stands in for the module: remembers what was initialized and logged."""

    def __init__(self) -> None:
        self.settings: dict[str, Any] = {}
        self.logged: list[tuple[int, dict[str, float]]] = []
        self.finished = False

    def init(self, **settings: Any) -> FakeWandb:
        self.settings = settings
        return self

    def log(self, values: dict[str, float], step: int) -> None:
        self.logged.append((step, values))

    def finish(self) -> None:
        self.finished = True


def test_wandb_gets_every_step_under_the_run_folders_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    run_dir = tmp_path / "my-run"
    with MetricsWriter(run_dir, LoggingConfig(tensorboard=False, wandb_project="flamingo"), 10, is_main=True) as writer:
        writer.write(step(1))
    assert (fake.settings["project"], fake.settings["id"]) == ("flamingo", "my-run")
    assert fake.logged[0][0] == 1
    assert fake.logged[0][1]["loss/documents"] == 3.0
    assert fake.finished
