"""Read how far the gates of a model are open."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from model.flamingo import Flamingo
from model.layers import tanh_gate


@dataclass(frozen=True)
class LayerGates:
    """Hold the gates of one cross-attention layer; 0 is shut, 1 or -1 is wide open.

    Attributes:
        block: Block of the language model that follows, counted from 0.
        attention: tanh of the gate of the cross-attention, or the mean size of its entries; None without a gate.
        feed_forward: The same of its feed-forward layer.
    """

    block: int
    attention: float | None
    feed_forward: float | None


def gates_of(model: Flamingo) -> list[LayerGates]:
    """Return the gates of all layers with cross-attention, the first layer first."""
    return [
        LayerGates(index, _openness(block.attention_gate), _openness(block.feed_forward_gate))
        for index, block in sorted(model.blocks_with_cross_attention().items())
    ]


@torch.no_grad()
def _openness(gate: torch.nn.Parameter | None) -> float | None:
    if gate is None:
        return None
    value = tanh_gate(gate, gate.float())
    return float(value if value.numel() == 1 else value.abs().mean())
