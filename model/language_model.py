"""Any Hugging Face causal language model, frozen, with something else before some of its blocks.

Nothing here knows a family of models. Three modules that every causal LM has are wrapped, once, when the object is
built: the decoder blocks, the input embedding and the output embedding. Each wrapper is the instance's ``forward``
around the class's own; none keeps anything between calls. What differs from call to call travels in a context
variable, and activation checkpointing hands it to the recomputation explicitly, so that it sees the right media
however many forwards have happened since.

Why ``forward`` and not module hooks: a forward hook does not see the ids before the pre-hook changed them, and whether
Hugging Face's checkpointing surrounds a block's hooks depends on its version. A wrapped ``forward`` surrounds both.

Shape suffixes: B rows, L tokens, D width, E width of the embeddings, V vocabulary, N positions with a label.
"""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import GenerationConfig
from transformers.modeling_outputs import BaseModelOutputWithPast

from model.loss import head_cross_entropy

BeforeBlock = Callable[[Tensor], Tensor]

_ATTENTION_LAYERS = {"full_attention", "sliding_attention", "chunked_attention", "attention"}
# A mask made with the positions as an argument, or from a mapping of arguments that has them.
_MASK_FROM_POSITIONS = re.compile(
    r"(create_\w*mask\w*|mask_function)\([^()]*\bposition_ids\b"
    r'|mask_kwargs = \{[^{}]*"position_ids"'
)


@dataclass(frozen=True)
class Call:
    """What one call of the language model needs besides its arguments.

    before: block index -> what the hidden states [B, L, D] go through before the block.
    positions: int64 [N], positions in the flattened [B * L] whose logits are wanted; None: all.
    targets: int64 [N], the token that each of them should predict, where the loss is wanted instead of the logits.
    """

    before: Mapping[int, BeforeBlock] = field(default_factory=dict)
    positions: Tensor | None = None
    targets: Tensor | None = None


_CALL: ContextVar[Call | None] = ContextVar("flamingo_language_model_call", default=None)


@contextmanager
def calling(call: Call) -> Iterator[None]:
    """The language model sees ``call`` inside of this, also in Hugging Face's own ``generate``."""
    token = _CALL.set(call)
    try:
        yield
    finally:
        _CALL.reset(token)


class InputRow(nn.Module):
    """The input row of one new token."""

    def __init__(self, token_id: int, start: Tensor, trained: bool) -> None:
        super().__init__()
        self.token_id = token_id
        self.weight = nn.Parameter(start.detach().clone()[None], requires_grad=trained)

    def forward(self, embedded_BLE: Tensor, input_ids_BL: Tensor) -> Tensor:
        """Its positions of the embedded text overwritten."""
        return torch.where((input_ids_BL == self.token_id)[..., None], self.weight.to(embedded_BLE.dtype), embedded_BLE)


class OutputRow(nn.Module):
    """The output row of one new token."""

    def __init__(self, token_id: int, start: Tensor, trained: bool) -> None:
        super().__init__()
        self.token_id = token_id
        self.weight = nn.Parameter(start.detach().clone()[None], requires_grad=trained)

    def forward(self, dtype: torch.dtype) -> Tensor:
        """The row, [1, E]: a copy, for ZeRO-3 takes the parameter away when this returns."""
        return self.weight.to(dtype, copy=True)


class LanguageModel(nn.Module):
    """A frozen causal LM with separate rows for new tokens. Submodules: ``lm``, ``input_rows``, ``output_rows``.

    Attributes: ``width`` of the hidden states, ``blocks`` (their number), ``vocabulary`` (columns of the logits),
    ``checkpointed`` (how many of the first blocks the backward recomputes),
    ``fuses_loss``: whether a call with targets gives the loss, for the LM does nothing to its logits.
    """

    def __init__(self, lm: Any, input_rows: list[InputRow], output_rows: list[OutputRow]) -> None:
        """lm: wrapped and frozen in place. Rows: of the same tokens in the same order; their ids may lie inside the
        LM's table or beyond it.

        Raises:
            ValueError: the decoder blocks or the output embedding cannot be found.
        """
        super().__init__()
        self.lm: Any = lm
        self.input_rows = nn.ModuleList(input_rows)
        self.output_rows = nn.ModuleList(output_rows)
        text_config = lm.config.get_text_config()
        self.width: int = text_config.hidden_size
        self.blocks: int = text_config.num_hidden_layers
        self.checkpointed = 0
        lm.requires_grad_(False)
        self.train(False)
        embedding, head = lm.get_input_embeddings(), lm.get_output_embeddings()
        if head is None:
            raise ValueError(f"{type(lm).__name__} has no output embedding: language_model.name must be a causal LM")
        self.table: int = embedding.num_embeddings
        self.token_ids = [row.token_id for row in output_rows]
        self.vocabulary = max(self.table, *(1 + token for token in self.token_ids))
        text_config.vocab_size = self.vocabulary  # beam search of some versions reads the width of the logits there
        lm.generation_config = GenerationConfig()  # generate() would fill what is not set from the LM's own defaults
        self.fuses_loss: bool = isinstance(head, nn.Linear) and gives_logits_unchanged(lm, head)
        embedding.forward = partial(self._embed, embedding.forward)
        head.forward = partial(self._head, head, head.forward)
        for index, block in enumerate(find_decoder_blocks(lm)):
            block.forward = partial(self._block, block.forward, index)

    def decoder_blocks(self) -> nn.ModuleList:
        """The LM's blocks."""
        return find_decoder_blocks(self.lm)

    def train(self, mode: bool = True) -> LanguageModel:
        """The LM stays in evaluation mode: a frozen model has no dropout."""
        super().train(mode)
        self.lm.eval()
        return self

    def activation_checkpointing(self, blocks: bool | int = True) -> None:
        """Recompute all blocks, none, or the first so many, each with what goes before it, in the backward.

        The first, for the backward reaches them last: what it recomputes then takes the place of what the kept blocks
        have already given back. Recomputing the last ones would come on top of everything that is kept. Not Hugging
        Face's own checkpointing: that one runs only in training mode, where dropout would run too.

        Raises:
            ValueError: fewer blocks than none, or more than there are.
        """
        number = blocks if not isinstance(blocks, bool) else self.blocks if blocks else 0
        if not 0 <= number <= self.blocks:
            raise ValueError(
                f"training.activation_checkpointing {number}: the language model has {self.blocks} blocks; "
                f"set a number from 0 to {self.blocks}, or true for all"
            )
        self.checkpointed = number

    def forward(
        self,
        input_ids_BL: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        call: Call | None = None,
    ) -> Tensor:
        """Logits [B, L, V], or [N, V] where ``call.positions`` are given; those of all others never exist. With
        ``call.targets``, where this LM ``fuses_loss``, their summed cross-entropy instead: a scalar.

        attention_mask: [B, L], 1 for real tokens. position_ids: [B, L]; without an attention mask, Hugging Face takes
        positions that restart for packed documents that do not see each other.
        """
        call = call or Call()
        extra = {} if position_ids is None else {"position_ids": position_ids}
        with calling(call):
            output = self.lm(input_ids=input_ids_BL, attention_mask=attention_mask, use_cache=False, **extra)
        logits: Tensor = output.logits
        if call.positions is None or logits.ndim == 0:
            return logits
        assert logits.shape[:2] == (1, call.positions.numel()), "this LM does not call its output embedding as a module"
        return logits[0]

    def _embed(self, original: Callable[[Tensor], Tensor], input_ids_BL: Tensor) -> Tensor:
        known = input_ids_BL
        for token in self.token_ids:
            known = known.masked_fill(known == token, 0)
        embedded = original(known)
        for row in self.input_rows:
            embedded = row(embedded, input_ids_BL)
        return embedded

    def _head(self, head: nn.Linear, original: Callable[[Tensor], Tensor], hidden_BLE: Tensor) -> Tensor:
        call = _CALL.get()
        rows = [row(hidden_BLE.dtype) for row in self.output_rows]
        if call is None or call.positions is None:
            return self._logits(original, hidden_BLE, rows)
        hidden_NE = hidden_BLE.flatten(0, 1)[call.positions]
        if call.targets is None or not self.fuses_loss:
            return self._logits(original, hidden_NE[None], rows)
        return head_cross_entropy(hidden_NE, torch.cat(rows), head.weight, head.bias, self.token_ids, call.targets)

    def _logits(self, original: Callable[[Tensor], Tensor], hidden_BLE: Tensor, rows: list[Tensor]) -> Tensor:
        logits_BLV = original(hidden_BLE)
        columns: dict[int, Tensor] = {
            token: F.linear(hidden_BLE, row) for token, row in zip(self.token_ids, rows, strict=True)
        }
        table = logits_BLV.shape[-1]
        for token, column in columns.items():
            if token < table:
                logits_BLV[..., token : token + 1] = column
        if max(columns, default=-1) >= table:
            nobody = logits_BLV.new_full((*logits_BLV.shape[:-1], 1), -torch.inf)
            beyond = [columns.get(i, nobody) for i in range(table, max(columns) + 1)]
            logits_BLV = torch.cat([logits_BLV, *beyond], -1)
        return logits_BLV

    def _block(self, original: Callable[..., Any], index: int, *args: Any, **kwargs: Any) -> Any:
        call = _CALL.get()
        before = None if call is None else call.before.get(index)
        if index < self.checkpointed and torch.is_grad_enabled():
            # No random numbers are drawn in a block (nothing has dropout), so none need be kept for the recomputation.
            return checkpoint(
                _run_block, original, before, *args, use_reentrant=False, preserve_rng_state=False, **kwargs
            )
        return _run_block(original, before, *args, **kwargs)


def _run_block(original: Callable[..., Any], before: BeforeBlock | None, *args: Any, **kwargs: Any) -> Any:
    """A block with what goes before it; hidden states come first, or as ``hidden_states``."""
    if before is not None:
        if args:
            args = (before(args[0]), *args[1:])
        else:
            kwargs = kwargs | {"hidden_states": before(kwargs["hidden_states"])}
    return original(*args, **kwargs)


class _Decoded(BaseModelOutputWithPast):
    """What a decoder gives; families read different fields of it, and all but the hidden states are None here."""

    def __getattr__(self, name: str) -> None:
        return None


def gives_logits_unchanged(lm: Any, head: Any) -> bool:
    """Whether a causal LM returns what its output embedding gives, with no scaling or soft cap after it.

    Its own forward is run with nothing in it: the decoder gives a hidden state of zeros, the output embedding a token
    that has to come out again. No weight is read, so they may be partitioned.
    """
    device = head.weight.device
    decoder = lm.get_submodule(_decoder_blocks_name(lm).rpartition(".")[0])
    given = torch.zeros(1, 1, 1, device=device)
    hidden = _Decoded(last_hidden_state=torch.zeros(1, 1, head.in_features, device=device))
    decoder.forward, head.forward = lambda *args, **kwargs: hidden, lambda *args: given
    try:
        with torch.no_grad():
            output = lm(input_ids=torch.zeros(1, 1, dtype=torch.int64, device=device), use_cache=False)
    finally:
        del decoder.forward, head.forward
    return output.logits is given


def find_decoder_blocks(lm: Any) -> nn.ModuleList:
    """The list of a causal LM's decoder blocks: the outermost one as long as the config says.

    Raises:
        ValueError: there is none, or there are several.
    """
    blocks: nn.ModuleList = lm.get_submodule(_decoder_blocks_name(lm))
    return blocks


def _decoder_blocks_name(lm: Any) -> str:
    count = lm.config.get_text_config().num_hidden_layers
    found: dict[str, nn.ModuleList] = {}
    for name, module in lm.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == count:
            if not any(name.startswith(outer + ".") for outer in found):
                found[name] = module
    if len(found) != 1:
        raise ValueError(
            f"{type(lm).__name__} has {len(found)} lists of {count} blocks ({', '.join(found) or 'none'}); "
            "one was expected: choose another language_model"
        )
    return next(iter(found))


def separates_packed_documents(lm: Any) -> bool:
    """Whether a causal LM keeps packed documents apart when it is given nothing but positions that restart.

    Hugging Face's masks do that where the family hands them its positions. Some do not (OPT, Falcon, BLOOM, MPT), and
    what is not attention (state-space layers) carries its state on. Neither shows in a signature, so the family's
    source is read; where it cannot be, the answer is no.
    """
    config = lm.config.get_text_config()
    kinds = {*(getattr(config, "layer_types", None) or ()), *(getattr(config, "layers_block_type", None) or ())}
    if not kinds <= _ATTENTION_LAYERS:
        return False
    try:
        source = inspect.getsource(sys.modules[type(lm).__module__])
    except (OSError, TypeError):
        return False
    return bool(_MASK_FROM_POSITIONS.search(source))
