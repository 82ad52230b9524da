"""Clip the gradients of parts of a module by themselves, under any stage of ZeRO.

DeepSpeed clips the gradient of the whole module to one norm. The paper's image tower is clipped unit by unit and its
text tower to a norm of its own.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
from deepspeed.utils import (
    safe_get_full_fp32_param,
    safe_get_full_grad,
    safe_get_local_grad,
    safe_set_full_grad,
    safe_set_local_grad,
)
from timm.utils.agc import adaptive_clip_grad
from torch import Tensor, nn

from trainer.deepspeed_engine.internals import is_partitioned


@dataclass(frozen=True)
class PartClipping:
    """Say how the gradient of a part is clipped, adaptively first.

    Attributes:
        prefixes: How the names of its parameters begin; "" is every parameter that no earlier part has.
        adaptive: Largest ratio of a unit's gradient norm to its weight norm (Brock et al. 2021); None has no limit.
        norm: Norm of the part's gradient; None does not clip it.
    """

    prefixes: tuple[str, ...]
    adaptive: float | None = None
    norm: float | None = None


class PartClipper:
    """Clip the accumulated gradients of a module.

    Args:
        module: Module whose parameters DeepSpeed trains.
        parts: Parts, each parameter belonging to the first whose prefix it has.
    """

    def __init__(self, module: nn.Module, parts: Sequence[PartClipping]) -> None:
        self._parts: list[tuple[PartClipping, list[nn.Parameter]]] = [(part, []) for part in parts]
        for name, parameter in module.named_parameters():
            if parameter.requires_grad:
                for part, parameters in self._parts:
                    if name.startswith(part.prefixes):
                        parameters.append(parameter)
                        break

    def clip(self) -> float:
        """Clip, and return the norm of the gradient before; a collective."""
        squares: list[Tensor] = []
        for part, parameters in self._parts:
            squares += [gradient.square().sum() for gradient in self._clip_part(part, parameters)]
        return float(torch.stack(squares).sum().sqrt())

    def _clip_part(self, part: PartClipping, parameters: list[nn.Parameter]) -> Iterator[Tensor]:
        """Yield each gradient as it was, then clip it; one whole gradient is in memory at a time."""
        clipped: list[Tensor] = []
        for parameter in parameters:
            gradient = safe_get_full_grad(parameter)
            if gradient is None:
                continue
            yield gradient.float()
            if part.adaptive is not None:
                gradient = adaptively_clipped(gradient.clone(), safe_get_full_fp32_param(parameter), part.adaptive)
                _set_gradient(parameter, gradient)
            clipped.append(gradient.float().square().sum())
        if part.norm is None or not clipped:
            return
        norm = torch.stack(clipped).sum().sqrt()
        if norm > part.norm:
            for parameter in parameters:
                _scale_gradient(parameter, part.norm / (norm + 1e-6))  # as torch.nn.utils.clip_grad_norm_


def _set_gradient(parameter: nn.Parameter, gradient: Tensor) -> None:
    if not is_partitioned(parameter):
        safe_set_full_grad(parameter, gradient)
        return
    # DeepSpeed's function for whole gradients fails where the ranks do not divide the elements of a parameter.
    size, rank = safe_get_local_grad(parameter).numel(), dist.get_rank()
    own = gradient.flatten()[size * rank : size * (rank + 1)]
    safe_set_local_grad(parameter, F.pad(own, (0, size - own.numel())))


def _scale_gradient(parameter: nn.Parameter, factor: Tensor) -> None:
    if is_partitioned(parameter):
        safe_set_local_grad(parameter, safe_get_local_grad(parameter) * factor)
    elif (gradient := safe_get_full_grad(parameter)) is not None:
        safe_set_full_grad(parameter, gradient * factor)


def adaptively_clipped(gradient: Tensor, weight: Tensor, factor: float) -> Tensor:
    """Return a gradient clipped by timm's adaptive gradient clipping."""
    holder = nn.Parameter(weight.detach().to(gradient.dtype), requires_grad=True)
    holder.grad = gradient
    adaptive_clip_grad([holder], clip_factor=factor)
    return holder.grad
