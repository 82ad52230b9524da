"""Compute ``input @ weight.T + bias`` while ZeRO-3 partitions parameters.

torch's function would keep the gathered weight alive until the backward pass. DeepSpeed therefore replaces it by a
function that keeps only the parameter, which is partitioned in between and gathered again. But that function also keeps
the input, which only the weight's gradient needs. In a frozen language model, such inputs are most of what a forward
pass would leave in memory.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from trainer.deepspeed_engine.internals import Zero3LinearFunction, set_zero3_linear


class _PartitionedLinear(Zero3LinearFunction):
    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor | None], output: Tensor) -> None:
        """Keep the same as DeepSpeed, except for the input of a frozen weight."""
        Zero3LinearFunction.setup_context(ctx, inputs, output)
        _, weight, bias = inputs
        if not ctx.needs_input_grad[1]:
            ctx.save_for_backward(None, weight, bias)


def partitioned_linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:  # noqa: A002
    """Compute ``torch.nn.functional.linear``, with the same argument names.

    Args:
        input: [..., I].
        weight: [O, I].
        bias: [O], or None.

    Returns:
        [..., O].
    """
    output: Tensor = _PartitionedLinear.apply(input, weight, bias)
    return output


def install() -> None:
    """Have DeepSpeed use this function for the first model that it partitions, and from then on."""
    set_zero3_linear(partitioned_linear)
