"""Add the two tokens of a Flamingo to a tokenizer, and find the ids of all special tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from model.config import LanguageModelConfig, SpecialTokensConfig

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class SpecialTokenIds:
    """Hold the ids of the special tokens.

    Attributes:
        image_id: Token that stands for a medium.
        end_of_chunk_id: Token that ends the text of a medium.
        bos_id: Token that begins a text; ``eos_id`` where the tokenizer has none.
        eos_id: Token that ends a text.
        pad_id: Token that fills rows; ``eos_id`` where the tokenizer has none.
    """

    image_id: int
    end_of_chunk_id: int
    bos_id: int
    eos_id: int
    pad_id: int


@dataclass(frozen=True)
class FlamingoTokenizer(SpecialTokenIds):
    """Hold the language model's tokenizer with the two added tokens, and the ids.

    Attributes:
        tokenizer: Hugging Face's tokenizer.
    """

    tokenizer: PreTrainedTokenizerBase

    @property
    def ids(self) -> SpecialTokenIds:
        """Ids alone, which can cross a process boundary."""
        return SpecialTokenIds(self.image_id, self.end_of_chunk_id, self.bos_id, self.eos_id, self.pad_id)

    def encode(self, text: str) -> list[int]:
        """Return the ids of a text, without the tokens that some tokenizers put around it."""
        return self.tokenizer.encode(text, add_special_tokens=False)

    def decode(self, ids: list[int]) -> str:
        """Return the text of ids, special tokens left out."""
        return str(self.tokenizer.decode(ids, skip_special_tokens=True))


def load_tokenizer(language_model: LanguageModelConfig, tokens: SpecialTokensConfig) -> FlamingoTokenizer:
    """Load the tokenizer of a language model and add the two tokens.

    Raises:
        ValueError: The config names no tokenizer, it cannot be loaded, or it has no end-of-sequence token.
    """
    from transformers import AutoTokenizer  # takes seconds; ids alone do not need it

    name = language_model.tokenizer or language_model.name
    if name is None:
        raise ValueError("the language model has no tokenizer: set language_model.tokenizer (a folder or a repository)")
    revision = language_model.revision if language_model.tokenizer is None else None
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, revision=revision, trust_remote_code=False)
    except OSError as error:
        raise ValueError(f"the tokenizer {name!r} of language_model cannot be loaded: {error}") from error
    return add_special_tokens(tokenizer, tokens)


def add_special_tokens(tokenizer: PreTrainedTokenizerBase, tokens: SpecialTokensConfig) -> FlamingoTokenizer:
    """Add the two tokens to a tokenizer in place, and find the ids of all special tokens.

    Ids are looked up, never taken from the end of an encoded text, where some tokenizers append a token of their own.

    Raises:
        ValueError: The two tokens are equal, or the tokenizer has no end-of-sequence token.
    """
    if tokens.image == tokens.end_of_chunk:
        raise ValueError("tokens.image and tokens.end_of_chunk are the same token: give them different names")
    missing = [token for token in (tokens.image, tokens.end_of_chunk) if token not in tokenizer.get_vocab()]
    tokenizer.add_tokens(missing, special_tokens=True)
    vocab = tokenizer.get_vocab()
    eos = tokenizer.eos_token_id
    if eos is None:
        raise ValueError("the tokenizer has no end-of-sequence token: set eos_token in language_model.tokenizer")
    return FlamingoTokenizer(
        image_id=vocab[tokens.image],
        end_of_chunk_id=vocab[tokens.end_of_chunk],
        bos_id=eos if tokenizer.bos_token_id is None else tokenizer.bos_token_id,
        eos_id=eos,
        pad_id=eos if tokenizer.pad_token_id is None else tokenizer.pad_token_id,
        tokenizer=tokenizer,
    )
