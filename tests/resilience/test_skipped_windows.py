"""Test the skipped windows of a run folder."""

from __future__ import annotations

from pathlib import Path

from trainer.resilience.skipped_windows import SkippedWindow, is_stale, read_windows, write_windows
from trainer.runtime.run_folder import RunFolder


def test_windows_read_back_sorted(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    assert read_windows(folder) == ()
    windows = (SkippedWindow(3, 5, "spike"), SkippedWindow(9, 9, "spike"))
    write_windows(folder, reversed(windows))
    assert read_windows(folder) == windows
    assert 5 in windows[0] and 6 not in windows[0]


def test_a_checkpoint_is_stale_if_it_was_trained_on_a_skipped_step() -> None:
    window = SkippedWindow(3, 5, "spike")
    known = {"windows": [{"first": 3, "last": 5, "reason": "spike"}]}
    assert is_stale(3, {}, (window,)) and not is_stale(2, {}, (window,)) and not is_stale(6, known, (window,))
