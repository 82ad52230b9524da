"""What most tests of whole runs start from."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.distributed.small_run import make_assets


@pytest.fixture(scope="module")
def assets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``make_assets`` in a folder of the module's own, whose tests may damage it."""
    folder = tmp_path_factory.mktemp("assets")
    make_assets(folder)
    return folder
