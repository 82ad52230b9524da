"""Provide the small layers that the resampler and the gated cross-attention share."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.config import Activation, Norm


class Linear(nn.Linear):
    """Project without bias, from a start that is drawn on the CPU in float32.

    The start depends on the CPU generator alone: not on the parameter's device or type, nor on whether DeepSpeed's
    ``zero.Init`` partitions parameters as they are made. The distribution is that of ``nn.Linear``.
    """

    def __init__(self, in_features: int, out_features: int) -> None:
        """Build a projection of ``in_features`` numbers to ``out_features``."""
        super().__init__(in_features, out_features, bias=False)

    def reset_parameters(self) -> None:
        """Draw the weights uniformly from +-1/sqrt(in_features)."""
        bound = 1 / math.sqrt(self.in_features)
        if not self.weight.is_meta:
            with torch.no_grad():
                self.weight.copy_(empty_for_drawing(*self.weight.shape).uniform_(-bound, bound))


def empty_for_drawing(*shape: int) -> Tensor:
    """Return an uninitialized float32 tensor on the CPU, to draw random numbers in.

    Inside DeepSpeed's ``zero.Init`` every constructor of torch returns the type that the engine computes in, whatever
    type was asked for. The second conversion undoes that.
    """
    return torch.empty(shape, dtype=torch.float32, device="cpu").float()


def build_norm(kind: Norm, dim: int, eps: float = 1e-5) -> nn.Module:
    """Return a LayerNorm or an RMSNorm of the last dimension."""
    return nn.LayerNorm(dim, eps) if kind == "layer_norm" else nn.RMSNorm(dim, eps)


def build_head_norm(kind: Norm | None, head_dim: int, eps: float = 1e-5) -> nn.Module:
    """Return a norm of each head, or none."""
    return nn.Identity() if kind is None else build_norm(kind, head_dim, eps)


class FeedForward(nn.Module):
    """Apply a norm, a wide projection, an activation and a narrow projection (paper, appendix A.1.1).

    Squared ReLU is from arXiv 2109.08668, SwiGLU from arXiv 2002.05202.
    """

    def __init__(
        self, dim: int, hidden_dim: int, activation: Activation, norm: Norm = "layer_norm", eps: float = 1e-5
    ) -> None:
        """Build a feed-forward for inputs of ``dim`` with ``hidden_dim`` hidden units."""
        super().__init__()
        self.activation: Activation = activation
        self.norm = build_norm(norm, dim, eps)
        self.up = Linear(dim, hidden_dim)
        self.down = Linear(hidden_dim, dim)
        if activation == "swiglu":
            self.gate = Linear(dim, hidden_dim)

    def forward(self, x: Tensor) -> Tensor:
        """Return a tensor of the input's shape, [..., dim]."""
        x = self.norm(x)
        if self.activation == "swiglu":
            return self.down(F.silu(self.gate(x)) * self.up(x))
        return self.down(_activate(self.up(x), self.activation))


def _activate(x: Tensor, activation: Activation) -> Tensor:
    if activation == "gelu":
        return F.gelu(x)
    return F.relu(x).square() if activation == "squared_relu" else F.relu(x)


def tanh_gate(gate: Tensor, like: Tensor) -> Tensor:
    """Return tanh of a gate, computed in float32 or wider, in the type of ``like``."""
    return torch.tanh(gate.float() if gate.dtype.itemsize < 4 else gate).to(like.dtype)
