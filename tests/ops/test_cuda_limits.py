"""Check on which cards the CUDA kernels are offered, with cards that are not here."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from model.ops import cuda_limits, dispatch, library, self_check
from model.ops.cuda_limits import Card, obstacle, shared_bytes

A100 = Card("A100", (8, 0), 163 * 1024)
RTX_3090 = Card("RTX 3090", (8, 6), 99 * 1024)
RTX_4090 = Card("RTX 4090", (8, 9), 99 * 1024)
H100 = Card("H100", (9, 0), 227 * 1024)
B200 = Card("B200", (10, 0), 227 * 1024)
RTX_5090 = Card("RTX 5090", (12, 0), 99 * 1024)
T4 = Card("T4", (7, 5), 64 * 1024)
DEFAULT = ("8.0+PTX", "9.0a")


@pytest.mark.parametrize("card", [A100, RTX_3090, RTX_4090, H100, B200, RTX_5090], ids=lambda card: card.name)
def test_head_dim_64_runs_on_every_card_since_ampere(card: Card) -> None:
    assert obstacle(card, 64, DEFAULT) is None


@pytest.mark.parametrize("head_dim", [96, 128])
def test_cards_whose_shared_memory_holds_only_the_forward_get_no_kernels(head_dim: int) -> None:
    for card in (A100, H100, B200):
        assert obstacle(card, head_dim, DEFAULT) is None, card
    for card in (RTX_3090, RTX_4090, RTX_5090):
        message = obstacle(card, head_dim, DEFAULT)
        assert message is not None and "112 KB" in message and card.name in message and "has 99" in message


def test_cards_without_code_are_named() -> None:
    assert "older" in (obstacle(T4, 64, DEFAULT) or "")
    for card in (B200, RTX_5090):
        message = obstacle(card, 64, ("8.0", "9.0a"))
        assert message is not None and "built for 8.0 9.0a" in message and "TORCH_CUDA_ARCH_LIST" in message
    assert obstacle(RTX_4090, 64, ("8.0",)) is None, "machine code runs on later minor versions"
    assert obstacle(A100, 64, ("8.6",)) is not None
    assert obstacle(B200, 64, ("9.0a",)) is not None
    assert obstacle(A100, 64, ()) is not None


def test_the_shared_memory_is_that_of_the_source() -> None:
    source = Path(__file__).parents[2] / "csrc" / "cuda"
    backward, tile = (source / name for name in ("attention_backward.cuh", "tile.cuh"))
    if not backward.exists():
        pytest.skip("csrc is not part of this tree")
    assert (
        "(6 * Tile<kWidth>::kSize + 2 * Tile<64>::kSize) * static_cast<int>(sizeof(uint16_t))" in backward.read_text()
    )
    assert re.search(r"kPitch = kWidth == 96 \? 128 : kWidth", tile.read_text())
    assert [shared_bytes(head_dim) for head_dim in cuda_limits.HEAD_DIMS] == [65_536, 114_688, 114_688]


@pytest.fixture
def two_cards(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the process have an A100 as device 0 and an RTX 4090 as device 1, and CUDA kernels."""
    cards = [A100, RTX_4090]
    monkeypatch.setattr(cuda_limits, "card", lambda index: cards[index])
    monkeypatch.setattr(library, "load_errors", lambda: {"cpu": None, "cuda": None})
    monkeypatch.setattr(library, "cuda_architectures", lambda: DEFAULT)
    monkeypatch.setattr(self_check, "disagreement", lambda device, dtype, head_dim: None)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)


@pytest.mark.usefixtures("two_cards")
def test_each_card_of_a_machine_is_judged_by_itself() -> None:
    def reason(index: int | None, head_dim: int) -> str | None:
        return dispatch.why_not_fused("cuda", index, torch.bfloat16, head_dim)

    assert reason(0, 128) is None
    assert "RTX 4090" in (reason(1, 128) or "")
    assert reason(None, 128) == reason(1, 128), "no number means the current card"
    assert reason(1, 64) is None


@pytest.mark.usefixtures("two_cards")
def test_the_doctor_says_which_card_runs_what(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "cpu_instruction_set", lambda: "generic")
    rows = {row.backend: row for row in dispatch.status() if row.op == "masked_cross_attention"}
    assert rows["fused on cuda:0"].available and "64, 96, 128" in rows["fused on cuda:0"].reason
    assert (
        rows["fused on cuda:1"].available and "head_dim 64; head_dim 96 needs 112 KB" in rows["fused on cuda:1"].reason
    )
