"""Trace some steps of a run with torch's profiler."""

from __future__ import annotations

import logging

import torch

from trainer.runtime.run_folder import RunFolder

_log = logging.getLogger(__name__)


class ProfilerTrace:
    """Write a trace of consecutive steps to ``traces/`` of the run folder, on the main process.

    Perfetto (ui.perfetto.dev) and TensorBoard's profiler plugin open the files. A run that resumes within the steps
    traces the rest of them.

    Args:
        run_folder: Folder of the run.
        steps: First and last step, counted from 1; None traces nothing.
        is_main: Whether this process traces.
    """

    def __init__(self, run_folder: RunFolder, steps: tuple[int, int] | None, *, is_main: bool) -> None:
        self._folder = run_folder.traces
        self._first, self._last = steps if steps is not None and is_main else (1, 0)
        self._profiler: torch.profiler.profile | None = None
        self._began, self._ended = 0, 0

    def begin(self, step: int) -> None:
        """Start the profiler if the step that begins is to be traced."""
        if self._profiler is None and self._first <= step <= self._last:
            self._profiler, self._began = torch.profiler.profile(), step
            self._profiler.start()

    def end(self, step: int) -> None:
        """Write the trace if the step that ended was the last one to be traced."""
        self._ended = step
        if step == self._last:
            self.close()

    def close(self) -> None:
        """Write the trace of the steps so far, if it is not written yet."""
        if self._profiler is None:
            return
        profiler, self._profiler = self._profiler, None
        profiler.stop()  # waits for the device
        path = self._folder / f"steps-{self._began}-{self._ended}.pt.trace.json.gz"
        try:
            self._folder.mkdir(exist_ok=True)
            profiler.export_chrome_trace(str(path))
        except (OSError, RuntimeError) as error:  # torch raises either
            _log.warning("the trace %s was not written: %s; training goes on", path, error)
