"""Reach into the internals of torch and transformers; no other file of ``model`` does.

Every name says why it is needed and which upstream issue would make it unnecessary. All were checked with torch 2.15.0
and transformers 5.23.0. ``tests/model/test_internals.py`` fails when one disappears or behaves differently.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor

# Reason: fake tensors count memory without computing, and some code must recognize them; a dispatch mode sees every op.
# torch documents all three and exports them from private modules only.
# Upstream issue: pytorch #173671 proposed a public module for fake tensors; none found for dispatch modes.
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import masking_utils

__all__ = [
    "FakeTensor",
    "FakeTensorMode",
    "TorchDispatchMode",
    "attention_implementation",
    "disable_autocast_key",
    "known_packing",
    "list_tensors",
    "storage_id",
    "takes_document_offsets",
    "tensor_version",
]


def storage_id(tensor: Tensor) -> int:
    """Return a number that all views of a storage share.

    Reason: fake tensors have no data address, so ``untyped_storage().data_ptr()`` cannot tell them apart.
    Upstream issue: none found.
    """
    return int(tensor.untyped_storage()._cdata)


def tensor_version(tensor: Tensor) -> int:
    """Return how often a tensor was changed in place; a tensor that is made in inference mode does not count.

    Reason: a result that is kept must be made anew when what it was made of changes.
    Upstream issue: none found.
    """
    return 0 if tensor.is_inference() else tensor._version


def list_tensors(tree: Any) -> list[Tensor]:
    """Return the tensors in nested lists, tuples and dicts, in torch's own order.

    Reason: a dispatch mode must find the tensors in the arguments and results of any op.
    Upstream issue: pytorch #65761 asks for a public module.
    """
    return [leaf for leaf in torch.utils._pytree.tree_leaves(tree) if isinstance(leaf, Tensor)]


def disable_autocast_key(device_type: str) -> AbstractContextManager[Any]:
    """Skip the autocast implementation of an op inside this context.

    Reason: an autocast implementation has to call its own op. ``torch.library.register_autocast`` does so with the same
    guard, but casts to one fixed type instead of the type that autocast has now.
    Upstream issue: none found; pytorch #145588 added ``register_autocast``.
    """
    key = getattr(torch._C.DispatchKey, f"Autocast{device_type.upper()}")
    guard: AbstractContextManager[Any] = torch._C._ExcludeDispatchKeyGuard(torch._C.DispatchKeySet(key))
    return guard


def attention_implementation(config: Any) -> str | None:
    """Return the attention that a transformers model computes with ("sdpa", "eager", ...).

    Reason: transformers takes the choice as an argument, and has no public name to read it.
    Upstream issue: none found.
    """
    name: str | None = config._attn_implementation
    return name


def takes_document_offsets(config: Any) -> bool:
    """Return whether the attention of a transformers model is FlashAttention, which takes offsets and no mask.

    Reason: as for ``attention_implementation``; the names are those of the package and of its builds on the Hub.
    Upstream issue: none found.
    """
    return "flash" in (attention_implementation(config) or "")


@contextmanager
def known_packing(is_packed: bool) -> Iterator[None]:
    """Tell transformers whether rows hold packed documents, so that it does not look for them.

    Reason: ``find_packed_sequence_indices`` reads a value of the positions, for which the host waits for a GPU in every
    forward without an attention mask. The caller knows the answer.
    Upstream issue: none found.
    """
    original = masking_utils.find_packed_sequence_indices
    masking_utils.find_packed_sequence_indices = _number_documents if is_packed else _no_documents
    try:
        yield
    finally:
        masking_utils.find_packed_sequence_indices = original


def _no_documents(position_ids: Tensor) -> None:
    return None


def _number_documents(position_ids: Tensor) -> Tensor:
    """Return the number of each token's document in its row, as transformers numbers them."""
    breaks = torch.diff(position_ids, prepend=position_ids[:, :1] - 1, dim=-1) != 1
    return breaks.cumsum(-1)
