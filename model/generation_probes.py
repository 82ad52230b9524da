"""Probe whether a causal language model continues the prompts of a batch as it continues each of them alone.

Padding at the left changes the texts of state-space and linear-attention layers, which ignore the mask. Some rotary
embeddings depend on the longest row of a batch (LongRoPE), or on the longest row so far (dynamic NTK). RWKV in
transformers mixes the states of all rows after the first new token.
"""

from __future__ import annotations

import functools
import json
import logging
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig

from model.tiny_language_model import build_tiny

_LONG, _OTHER, _SHORT = [1, 4, 7, 10, 13, 3, 5, 8, 11], [5, 2, 8], [3, 6, 9]
_NEW_TOKENS = 3
_WINDOW = 4  # shorter than the long prompt, so that windows and chunks begin inside of it
# Rounding changes the logits by a millionth of their size; padding that is seen changes them by more than a hundredth.
_MOST_DIFFERENCE = 1e-3
_FAILURES = (ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class BatchBehavior:
    """Say how a causal LM continues a batch.

    Attributes:
        ignores_padding: Whether padding at the left leaves a row's logits as they are.
        ignores_other_positions: Whether a row's logits stay as they are when another row has far positions.
        keeps_rows_apart: Whether rows of one length can be continued together, beams among them.
    """

    ignores_padding: bool
    ignores_other_positions: bool
    keeps_rows_apart: bool

    @property
    def batches_any_lengths(self) -> bool:
        """Whether prompts of different lengths can be continued together."""
        return self.ignores_padding and self.ignores_other_positions and self.keeps_rows_apart


def probe_batches(lm: Any) -> BatchBehavior:
    """Try out how a causal LM continues a batch, on a tiny model of its class and config.

    Where no such model can be built or run, nothing is known, and no prompt should depend on another.
    """
    return _probe(_Probed(lm))


class _Probed:
    """Compare LMs by class and config, on which alone a probe depends."""

    def __init__(self, lm: Any) -> None:
        self.lm = lm
        self._key = (type(lm), json.dumps(lm.config.to_dict(), sort_keys=True, default=str))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Probed) and self._key == other._key

    def __hash__(self) -> int:
        return hash(self._key)


@functools.lru_cache(maxsize=4)
@torch.no_grad()
def _probe(probed: _Probed) -> BatchBehavior:
    settings = {
        name: _WINDOW
        for name in ("sliding_window", "attention_chunk_size")
        if getattr(probed.lm.config.get_text_config(), name, None) is not None
    }
    try:
        tiny = build_tiny(probed.lm, **settings)
        alone = _continue(tiny, [_SHORT])
    except _FAILURES:  # a family's own code may fail in any way
        _log.debug("%s cannot be probed", type(probed.lm).__name__, exc_info=True)
        return BatchBehavior(ignores_padding=False, ignores_other_positions=False, keeps_rows_apart=False)
    try:
        ignores_positions = _ignores_other_positions(tiny)
    except _FAILURES:  # it takes no positions, so padded rows show all there is
        _log.debug("%s cannot be probed with positions", type(probed.lm).__name__, exc_info=True)
        ignores_positions = True
    return BatchBehavior(
        ignores_padding=_is_same_beside(tiny, _LONG, alone),
        ignores_other_positions=ignores_positions,
        keeps_rows_apart=_is_same_beside(tiny, _OTHER, alone),
    )


def _is_same_beside(tiny: Any, other: list[int], alone: Tensor) -> bool:
    """Return whether the short prompt gets its logits also when it is continued together with another one."""
    try:
        return _are_close(_continue(tiny, [other, _SHORT])[1:], alone)
    except _FAILURES:
        return False


def _continue(tiny: Any, prompts: list[list[int]]) -> Tensor:
    """Return the logits of a few new tokens, [prompts, tokens, vocabulary]; all of them are the token 1."""
    size = tiny.get_input_embeddings().weight.shape[0]
    longest = max(map(len, prompts))
    ids = torch.tensor([[0] * (longest - len(prompt)) + [token % size for token in prompt] for prompt in prompts])
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    tiny.generation_config = GenerationConfig()
    settings = GenerationConfig(
        max_new_tokens=_NEW_TOKENS,
        min_new_tokens=_NEW_TOKENS,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
        pad_token_id=0,
        eos_token_id=size,  # never reached
        # The same tokens follow in both runs, also where the two most likely ones are nearly equal.
        suppress_tokens=[token for token in range(size) if token != 1],
    )
    logits: Tensor = torch.stack(tiny.generate(ids, attention_mask=mask, generation_config=settings).logits, 1)
    return logits


def _ignores_other_positions(tiny: Any) -> bool:
    """Compare a row beside near positions with the same row beside positions around the LM's longest row."""
    size = tiny.get_input_embeddings().weight.shape[0]
    ids = torch.tensor([_SHORT, _SHORT]) % size
    near = torch.arange(len(_SHORT)).expand(2, -1)
    expected = tiny(input_ids=ids, position_ids=near, use_cache=False).logits[0]
    most = tiny.config.get_text_config().max_position_embeddings
    for last in (most - 1, 2 * most):  # the last learned position, and beyond, where only computed ones go
        far = near.clone()
        far[1] += last - (len(_SHORT) - 1)
        try:
            found = tiny(input_ids=ids, position_ids=far, use_cache=False).logits[0]
        except IndexError:
            continue
        if not _are_close(found, expected):
            return False
    return True


def _are_close(found: Tensor, expected: Tensor) -> bool:
    return bool((found - expected).abs().max() <= _MOST_DIFFERENCE * expected.abs().max())
