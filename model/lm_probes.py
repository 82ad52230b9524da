"""Probe how a Hugging Face causal language model is built and how it behaves.

So no table of families is needed. Behavior is tried out on a tiny model of the same class and config. No probe reads a
weight of the language model itself, so all of them work while ZeRO-3 has weights partitioned.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from model.tiny_language_model import build_tiny

# Documents; the second follows the first or the other.
_FIRST, _OTHER, _SECOND = [1, 4, 7, 10, 13, 3], [2, 5, 8, 11, 14, 6], [3, 6, 9, 12, 15, 4, 7]
# Rounding changes the logits by a millionth of their size; a visible document changes them by more than a hundredth.
_MOST_DIFFERENCE = 1e-3
_CPU = torch.device("cpu")  # the caller may be building its model on the meta device, where a probe has no values


@dataclass(frozen=True)
class Behavior:
    """Say how a causal LM treats what it is given.

    Attributes:
        gives_logits_unchanged: Whether it returns the output of its output embedding without scaling or capping it.
        token_tables: Names of the embeddings beside the input embedding that are looked up by token id.
    """

    gives_logits_unchanged: bool = False
    token_tables: tuple[str, ...] = ()


def find_decoder_blocks(lm: Any) -> nn.ModuleList:
    """Return the decoder blocks of a causal LM: its outermost list that is as long as the config says.

    Raises:
        ValueError: The LM has no such list, or several.
    """
    count = lm.config.get_text_config().num_hidden_layers
    found: dict[str, nn.ModuleList] = {}
    for name, module in lm.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == count:
            if not any(name.startswith(outer + ".") for outer in found):
                found[name] = module
    if len(found) != 1:
        raise ValueError(
            f"{type(lm).__name__} has {len(found)} lists of {count} blocks ({', '.join(found) or 'none'}), but one was "
            "expected: choose another language_model"
        )
    return next(iter(found.values()))


class _Record:
    """Run a tiny LM once, and record what its embeddings, blocks and output embedding were given."""

    def __init__(self, tiny: Any, input_ids: Tensor) -> None:
        self.tables: list[str] = []
        self.hidden: dict[int, Any] = {}  # by block; None where the hidden states were not found
        self.head_input: Tensor | None = None
        self._head_output = self._head_values = torch.empty(0)
        self._input_ids = input_ids
        embedding, head = tiny.get_input_embeddings(), tiny.get_output_embeddings()
        for name, module in tiny.named_modules():
            if isinstance(module, nn.Embedding) and module is not embedding:
                module.register_forward_pre_hook(lambda _, args, name=name: self._look_up(name, args))
        for index, block in enumerate(find_decoder_blocks(tiny)):
            block.register_forward_pre_hook(
                lambda _, args, kwargs, index=index: self._enter(index, args, kwargs), with_kwargs=True
            )
        head.register_forward_hook(lambda _, args, output: self._leave(args, output))
        logits = tiny(input_ids=input_ids, use_cache=False).logits
        self.gives_logits_unchanged = logits is self._head_output and torch.equal(logits, self._head_values)

    def _look_up(self, name: str, args: tuple[Any, ...]) -> None:
        if args and args[0].shape == self._input_ids.shape and torch.equal(args[0], self._input_ids):
            self.tables.append(name)

    def _enter(self, index: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.hidden[index] = args[0] if args else kwargs.get("hidden_states")

    def _leave(self, args: tuple[Any, ...], output: Tensor) -> None:
        self.head_input, self._head_output, self._head_values = args[0], output, output.clone()


@torch.no_grad()
def probe_behavior(lm: Any) -> Behavior:
    """Try out whether a causal LM can be used, and how it treats what it is given.

    Where no tiny model can be built or run, nothing is known: the first forward of the LM itself raises then.

    Raises:
        ValueError: The LM does not pass hidden states [B, L, D] from block to block, or does not call its blocks or its
            output embedding as modules.
    """
    try:
        tiny = build_tiny(lm)
        with _CPU:
            record = _Record(tiny, _fit_vocabulary(tiny, [_FIRST, _OTHER]))
    except Exception:  # noqa: BLE001  a family's own code may fail in any way
        return Behavior()
    dim = tiny.config.get_text_config().hidden_size
    for index in range(len(find_decoder_blocks(tiny))):
        check_hidden(lm, record.hidden.get(index), dim)
    if not _is_hidden(record.head_input):
        raise ValueError(_unusable(lm, "does not call its output embedding as a module on the hidden states of a row"))
    return Behavior(record.gives_logits_unchanged, tuple(record.tables))


def check_hidden(lm: Any, hidden: Any, dim: int) -> None:
    """Check what a decoder block gets as hidden states.

    Raises:
        ValueError: They are not one tensor [B, L, ``dim``].
    """
    if not isinstance(hidden, Tensor):
        raise ValueError(_unusable(lm, "does not call its decoder blocks as modules with hidden states"))
    if not _is_hidden(hidden):
        raise ValueError(
            _unusable(
                lm, f"passes hidden states of {hidden.ndim} dimensions between its blocks (several streams), not 3"
            )
        )
    if hidden.shape[-1] != dim:
        raise ValueError(_unusable(lm, f"passes hidden states of {hidden.shape[-1]} numbers, not hidden_size {dim}"))


def _is_hidden(value: Any) -> bool:
    return isinstance(value, Tensor) and value.ndim == 3


def _unusable(lm: Any, reason: str) -> str:
    return f"{type(lm).__name__} {reason}, so no cross-attention fits between them: choose another language_model"


@torch.no_grad()
def separates_packed_documents(lm: Any) -> bool:
    """Return whether a causal LM keeps packed documents apart when it gets only positions that restart.

    Many families derive their attention mask from the positions. Others do not (OPT, BLOOM), and state-space layers
    carry their state on. A tiny model reads two packed documents: the second must get the same logits when the first
    changes, and when it stands alone.

    Raises:
        ValueError: No such tiny model can be built or run, so nothing is known about this LM.
    """
    try:
        tiny = build_tiny(lm)
        together = _run(tiny, [_FIRST + _SECOND, _OTHER + _SECOND], [len(_FIRST), len(_SECOND)])
        alone = _run(tiny, [_SECOND], [len(_SECOND)])
        difference = (together[:, len(_FIRST) :] - alone).abs().max() / alone.abs().max()
        return bool(difference <= _MOST_DIFFERENCE)
    except Exception as error:  # a family's own code may fail in any way
        raise ValueError(
            f"{type(lm).__name__} cannot be probed for packed documents ({type(error).__name__}: {error}): set packing "
            "to false, or use another language model"
        ) from error


@torch.no_grad()
def takes_rows_beyond_positions(lm: Any) -> bool:
    """Return whether a causal LM takes rows longer than the positions of its config, as rotary ones do.

    Where no tiny model can be built, nothing is known, and the answer is yes.
    """
    few = 8
    try:
        tiny = build_tiny(lm, max_position_embeddings=few)
        _run(tiny, [_SECOND[:few]], [few - 1])
    except Exception:  # noqa: BLE001  a family's own code may fail in any way
        return True
    try:
        _run(tiny, [_FIRST + _SECOND + _OTHER], [len(_FIRST + _SECOND + _OTHER)])
    except (IndexError, RuntimeError, ValueError):
        return False
    return True


def _run(tiny: Any, rows: list[list[int]], lengths: list[int]) -> Tensor:
    """Return the logits of rows that pack documents of these lengths."""
    with _CPU:
        input_ids = _fit_vocabulary(tiny, rows)
        positions = torch.cat([torch.arange(length) for length in lengths]).expand_as(input_ids)
        logits: Tensor = tiny(input_ids=input_ids, position_ids=positions, use_cache=False).logits
    return logits


def _fit_vocabulary(tiny: Any, rows: list[list[int]]) -> Tensor:
    return torch.tensor(rows) % tiny.get_input_embeddings().weight.shape[0]
