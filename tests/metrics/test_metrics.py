"""Test metrics.jsonl, the ledger, the console line and the other sinks."""

from __future__ import annotations

import io
import json
import shutil
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from trainer.config.run_config import LoggingConfig
from trainer.errors import ConfigError
from trainer.metrics.jsonl import JsonLinesWriter, drop_steps_after
from trainer.metrics.ledger import LedgerWriter
from trainer.metrics.sinks import ConsoleSink, MetricsWriter, console_line
from trainer.metrics.step_metrics import StepMetrics
from trainer.metrics.throughput import Throughput, format_count, format_duration
from trainer.runtime.run_folder import RunFolder

QUIET = LoggingConfig(tensorboard=False)


def step(number: int, **changes: Any) -> StepMetrics:
    """Return the metrics of a step."""
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


def metrics_writer(
    folder: Path, total_steps: int = 10, *, is_main: bool = True, resume_step: int = 0, logging: LoggingConfig = QUIET
) -> MetricsWriter:
    """Build the writer of a run folder."""
    return MetricsWriter(RunFolder(folder), logging, total_steps=total_steps, is_main=is_main, resume_step=resume_step)


def records(path: Path) -> list[dict[str, Any]]:
    """Read a JSON Lines file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_a_step_has_the_promised_fields() -> None:
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


def test_numbers_that_are_not_finite_become_null(tmp_path: Path) -> None:
    with metrics_writer(tmp_path) as writer:
        writer.write(step(1, loss=float("nan"), grad_norm=float("inf"), step_skipped=True))
    text = (tmp_path / "metrics.jsonl").read_text()
    assert "NaN" not in text
    assert "Infinity" not in text
    (record,) = records(tmp_path / "metrics.jsonl")
    assert (record["loss"], record["grad_norm"], record["step_skipped"]) == (None, None, True)


def test_the_file_holds_each_step_once_however_often_the_run_was_killed(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    for resume_step, stop in ((0, 7), (5, 9), (5, 6), (5, 12)):
        writer = metrics_writer(tmp_path, 12, resume_step=resume_step)
        for number in range(resume_step + 1, stop + 1):
            writer.write(step(number, loss=float(stop)))
        with path.open("a") as file:
            file.write('{"step": 13, "lo')  # killed in the middle of a write
    writer.close()
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:-1]))
    assert [record["step"] for record in records(path)] == list(range(1, 13))
    assert [record["loss"] for record in records(path)] == [7.0] * 5 + [12.0] * 7


def test_every_line_is_on_disk_before_the_next_step(tmp_path: Path) -> None:
    writer = metrics_writer(tmp_path)
    for number in (1, 2, 3):
        writer.write(step(number))
        assert len(records(tmp_path / "metrics.jsonl")) == number
    writer.close()


def test_a_new_run_in_an_old_folder_empties_the_file(tmp_path: Path) -> None:
    metrics_writer(tmp_path).write(step(1))
    metrics_writer(tmp_path).close()
    assert records(tmp_path / "metrics.jsonl") == []


def test_only_the_main_process_writes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with metrics_writer(tmp_path, is_main=False) as writer:
        writer.write(step(1))
    assert list(tmp_path.iterdir()) == []
    assert capsys.readouterr().err == ""


def test_steps_are_dropped_atomically(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "metrics.jsonl"
    text = "".join(json.dumps({"step": number}) + "\n" for number in range(1, 6)) + "not json\n" + '{"step": 6'
    path.write_text(text)

    def killed(*arguments: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("os.replace", killed)
    with pytest.raises(KeyboardInterrupt):
        drop_steps_after(path, 3)
    assert path.read_text() == text
    monkeypatch.undo()
    assert drop_steps_after(path, 3) == 4
    assert [record["step"] for record in records(path)] == [1, 2, 3]
    assert drop_steps_after(path, 3) == 0
    assert [entry.name for entry in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_dropping_steps_needs_no_file(tmp_path: Path) -> None:
    assert drop_steps_after(tmp_path / "absent.jsonl", 3) == 0


def test_text_that_is_not_ascii_stays_readable(tmp_path: Path) -> None:
    writer = JsonLinesWriter(tmp_path / "a" / "x.jsonl", 0)
    writer.write([{"step": 1, "key": "naïve/été"}])
    writer.close()
    JsonLinesWriter(tmp_path / "a" / "x.jsonl", 1).close()
    assert records(tmp_path / "a" / "x.jsonl") == [{"step": 1, "key": "naïve/été"}]


@dataclass
class Sample:
    """Identify a sample in the ledger."""

    source: str = "pairs"
    shard: str = "shard-0.tar"
    index: int = 3
    key: str = "0003"


def test_a_resume_on_fewer_ranks_shortens_all_ledgers(tmp_path: Path) -> None:
    for rank in range(4):
        ledger = LedgerWriter(RunFolder(tmp_path), rank=rank, world_size=4, resume_step=0)
        for number in (1, 2, 3):
            ledger.write(number, [Sample(index=rank), Sample(index=rank + 10)])
        ledger.close()
    expected = {"step": 1, "source": "pairs", "shard": "shard-0.tar", "index": 2, "key": "0003"}
    assert records(tmp_path / "ledger" / "rank-2.jsonl")[0] == expected

    for rank in range(2):  # resumed from step 1 with half as many processes
        LedgerWriter(RunFolder(tmp_path), rank=rank, world_size=2, resume_step=1).close()
    for rank in range(4):
        assert [record["step"] for record in records(tmp_path / "ledger" / f"rank-{rank}.jsonl")] == [1, 1]


def test_rates_leave_out_the_first_step() -> None:
    throughput = Throughput(total_steps=10, num_steps=3)
    assert throughput.add(step(1, step_seconds=60.0)).seconds_left == pytest.approx(540)
    rates = throughput.add(step(2))
    assert rates.tokens == pytest.approx(2000)
    assert rates.samples == pytest.approx(48)
    assert rates.images == pytest.approx(64)
    assert rates.data_fraction == pytest.approx(0.2)
    assert rates.seconds_left == pytest.approx(4)
    for number in (3, 4, 5):
        rates = throughput.add(step(number, step_seconds=1.0))
    assert rates.tokens == pytest.approx(1000)  # the last three steps took a second each
    assert throughput.add(step(10)).seconds_left == 0


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.4, "0s"), (59, "59s"), (61, "1m 01s"), (3599.6, "1h 00m"), (7500, "2h 05m"), (277_000, "3d 04h")],
)
def test_durations_are_formatted_in_two_units(seconds: float, text: str) -> None:
    assert format_duration(seconds) == text


@pytest.mark.parametrize(("value", "text"), [(9.5, "9.5"), (950, "950"), (12_345, "12.3k"), (4.56e6, "4.56M")])
def test_counts_are_formatted_with_three_digits(value: float, text: str) -> None:
    assert format_count(value) == text


def test_the_console_line_shows_all_metrics() -> None:
    throughput = Throughput(500)
    throughput.add(step(6, step_seconds=60.0))
    rates = throughput.add(step(7))
    line = console_line(step(7), rates, 500)
    assert line == (
        "step   7/500  loss 2.5000 (pairs 2.0000, documents 3.0000)  lr 1.00e-04  grad norm 0.75  2k tokens/s  "
        "48 samples/s  data wait 20%  4m 06s left"
    )
    skipped = console_line(step(7, step_skipped=True, replaced={"corrupt_image": 2}), rates, 500)
    assert skipped.endswith("SKIPPED (gradient not finite)  2 samples replaced")


def test_lines_are_printed_every_few_steps_for_skipped_steps_and_at_the_end() -> None:
    stream = io.StringIO()
    sink = ConsoleSink(total_steps=8, log_every=3, stream=stream)
    throughput = Throughput(8)
    for number in range(1, 9):
        sink.write(step(number, step_skipped=number == 4), throughput.add(step(number)))
    sink.close()
    assert [int(line.split()[1].split("/")[0]) for line in stream.getvalue().splitlines()] == [3, 4, 6, 8]
    assert "\x1b" not in stream.getvalue()  # no escape sequences without a terminal


class Terminal(io.StringIO):
    """Claim to be a terminal."""

    def isatty(self) -> bool:
        return True


def test_a_terminal_gets_a_progress_bar() -> None:
    stream = Terminal()
    sink = ConsoleSink(total_steps=8, log_every=1, stream=stream)
    sink.write(step(2), Throughput(8).add(step(2)))
    sink.close()
    assert "loss 2.5000" in stream.getvalue()
    assert "2/8" in stream.getvalue()


def test_tensorboard_curves_continue_after_a_resume(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for resume_step, stop in ((0, 4), (2, 6)):
        with metrics_writer(tmp_path, 6, resume_step=resume_step, logging=LoggingConfig()) as writer:
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
def test_a_missing_library_is_an_error_that_names_the_setting(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: str, logging: LoggingConfig, setting: str
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ConfigError, match=setting):
        metrics_writer(tmp_path, logging=logging)


class FakeWandb:
    """Replace the module and remember the calls."""

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


@pytest.fixture
def wandb(monkeypatch: pytest.MonkeyPatch) -> FakeWandb:
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    monkeypatch.setenv("WANDB_API_KEY", "a key")
    monkeypatch.delenv("WANDB_MODE", raising=False)
    return fake


WANDB = LoggingConfig(tensorboard=False, wandb_project="flamingo")


def test_wandb_gets_every_step_under_the_name_of_the_run_folder(tmp_path: Path, wandb: FakeWandb) -> None:
    with metrics_writer(tmp_path / "my-run", logging=WANDB) as writer:
        writer.write(step(1))
    assert (wandb.settings["project"], wandb.settings["name"]) == ("flamingo", "my-run")
    assert "mode" not in wandb.settings
    assert wandb.logged[0][0] == 1
    assert wandb.logged[0][1]["loss/documents"] == 3.0
    assert wandb.finished


def test_an_id_of_wandb_belongs_to_one_run_folder(tmp_path: Path, wandb: FakeWandb) -> None:
    """A resume and a moved folder go on with their run; another folder of the same name and a copy do not."""

    def wandb_id(folder: Path) -> str:
        metrics_writer(folder, logging=WANDB).close()
        return str(wandb.settings["id"])

    first = wandb_id(tmp_path / "lr1" / "run")
    assert wandb_id(tmp_path / "lr1" / "run") == first
    assert wandb_id(tmp_path / "lr2" / "run") != first
    shutil.copytree(tmp_path / "lr1", tmp_path / "copy")
    copied = wandb_id(tmp_path / "copy" / "run")
    assert copied != first
    assert wandb_id(tmp_path / "copy" / "run") == copied
    shutil.move(tmp_path / "lr1", tmp_path / "moved")
    assert wandb_id(tmp_path / "moved" / "run") == first
    shutil.rmtree(tmp_path / "moved")
    assert wandb_id(tmp_path / "moved" / "run") != first


def test_wandb_works_offline_without_a_key(
    tmp_path: Path, wandb: FakeWandb, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.delenv("WANDB_API_KEY")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    metrics_writer(tmp_path / "run", logging=WANDB).close()
    assert wandb.settings["mode"] == "offline"
    assert "WANDB_API_KEY" in caplog.text
    (tmp_path / "netrc").write_text("machine api.wandb.ai login user password key\n")
    metrics_writer(tmp_path / "run", logging=WANDB).close()
    assert "mode" not in wandb.settings


def test_wandb_works_offline_where_it_cannot_log_in(
    tmp_path: Path, wandb: FakeWandb, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    start = wandb.init

    def refuse(**settings: Any) -> FakeWandb:
        if "mode" not in settings:
            raise RuntimeError("invalid key")
        return start(**settings)

    monkeypatch.setattr(wandb, "init", refuse)
    metrics_writer(tmp_path / "run", logging=WANDB).close()
    assert wandb.settings["mode"] == "offline"
    assert "invalid key" in caplog.text


@pytest.mark.parametrize(("total", "expected"), [(20, 1), (300, 5), (450, 5), (5000, 50), (10_000, 100), (10**6, 100)])
def test_lines_adapt_to_the_length_of_the_run(total: int, expected: int) -> None:
    stream = io.StringIO()
    sink = ConsoleSink(total_steps=total, log_every=None, resume_step=10, stream=stream)
    throughput = Throughput(total)
    for number in range(11, 10 + 2 * expected + 1):
        sink.write(step(number), throughput.add(step(number)))
    sink.close()
    printed = [int(line.split()[1].split("/")[0]) for line in stream.getvalue().splitlines()]
    due = [number for number in range(11, 10 + 2 * expected + 1) if number == 11 or number % expected == 0]
    assert printed == due
