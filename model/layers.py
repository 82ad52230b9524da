"""The small layers that the resampler and the gated cross-attention share."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.config import Activation


class Linear(nn.Linear):
    """A projection without bias whose start is drawn on the CPU, in float32.

    So the start depends on the CPU generator alone: not on the device or type of the parameter, nor on whether
    DeepSpeed's ``zero.Init`` is partitioning parameters while they are made. The distribution is ``nn.Linear``'s own.
    """

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features, bias=False)

    def reset_parameters(self) -> None:
        """Uniform in +-1/sqrt(in_features)."""
        bound = 1 / math.sqrt(self.in_features)
        if not self.weight.is_meta:
            with torch.no_grad():
                self.weight.copy_(blank(*self.weight.shape).uniform_(-bound, bound))


def blank(*shape: int) -> Tensor:
    """An uninitialized float32 tensor on the CPU, to draw in. Inside of DeepSpeed's ``zero.Init`` every constructor of
    torch returns the type that the engine computes in, whatever it was asked for: hence the second conversion."""
    return torch.empty(shape, dtype=torch.float32, device="cpu").float()


class FeedForward(nn.Module):
    """LayerNorm, widen, activation, narrow (paper, appendix A.1.1; squared ReLU is from arXiv 2109.08668)."""

    def __init__(self, width: int, multiplier: int, activation: Activation) -> None:
        super().__init__()
        self.activation: Activation = activation
        self.norm = nn.LayerNorm(width)
        self.up = Linear(width, multiplier * width)
        self.down = Linear(multiplier * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """[..., width] -> [..., width]"""
        x = self.up(self.norm(x))
        x = F.relu(x).square() if self.activation == "squared_relu" else F.gelu(x)
        return self.down(x)


def tanh_gate(gate: Tensor, like: Tensor) -> Tensor:
    """tanh of a gate of shape (1,), computed in float32, in the type of ``like``."""
    return torch.tanh(gate.float() if gate.dtype.itemsize < 4 else gate).to(like.dtype)
