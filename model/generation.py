"""Generate text from prompts with media, on top of Hugging Face's own ``generate``.

A prompt is a row; L counts the tokens that one decoding step feeds.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig

from model import media_index as media_indices
from model.flamingo import Flamingo
from model.gated_cross_attention import GatedCrossAttentionBlock, KeysValues
from model.language_model import BeforeBlock, Call, calling
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
    **generation_settings: Any,
) -> list[list[int]]:
    """Continue prompts; a batch gives the same texts as its prompts one by one.

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
        **generation_settings: Any other setting of ``transformers.GenerationConfig``.

    Returns:
        The new tokens of each prompt, up to the stop token, which is left out.

    Raises:
        ValueError: A prompt is empty, or media and prompts do not fit each other.
    """
    tokens = model.tokens
    media_count = None if media is None else len(media if media_grids is None else media_grids)
    _check_prompts(prompts, media_count, media_per_prompt, tokens.image_id)
    device = model.device
    stops = list(stop_ids) if stop_ids is not None else [tokens.end_of_chunk_id, tokens.eos_id]
    ids_BG, mask_BG, index_BG = _pad_left(prompts, media_per_prompt, tokens.image_id, tokens.pad_id, media is None)
    ids_BG, mask_BG, index_BG = ids_BG.to(device), mask_BG.to(device), index_BG.to(device)
    if (media is None or len(media) == 0) and synced_ranks:
        size = model.vision_encoder.image_size
        media, media_grids = torch.zeros(1, 1, 3, size, size, dtype=torch.uint8), None  # no token sees it
    before = _prepare_cross_attention(model, media, media_grids, index_BG)
    sampling = {"temperature": temperature, "top_p": top_p, "top_k": top_k} if do_sample else {}
    settings = GenerationConfig(
        max_new_tokens=max_new_tokens,
        num_beams=num_beams,
        do_sample=do_sample,
        length_penalty=length_penalty,
        eos_token_id=stops,
        pad_token_id=tokens.pad_id,
        bos_token_id=tokens.bos_id,
        suppress_tokens=[tokens.image_id, *generation_settings.pop("suppress_tokens", ())],
        use_cache=True,
        **sampling,
        **generation_settings,
    )
    with calling(Call(before)):
        out = model.language_model.lm.generate(
            ids_BG, attention_mask=mask_BG, generation_config=settings, synced_gpus=synced_ranks
        )
    return [_cut_at_stop(row, stops) for row in out[:, ids_BG.shape[1] :].tolist()]


def _prepare_cross_attention(
    model: Flamingo, media: Tensor | None, media_grids: Sequence[Grid] | None, index_BG: Tensor
) -> dict[int, BeforeBlock]:
    """Compute keys and values of the media once, for the cross-attention of every decoding step."""
    first_BG = media_indices.first_media(index_BG) if model.config.cross_attention.attend == "all" else None
    projected: dict[int, KeysValues] = {}
    if media is not None and len(media) > 0:
        projected = model.project_media(model.encode_media(media.to(model.device), media_grids))
    return {
        index: partial(_apply_cross_attention, block, projected.get(index), index_BG, first_BG)
        for index, block in model.blocks_with_cross_attention().items()
    }


def _apply_cross_attention(
    block: GatedCrossAttentionBlock,
    keys_values: KeysValues | None,
    index_BG: Tensor,
    first_BG: Tensor | None,
    hidden_BLD: Tensor,
) -> Tensor:
    """Run the cross-attention of a prefill, or of one more token, which sees what the prompt's last token sees.

    Beams, and several texts for a prompt, repeat its row.
    """
    rows, length, _ = hidden_BLD.shape
    repeats = rows // index_BG.shape[0]
    index, first = (
        None if x is None else _index_of_step(x, length).repeat_interleave(repeats, 0) for x in (index_BG, first_BG)
    )
    out: Tensor = block(hidden_BLD, None, index, first, keys_values=keys_values)
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


def _check_prompts(
    prompts: Sequence[Sequence[int]], media_count: int | None, media_per_prompt: Sequence[int], image_id: int
) -> None:
    if len(prompts) != len(media_per_prompt):
        raise ValueError(f"{len(prompts)} prompts but media_per_prompt has {len(media_per_prompt)} entries")
    for number, (prompt, count) in enumerate(zip(prompts, media_per_prompt, strict=True)):
        if not prompt:
            raise ValueError(f"prompt {number} is empty: begin it with the token bos_id")
        if media_count is not None and (found := sum(token == image_id for token in prompt)) != count:
            raise ValueError(f"prompt {number} has {found} image tokens, but media_per_prompt says {count}")
    if media_count is not None and media_count != sum(media_per_prompt):
        raise ValueError(f"media has {media_count} rows, but media_per_prompt adds up to {sum(media_per_prompt)}")


def _pad_left(
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
