"""Provide the compiled libraries to the tests of the ops, or skip with the reason why they are missing."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from model.ops import library
from tests.ops import emulator as emulation


@pytest.fixture(scope="session")
def cpu_library() -> None:
    """Load the CPU kernels."""
    reason = library.load_errors()["cpu"]
    if reason is not None:
        pytest.skip(f"CPU kernels: {reason}")


@pytest.fixture
def instruction_set(request: pytest.FixtureRequest, cpu_library: None) -> Iterator[str]:
    """Select the kernels of one instruction set (an indirect parameter)."""
    before = library.cpu_instruction_set()
    try:
        library.cpu_instruction_set(request.param)
    except RuntimeError as error:
        pytest.skip(str(error).splitlines()[0])
    yield request.param
    library.cpu_instruction_set(before)


@pytest.fixture(scope="session")
def emulator(tmp_path_factory: pytest.TempPathFactory) -> emulation.Emulator:
    """Build the emulator with the CUDA kernels of csrc/."""
    reason = emulation.why_unavailable()
    if reason is not None:
        pytest.skip(reason)
    return emulation.build(Path(tmp_path_factory.mktemp("emulator")))


@pytest.fixture(scope="session")
def group_emulators(tmp_path_factory: pytest.TempPathFactory) -> dict[int, emulation.Emulator]:
    """Build emulators with the kernels of sm_90a in bfloat16, by head_dim: warpgroups multiply their tiles."""
    reason = emulation.why_unavailable()
    if reason is not None:
        pytest.skip(reason)
    folders = {head_dim: tmp_path_factory.mktemp(f"warpgroups_{head_dim}") for head_dim in (64, 96, 128)}
    return {head_dim: emulation.build(folder, only=head_dim, warpgroups=True) for head_dim, folder in folders.items()}
