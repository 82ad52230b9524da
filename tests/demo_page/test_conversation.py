"""Put pieces, examples and answers together."""

from __future__ import annotations

import pytest
import torch

from model.processor import Special
from trainer.demo_page.conversation import Conversation, Piece
from trainer.demo_page.limits import MOST_CHARACTERS, MOST_EXAMPLES, MOST_PIECES, UserError

IMAGE, END = Special.IMAGE, Special.END_OF_CHUNK


def image(name: str = "cat.png") -> Piece:
    return Piece("image", name, torch.zeros(1, 3, 16, 16, dtype=torch.uint8))


def texts(conversation: Conversation) -> list[str]:
    return [piece.text for piece in conversation.pieces]


def test_pieces_keep_their_order_and_can_be_moved_and_deleted() -> None:
    first = Conversation().add_text("a").add([image("b")]).add_text("c")
    assert texts(first) == ["a", "b", "c"]
    assert texts(first.change_pieces("later", 0)) == ["b", "a", "c"]
    assert texts(first.change_pieces("earlier", 2)) == ["a", "c", "b"]
    assert texts(first.change_pieces("delete", 1)) == ["a", "c"]
    assert texts(first.change_pieces("earlier", 0)) == texts(first.change_pieces("later", 2)) == ["a", "b", "c"]
    assert texts(first.change_pieces("delete", 3)) == texts(first.change_pieces("delete", -1)) == ["a", "b", "c"]


def test_a_prompt_is_encoded_as_in_training() -> None:
    prompt = Conversation().add([image(), image()]).add_text("Question: what?").add_text("Answer:").add([image()])
    assert prompt.parts() == [IMAGE, IMAGE, "Question: what? Answer:", IMAGE]
    spaced = Conversation().add_text("one ").add_text("two").add_text("\nthree")
    assert spaced.parts() == ["one two\nthree"]


def test_examples_come_first_and_end_with_the_end_of_chunk() -> None:
    started = Conversation().add([image("x")]).keep_as_example(" a cat ")
    again = started.add([image("y")]).add_text("Color:").keep_as_example("red")
    whole = again.add([image("z")])
    assert whole.parts() == [IMAGE, "a cat", END, IMAGE, "Color: red", END, IMAGE]
    assert [piece.text for piece in whole.media()] == ["x", "y", "z"]
    assert [len(example) for example in whole.change_examples("later", 0).examples] == [2, 2]
    assert whole.change_examples("delete", 0).parts() == [IMAGE, "Color: red", END, IMAGE]


def test_an_answer_can_be_gone_on_from() -> None:
    assert Conversation().add_text("Answer:").with_answer(" red")[0].text == "Answer: red"
    assert [piece.text for piece in Conversation().add([image("x")]).with_answer("red")] == ["x", "red"]
    assert [piece.text for piece in Conversation().add_text("a").with_answer("  ")] == ["a"]


@pytest.mark.parametrize("text", ["", "   ", "\n"])
def test_an_empty_text_is_a_message(text: str) -> None:
    with pytest.raises(UserError, match="There is no text to add"):
        Conversation().add_text(text)


def test_an_empty_prompt_is_a_message() -> None:
    with pytest.raises(UserError, match="The prompt is empty: add an image, a video or a text first"):
        Conversation().parts()
    only_examples = Conversation().add_text("a").keep_as_example("")
    with pytest.raises(UserError, match="The prompt is empty"):
        only_examples.parts()


def test_what_is_no_example_is_a_message() -> None:
    with pytest.raises(UserError, match="There is nothing to keep"):
        Conversation().keep_as_example("red")
    with pytest.raises(UserError, match="An example needs a text"):
        Conversation().add([image()]).keep_as_example(" ")


def test_lists_and_texts_are_bounded() -> None:
    with pytest.raises(UserError, match=f"at most {MOST_CHARACTERS:,}"):
        Conversation().add_text("a" * (MOST_CHARACTERS + 1))
    with pytest.raises(UserError, match=f"more than {MOST_PIECES} pieces"):
        Conversation().add([Piece("text", "a")] * (MOST_PIECES + 1))
    full = Conversation((Piece("text", "a"),), ((Piece("text", "a"),),) * MOST_EXAMPLES)
    with pytest.raises(UserError, match=f"{MOST_EXAMPLES} examples already"):
        full.keep_as_example("")
