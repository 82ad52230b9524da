"""Keep what a user puts together: the pieces of a prompt, and the few-shot examples before it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, TypeVar

from torch import Tensor

from model.processor import Special
from trainer.demo_page.limits import MOST_CHARACTERS, MOST_EXAMPLES, MOST_PIECES, UserError

Kind = Literal["text", "image", "video"]
Action = Literal["earlier", "later", "delete"]
T = TypeVar("T")


@dataclass(frozen=True, eq=False)
class Piece:
    """Hold one text, image or video.

    Attributes:
        kind: Kind of the piece.
        text: Text, or the name of the file.
        pixels: Pixels as the model gets them, uint8 [F, 3, Y, X]; None for a text.
    """

    kind: Kind
    text: str
    pixels: Tensor | None = None


Pieces = tuple[Piece, ...]


@dataclass(frozen=True)
class Conversation:
    """Hold the state of one user's page.

    Attributes:
        pieces: Pieces of the prompt.
        examples: Pieces of each few-shot example.
    """

    pieces: Pieces = ()
    examples: tuple[Pieces, ...] = ()

    def add_text(self, text: str) -> Conversation:
        """Add a text at the end of the prompt.

        Raises:
            UserError: The text is empty or too long, or the prompt is full.
        """
        if not text.strip():
            raise UserError("There is no text to add: type it first.")
        if len(text) > MOST_CHARACTERS:
            raise UserError(f"The text has {len(text):,} characters; at most {MOST_CHARACTERS:,} fit into one piece.")
        return self.add([Piece("text", text)])

    def add(self, pieces: Sequence[Piece]) -> Conversation:
        """Add pieces at the end of the prompt.

        Raises:
            UserError: The prompt is full.
        """
        if len(self.pieces) + len(pieces) > MOST_PIECES:
            raise UserError(f"The prompt would have more than {MOST_PIECES} pieces: delete some first.")
        return replace(self, pieces=(*self.pieces, *pieces))

    def change_pieces(self, action: Action, place: int) -> Conversation:
        """Move or delete a piece; a place that does not exist changes nothing."""
        return replace(self, pieces=_change(self.pieces, action, place))

    def change_examples(self, action: Action, place: int) -> Conversation:
        """Move or delete an example; a place that does not exist changes nothing."""
        return replace(self, examples=_change(self.examples, action, place))

    def with_answer(self, answer: str) -> Pieces:
        """Return the pieces of the prompt with an answer at their end; one space separates it from a text."""
        answer = answer.strip()
        if not answer:
            return self.pieces
        if not self.pieces or self.pieces[-1].kind != "text":
            return (*self.pieces, Piece("text", answer))
        return (*self.pieces[:-1], Piece("text", _join(self.pieces[-1].text, answer)))

    def keep_as_example(self, answer: str) -> Conversation:
        """Move prompt and answer to the examples, which leaves an empty prompt.

        Raises:
            UserError: There is no prompt, the example has no text, or there are too many examples.
        """
        example = self.with_answer(answer)
        if not self.pieces:
            raise UserError("There is nothing to keep: the prompt is empty.")
        if not any(piece.kind == "text" for piece in example):
            raise UserError("An example needs a text: write its answer first.")
        if len(self.examples) >= MOST_EXAMPLES:
            raise UserError(f"There are {MOST_EXAMPLES} examples already: delete some first.")
        return Conversation((), (*self.examples, example))

    def media(self) -> list[Piece]:
        """Return all images and videos in the order of the prompt, those of the examples first."""
        everything = [*(piece for example in self.examples for piece in example), *self.pieces]
        return [piece for piece in everything if piece.kind != "text"]

    def parts(self) -> list[str | Special]:
        """Return the prompt for ``TextLayout.encode_parts``; each example ends with ``<|endofchunk|>``.

        Raises:
            UserError: The prompt is empty.
        """
        if not self.pieces:
            raise UserError("The prompt is empty: add an image, a video or a text first.")
        parts: list[str | Special] = []
        for example in self.examples:
            parts += [*_parts_of(example), Special.END_OF_CHUNK]
        return parts + _parts_of(self.pieces)


def _parts_of(pieces: Pieces) -> list[str | Special]:
    """Return texts and image tokens; neighboring texts become one, because training encodes them as one."""
    parts: list[str | Special] = []
    for piece in pieces:
        before = parts[-1] if parts else None
        if piece.kind != "text":
            parts.append(Special.IMAGE)
        elif isinstance(before, str):
            parts[-1] = _join(before, piece.text)
        else:
            parts.append(piece.text)
    return parts


def _join(before: str, after: str) -> str:
    """Join two texts, with a space where none has one."""
    has_space = before[-1:].isspace() or after[:1].isspace()
    return f"{before}{'' if has_space else ' '}{after}"


def _change(items: tuple[T, ...], action: Action, place: int) -> tuple[T, ...]:
    changed = list(items)
    other = {"earlier": place - 1, "later": place + 1, "delete": place}[action]
    if not (0 <= place < len(changed) and 0 <= other < len(changed)):
        return items
    item = changed.pop(place)
    if action != "delete":
        changed.insert(other, item)
    return tuple(changed)
