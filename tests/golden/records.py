"""Read and write the golden files, and compare lines with them.

A file belongs to a recipe. Its first line describes the machine that wrote it; the others are one step each, on 1
process and then on 2.
"""

from __future__ import annotations

import json
import math
import platform
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from model.ops import library
from tests.golden.recipes import Line, Trained

FOLDER = Path(__file__).parent
# Relative, where another machine, torch or number of processes rounds differently. Adam's first steps divide gradients
# that are rounding errors by themselves, and the norm of the gradient shows that sooner than the loss.
TOLERANCES = {"loss": 1e-5, "grad_norm": 2e-4}
_EXACT = ("processes", "step", "samples", "samples_sha256")


def path_of(name: str) -> Path:
    """Return the golden file of a recipe."""
    return FOLDER / f"{name.removesuffix('.yaml').replace('/', '-')}.jsonl"


def this_machine() -> dict[str, str]:
    """Return what decides how sums are rounded: processor, instruction set, kernels, torch and its neighbors."""
    found = {"processor": platform.machine()}
    info = Path("/proc/cpuinfo")
    if info.exists():
        rows = [line.partition(":") for line in info.read_text().split("\n\n")[0].splitlines()]
        values = {key.strip(): value.strip() for key, _, value in rows}
        model = [values.get(key, "?") for key in ("vendor_id", "cpu family", "model")]
        found["processor"] += f" {' '.join(model)}"
    found["instruction_set"] = torch.backends.cpu.get_cpu_capability()
    found["kernels"] = "fused" if library.load_errors()["cpu"] is None else "plain torch"
    return found | {name: version(name) for name in ("torch", "deepspeed", "transformers", "numpy", "pillow")}


def write(name: str, runs: Sequence[Trained]) -> None:
    """Write the golden file of a recipe, from its runs on 1 and on 2 processes."""
    header = {"config": f"configs/{name}", "parameters": runs[0].parameters, "machine": this_machine()}
    lines = [line for run in runs for line in run.lines]
    path_of(name).write_text("".join(json.dumps(line) + "\n" for line in (header, *lines)), encoding="utf-8")


def read(name: str) -> tuple[dict[str, Any], list[Line]]:
    """Return header and steps of a golden file."""
    header, *lines = map(json.loads, path_of(name).read_text(encoding="utf-8").splitlines())
    return header, lines


def differences(recorded: Sequence[Line], found: Sequence[Line], *, exact: bool) -> list[str]:
    """Return a sentence for each value that differs.

    Args:
        recorded: Lines of a golden file.
        found: Lines of a run.
        exact: Whether to compare losses and gradient norms bit for bit, and not within ``TOLERANCES``.
    """
    if len(recorded) != len(found):
        return [f"{len(recorded)} steps are recorded, {len(found)} were found"]
    return [
        f"{ours['processes']} processes, step {ours['step']}: {key} is {theirs[key]!r}, recorded is {ours[key]!r}"
        for ours, theirs in zip(recorded, found, strict=True)
        for key in (*_EXACT, *TOLERANCES)
        if not _equal(ours[key], theirs[key], 0 if exact else TOLERANCES.get(key, 0))
    ]


def _equal(recorded: Any, found: Any, tolerance: float) -> bool:
    return bool(recorded == found or (tolerance and math.isclose(recorded, found, rel_tol=tolerance)))
