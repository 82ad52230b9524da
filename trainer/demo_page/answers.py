"""Answer a prompt token by token, and find where the model looked at each word."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from model.attention_maps import attention_maps
from model.generation import generate
from trainer.data.samples.prompt_media import Media, stack_media
from trainer.demo_page.conversation import Conversation, Piece
from trainer.demo_page.limits import Limits, UserError
from trainer.prompting.exported_model import ExportedModel

_UNFINISHED = "\ufffd"  # stands for a character of which only the first bytes are known
_END = None


@dataclass(frozen=True, eq=False)
class Prompt:
    """Hold a prompt in the model's terms.

    Attributes:
        ids: Token ids.
        pieces: Images and videos, in the order of their ``<image>`` tokens.
        media: Media and grids for the model.
    """

    ids: list[int]
    pieces: Sequence[Piece]
    media: Media


@dataclass(frozen=True, eq=False)
class Word:
    """Hold a generated word and where the model looked when it wrote the word.

    Attributes:
        text: The word, with the white space before it.
        tokens: Number of its tokens.
        maps: Share of attention of each patch of each medium, float32 [Y, X], averaged over the tokens; all maps
            together sum to 1, or to 0 where the model saw no medium. Empty without attention.
    """

    text: str
    tokens: int
    maps: tuple[Tensor, ...] = ()


class _StoppedError(Exception):
    """Ends the thread that generates, when nobody waits for its text any more."""


def encode(exported: ExportedModel, conversation: Conversation, limits: Limits) -> Prompt:
    """Return a user's prompt in the model's terms.

    Raises:
        UserError: The prompt is empty or too long, or the model cannot take it.
    """
    parts = conversation.parts()
    pieces = conversation.media()
    if len(pieces) > limits.media:
        raise UserError(
            f"The prompt and its examples have {len(pieces)} images and videos, and at most {limits.media} are taken "
            "here: delete some."
        )
    try:
        ids = exported.layout.encode_parts(parts)
        pixels = [(piece.kind, piece.pixels) for piece in pieces if piece.pixels is not None]
        media = stack_media(pixels, exported.processor)
    except ValueError as error:
        raise UserError(f"The prompt cannot be used: {error}") from error
    if len(ids) > limits.prompt_tokens:
        raise UserError(
            f"The prompt and its examples have {len(ids):,} tokens, and at most {limits.prompt_tokens:,} are taken "
            "here: shorten a text, or delete an example."
        )
    return Prompt(ids, pieces, media)


def stream_tokens(
    exported: ExportedModel, prompt: Prompt, max_new_tokens: int, sampling: Mapping[str, Any]
) -> Iterator[int]:
    """Yield the new tokens as soon as they are known; closing the iterator ends the generation.

    Args:
        exported: Model.
        prompt: Prompt.
        max_new_tokens: Most new tokens.
        sampling: Settings of ``generate``; empty takes the most likely token.

    Raises:
        UserError: The model cannot continue the prompt.
    """
    told: queue.SimpleQueue[int | Exception | None] = queue.SimpleQueue()
    stopped = threading.Event()

    def tell(token: int) -> None:
        if stopped.is_set():
            raise _StoppedError
        told.put(token)

    def work() -> None:
        media, grids = prompt.media
        settings: dict[str, Any] = {"max_new_tokens": max_new_tokens, "on_token": tell, **sampling}
        try:
            generate(exported.model, [prompt.ids], media, [len(prompt.pieces)], media_grids=grids, **settings)
            told.put(_END)
        except _StoppedError:
            pass
        except Exception as error:  # noqa: BLE001  the reader raises it in its own thread
            told.put(error)

    threading.Thread(target=work, name="answer", daemon=True).start()
    try:
        while (token := told.get()) is not _END:
            if isinstance(token, ValueError | torch.OutOfMemoryError):
                raise UserError(f"The model cannot answer: {token}") from token
            if isinstance(token, Exception):
                raise token
            yield token
    finally:
        stopped.set()


def split_words(exported: ExportedModel, tokens: Sequence[int]) -> list[Word]:
    """Return the words of generated tokens; a word begins with white space, apart from the first one."""
    decode = exported.layout.tokenizer.decode
    words: list[Word] = []
    known, waiting = "", 0
    for number in range(1, len(tokens) + 1):
        text, waiting = decode(list(tokens[:number])), waiting + 1
        if text.endswith(_UNFINISHED) and number < len(tokens):
            continue
        new, known = text[len(known) :], text
        if words and not new[:1].isspace():
            last = words.pop()
            words.append(Word(last.text + new, last.tokens + waiting))
        else:
            words.append(Word(new, waiting))
        waiting = 0
    return words


def look_up_attention(exported: ExportedModel, prompt: Prompt, tokens: Sequence[int]) -> list[Word]:
    """Return the words of generated tokens with their attention.

    Raises:
        UserError: The prompt has no media, or the model's attention has no place in an image.
    """
    words = split_words(exported, tokens)
    media, grids = prompt.media
    if media is None:
        raise UserError("The prompt has no image or video, so there is no attention to show.")
    try:
        maps = attention_maps(exported.model, prompt.ids, tokens, media, grids)
    except ValueError as error:
        raise UserError(f"The attention of this model cannot be drawn: {error}") from error
    found, start = [], 0
    for word in words:
        own = slice(start, start + word.tokens)
        found.append(Word(word.text, word.tokens, tuple(one[own].mean(0) for one in maps.patches)))
        start += word.tokens
    return found
