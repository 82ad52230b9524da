"""The ids of the tokens that a Flamingo gives a meaning to, and the tokenizer that has them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from model.config import LanguageModelConfig, SpecialTokensConfig

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class SpecialTokenIds:
    """image_id, end_of_chunk_id: the two new ones. bos_id and pad_id fall back to eos_id."""

    image_id: int
    end_of_chunk_id: int
    bos_id: int
    eos_id: int
    pad_id: int


@dataclass(frozen=True)
class FlamingoTokenizer(SpecialTokenIds):
    """The language model's tokenizer with the two new tokens, and the ids."""

    tokenizer: PreTrainedTokenizerBase

    @property
    def ids(self) -> SpecialTokenIds:
        """The ids alone, which can cross a process boundary."""
        return SpecialTokenIds(self.image_id, self.end_of_chunk_id, self.bos_id, self.eos_id, self.pad_id)

    def encode(self, text: str) -> list[int]:
        """Ids of a text, without the tokens that some tokenizers put around it."""
        return self.tokenizer.encode(text, add_special_tokens=False)

    def decode(self, ids: list[int]) -> str:
        """The text of ids, special tokens left out."""
        return str(self.tokenizer.decode(ids, skip_special_tokens=True))


def load_tokenizer(language_model: LanguageModelConfig, tokens: SpecialTokensConfig) -> FlamingoTokenizer:
    """The tokenizer of a language model with the new tokens added.

    Raises:
        ValueError: the config names no tokenizer, it cannot be loaded, or it has no end-of-sequence token.
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
    return with_new_tokens(tokenizer, tokens)


def with_new_tokens(tokenizer: PreTrainedTokenizerBase, tokens: SpecialTokensConfig) -> FlamingoTokenizer:
    """Adds the new tokens to a tokenizer (in place) and finds the ids.

    Ids are looked up, never taken from the end of an encoded text: some tokenizers append a token of their own there.
    """
    if tokens.image == tokens.end_of_chunk:
        raise ValueError("tokens.image and tokens.end_of_chunk are the same token: give them different names")
    missing = [token for token in (tokens.image, tokens.end_of_chunk) if token not in tokenizer.get_vocab()]
    tokenizer.add_tokens(missing, special_tokens=True)
    vocabulary = tokenizer.get_vocab()
    eos = tokenizer.eos_token_id
    if eos is None:
        raise ValueError("the tokenizer has no end-of-sequence token: set eos_token in language_model.tokenizer")
    return FlamingoTokenizer(
        image_id=vocabulary[tokens.image],
        end_of_chunk_id=vocabulary[tokens.end_of_chunk],
        bos_id=eos if tokenizer.bos_token_id is None else tokenizer.bos_token_id,
        eos_id=eos,
        pad_id=eos if tokenizer.pad_token_id is None else tokenizer.pad_token_id,
        tokenizer=tokenizer,
    )
