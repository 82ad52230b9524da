"""Check ``train_on: answer``: the prompt is not trained on, and its ids are those of the prompt at inference."""

from __future__ import annotations

from typing import Any

import pytest
from tokenizers import AddedToken
from transformers import PreTrainedTokenizerFast

from model.config import SpecialTokensConfig
from model.processor import Special, TextLayout
from model.tokens import FlamingoTokenizer, add_special_tokens
from tests.data.helpers import DECODER, NO_MANIFEST, SAMPLE, encoding, image_bytes, pair_builder, text_of
from tests.data.videos import video_bytes
from tests.model.test_processor import KINDS
from trainer.config.data_config import ImageTextSource, VideoTextSource
from trainer.data.batch import IGNORED_LABEL, Row
from trainer.data.errors import SampleError
from trainer.data.samples.pair_rows import PairBuilder
from trainer.data.samples.rows import sample_rng
from trainer.data.samples.video_decoder import VideoDecoder
from trainer.tasks.row_builders import flamingo_encoding

QUESTION, ANSWER = "a red square?", "a blue circle"
MEMBERS = {"png": image_bytes(), "prompt.txt": QUESTION.encode(), "txt": ANSWER.encode()}


def build(builder: PairBuilder, **members: bytes) -> Row:
    return builder(MEMBERS | members, SAMPLE, sample_rng(0, SAMPLE))


def trained(row: Row) -> str:
    return "".join("." if label < 0 else text_of([label]) for label in row.labels.tolist())


def answer_builder(**settings: Any) -> PairBuilder:
    return pair_builder(train_on="answer", **settings)


def test_only_the_answer_is_trained_on() -> None:
    row = build(answer_builder(end_of_sequence=True))
    assert text_of(row.input_ids) == f"B#{QUESTION} {ANSWER}|E"
    assert trained(row) == "." * (2 + len(QUESTION)) + f" {ANSWER}|E"
    assert row.labels[2] == IGNORED_LABEL
    assert row.media_index.tolist() == [-1] + [0] * (len(row.input_ids) - 1)


def test_a_prompt_is_ignored_where_the_whole_text_is_trained_on() -> None:
    assert text_of(build(pair_builder()).input_ids) == f"B#{ANSWER}|"


def test_the_prefix_of_the_answer_and_the_space_after_the_image() -> None:
    row = build(answer_builder(answer_prefix="", space_prefix_probability=1.0))
    assert text_of(row.input_ids) == f"B# {QUESTION}{ANSWER}|"
    assert trained(row).lstrip(".") == f"{ANSWER}|"


def test_videos_have_prompts_too() -> None:
    source = VideoTextSource("videos", NO_MANIFEST, 1, num_frames=2, train_on="answer")
    builder = PairBuilder(source, encoding(), VideoDecoder(source, DECODER))
    members = {"mp4": video_bytes(2), "prompt.txt": b"what?", "txt": b"this"}
    row = builder(members, SAMPLE, sample_rng(0, SAMPLE))
    assert trained(row) == "." * 7 + " this|"


def test_a_long_row_is_cut_in_the_answer_but_never_before_it() -> None:
    longest = 2 + len(QUESTION) + 3
    row = build(answer_builder(max_tokens=longest))
    assert trained(row).lstrip(".") == " a "
    assert answer_builder(max_tokens=longest).length(MEMBERS, SAMPLE, sample_rng(0, SAMPLE)) == longest
    with pytest.raises(SampleError, match="max_tokens = 15 leaves no token for the answer") as caught:
        build(answer_builder(max_tokens=2 + len(QUESTION)))
    assert caught.value.reason == "filtered_max_tokens"


@pytest.mark.parametrize(
    ("members", "reason", "detail"),
    [
        ({"prompt.txt": b"\xff"}, "invalid_utf8", "byte 0"),
        ({"prompt.txt": b" \n"}, "empty_text", "the .prompt.txt"),
        ({"txt": b"\xff"}, "invalid_utf8", "byte 0"),
        ({"txt": b""}, "empty_text", "the .txt"),
    ],
)
def test_bad_prompts_and_answers(members: dict[str, bytes], reason: str, detail: str) -> None:
    for use in (answer_builder().__call__, answer_builder().length):
        with pytest.raises(SampleError, match=detail) as caught:
            use(MEMBERS | members, SAMPLE, sample_rng(0, SAMPLE))
        assert caught.value.reason == reason


def test_a_sample_without_a_prompt_is_replaced() -> None:
    with pytest.raises(SampleError, match=r"no \.prompt\.txt; members: png, txt") as caught:
        answer_builder()({"png": MEMBERS["png"], "txt": b"a"}, SAMPLE, sample_rng(0, SAMPLE))
    assert caught.value.reason == "missing_text"


@pytest.fixture(scope="module", params=KINDS)
def tokenizer(request: pytest.FixtureRequest) -> FlamingoTokenizer:
    backend = KINDS[request.param]()
    backend.add_special_tokens([AddedToken("<s>", special=True), AddedToken("</s>", special=True)])
    fast = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")
    return add_special_tokens(fast, SpecialTokensConfig())


@pytest.mark.parametrize("space", [0.0, 1.0])
def test_the_untrained_ids_are_those_of_the_prompt_at_inference(tokenizer: FlamingoTokenizer, space: float) -> None:
    """For tokenizers that mark the beginning of a text, too: they see one at the prompt and one at the answer."""
    source = ImageTextSource("a", NO_MANIFEST, 1, train_on="answer", max_tokens=99, space_prefix_probability=space)
    row = build(PairBuilder(source, flamingo_encoding(tokenizer), DECODER))
    layout = TextLayout(tokenizer, space_after_image=space == 1.0)
    prompt = layout.encode_parts([Special.IMAGE, QUESTION])
    ids, labels = row.input_ids.tolist(), row.labels.tolist()
    assert ids[: len(prompt)] == prompt
    assert labels == [IGNORED_LABEL] * len(prompt) + ids[len(prompt) :]
    assert ids == layout.encode_parts([Special.IMAGE, QUESTION, f" {ANSWER}", Special.END_OF_CHUNK])
