"""Test the event log."""

from __future__ import annotations

import json
from pathlib import Path

from trainer.resilience.events import EventLog
from trainer.runtime.run_folder import RunFolder


def test_events_are_appended_with_their_time(tmp_path: Path) -> None:
    for enabled in (True, False, True):
        EventLog(RunFolder(tmp_path), enabled).write("spike", 4, reason="é")
    lines = [json.loads(line) for line in (tmp_path / "events.jsonl").read_text().splitlines()]
    assert [(line["event"], line["step"], line["reason"]) for line in lines] == [("spike", 4, "é")] * 2
    assert lines[0]["time"] <= lines[1]["time"]
