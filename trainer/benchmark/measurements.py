"""What every benchmark reports: rows with a baseline and a target, after a header that says where they were measured."""

from __future__ import annotations

import platform
import subprocess
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

_VERSIONS = ("torch", "triton", "transformers", "deepspeed", "open_clip_torch", "flash-attn")


@dataclass(frozen=True)
class Measurement:
    """One measurement against one baseline; ``ratio`` > 1: better than the baseline. ``target``: the least ratio wanted."""

    benchmark: str
    case: str
    measure: str
    unit: str
    value: float
    baseline: str | None = None
    baseline_value: float | None = None
    ratio: float | None = None
    target: float | None = None

    @property
    def met(self) -> bool | None:
        """Whether the target is reached; None where there is none, or nothing to compare with."""
        return None if self.target is None or self.ratio is None else self.ratio >= self.target

    def as_json(self) -> dict[str, Any]:
        """The row as it is written to a file."""
        return asdict(self) | {"met": self.met}


def header(device: str) -> dict[str, Any]:
    """Hardware, versions and commit."""
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        hardware = f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB"
    else:
        hardware = f"{_cpu_name()}, {torch.get_num_threads()} threads"
    return {
        "device": device,
        "hardware": hardware,
        "python": platform.python_version(),
        "versions": {name: found for name in _VERSIONS if (found := _version(name)) is not None},
        "commit": _commit(),
    }


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def _commit() -> str | None:
    folder = Path(__file__).parent
    git = ["git", "-C", str(folder)]
    try:
        commit = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
        changed = subprocess.run([*git, "status", "--porcelain"], capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return None
    return commit + ("+changes" if changed.strip() else "")
