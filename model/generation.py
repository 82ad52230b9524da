"""Generate text from prompts with media, on top of Hugging Face's own ``generate``.

A prompt is a row; L counts the tokens that one decoding step feeds. Prompts of one batch are padded at the left, except
where the language model would see the padding or the length of other rows (``generation_probes``): then prompts of one
length are continued together, one length after the other.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig

from model import media_index as media_indices
from model.flamingo import Flamingo
from model.gated_cross_attention import GatedCrossAttentionBlock, KeysValues
from model.generation_checks import (
    check_prompts,
    check_rows,
    check_settings,
    check_streaming,
    explain_missing_positions,
)
from model.generation_probes import probe_batches
from model.language_model import BeforeBlock, Call, calling
from model.media_cache import MediaCache
from model.seen_media import SeenMedia
from model.tower_patches import Grid


@torch.no_grad()
def generate(
    model: Flamingo,
    prompts: Sequence[Sequence[int]],
    media: Tensor | None,
    media_per_prompt: Sequence[int],
    *,
    max_new_tokens: int,
    media_grids: Sequence[Grid] | None = None,
    num_beams: int = 1,
    do_sample: bool = False,
    temperature: float = 1.0,
    top_p: float = 1.0,
    top_k: int = 0,
    length_penalty: float = 1.0,
    stop_ids: Sequence[int] | None = None,
    synced_ranks: bool = False,
    blind: bool = False,
    media_cache: MediaCache | None = None,
    on_token: Callable[[int], object] | None = None,
    **generation_settings: Any,
) -> list[list[int]]:
    """Continue prompts; a batch gives the same texts as its prompts one by one (apart from random draws).

    The search is greedy by default. The language model's own generation defaults (temperature, penalties, ...) are not
    used.

    Args:
        model: Model, on the device to compute on.
        prompts: Token ids of each prompt, of any lengths; each ``<image>`` in a prompt is one medium.
        media: [M, F, 3, Y, X], the media of the first prompt, then those of the second, and so on; None for no media.
        media_per_prompt: Number of media of each prompt.
        max_new_tokens: Most new tokens of a prompt, the stop token included.
        media_grids: Frames, rows and columns of patches of each medium; ``media`` are then patches, as
            ``VisionEncoder`` takes them.
        num_beams: Beams of beam search; 1 for none.
        do_sample: Whether to sample from torch's generator.
        temperature: Hugging Face's setting for sampling.
        top_p: Hugging Face's setting for sampling.
        top_k: Hugging Face's setting for sampling; 0 for no limit.
        length_penalty: Hugging Face's setting for beam search.
        stop_ids: Tokens that end a text; None takes ``<|endofchunk|>`` and the end-of-sequence token.
        synced_ranks: Whether several ranks run under ZeRO-3, where every module is a collective. All ranks then run the
            same modules, also without media, until the last one has finished.
        blind: Whether ``<image>`` tokens in prompts show nothing, which measures the gain from media. Without it,
            ``<image>`` tokens without media are an error.
        media_cache: Cache of the media of earlier calls; None encodes all media of this call.
        on_token: Called with each new token of the only prompt as soon as it is known, without the stop token. An
            error that it raises ends the generation.
        **generation_settings: Any other setting of ``transformers.GenerationConfig``.

    Returns:
        The new tokens of each prompt, up to the stop token, which is left out; with ``num_return_sequences`` several
        texts of each prompt, one after the other.

    Raises:
        ValueError: A prompt is empty, media and prompts do not fit each other, a setting is unknown or impossible, or
            the language model has no positions for so many tokens.
    """
    sampling = {"temperature": temperature, "top_p": top_p, "top_k": top_k} if do_sample else {}
    check_settings(max_new_tokens, num_beams, length_penalty, sampling, generation_settings)
    if blind:
        media, media_grids, media_per_prompt = None, None, [0] * len(prompts)
    num_media = 0 if media is None else len(media if media_grids is None else media_grids)
    check_prompts(model, prompts, num_media, media_per_prompt, blind=blind)
    groups = group_prompts(model, prompts, synced_ranks)
    num_texts = generation_settings.get("num_return_sequences", 1)
    check_rows(model, num_beams, num_texts)
    stops = list(stop_ids) if stop_ids is not None else [model.tokens.end_of_chunk_id, model.tokens.eos_id]
    if on_token is not None:
        check_streaming(len(prompts), num_beams, num_texts)
    ids, mask, media_index = pad_left(prompts, media_per_prompt, model.tokens.image_id, model.tokens.pad_id, blind)
    projected, seen = project_media(model, ids, media_index, media, media_grids, media_cache, synced_ranks)
    search = {"num_beams": num_beams, "do_sample": do_sample, "length_penalty": length_penalty, **sampling}
    continue_rows = partial(
        _continue_rows,
        model,
        projected=projected,
        settings=_settings(model, max_new_tokens, stops, {**search, **generation_settings}),
        synced_ranks=synced_ranks,
        streamer=None if on_token is None else _Streamer(on_token, stops),
    )
    texts: dict[int, list[list[int]]] = {}  # by the number of the prompt
    for rows in groups:
        longest = max(len(prompts[row]) for row in rows)
        texts |= continue_rows(rows, ids[rows, -longest:], mask[rows, -longest:], seen.of_rows(rows, longest))
    return [_cut_at_stop(text, stops) for row in range(len(prompts)) for text in texts[row]]


def _settings(model: Flamingo, max_new_tokens: int, stops: list[int], chosen: dict[str, Any]) -> GenerationConfig:
    """Return Hugging Face's settings: the chosen ones, and what this module decides."""
    suppressed = [model.tokens.image_id, *chosen.pop("suppress_tokens", ())]
    return GenerationConfig(
        max_new_tokens=max_new_tokens,
        eos_token_id=stops,
        pad_token_id=model.tokens.pad_id,
        bos_token_id=model.tokens.bos_id,
        suppress_tokens=suppressed,
        use_cache=True,
        **chosen,
    )


class _Streamer:
    """Pass on each new token of one row; the other end of transformers' ``streamer``."""

    def __init__(self, on_token: Callable[[int], object], stops: Collection[int]) -> None:
        self._on_token, self._stops, self._is_prompt = on_token, stops, True

    def put(self, value: Tensor) -> None:
        """Take the prompt [1, L] first, then each new token [1]."""
        if not self._is_prompt and value.item() not in self._stops:
            self._on_token(int(value.item()))
        self._is_prompt = False

    def end(self) -> None:
        """Take the end of the text; ``generate`` returns then."""


def project_media(
    model: Flamingo,
    ids: Tensor,
    media_index: Tensor,
    media: Tensor | None,
    media_grids: Sequence[Grid] | None,
    media_cache: MediaCache | None,
    synced_ranks: bool,
) -> tuple[dict[int, KeysValues], SeenMedia]:
    """Return keys and values of the media in every cross-attention, and which of them each token sees.

    Args:
        model: Model.
        ids: Prompts that are padded to one length, [B, G].
        media_index: Medium that each token sees, [B, G].
        media: As for ``generate``.
        media_grids: As for ``generate``.
        media_cache: As for ``generate``.
        synced_ranks: As for ``generate``; without media, a black one runs through the modules.
    """
    if (media is None or len(media) == 0) and synced_ranks:
        size = model.vision_encoder.image_size
        media, media_grids = torch.zeros(1, 1, 3, size, size, dtype=torch.uint8), None  # no token sees it
    if media is None or len(media) == 0:
        return {}, SeenMedia(media_index)
    media = media.to(model.device)
    if media_cache is None:
        latents = model.encode_media(media, media_grids)
    else:
        latents = media_cache.encode(model, media, media_grids, synced_ranks=synced_ranks)
    places = (ids.to(model.device), media_index.to(model.device))
    seen = model.find_seen_media(*places, None, model.media_blocks(media, media_grids))
    return model.project_media(latents if seen.order is None else latents[seen.order]), seen


def group_prompts(model: Flamingo, prompts: Sequence[Sequence[int]], synced_ranks: bool) -> list[list[int]]:
    """Return the numbers of the prompts that are continued together, shortest prompts first.

    Raises:
        ValueError: Groups are needed, but ranks have to run the same modules, and their groups may differ.
    """
    lm = model.language_model.lm
    behavior = probe_batches(lm)
    if behavior.batches_any_lengths:
        return [list(range(len(prompts)))]
    if synced_ranks:
        raise ValueError(
            f"synced_ranks: {type(lm).__name__} cannot continue prompts of several lengths together, but ranks under "
            "ZeRO-3 must run the same modules: generate from an export on each process, without synced_ranks"
        )
    if not behavior.keeps_rows_apart:
        return [[row] for row in range(len(prompts))]
    by_length: dict[int, list[int]] = {}
    for row, prompt in enumerate(prompts):
        by_length.setdefault(len(prompt), []).append(row)
    return [by_length[length] for length in sorted(by_length)]


def _continue_rows(
    model: Flamingo,
    rows: Sequence[int],
    ids_BG: Tensor,
    mask_BG: Tensor,
    seen: SeenMedia,
    *,
    projected: dict[int, KeysValues],
    settings: GenerationConfig,
    synced_ranks: bool,
    streamer: _Streamer | None,
) -> dict[int, list[list[int]]]:
    """Return the new texts of prompts that are continued together, by the number of the prompt.

    Keys and values of the media are computed before.
    """
    lm, length = model.language_model.lm, ids_BG.shape[1]
    ids_BG, mask_BG, seen = ids_BG.to(model.device), mask_BG.to(model.device), seen.to(model.device)
    if not probe_batches(lm).ignores_other_positions:
        lm(input_ids=ids_BG[:1, :1], use_cache=False)  # dynamic NTK forgets the longest row so far
    before: dict[int, BeforeBlock] = {
        index: partial(apply_cross_attention, block, projected.get(index), seen)
        for index, block in model.blocks_with_cross_attention().items()
    }
    with calling(Call(before)), explain_missing_positions(lm, length, settings.max_new_tokens):
        out = lm.generate(
            ids_BG, attention_mask=mask_BG, generation_config=settings, synced_gpus=synced_ranks, streamer=streamer
        )
    found: list[list[int]] = out[:, length:].tolist()
    each = len(found) // len(rows)
    return {row: found[each * place : each * (place + 1)] for place, row in enumerate(rows)}


def apply_cross_attention(
    block: GatedCrossAttentionBlock,
    keys_values: KeysValues | None,
    seen: SeenMedia,
    hidden_BLD: Tensor,
) -> Tensor:
    """Run the cross-attention of a prefill, or of one more token, which sees what the prompt's last token sees.

    Beams, and several texts for a prompt, repeat its row.
    """
    rows, length, _ = hidden_BLD.shape
    repeats = rows // seen.last.shape[0]
    index, first, has_media = (
        None if x is None else _index_of_step(x, length).repeat_interleave(repeats, 0)
        for x in (seen.last, seen.first, seen.has_media)
    )
    out: Tensor = block(hidden_BLD, None, index, first, has_media_BL=has_media, keys_values=keys_values)
    return out


def _index_of_step(index_BG: Tensor, length: int) -> Tensor:
    """Return the index of the tokens that a step feeds: the prompt, one more token, or (without a cache) both."""
    prompt_length = index_BG.shape[1]
    if length == prompt_length:
        return index_BG
    last = index_BG[:, -1:]
    if length == 1:
        return last
    assert length > prompt_length, "prefill in chunks is not supported"
    return torch.cat([index_BG, last.expand(-1, length - prompt_length)], 1)


def pad_left(
    prompts: Sequence[Sequence[int]], media_per_prompt: Sequence[int], image_id: int, pad_id: int, without_media: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Return ids, attention mask and media_index, [B, G] each; padding sees no medium."""
    length = max(len(prompt) for prompt in prompts)
    ids = torch.full((len(prompts), length), pad_id, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    index = torch.full_like(ids, media_indices.NO_MEDIUM)
    offset = 0
    for row, (prompt, count) in enumerate(zip(prompts, media_per_prompt, strict=True)):
        tokens = torch.tensor(prompt, dtype=torch.int64)
        ids[row, length - len(tokens) :] = tokens
        mask[row, length - len(tokens) :] = 1
        if not without_media:
            own = media_indices.preceding(tokens, image_id)
            index[row, length - len(tokens) :] = torch.where(own < 0, own, own + offset)
        offset += count
    return ids, mask, index


def _cut_at_stop(tokens: list[int], stops: list[int]) -> list[int]:
    ends = [i for i, token in enumerate(tokens) if token in stops]
    return tokens[: ends[0]] if ends else tokens
