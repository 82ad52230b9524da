"""Encode text to token ids so that no text can become a special token.

A caption may contain the characters ``<image>``. Tokenizers of Hugging Face find special tokens in any text, so a web
page could forge images and ends of documents. Two measures prevent it: ``model.processor.PlainTextEncoder`` splits such
characters like any others, and ``TextEncoding`` refuses special ids in the result of any encoder.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from model.processor import TextError, refuse_special_ids
from trainer.data.errors import SampleError

_WHOLE_CHARACTERS = 1 << 15  # a text up to this length is encoded as a whole, which takes some 20 ms
_CHARACTERS_PER_TOKEN = 16  # of a longer text's beginning that is encoded first; English has 4 or 5
_SPARE_TOKENS = 64  # ids before a cut that might change without it


def first_ids(encode: Callable[[str], list[int]], text: str, max_tokens: int) -> list[int]:
    """Encode as much of a text as its first ``max_tokens`` ids depend on.

    The text is cut before a space that follows a visible character, because tokens begin with a space and do not hold
    one inside. Where there is no such place, or where tokens span words, the ids shortly before the cut may differ from
    those of the whole text; so ``_SPARE_TOKENS`` of them are not used.

    Returns:
        Ids of the whole text if it is short, otherwise at least ``max_tokens`` ids.
    """
    length = max(_WHOLE_CHARACTERS, _CHARACTERS_PER_TOKEN * (max_tokens + _SPARE_TOKENS))
    while length < len(text):
        end = length
        for place in range(length, length // 2, -1):
            if text[place] == " " and not text[place - 1].isspace():
                end = place
                break
        ids = encode(text[:end])
        if len(ids) >= max_tokens + _SPARE_TOKENS:
            return ids[:max_tokens]
        length *= 4
    return encode(text)


@dataclass(frozen=True)
class TextEncoding:
    """Hold an encoder of plain text and the ids of the special tokens, which only row builders place.

    Attributes:
        encode: Text -> token ids.
        bos_id: First token of a row. It may equal ``eos_id`` (GPT-NeoX, GPT-2).
        eos_id: End of a sequence.
        pad_id: Padding. It may equal ``bos_id`` or ``eos_id``.
        image_id: Place of a medium; None if the tokenizer has no such token.
        end_of_chunk_id: End of the text that belongs to a medium; None if the tokenizer has no such token.
    """

    encode: Callable[[str], list[int]]
    bos_id: int
    eos_id: int
    pad_id: int
    image_id: int | None = None
    end_of_chunk_id: int | None = None

    def plain_ids(self, text: str, max_tokens: int | None = None) -> list[int]:
        """Return the ids of a text that comes from data.

        Args:
            text: Any text.
            max_tokens: Number of first ids that the caller uses. Of a long text only the beginning is encoded then; the
                first ``max_tokens`` ids are those of the whole text.

        Raises:
            SampleError: special_token, unencodable_text.
        """
        try:
            ids = self.encode(text) if max_tokens is None else first_ids(self.encode, text, max_tokens)
            refuse_special_ids(ids, (self.bos_id, self.eos_id, self.pad_id, self.image_id, self.end_of_chunk_id))
        except TextError as error:
            raise SampleError(error.reason, error.detail) from error
        return ids

    def layout_ids(self) -> tuple[int, int]:
        """Return ``image_id`` and ``end_of_chunk_id``.

        Raises:
            ValueError: The tokenizer lacks one of them.
        """
        if self.image_id is None or self.end_of_chunk_id is None:
            raise ValueError(
                "this source has images: the tokenizer needs model.tokens.image and model.tokens.end_of_chunk"
            )
        return self.image_id, self.end_of_chunk_id
