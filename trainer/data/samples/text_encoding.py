"""The little that the data needs of a tokenizer, with text that can never become a special token.

A caption may contain the characters ``<image>``. Tokenizers of Hugging Face find special tokens in any text, so a web
page could forge images and ends of documents. ``PlainTextEncoder`` therefore sets ``encode_special_tokens`` on a copy
of the tokenizer, which then splits those characters like any others; whatever the encoder, ids of special tokens in its
result are refused (``special_token``), as a second lock.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from tokenizers import Tokenizer

from trainer.data.errors import SampleError


class PlainTextEncoder:
    """A ``tokenizers.Tokenizer`` (``backend_tokenizer`` in transformers) as str -> ids of plain text.

    No special tokens are added or recognized, nothing is truncated or padded.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = Tokenizer.from_str(tokenizer.to_str())
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        self._tokenizer.encode_special_tokens = True

    def __call__(self, text: str) -> list[int]:
        """Ids of plain text."""
        return list(self._tokenizer.encode(text, add_special_tokens=False).ids)

    def __reduce__(self) -> tuple[object, tuple[Tokenizer]]:
        return PlainTextEncoder, (self._tokenizer,)


@dataclass(frozen=True)
class TextEncoding:
    """encode: str -> ids. The ids of the tokens that only the layout may place; None for one that is not there.

    bos_id may equal eos_id (GPT-NeoX, GPT-2), and pad_id may equal either.
    """

    encode: Callable[[str], list[int]]
    bos_id: int
    eos_id: int
    pad_id: int
    image_id: int | None = None
    end_of_chunk_id: int | None = None

    def plain(self, text: str) -> list[int]:
        """Ids of text that comes from data. Raises SampleError (special_token)."""
        ids = self.encode(text)
        special = {self.bos_id, self.eos_id, self.pad_id, self.image_id, self.end_of_chunk_id}.intersection(ids)
        if special:
            raise SampleError("special_token", f"the text was encoded to the special tokens {special}")
        return ids

    def layout_ids(self) -> tuple[int, int]:
        """(image_id, end_of_chunk_id). Raises ValueError when the tokenizer has none."""
        if self.image_id is None or self.end_of_chunk_id is None:
            raise ValueError("this source places images: the tokenizer needs model.tokens.image and .end_of_chunk")
        return self.image_id, self.end_of_chunk_id
