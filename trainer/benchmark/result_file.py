"""Write and read the files of ``trainer.benchmark --json``: a header with hardware, versions and commit, then rows."""

from __future__ import annotations

import json
import platform
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

_VERSIONS = ("torch", "triton", "transformers", "deepspeed", "open_clip_torch", "flash-attn")
_HEADER_KEYS = {"benchmark", "hardware", "versions"}
_ROW_KEYS = {"case", "measure", "unit", "value", "baseline", "baseline_value", "ratio", "target", "met"}


@dataclass(frozen=True)
class Measurement:
    """Hold one measured value, with a baseline where there is one.

    Attributes:
        benchmark: Name of the benchmark.
        case: What was measured on.
        measure: What was measured.
        unit: Unit of the value and of the baseline's value.
        value: The measured value.
        baseline: Name of the baseline; "limit" is a fixed value instead of a measured one.
        baseline_value: Value of the baseline.
        ratio: How many times better than the baseline the value is.
        target: Lowest ratio that is wanted.
    """

    benchmark: str
    case: str
    measure: str
    unit: str
    value: float
    baseline: str | None = None
    baseline_value: float | None = None
    ratio: float | None = None
    target: float | None = None

    @classmethod
    def compared(
        cls,
        benchmark: str,
        case: str,
        measure: str,
        unit: str,
        value: float,
        baseline: str,
        baseline_value: float,
        target: float | None = None,
    ) -> Measurement:
        """Return a value beside a baseline's, where the lower one is better."""
        ratio = baseline_value / value
        return cls(benchmark, case, measure, unit, value, baseline, baseline_value, ratio, target)

    @property
    def met(self) -> bool | None:
        """Whether the target is reached; None where there is no target or no ratio."""
        return None if self.target is None or self.ratio is None else self.ratio >= self.target

    def as_json(self) -> dict[str, Any]:
        """Return the row as it is written to a file."""
        return asdict(self) | {"met": self.met}


def write_result(path: Path, device: str, description: Mapping[str, Any], rows: Sequence[Measurement]) -> None:
    """Write a result.

    Args:
        path: File to write.
        device: "cpu" or "cuda".
        description: Further keys of the header; ``benchmark`` must be one of them.
        rows: The measurements.
    """
    document = [environment(device) | dict(description), *(row.as_json() for row in rows)]
    path.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


def read_result(path: Path) -> tuple[Any, list[Any]]:
    """Return header and rows of a result.

    Raises:
        ValueError: The file is not a result.
    """
    try:
        header, *rows = json.loads(path.read_text(encoding="utf-8"))
        if not header.keys() >= _HEADER_KEYS or not all(row.keys() >= _ROW_KEYS for row in rows):
            raise ValueError("keys are missing")
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is not a file that trainer.benchmark --json wrote") from error
    return header, rows


def differing_paths(path: str, left: Any, right: Any) -> list[str]:
    """Return the dotted paths below ``path`` at which two headers or configurations differ."""
    if isinstance(left, dict) and isinstance(right, dict):
        keys = sorted(left.keys() | right.keys())
        below = f"{path}." if path else ""
        return [name for key in keys for name in differing_paths(f"{below}{key}", left.get(key), right.get(key))]
    return [] if left == right else [path]


def environment(device: str) -> dict[str, Any]:
    """Return hardware, versions and commit of this process."""
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
    git = ["git", "-C", str(Path(__file__).parent)]
    try:
        commit = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
        changed = subprocess.run([*git, "status", "--porcelain"], capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return None
    return commit + ("+changes" if changed.strip() else "")
