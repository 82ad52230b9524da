"""Text from prompts with media, on top of Hugging Face's own ``generate``.

Shape suffixes: B prompts, P tokens of the longest prompt, L tokens of this step, D width.
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
    """Continue prompts; a batch gives the same as its prompts one by one.

    Greedy search by default, beam search with ``num_beams``, sampling with ``do_sample`` (from torch's generator). The
    language model's own generation defaults (temperature, penalties, ...) are not used.

    Args:
        model: on the device that is to be used.
        prompts: token ids, of any lengths; each ``<image>`` in a prompt is one medium.
        media: [M, F, 3, Y, X], those of the first prompt, then those of the second, and so on; None: without media.
        media_per_prompt: how many of them belong to each prompt.
        max_new_tokens: at most this many, with the stop token.
        media_grids: of each medium; ``media`` are then patches of media of any shape, as ``VisionEncoder`` takes them.
        top_k: 0 for no limit. temperature, top_p, length_penalty: as Hugging Face defines them.
        stop_ids: where a text ends; None: at <|endofchunk|> and at the end of the sequence.
        synced_ranks: under ZeRO-3 with several ranks, where every module is a collective: all run the same modules,
            also those without media, and go on until the last one has finished.
        generation_settings: anything else that ``transformers.GenerationConfig`` knows.

    Returns:
        The new tokens of each prompt, without the stop token and what follows it.

    Raises:
        ValueError: a prompt is empty, or media and prompts do not fit each other.
    """
    tokens = model.tokens
    media_count = None if media is None else len(media if media_grids is None else media_grids)
    _check(prompts, media_count, media_per_prompt, tokens.image_id)
    device = model.device
    stops = list(stop_ids) if stop_ids is not None else [tokens.end_of_chunk_id, tokens.eos_id]
    ids_BP, mask_BP, index_BP = _pad_left(prompts, media_per_prompt, tokens.image_id, tokens.pad_id, media is None)
    ids_BP, mask_BP, index_BP = ids_BP.to(device), mask_BP.to(device), index_BP.to(device)
    first_BP = media_indices.first_media(index_BP) if model.config.cross_attention.attend == "all" else None
    if (media is None or len(media) == 0) and synced_ranks:
        size = model.vision_encoder.image_size
        media, media_grids = torch.zeros(1, 1, 3, size, size, dtype=torch.uint8), None  # seen by nobody
    projected: dict[int, KeysValues] = {}
    if media is not None and len(media) > 0:
        projected = model.project_media(model.encode_media(media.to(device), media_grids))
    before: dict[int, BeforeBlock] = {
        index: partial(_before_block, block, projected.get(index), index_BP, first_BP)
        for index, block in model.blocks_with_cross_attention().items()
    }
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
            ids_BP, attention_mask=mask_BP, generation_config=settings, synced_gpus=synced_ranks
        )
    return [_until_stop(row, stops) for row in out[:, ids_BP.shape[1] :].tolist()]


def _before_block(
    block: GatedCrossAttentionBlock,
    keys_values: KeysValues | None,
    index_BP: Tensor,
    first_BP: Tensor | None,
    hidden_BLD: Tensor,
) -> Tensor:
    """Cross-attention of a prefill, or of one more token, which sees what the prompt's last token sees.

    Beams and several returned sequences repeat each prompt's row.
    """
    rows, length, _ = hidden_BLD.shape
    repeats = rows // index_BP.shape[0]
    index, first = (
        None if x is None else _for_step(x, length).repeat_interleave(repeats, 0) for x in (index_BP, first_BP)
    )
    out: Tensor = block(hidden_BLD, None, index, first, keys_values=keys_values)
    return out


def _for_step(index_BP: Tensor, length: int) -> Tensor:
    """The index of the tokens that a step feeds: the prompt, one more token, or (without a cache) both."""
    prompt = index_BP.shape[1]
    if length == prompt:
        return index_BP
    last = index_BP[:, -1:]
    if length == 1:
        return last
    assert length > prompt, "prefill in chunks is not supported"
    return torch.cat([index_BP, last.expand(-1, length - prompt)], 1)


def _check(
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
    """Ids, attention mask and media_index, [B, P] each; padding sees no medium."""
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


def _until_stop(tokens: list[int], stops: list[int]) -> list[int]:
    ends = [i for i, token in enumerate(tokens) if token in stops]
    return tokens[: ends[0]] if ends else tokens
