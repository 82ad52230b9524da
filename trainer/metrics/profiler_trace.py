"""A trace of some updates in the middle of a run, by torch profiler."""

from __future__ import annotations

from pathlib import Path

import torch


class ProfilerTrace:
    """Traces updates first to last (counted from 1) into ``run_dir/traces``, on the main process.

    The files open in Perfetto (ui.perfetto.dev) and TensorBoard's profiler plugin. Without ``steps`` it does nothing.
    """

    def __init__(self, run_dir: Path, steps: tuple[int, int] | None, is_main: bool) -> None:
        self._folder = run_dir / "traces"
        self._first, self._last = steps if steps is not None and is_main else (1, 0)
        self._profiler: torch.profiler.profile | None = None
        self._began, self._ended = 0, 0

    def begin(self, step: int) -> None:
        """Before an update; a run that resumes among those to be traced traces the rest of them."""
        if self._profiler is None and self._first <= step <= self._last:
            self._profiler, self._began = torch.profiler.profile(), step
            self._profiler.start()

    def end(self, step: int) -> None:
        """After an update."""
        self._ended = step
        if step == self._last:
            self.close()

    def close(self) -> None:
        """Write what was traced, if anything is not written yet."""
        if self._profiler is None:
            return
        profiler, self._profiler = self._profiler, None
        profiler.stop()  # waits for the device
        self._folder.mkdir(exist_ok=True)
        profiler.export_chrome_trace(str(self._folder / f"updates-{self._began}-{self._ended}.pt.trace.json.gz"))
