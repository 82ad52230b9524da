"""The projection ``input @ weight.T + bias`` while ZeRO-3 partitions parameters.

torch's own would keep the gathered weight alive until the backward. DeepSpeed therefore puts a function in its place
that keeps the parameter, which is partitioned in between and gathered again. But it keeps the input too, which is
needed for nothing but the weight's gradient: of a frozen language model that is most of what a forward would leave.
"""

from __future__ import annotations

from typing import Any

from deepspeed.runtime.zero import partition_parameters
from deepspeed.runtime.zero.linear import LinearFunctionForZeroStage3
from torch import Tensor


class _Linear(LinearFunctionForZeroStage3):
    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor | None], output: Tensor) -> None:
        """What DeepSpeed keeps, but for the input of a frozen weight."""
        LinearFunctionForZeroStage3.setup_context(ctx, inputs, output)
        _, weight, bias = inputs
        if not ctx.needs_input_grad[1]:
            ctx.save_for_backward(None, weight, bias)


def partitioned_linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:  # noqa: A002
    """As ``torch.nn.functional.linear``, with its names: input [..., I], weight [O, I], bias [O]; returns [..., O]."""
    output: Tensor = _Linear.apply(input, weight, bias)
    return output


def install() -> None:
    """Have DeepSpeed use it when it next replaces torch's, with the first model that it partitions."""
    partition_parameters.zero3_linear_wrap = partitioned_linear
