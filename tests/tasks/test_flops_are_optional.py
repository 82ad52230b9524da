"""Check that a language model whose FLOPs cannot be counted trains all the same."""

from __future__ import annotations

import pytest

from model.flops import UsefulFlops
from tests.model.builders import tiny_flamingo
from trainer.tasks.flamingo import count_sizes


def test_training_goes_on_without_a_count(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    model = tiny_flamingo()
    assert count_sizes(model) == UsefulFlops.of(model)
    monkeypatch.setattr(UsefulFlops, "of", lambda model: model.no_such_size)
    assert count_sizes(model) is None
    assert "FLOPs of LlamaForCausalLM are not counted" in caplog.text
