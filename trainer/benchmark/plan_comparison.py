"""Compare a prediction with what ``trainer.benchmark step`` measured of the same run."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from trainer.benchmark.part_clock import DATA_WAIT, GATHER, REDUCE
from trainer.benchmark.result_file import differing_paths, read_result
from trainer.config.loader import to_plain
from trainer.config.run_config import RunConfig
from trainer.config.validation import validate
from trainer.planning.prediction import Prediction

_MIB = 2.0**20
_NOT_COMPUTING = (DATA_WAIT, GATHER, REDUCE, "optimizer")
_IGNORED_SETTINGS = ("run_dir", "training.steps", "training.threads")


def comparison_table(prediction: Prediction, config: RunConfig, processes: int, path: Path) -> str:
    """Return a table of predicted values, measured values and their difference.

    Args:
        prediction: Prediction of the run.
        config: The run.
        processes: Number of its processes.
        path: Result of ``step --json`` with synthetic batches; real batches are not full rows.

    Raises:
        ValueError: The file is not such a result, or it is of another run; the message names what differs.
    """
    header, rows = read_result(path)
    if header["benchmark"] != "step" or header.get("data") != "synthetic":
        raise ValueError(f"{path}: not a result of trainer.benchmark step with synthetic batches")
    # An older version's result lacks the settings that came later: their defaults leave a run as it was.
    measured_config, _ = validate(header["config"], type(config))
    before = header["config"] if measured_config is None else to_plain(measured_config)
    different = [name for name in differing_paths("", before, to_plain(config)) if name not in _IGNORED_SETTINGS]
    if header["processes"] != processes:
        different.insert(0, f"processes ({header['processes']} and {processes})")
    if different:
        raise ValueError(f"{path} was measured with different {', '.join(different)}")
    measured = {row["measure"]: row["value"] for row in rows}
    lines = [f"  {'':36s} {'predicted':>12s} {'measured':>12s}     difference"]
    for name, unit, predicted, value in _pairs(prediction, measured):
        if value:
            difference = f"{100 * (predicted / value - 1):+6.1f} %"
        else:
            difference = "none sent" if predicted == 0 else "some predicted"
        lines.append(f"  {name:36s} {predicted:12.5g} {value:12.5g} {unit:3s} {difference}")
    return "\n".join(lines)


def _pairs(prediction: Prediction, measured: dict[str, float]) -> Iterator[tuple[str, str, float, float]]:
    """Yield name, unit, predicted value and measured value."""
    yield "memory of a device", "MiB", prediction.total_memory / _MIB, measured["peak memory of a device"]
    yield "sent by a device in a step", "MiB", prediction.sent / _MIB, measured["sent by a device"]
    collectives = measured.get("collectives that gather", 0.0) + measured.get("collectives that reduce", 0.0)
    if collectives and prediction.messages:  # a single process sends nothing, and older results have no count
        yield "collectives of a step", "", prediction.messages, collectives
    yield "a step", "s", prediction.step_seconds, measured["step, median"]
    computing = sum(
        value
        for name, value in measured.items()
        if name.startswith("part: ") and name.removeprefix("part: ") not in _NOT_COMPUTING
    )
    yield "computing", "s", prediction.computing, computing
    network = measured["part: gather"] + measured["part: reduce"]
    yield "waiting for the network", "s", prediction.seconds["network"], network
    yield "optimizer", "s", prediction.seconds["optimizer"], measured["part: optimizer"]
