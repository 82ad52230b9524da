"""Run any Hugging Face causal language model, frozen, with something else before some of its blocks.

Nothing here knows a family of models. Three kinds of modules that every causal LM has are wrapped once, when the object
is built: the decoder blocks, the input embedding and the output embedding. Some LMs look up further tables by token id
(embeddings of their own for each block), which are wrapped too: they have no row for an added token. A wrapper is the
instance's ``forward`` around that of its class, and keeps nothing between calls. The settings of one call travel in a
context variable. Activation checkpointing passes them to the recomputation explicitly, so that it sees the right media
however many forwards ran in between.

Module hooks cannot replace the wrappers. A forward hook does not see the ids as they were before the pre-hook changed
them, and whether Hugging Face's checkpointing surrounds a block's hooks depends on its version.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import GenerationConfig

from model.internals import known_packing, takes_document_offsets
from model.lm_probes import check_hidden, find_decoder_blocks, probe_behavior
from model.lora import adapter_dropouts, adapters_off
from model.loss import head_cross_entropy
from model.media_index import find_documents
from model.parameters import full_shape
from model.quantization import QuantizationError

BeforeBlock = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Call:
    """Hold the settings of one call of the language model.

    Attributes:
        before: Function of the hidden states [B, L, D] to run before a block, by the block's index.
        target_positions: int64 [N], positions in the flattened [B * L] whose logits are wanted; None for all.
        targets: int64 [N], token that each of them should predict, where the loss is wanted instead of the logits.
        document_offsets: ``media_index.find_documents`` of packed rows, with ``longest_document``.
        longest_document: Tokens of the longest packed document.
    """

    before: Mapping[int, BeforeBlock] = field(default_factory=dict)
    target_positions: Tensor | None = None
    targets: Tensor | None = None
    document_offsets: Tensor | None = None
    longest_document: int | None = None


_CALL: ContextVar[Call | None] = ContextVar("flamingo_language_model_call", default=None)
_ALONE: ContextVar[bool] = ContextVar("flamingo_language_model_alone", default=False)


@contextmanager
def calling(call: Call) -> Iterator[None]:
    """Apply ``call`` to the language model inside this context, also in Hugging Face's own ``generate``."""
    token = _CALL.set(call)
    try:
        yield
    finally:
        _CALL.reset(token)


class InputRow(nn.Module):
    """Hold the input embedding of one added token."""

    def __init__(self, token_id: int, start: Tensor, trained: bool) -> None:
        """Start from an embedding [E]; ``trained`` says whether it trains."""
        super().__init__()
        self.token_id = token_id
        self.weight = nn.Parameter(start.detach().clone()[None], requires_grad=trained)

    def forward(self, embedded_BLE: Tensor, input_ids_BL: Tensor) -> Tensor:
        """Return the embedded text with this token's positions overwritten."""
        return torch.where((input_ids_BL == self.token_id)[..., None], self.weight.to(embedded_BLE.dtype), embedded_BLE)


class OutputRow(nn.Module):
    """Hold the output embedding of one added token."""

    def __init__(self, token_id: int, start: Tensor, trained: bool) -> None:
        """Start from an embedding [E]; ``trained`` says whether it trains."""
        super().__init__()
        self.token_id = token_id
        self.weight = nn.Parameter(start.detach().clone()[None], requires_grad=trained)

    def forward(self, dtype: torch.dtype) -> Tensor:
        """Return a copy of the row, [1, E]: ZeRO-3 takes the parameter itself away when this returns."""
        return self.weight.to(dtype, copy=True)


class LanguageModel(nn.Module):
    """Run a frozen causal LM with separate embeddings for added tokens.

    Attributes:
        lm: Hugging Face's model.
        input_rows: Input embeddings of the added tokens.
        output_rows: Output embeddings of the added tokens.
        dim: Dim of the hidden states.
        num_blocks: Number of decoder blocks.
        vocab_size: Columns of the logits.
        checkpointed: Number of blocks, from the first on, that the backward recomputes.
        fuses_loss: Whether a call with targets returns the loss, because the LM leaves its logits unchanged.
        quantization_error: What quantizing the blocks changed; None where they were not.
    """

    def __init__(self, lm: Any, input_rows: list[InputRow], output_rows: list[OutputRow]) -> None:
        """Wrap and freeze ``lm`` in place.

        Args:
            lm: Hugging Face's causal LM.
            input_rows: One for each added token, whose id may lie inside the LM's table or beyond it.
            output_rows: The same tokens in the same order, except those that are never predicted.

        Raises:
            ValueError: The decoder blocks or the output embedding cannot be found, or no cross-attention fits between
                the blocks.
        """
        super().__init__()
        self.lm: Any = lm
        self.input_rows = nn.ModuleList(input_rows)
        self.output_rows = nn.ModuleList(output_rows)
        text_config = lm.config.get_text_config()
        self.dim, self.num_blocks = read_sizes(lm)
        self.checkpointed = 0
        self.quantization_error: QuantizationError | None = None
        self._trains, self._dropouts = False, list[nn.Module]()
        lm.requires_grad_(False)
        self.train(False)
        embedding, head = lm.get_input_embeddings(), lm.get_output_embeddings()
        if head is None:
            raise ValueError(f"{type(lm).__name__} has no output embedding: language_model.name must be a causal LM")
        self.token_ids = [row.token_id for row in input_rows]
        self.output_ids = [row.token_id for row in output_rows]
        self.vocab_size: int = max(table_size(lm), *(1 + token for token in self.output_ids))
        behavior = probe_behavior(lm)
        text_config.vocab_size = self.vocab_size  # some versions' beam search reads the number of columns here
        lm.generation_config = GenerationConfig()  # generate() fills settings left open from the LM's own defaults
        self.fuses_loss: bool = isinstance(head, nn.Linear) and behavior.gives_logits_unchanged
        embedding.forward = partial(self._embed, embedding.forward)
        for name in behavior.token_tables:
            table = lm.get_submodule(name)
            table.forward = partial(self._look_up, table.forward)
        head.forward = partial(self._head, head, head.forward)
        for index, block in enumerate(find_decoder_blocks(lm)):
            block.forward = partial(self._block, block.forward, index)

    def decoder_blocks(self) -> nn.ModuleList:
        """Return the LM's decoder blocks."""
        return find_decoder_blocks(self.lm)

    def train(self, mode: bool = True) -> LanguageModel:
        """Set the mode, except that a frozen LM stays in evaluation mode: it has no dropout."""
        super().train(mode)
        if not self._trains:
            self.lm.eval()
        for dropout in self._dropouts:
            dropout.train(mode)
        return self

    def set_training(self, mode: Literal["frozen", "full", "lora", "from_random"]) -> None:
        """Follow what trains of the LM, which decides its dropout and how the loss is computed.

        Args:
            mode: ``TrainableConfig.language_model``, after ``requires_grad`` of the parameters was set.
        """
        self._trains = mode in ("full", "from_random")
        self._dropouts = adapter_dropouts(self.lm) if mode == "lora" else []
        # The fused loss gives the table of output embeddings no gradient.
        self.fuses_loss = self.fuses_loss and not self._trains
        self.train(self.training)

    def set_activation_checkpointing(self, num_blocks: bool | int = True) -> None:
        """Set how many blocks the backward recomputes, each with the function before it.

        They are the first ones. The backward reaches them last, so their recomputation takes the memory that the kept
        blocks have already freed. Recomputing the last blocks would add to everything that is kept. Hugging Face's own
        checkpointing is no alternative: it runs only in training mode, where dropout would run too.

        Args:
            num_blocks: Number of blocks; True for all, False for none.

        Raises:
            ValueError: The number is negative, or larger than the number of blocks.
        """
        number = num_blocks if not isinstance(num_blocks, bool) else self.num_blocks if num_blocks else 0
        if not 0 <= number <= self.num_blocks:
            raise ValueError(
                f"training.activation_checkpointing {number}: the language model has {self.num_blocks} blocks; "
                f"set a number from 0 to {self.num_blocks}, or true for all"
            )
        self.checkpointed = number

    def forward(
        self,
        input_ids_BL: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        call: Call | None = None,
    ) -> Tensor:
        """Return logits or a loss.

        Args:
            input_ids_BL: int64 [B, L].
            attention_mask: [B, L], 1 for real tokens; not needed where padding comes after them.
            position_ids: [B, L] of rows without an attention mask. They restart at 0 with each packed document;
                documents do not see each other.
            call: Settings of this call.

        Returns:
            Logits [B, L, Z]; with ``call.target_positions`` only theirs, [N, Z]. With ``call.targets``, where this LM
            ``fuses_loss``, the summed cross-entropy, a scalar.
        """
        call = call or Call()
        documents = (position_ids, call.document_offsets, call.longest_document)
        with calling(call):
            logits = run_causal_lm(self.lm, input_ids_BL, attention_mask, *documents)
        if call.target_positions is None or logits.ndim == 0:
            return logits
        shape = (1, call.target_positions.numel())
        assert logits.shape[:2] == shape, "this LM does not call its output embedding as a module"
        return logits[0]

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Leave out cross-attention and adapters in this context; of what trained, the added tokens' rows stay."""
        token = _ALONE.set(True)
        try:
            with adapters_off(self.lm):
                yield
        finally:
            _ALONE.reset(token)

    def own_tokens(self, device: torch.device | str) -> Tensor:
        """Return which columns of the logits the LM has without the added tokens, bool [Z]."""
        is_own_Z = torch.arange(self.vocab_size, device=device) < table_size(self.lm)
        for token in self.output_ids:
            is_own_Z[token] = False
        return is_own_Z

    @torch.no_grad()
    def base_logits(
        self,
        input_ids_BL: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        call: Call | None = None,
    ) -> Tensor:
        """Return the logits of the LM alone: without cross-attention, without adapters, without a gradient.

        Args:
            input_ids_BL: int64 [B, L].
            attention_mask: As for ``forward``.
            position_ids: As for ``forward``.
            call: Settings of a call of ``forward``, of which the positions count.
        """
        with self.alone():
            return self.forward(input_ids_BL, attention_mask, position_ids, replace(call or Call(), targets=None))

    def _embed(self, original: Callable[[Tensor], Tensor], input_ids_BL: Tensor) -> Tensor:
        embedded_BLE = self._look_up(original, input_ids_BL)
        for row in self.input_rows:
            embedded_BLE = row(embedded_BLE, input_ids_BL)
        return embedded_BLE

    def _look_up(self, original: Callable[[Tensor], Tensor], input_ids_BL: Tensor) -> Tensor:
        """Look up token ids in a table, with the row of id 0 for added tokens."""
        known_BL = input_ids_BL
        for token in self.token_ids:
            known_BL = known_BL.masked_fill(known_BL == token, 0)
        return original(known_BL)

    def _head(self, head: nn.Linear, original: Callable[[Tensor], Tensor], hidden_BLE: Tensor) -> Tensor:
        call = _CALL.get()
        rows = [row(hidden_BLE.dtype) for row in self.output_rows]
        if call is None or call.target_positions is None:
            return self._logits(original, hidden_BLE, rows)
        hidden_NE = hidden_BLE.flatten(0, 1)[call.target_positions]
        if call.targets is None or not self.fuses_loss:
            return self._logits(original, hidden_NE[None], rows)
        return head_cross_entropy(hidden_NE, torch.cat(rows), head.weight, head.bias, self.output_ids, call.targets)

    def _logits(self, original: Callable[[Tensor], Tensor], hidden_BLE: Tensor, rows: list[Tensor]) -> Tensor:
        logits_BLZ = original(hidden_BLE)
        columns: dict[int, Tensor] = {
            token: F.linear(hidden_BLE, row) for token, row in zip(self.output_ids, rows, strict=True)
        }
        table_size = logits_BLZ.shape[-1]
        for token, column in columns.items():
            if token < table_size:
                logits_BLZ[..., token : token + 1] = column
        if max(columns, default=-1) >= table_size:
            never = logits_BLZ.new_full((*logits_BLZ.shape[:-1], 1), -torch.inf)
            beyond = [columns.get(i, never) for i in range(table_size, max(columns) + 1)]
            logits_BLZ = torch.cat([logits_BLZ, *beyond], -1)
        return logits_BLZ

    def _block(self, original: Callable[..., Any], index: int, *args: Any, **kwargs: Any) -> Any:
        call = _CALL.get()
        before = None if call is None or _ALONE.get() else call.before.get(index)
        if before is not None:
            check_hidden(self.lm, args[0] if args else kwargs.get("hidden_states"), self.dim)
        if index < self.checkpointed and torch.is_grad_enabled():
            # A frozen block draws no random numbers: it has no dropout. Keeping the generator's state takes time.
            draws = self._trains or bool(self._dropouts)
            return checkpoint(
                _run_block, original, before, *args, use_reentrant=False, preserve_rng_state=draws, **kwargs
            )
        return _run_block(original, before, *args, **kwargs)


def run_causal_lm(
    lm: Any,
    input_ids_BL: Tensor,
    attention_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
    document_offsets: Tensor | None = None,
    longest_document: int | None = None,
) -> Tensor:
    """Return the logits of a Hugging Face causal LM, without waiting for the device where there is no attention mask.

    Hugging Face makes a mask of the positions for all attentions but FlashAttention. That one looks at the positions of
    a single row only, and of several rows at none; it keeps documents apart by their offsets.

    Args:
        lm: Hugging Face's causal LM.
        input_ids_BL: int64 [B, L].
        attention_mask: [B, L], 1 for real tokens.
        position_ids: [B, L] of packed rows.
        document_offsets: ``media_index.find_documents`` of packed rows, with ``longest_document``; None finds them here
            if FlashAttention needs them.
        longest_document: Tokens of the longest packed document.
    """
    inputs: dict[str, Any] = {"attention_mask": attention_mask}
    if position_ids is not None:
        inputs = {"position_ids": position_ids}
        if takes_document_offsets(lm.config):
            if document_offsets is None or longest_document is None:
                document_offsets, longest_document = find_documents(position_ids)
            inputs |= {"cu_seq_lens_q": document_offsets, "cu_seq_lens_k": document_offsets}
            inputs |= {"max_length_q": longest_document, "max_length_k": longest_document}
    with known_packing(position_ids is not None):
        logits: Tensor = lm(input_ids=input_ids_BL, use_cache=False, **inputs).logits
    return logits


def read_sizes(lm: Any) -> tuple[int, int]:
    """Return the dim of the hidden states and the number of blocks of a causal LM.

    Raises:
        ValueError: Its config does not say them.
    """
    text_config = lm.config.get_text_config()
    dim, num_blocks = (getattr(text_config, name, None) for name in ("hidden_size", "num_hidden_layers"))
    if not isinstance(dim, int) or not isinstance(num_blocks, int):
        raise ValueError(
            f"the config of {type(lm).__name__} does not have one hidden_size and one num_hidden_layers: choose "
            "another language_model"
        )
    return dim, num_blocks


def table_size(lm: Any) -> int:
    """Return the number of tokens in the input embedding of a causal LM, also while it is partitioned."""
    return full_shape(lm.get_input_embeddings().weight)[0]


def _run_block(original: Callable[..., Any], before: BeforeBlock | None, *args: Any, **kwargs: Any) -> Any:
    """Run a block after ``before``; families pass the hidden states first, or as ``hidden_states``."""
    if before is not None:
        if args:
            args = (before(args[0]), *args[1:])
        else:
            kwargs = kwargs | {"hidden_states": before(kwargs["hidden_states"])}
    return original(*args, **kwargs)
