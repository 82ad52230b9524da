"""Have ZeRO-3 gather the parameters of a frozen block together, instead of module by module."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

from deepspeed.utils import set_z3_leaf_module, z3_leaf_module
from torch import nn


@runtime_checkable
class HasBlocks(Protocol):
    """Describe a model that names its blocks."""

    def blocks(self) -> Sequence[nn.Module]:
        """Return modules that use all of their parameters in each call, and whose parameters nothing else reads."""
        ...


def gather_frozen_blocks_together(module: nn.Module) -> list[nn.Module]:
    """Mark the frozen blocks of a model for ZeRO-3, before ``deepspeed.initialize``, and return them.

    DeepSpeed hooks every module otherwise, and its hooks take the host longer than a small module takes a GPU.

    Blocks that train are left out. DeepSpeed reduces all gradients of a marked module when the gradients of its
    positional inputs are there, and takes a gradient that is missing then for zero. A module none of whose inputs needs
    a gradient would train on zeros.
    """
    blocks = module.blocks() if isinstance(module, HasBlocks) else []
    frozen = [block for block in blocks if _is_frozen(block)]
    for block in frozen:
        set_z3_leaf_module(block, True)
    return frozen


def hooked_modules(module: nn.Module) -> list[nn.Module]:
    """Return the modules with parameters that ZeRO-3 gathers one by one."""
    if z3_leaf_module(module):
        return [module]
    own = [module] if any(True for _ in module.parameters(recurse=False)) else []
    return own + [found for child in module.children() for found in hooked_modules(child)]


def _is_frozen(block: nn.Module) -> bool:
    parameters = list(block.parameters())
    return bool(parameters) and not any(parameter.requires_grad for parameter in parameters)
