"""Fixtures shared by the tests of whole runs."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.distributed.processes import reserved_port
from tests.distributed.small_run import make_assets


@pytest.fixture(scope="module")
def assets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder filled by ``make_assets``. Each module has its own, so its tests may damage it."""
    folder = tmp_path_factory.mktemp("assets")
    make_assets(folder)
    return folder


@pytest.fixture
def port() -> Iterator[int]:
    """Yield a port for the launcher, reserved while the test runs."""
    with reserved_port() as number:
        yield number
