"""A prediction beside what ``trainer.benchmark step`` measured of the same run."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from trainer.benchmark.results import differing, read_result
from trainer.config.loader import to_plain
from trainer.config.run_config import FlamingoRunConfig
from trainer.planning.prediction import Prediction

MIB = 2.0**20


def against(prediction: Prediction, config: FlamingoRunConfig, processes: int, path: Path) -> str:
    """A table of predicted, measured and how far the one is off the other.

    path: what ``step --json`` wrote, of made-up batches: real ones are not full rows.

    Raises: ValueError for a file that is no such result, or one of another run; it names what differs.
    """
    head, rows = read_result(path)
    if head["benchmark"] != "step" or head.get("data") != "synthetic":
        raise ValueError(f"{path}: not a result of trainer.benchmark step with made-up batches")
    different = [name for name in differing("", head["config"], to_plain(config)) if name not in _OF_NO_MATTER]
    if head["processes"] != processes:
        different.insert(0, f"processes ({head['processes']} and {processes})")
    if different:
        raise ValueError(f"{path} was measured with different {', '.join(different)}")
    measured = {row["measure"]: row["value"] for row in rows}
    lines = [f"  {'':36s} {'predicted':>12s} {'measured':>12s}     off"]
    for name, unit, predicted, value in _compared(prediction, measured):
        off = (
            f"{100 * (predicted / value - 1):+6.1f} %" if value else "none sent" if predicted == 0 else "some predicted"
        )
        lines.append(f"  {name:36s} {predicted:12.5g} {value:12.5g} {unit:3s} {off}")
    return "\n".join(lines)


_OF_NO_MATTER = ("run_dir", "training.steps", "training.threads")


def _compared(prediction: Prediction, measured: dict[str, float]) -> Iterator[tuple[str, str, float, float]]:
    """(what, unit, predicted, measured)."""
    yield "memory of a device", "MiB", prediction.total_memory / MIB, measured["peak memory of a device"]
    yield "sent by a device, an update", "MiB", prediction.sent / MIB, measured["sent over the network, a device"]
    yield "an update", "s", prediction.step_seconds, measured["update, median"]
    parts = {name: measured[f"part: {name}"] for name in ("vision", "resampler", "language model", "backward")}
    yield "of it computing", "s", prediction.seconds["compute"], sum(parts.values())
    network = measured["part: gather"] + measured["part: reduce"]
    yield "of it waiting for the network", "s", prediction.seconds["network"], network
    yield "of it the optimizer", "s", prediction.seconds["optimizer"], measured["part: optimizer"]
