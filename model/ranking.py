"""Rank answers by their log-likelihood after a prompt with media (paper, section 4: close-ended tasks).

A prompt is computed once: its media are encoded, and it fills the language model's cache of keys and values, which is
then repeated for its candidates. Prompts are padded at the left, as in ``model.generation``. A language model that
would see the padding, or keeps another kind of cache, computes every prompt with every candidate from the start.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import DynamicCache

from model.flamingo import Flamingo
from model.gated_cross_attention import KeysValues
from model.generation import apply_cross_attention, group_prompts, pad_left, project_media
from model.generation_checks import check_prompts, explain_missing_positions
from model.generation_probes import probe_batches
from model.language_model import BeforeBlock, Call, calling
from model.media_cache import MediaCache, most_of_all_ranks
from model.seen_media import SeenMedia
from model.tower_patches import Grid


@dataclass(frozen=True)
class Candidate:
    """Hold the log-likelihood of an answer.

    Attributes:
        total: Sum over its tokens, in nats.
        num_tokens: Number of its tokens.
    """

    total: float
    num_tokens: int

    @property
    def per_token(self) -> float:
        """Mean over its tokens; 0 for an empty answer."""
        return self.total / max(1, self.num_tokens)


class _Prompts(NamedTuple):
    """Hold computed prompts: mask [B, G], what their tokens see, keys and values of the media, and the LM's cache."""

    mask: Tensor
    seen: SeenMedia
    projected: dict[int, KeysValues]
    cache: DynamicCache


class _Row(NamedTuple):
    """Name a candidate: its prompt, its place among the prompt's candidates, and its tokens."""

    prompt: int
    place: int
    tokens: Sequence[int]


@torch.no_grad()
def rank(
    model: Flamingo,
    prompts: Sequence[Sequence[int]],
    media: Tensor | None,
    media_per_prompt: Sequence[int],
    candidates: Sequence[Sequence[Sequence[int]]],
    *,
    media_grids: Sequence[Grid] | None = None,
    synced_ranks: bool = False,
    blind: bool = False,
    media_cache: MediaCache | None = None,
    rows_per_forward: int = 64,
) -> list[list[Candidate]]:
    """Return the log-likelihood of each candidate of each prompt; a batch gives what its prompts give one by one.

    Args:
        model: Model in evaluation mode, on the device to compute on.
        prompts: As for ``generation.generate``.
        media: As for ``generation.generate``.
        media_per_prompt: As for ``generation.generate``.
        candidates: Token ids of each candidate of each prompt; prompts may have different numbers of them. An empty
            candidate has the log-likelihood 0.
        media_grids: As for ``generation.generate``.
        synced_ranks: As for ``generation.generate``; ranks may have different numbers of candidates.
        blind: As for ``generation.generate``.
        media_cache: As for ``generation.generate``.
        rows_per_forward: Most candidates that are computed together.

    Returns:
        Candidates of each prompt, in the given order.

    Raises:
        ValueError: A prompt is empty, media and prompts or candidates do not fit each other, or the language model has
            no positions for so many tokens.
    """
    _check_candidates(model, prompts, candidates)
    if blind:
        media, media_grids, media_per_prompt = None, None, [0] * len(prompts)
    num_media = 0 if media is None else len(media if media_grids is None else media_grids)
    check_prompts(model, prompts, num_media, media_per_prompt, blind=blind)
    group_prompts(model, prompts, synced_ranks)  # refuses ranks that would run different modules
    ids, mask, media_index = pad_left(prompts, media_per_prompt, model.tokens.image_id, model.tokens.pad_id, blind)
    ids, mask, media_index = (one.to(model.device) for one in (ids, mask, media_index))
    projected, seen = project_media(model, ids, media_index, media, media_grids, media_cache, synced_ranks)
    longest = max((len(tokens) for row in candidates for tokens in row), default=0)
    rows = [_Row(n, m, tokens) for n, row in enumerate(candidates) for m, tokens in enumerate(row) if tokens]
    totals: dict[tuple[int, int], float] = {}
    with explain_missing_positions(model.language_model.lm, ids.shape[1], longest):
        done = None
        if probe_batches(model.language_model.lm).batches_any_lengths:
            done = _prefill(model, ids, mask, seen, projected)
        if done is None:
            totals = _from_the_start(model, prompts, seen, projected, rows)
        else:
            first_BZ, computed = done
            totals = _with_cache(model, computed, first_BZ, rows, rows_per_forward, synced_ranks)
    return [
        [Candidate(totals.get((n, m), 0.0), len(tokens)) for m, tokens in enumerate(row)]
        for n, row in enumerate(candidates)
    ]


def _check_candidates(
    model: Flamingo, prompts: Sequence[Sequence[int]], candidates: Sequence[Sequence[Sequence[int]]]
) -> None:
    if len(candidates) != len(prompts):
        raise ValueError(f"{len(prompts)} prompts have {len(candidates)} lists of candidates: give one for each")
    for number, row in enumerate(candidates):
        if any(model.tokens.image_id in tokens for tokens in row):
            raise ValueError(f"a candidate of prompt {number} has an <image> token: media belong into the prompt")


def _call(
    model: Flamingo, seen: SeenMedia, projected: dict[int, KeysValues], target_positions: Tensor | None = None
) -> Call:
    before: dict[int, BeforeBlock] = {
        index: partial(apply_cross_attention, block, projected.get(index), seen)
        for index, block in model.blocks_with_cross_attention().items()
    }
    return Call(before, target_positions)


def _prefill(
    model: Flamingo, ids: Tensor, mask: Tensor, seen: SeenMedia, projected: dict[int, KeysValues]
) -> tuple[Tensor, _Prompts] | None:
    """Return log-probabilities of the next token [B, Z] and the computed prompts; None for another kind of cache."""
    number, length = ids.shape
    last_B = torch.arange(1, number + 1, device=ids.device) * length - 1
    with calling(_call(model, seen, projected, last_B)):
        out = model.language_model.lm(
            input_ids=ids, attention_mask=mask, use_cache=True, **_positions(model, mask, length)
        )
    cache = getattr(out, "past_key_values", None)
    if not isinstance(cache, DynamicCache):
        return None
    return out.logits[0].float().log_softmax(-1), _Prompts(mask, seen, projected, cache)


def _positions(model: Flamingo, mask: Tensor, length: int) -> dict[str, Tensor]:
    """Return the positions of the last ``length`` tokens, counted without padding, if the language model takes them."""
    lm: Any = model.language_model.lm
    if "position_ids" not in inspect.signature(lm.forward).parameters:
        return {}
    return {"position_ids": (mask.cumsum(-1) - 1).clamp(min=0)[:, -length:]}


def _with_cache(
    model: Flamingo,
    prompts: _Prompts,
    first_BZ: Tensor,
    rows: Sequence[_Row],
    rows_per_forward: int,
    synced_ranks: bool,
) -> dict[tuple[int, int], float]:
    """Return the log-likelihoods; candidates of one token need no forward beyond that of the prompts."""
    totals = {(row.prompt, row.place): float(first_BZ[row.prompt, row.tokens[0]]) for row in rows}
    longer = sorted((row for row in rows if len(row.tokens) > 1), key=lambda row: len(row.tokens))
    chunks = [longer[start : start + rows_per_forward] for start in range(0, len(longer), rows_per_forward)]
    # Agreed before the first forward, which is a collective too.
    rounds = most_of_all_ranks(len(chunks), model.device) if synced_ranks else len(chunks)
    for chunk in chunks:
        for row, rest in zip(chunk, _continue(model, prompts, chunk), strict=True):
            totals[row.prompt, row.place] += rest
    for _ in range(rounds - len(chunks)):
        _continue(model, prompts, [_Row(0, 0, [model.tokens.pad_id] * 2)])
    return totals


def _continue(model: Flamingo, prompts: _Prompts, rows: Sequence[_Row]) -> list[float]:
    """Return the log-likelihood of each candidate's tokens after its first one."""
    device, longest = prompts.mask.device, max(len(row.tokens) for row in rows) - 1
    index_B = torch.tensor([row.prompt for row in rows], device=device)
    padding = [[model.tokens.pad_id] * (longest + 1 - len(row.tokens)) for row in rows]
    tokens = torch.tensor([[*row.tokens, *pad] for row, pad in zip(rows, padding, strict=True)], device=device)
    lengths_B = torch.tensor([len(row.tokens) - 1 for row in rows], device=device)
    real = (torch.arange(longest, device=device) < lengths_B[:, None]).to(prompts.mask.dtype)
    mask = torch.cat([prompts.mask[index_B], real], 1)
    last = prompts.seen.of_rows([row.prompt for row in rows], 1)  # candidates see what the prompt's last token sees
    seen = SeenMedia(
        last.last.expand(-1, longest),
        None if last.first is None else last.first.expand(-1, longest),
        None if last.has_media is None else last.has_media.expand(-1, longest),
    )
    targets_N = real.flatten().nonzero().squeeze(1)
    with calling(_call(model, seen, prompts.projected, targets_N)):
        out = model.language_model.lm(
            input_ids=tokens[:, :-1],
            attention_mask=mask,
            past_key_values=_select(prompts.cache, index_B),
            use_cache=True,
            **_positions(model, mask, longest),
        )
    found_N = out.logits[0].float().log_softmax(-1).gather(1, tokens[:, 1:].flatten()[targets_N, None])[:, 0]
    sums_B = found_N.new_zeros(len(rows)).index_add(0, targets_N // longest, found_N)
    return [float(value) for value in sums_B]


def _select(cache: DynamicCache, index_B: Tensor) -> DynamicCache:
    """Return a copy of the cache with these rows; the layers of the original keep their tensors."""
    selected = copy.copy(cache)
    selected.layers = [copy.copy(layer) for layer in cache.layers]
    selected.batch_select_indices(index_B)
    return selected


def _from_the_start(
    model: Flamingo,
    prompts: Sequence[Sequence[int]],
    seen: SeenMedia,
    projected: dict[int, KeysValues],
    rows: Sequence[_Row],
) -> dict[tuple[int, int], float]:
    """Return the log-likelihoods by a forward for each candidate, without padding and cache; media stay encoded."""
    totals = {}
    for row in rows:
        prompt = prompts[row.prompt]
        ids = torch.tensor([[*prompt, *row.tokens]], device=model.device)
        own = seen.of_rows([row.prompt], len(prompt)).to(model.device)
        places = torch.arange(len(prompt) - 1, ids.shape[1] - 1, device=model.device)
        logits_NZ = model.language_model(ids, call=_call(model, own, projected, places))
        found_N = logits_NZ.float().log_softmax(-1).gather(1, ids[0, places + 1, None])
        totals[row.prompt, row.place] = float(found_N.sum())
    return totals
