"""Rules for all tests: no downloads, no GPU tests without a GPU, tests with several processes last or apart."""

from __future__ import annotations

import os

import pytest

# With these, a test that wants to download fails at once.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("WANDB_MODE", "disabled")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add ``--kills``, ``--long`` and ``--part``."""
    parser.addoption("--kills", type=int, default=5, help="kills in the stress test of checkpoints (100 for a release)")
    parser.addoption("--long", action="store_true", help="also run the tests marked long, as for a release")
    choices = ("all", "single", "distributed")
    parser.addoption("--part", choices=choices, default="all", help="tests of one process, or of several")


@pytest.hookimpl(tryfirst=True)  # before pytest selects by markers
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Skip ``gpu`` tests without a GPU; leave ``long`` tests and the other part out; put ``distributed`` tests last."""
    part, with_long = config.getoption("--part"), config.getoption("--long")
    left_out = [item for item in items if _is_left_out(item, part, with_long)]
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in set(left_out)]
    gpu = [item for item in items if item.get_closest_marker("gpu")]
    if gpu:
        import torch

        if not torch.cuda.is_available():
            for item in gpu:
                item.add_marker(pytest.mark.skip(reason="no CUDA device"))
    for item in items:
        if item.get_closest_marker("distributed") and not item.get_closest_marker("smoke"):
            item.add_marker(pytest.mark.slow)
    items.sort(key=lambda item: item.get_closest_marker("distributed") is not None)


def _is_left_out(item: pytest.Item, part: str, with_long: bool) -> bool:
    if item.get_closest_marker("long") and not with_long:
        return True
    return part != "all" and (part == "distributed") != (item.get_closest_marker("distributed") is not None)
