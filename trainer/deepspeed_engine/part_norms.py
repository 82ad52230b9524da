"""Measure the gradient of each part of a module, under any stage of ZeRO."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import nn

from trainer.deepspeed_engine.internals import local_gradient


class PartNorms:
    """Sum the squares of each part's gradient on this rank, so that one sum over the ranks gives the norms.

    It reads every gradient once, and has the host wait for the device once a step.

    Args:
        module: Module whose parameters DeepSpeed trains.
        part_of: Returns the part of a parameter by its name.
    """

    def __init__(self, module: nn.Module, part_of: Callable[[str], str]) -> None:
        self._parts: dict[str, list[nn.Parameter]] = {}
        for name, parameter in module.named_parameters():
            if parameter.requires_grad:
                self._parts.setdefault(part_of(name), []).append(parameter)

    def squares(self) -> Mapping[str, float]:
        """Return this rank's sum of squares by part, the same parts in the same order on all ranks."""
        sums = []
        for parameters in self._parts.values():
            parts = [gradient for one in parameters if (gradient := local_gradient(one)) is not None]
            squares = [torch.linalg.vector_norm(gradient, dtype=torch.float64).square() for gradient in parts]
            sums.append(torch.stack(squares).sum() if squares else torch.zeros((), dtype=torch.float64))
        device = next((total.device for total in sums if total.device.type != "cpu"), torch.device("cpu"))
        return dict(zip(self._parts, torch.stack([total.to(device) for total in sums]).tolist(), strict=True))
