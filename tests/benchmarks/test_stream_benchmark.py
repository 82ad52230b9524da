"""``trainer.benchmark stream``: the rows that it makes of what steps measured, and a real run of two sizes."""

from __future__ import annotations

import ctypes.util

import pytest

from trainer.benchmark import __main__ as benchmark
from trainer.benchmark import stream
from trainer.benchmark.result_file import Measurement


def steps(growth_mib: float, seconds: float) -> stream.StepMeasured:
    """Return measured steps of which each block takes some MiB, and one from a drive some seconds."""

    def measured(blocks: int, rows: int, *, on_drive: bool) -> dict[str, float]:
        memory = 1000.0 + blocks * (growth_mib if on_drive else 50.0)
        return {
            "peak memory of a device": memory,
            "peak memory of a process": memory + 1000,
            "parameters": blocks * 2.0**20,
            "step, median": seconds if on_drive else 2.0,
            "read from drives": 512.0 if on_drive else 0.0,
        }

    return measured


def rows(growth_mib: float, seconds: float, mib_per_second: float) -> dict[tuple[str, str, str | None], Measurement]:
    found = stream.compare(steps(growth_mib, seconds), mib_per_second * 2**20)
    return {(row.case, row.measure, row.baseline): row for row in found}


def test_memory_may_grow_by_two_percent() -> None:
    for growth, met in ((0.3, True), (0.5, False)):
        found = rows(growth, seconds=2.1, mib_per_second=512)
        row = found["64 blocks on a drive", "peak memory of a device", "8 blocks on a drive"]
        assert row.met is met
        assert found["64 blocks on a drive", "peak memory of a process", "8 blocks on a drive"].met is None
        assert found["64 blocks on a drive", "weights", None].value == 128
        assert found["64 blocks on the host", "peak memory of a device", "8 blocks on a drive"].value == 4200


@pytest.mark.parametrize(
    ("mib_per_second", "longer", "other"),
    [(512, "its computation", "its reads"), (128, "its reads", "its computation")],
)
def test_a_step_may_take_a_tenth_more_than_the_longer_of_computation_and_reads(
    mib_per_second: float, longer: str, other: str
) -> None:
    bound = 2.0 if longer == "its computation" else 4.0
    for seconds, met in ((1.09 * bound, True), (1.11 * bound, False)):
        found = rows(0.0, seconds, mib_per_second)
        assert found["16 blocks on a drive", "step", longer].met is met
        assert found["16 blocks on a drive", "step", other].met is None


def test_a_machine_without_libaio_is_told_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(ctypes.util, "find_library", lambda name: None)
    assert benchmark.main(["stream", "--device", "cpu"]) == 2
    assert "apt install libaio-dev" in capsys.readouterr().err
