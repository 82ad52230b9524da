"""Stream answers, and find where the model looked."""

from __future__ import annotations

import threading
import time
from dataclasses import replace
from itertools import accumulate
from pathlib import Path

import pytest
import torch

from model.attention_maps import attention_maps
from model.generation import generate
from trainer.demo_page.answers import Prompt, encode, look_up_attention, split_words, stream_tokens
from trainer.demo_page.conversation import Conversation
from trainer.demo_page.limits import Limits, UserError
from trainer.demo_page.uploads import read_uploads
from trainer.prompting.exported_model import ExportedModel


@pytest.fixture
def conversation(folder: Path, exported: ExportedModel) -> Conversation:
    """An example and a prompt, with an image each."""
    pieces, _ = read_uploads([folder / "0.png", folder / "1.png"], exported.processor, 1.0)
    return Conversation().add(pieces[:1]).keep_as_example("w1 w2").add(pieces[1:]).add_text("w3")


@pytest.fixture
def prompt(exported: ExportedModel, conversation: Conversation) -> Prompt:
    """The conversation in the model's terms."""
    return encode(exported, conversation, Limits())


def test_a_prompt_is_that_of_trainer_generate(exported: ExportedModel, prompt: Prompt) -> None:
    assert prompt.ids == exported.layout.encode_prompt("<image>w1 w2<|endofchunk|><image>w3")
    assert prompt.media[0] is not None and len(prompt.media[0]) == 2


def test_streamed_tokens_are_those_of_generate(exported: ExportedModel, prompt: Prompt) -> None:
    media, grids = prompt.media
    [expected] = generate(exported.model, [prompt.ids], media, [2], media_grids=grids, max_new_tokens=9)
    assert list(stream_tokens(exported, prompt, 9, {})) == expected
    sampling = {"do_sample": True, "temperature": 2.0}
    torch.manual_seed(0)
    [drawn] = generate(exported.model, [prompt.ids], media, [2], max_new_tokens=9, **sampling)
    torch.manual_seed(0)
    assert list(stream_tokens(exported, prompt, 9, sampling)) == drawn != expected


def test_a_closed_stream_ends_its_thread(exported: ExportedModel, prompt: Prompt) -> None:
    stream = stream_tokens(exported, prompt, 40, {})
    next(stream)
    stream.close()
    deadline = time.monotonic() + 20
    while any(thread.name == "answer" for thread in threading.enumerate()):
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_what_the_model_cannot_do_is_a_message(exported: ExportedModel, prompt: Prompt) -> None:
    with pytest.raises(UserError, match="The model cannot answer: .*64 positions"):
        list(stream_tokens(exported, prompt, 200, {}))
    with pytest.raises(UserError, match="The model cannot answer: temperature 0"):
        list(stream_tokens(exported, prompt, 4, {"do_sample": True, "temperature": 0.0}))


def test_limits_are_messages(exported: ExportedModel, conversation: Conversation) -> None:
    with pytest.raises(UserError, match="have 2 images and videos, and at most 1 are taken"):
        encode(exported, conversation, replace(Limits(), media=1))
    with pytest.raises(UserError, match="have 7 tokens, and at most 5 are taken"):
        encode(exported, conversation, replace(Limits(), prompt_tokens=5))


def test_words_have_the_mean_attention_of_their_tokens(exported: ExportedModel, prompt: Prompt) -> None:
    tokens = list(stream_tokens(exported, prompt, 6, {}))
    words = look_up_attention(exported, prompt, tokens)
    media, _ = prompt.media
    assert media is not None
    maps = attention_maps(exported.model, prompt.ids, tokens, media)
    assert [word.text.strip() for word in words] == exported.layout.tokenizer.decode(tokens).split()
    assert sum(word.tokens for word in words) == len(tokens)
    starts = list(accumulate((word.tokens for word in words), initial=0))
    for word, start in zip(words, starts, strict=False):
        torch.testing.assert_close(word.maps[1], maps.patches[1][start : start + word.tokens].mean(0))
        assert float(word.maps[0].sum()) == 0  # the model attends to the last image alone
        assert float(word.maps[1].sum()) == pytest.approx(1)


class _Bytes:
    """Stands for a tokenizer whose tokens are bytes."""

    def decode(self, tokens: list[int]) -> str:
        return bytes(tokens).decode(errors="replace")


def test_words_wait_for_whole_characters(exported: ExportedModel) -> None:
    layout = replace(exported.layout, tokenizer=_Bytes())
    words = split_words(replace(exported, layout=layout), list("é à  b".encode()))
    assert [(word.text, word.tokens) for word in words] == [("é", 2), (" à", 3), (" ", 1), (" b", 2)]
    cut = split_words(replace(exported, layout=layout), list("aé".encode())[:-1])
    assert sum(word.tokens for word in cut) == 2


def test_a_prompt_without_media_has_no_attention(exported: ExportedModel) -> None:
    prompt = encode(exported, Conversation().add_text("w3"), Limits())
    tokens = list(stream_tokens(exported, prompt, 3, {}))
    assert tokens
    with pytest.raises(UserError, match="no image or video, so there is no attention"):
        look_up_attention(exported, prompt, tokens)


def test_attention_without_a_place_is_a_message(
    exported: ExportedModel, prompt: Prompt, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(exported.model.vision_encoder, "max_tiles", 4)
    with pytest.raises(UserError, match="The attention of this model cannot be drawn: .*tower of tiles"):
        look_up_attention(exported, prompt, [5, 6])
