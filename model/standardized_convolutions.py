"""Standardize the weights of a frozen NFNet's convolutions once, instead of in every forward.

An NFNet's convolution (arXiv 2101.08692) standardizes its weight with a call of batch norm in each forward. NFNet-F6
has 345 of them. The results of a frozen tower never change. They are kept beside the weights, which stay as published,
and so do checkpoints, exports and digests.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import ScaledStdConv2d, ScaledStdConv2dSame, StdConv2d, StdConv2dSame, pad_same
from torch import Tensor, nn

from model.internals import tensor_version

STANDARDIZED = (ScaledStdConv2d, ScaledStdConv2dSame, StdConv2d, StdConv2dSame)


@dataclass
class _Kept:
    """Hold a standardized weight, and what it was made of.

    Attributes:
        made_of: Parameters.
        versions: Type, device and number of changes of each parameter when the weight was made.
        weight: Standardized weight.
    """

    made_of: tuple[Tensor, ...] = ()
    versions: tuple[Any, ...] = ()
    weight: Tensor | None = None


def standardize_once(tower: nn.Module) -> int:
    """Let the convolutions of a tower keep their standardized weights while they are frozen.

    Returns:
        Number of the convolutions.
    """
    convolutions = [module for module in tower.modules() if isinstance(module, STANDARDIZED)]
    for convolution in convolutions:
        convolution.forward = partial(_forward, convolution, _Kept())
    return len(convolutions)


def _forward(convolution: Any, kept: _Kept, x: Tensor) -> Tensor:
    parameters = tuple(convolution.parameters(recurse=False))
    if torch.is_grad_enabled() and any(parameter.requires_grad for parameter in parameters):
        return type(convolution).forward(convolution, x)
    # ZeRO-3 partitions parameters and gathers them again, which replaces their data but does not change them.
    versions = tuple((one.dtype, one.device, tensor_version(one)) for one in parameters)
    same = len(kept.made_of) == len(parameters) and all(a is b for a, b in zip(kept.made_of, parameters, strict=True))
    if kept.weight is None or not same or kept.versions != versions:
        kept.made_of, kept.versions = parameters, versions
        kept.weight = _standardize(convolution).contiguous(memory_format=memory_format(x.device))
    if getattr(convolution, "same_pad", False):
        x = pad_same(x, convolution.kernel_size, convolution.stride, convolution.dilation)
    settings = (convolution.stride, convolution.padding, convolution.dilation, convolution.groups)
    return F.conv2d(x, kept.weight, convolution.bias, *settings)


@torch.inference_mode(False)  # a result that is kept may be needed outside inference mode
@torch.no_grad()
def _standardize(convolution: Any) -> Tensor:
    """Return the weight with mean 0 and variance 1 / fan-in in each output channel, times the gain."""
    weight = convolution.weight
    scaled = isinstance(convolution, ScaledStdConv2d | ScaledStdConv2dSame)
    gain = (convolution.gain * convolution.scale).view(-1) if scaled else None
    rows = weight.reshape(1, convolution.out_channels, -1)
    flat = F.batch_norm(rows, None, None, weight=gain, training=True, momentum=0.0, eps=convolution.eps)
    return flat.reshape_as(weight)


def memory_format(device: torch.device) -> torch.memory_format:
    """Return the order of memory that convolutions run in: channels last on a GPU, whose tensor cores need it."""
    return torch.channels_last if device.type == "cuda" else torch.contiguous_format
