"""Compare the ranking of answers with a plain forward of each prompt with each candidate."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from model.config import CrossAttentionConfig
from model.flamingo import Flamingo
from model.generation import generate
from model.media_cache import MediaCache
from model.ranking import Candidate, rank
from tests.model.builders import BEYOND, FAMILIES, random_media, tiny_flamingo

IMAGE, END = BEYOND.image_id, BEYOND.end_of_chunk_id
PROMPTS = [[1, IMAGE, 5, 6, END, IMAGE, 7], [1, 9], [1, IMAGE], [1, 4, IMAGE, 8, 11, 12, END, 13, IMAGE, IMAGE, 10, 14]]
COUNTS = [2, 0, 1, 3]
CANDIDATES = [[[5], [6, 7], [8, 9, 10, 11]], [[12, 13]], [[5], [5, 5]], [[], [20, 21, 22], [23]]]


def plainly(model: Flamingo, media: Tensor | None) -> list[list[Candidate]]:
    found, start = [], 0
    for prompt, count, row in zip(PROMPTS, COUNTS, CANDIDATES, strict=True):
        own = media[start : start + count] if media is not None and count else None
        start += count
        candidates = []
        for tokens in row:
            ids = torch.tensor([[*prompt, *tokens]])
            with torch.no_grad():
                logp = model(ids, media=own).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
            total = logp.gather(1, ids[0, len(prompt) :, None]).sum()
            candidates.append(Candidate(float(total), len(tokens)))
        found.append(candidates)
    return found


def assert_same(found: list[list[Candidate]], expected: list[list[Candidate]]) -> None:
    for row, other in zip(found, expected, strict=True):
        assert [one.num_tokens for one in row] == [one.num_tokens for one in other]
        assert [one.total for one in row] == pytest.approx([one.total for one in other], abs=2e-5)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("rows_per_forward", [1, 64])
def test_ranking_equals_a_plain_forward(family: str, rows_per_forward: int) -> None:
    model, media = tiny_flamingo(family, gates=1.0, seed=1), random_media(6)
    found = rank(model, PROMPTS, media, COUNTS, CANDIDATES, rows_per_forward=rows_per_forward)
    assert_same(found, plainly(model, media))
    assert found[3][0] == Candidate(0.0, 0) and found[0][1].per_token == found[0][1].total / 2


@pytest.mark.parametrize("attend", ["one", "all"])
def test_candidates_see_the_media_of_the_prompt(attend: Any) -> None:
    config = CrossAttentionConfig(every_n_layers=1, head_dim=8, num_heads=4, attend=attend)
    model, media = tiny_flamingo(gates=1.0, seed=1, cross_attention=config), random_media(6)
    assert_same(rank(model, PROMPTS, media, COUNTS, CANDIDATES), plainly(model, media))
    other = rank(model, PROMPTS, 255 - media, COUNTS, CANDIDATES)
    found = rank(model, PROMPTS, media, COUNTS, CANDIDATES)
    assert abs(other[0][1].total - found[0][1].total) > 1e-3
    assert other[1] == found[1]  # its prompt has no media


def test_a_blind_ranking_is_that_of_the_language_model() -> None:
    model = tiny_flamingo(gates=1.0, seed=1)
    assert_same(rank(model, PROMPTS, random_media(6), COUNTS, CANDIDATES, blind=True), plainly(model, None))


@pytest.mark.parametrize("family", ["llama", "gpt_neox"])
def test_padding_changes_nothing(family: str) -> None:
    model, media = tiny_flamingo(family, gates=1.0, seed=1), random_media(6)
    batch, start = rank(model, PROMPTS, media, COUNTS, CANDIDATES), 0
    for number, (prompt, count) in enumerate(zip(PROMPTS, COUNTS, strict=True)):
        own = media[start : start + count] if count else None
        assert_same(rank(model, [prompt], own, [count], [CANDIDATES[number]]), [batch[number]])
        start += count


def test_shared_media_are_encoded_once() -> None:
    model, media, cache = tiny_flamingo(gates=1.0, seed=1), random_media(6), MediaCache()
    first = rank(model, PROMPTS, media, COUNTS, CANDIDATES, media_cache=cache)
    assert (cache.encoded, cache.found) == (6, 0)
    assert rank(model, PROMPTS, media, COUNTS, CANDIDATES, media_cache=cache) == first
    assert (cache.encoded, cache.found) == (6, 6)
    assert_same(first, plainly(model, media))
    shared = media[[0, 1, 0, 1, 1, 0]]
    texts = generate(model, PROMPTS, shared, COUNTS, max_new_tokens=6, media_cache=cache)
    assert cache.encoded == 6
    assert texts == generate(model, PROMPTS, shared, COUNTS, max_new_tokens=6)


def test_a_small_cache_forgets_what_was_not_used_for_the_longest_time() -> None:
    model, media = tiny_flamingo(gates=1.0), random_media(3)
    size = model.encode_media(media[:1]).nbytes
    cache = MediaCache(max_bytes=2 * size)
    for place in (0, 1, 0, 2, 0, 1):
        torch.testing.assert_close(cache.encode(model, media[[place]]), model.encode_media(media[[place]]))
    assert (cache.encoded, cache.found) == (4, 2)


def test_bad_candidates_are_errors() -> None:
    model = tiny_flamingo()
    with pytest.raises(ValueError, match="1 prompts have 2 lists of candidates"):
        rank(model, [[1]], None, [0], [[[5]], [[6]]])
    with pytest.raises(ValueError, match="candidate of prompt 0 has an <image> token"):
        rank(model, [[1]], None, [0], [[[IMAGE]]])
    with pytest.raises(ValueError, match="positions"):
        rank(tiny_flamingo("opt"), [[1] * 60], None, [0], [[[5] * 20]])


def test_a_prompt_is_computed_once() -> None:
    model, lengths = tiny_flamingo(gates=1.0), []
    model.language_model.lm.register_forward_pre_hook(
        lambda _, args, kwargs: lengths.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    rank(model, PROMPTS, random_media(6), COUNTS, CANDIDATES)
    assert lengths == [(4, 12), (5, 3)]  # all prompts, then the candidates of several tokens without their last one
