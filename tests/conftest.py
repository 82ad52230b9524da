"""What holds for all tests: nothing is downloaded, GPU tests wait for a GPU, several processes come last."""

from __future__ import annotations

import os

import pytest

# A test that reaches for the hub is a test that fails on a machine without network.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("WANDB_MODE", "disabled")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


def pytest_addoption(parser: pytest.Parser) -> None:
    """``--kills``: how often the stress test of checkpoints kills a process (5 in CI, 100 for a release)."""
    parser.addoption("--kills", type=int, default=5)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip ``gpu`` tests without a GPU, and put ``distributed`` ones after all others."""
    gpu = [item for item in items if item.get_closest_marker("gpu")]
    if gpu:
        import torch

        if not torch.cuda.is_available():
            for item in gpu:
                item.add_marker(pytest.mark.skip(reason="no CUDA device"))
    items.sort(key=lambda item: item.get_closest_marker("distributed") is not None)
