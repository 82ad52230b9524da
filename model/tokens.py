"""Add the two tokens of a Flamingo to a tokenizer, and find the ids of all special tokens."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from model.config import LanguageModelConfig, SpecialTokensConfig
from model.loading_errors import explain_loading

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

    def require_table(self, size: int) -> None:
        """Check that each token of a row, except the two added ones, has an embedding.

        Args:
            size: Number of tokens in the language model's embedding.

        Raises:
            ValueError: A token lies beyond the embedding.
        """
        tokens = {"bos_token": self.bos_id, "eos_token": self.eos_id, "pad_token": self.pad_id}
        beyond = [f"{name} (id {token})" for name, token in tokens.items() if not 0 <= token < size]
        if beyond:
            raise ValueError(
                f"language_model.tokenizer: {', '.join(beyond)} lies beyond the language model's embedding of {size} "
                f"tokens (ids 0 to {size - 1}); take the tokenizer that belongs to the language model"
            )


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

    def require_table(self, size: int) -> None:
        """Check that each token of a row, also those of any text, has an embedding; texts give no special tokens.

        Raises:
            ValueError: A token lies beyond the language model's embedding of ``size`` tokens.
        """
        super().require_table(size)
        special = {number for number, token in self.tokenizer.added_tokens_decoder.items() if token.special}
        special |= {self.image_id, self.end_of_chunk_id}
        beyond = {token: i for token, i in self.tokenizer.get_vocab().items() if i >= size and i not in special}
        if beyond:
            last = max(beyond, key=beyond.__getitem__)
            raise ValueError(
                f"language_model.tokenizer has {len(beyond)} tokens beyond the language model's embedding of {size} "
                f"tokens, such as {last!r} with id {beyond[last]}; take the tokenizer that belongs to the language "
                "model"
            )

    def decode(self, ids: list[int]) -> str:
        """Return the text of ids, special tokens left out."""
        return str(self.tokenizer.decode(ids, skip_special_tokens=True))


def load_tokenizer(language_model: LanguageModelConfig, tokens: SpecialTokensConfig) -> FlamingoTokenizer:
    """Load the tokenizer of a language model and add the two tokens.

    Raises:
        ValueError: The config names no tokenizer, it cannot be loaded, it is not a fast one, or it has no
            end-of-sequence token.
    """
    from transformers import AutoTokenizer, PreTrainedConfig  # takes seconds; ids alone do not need it

    name = language_model.tokenizer or language_model.name
    if name is None:
        raise ValueError("the language model has no tokenizer: set language_model.tokenizer (a folder or a repository)")
    if language_model.tokenizer is not None:
        setting, revision = f"language_model.tokenizer {name!r}", None
    else:
        setting, revision = f"language_model.name {name!r}: its tokenizer", language_model.revision
        setting += "" if revision is None else f" (language_model.revision {revision!r})"
    with explain_loading(setting):
        # The config.json of an export for transformers describes a model whose code is not run here.
        own = {"config": PreTrainedConfig()} if _describes_remote_code(Path(name) / "config.json") else {}
        tokenizer = AutoTokenizer.from_pretrained(name, revision=revision, trust_remote_code=False, **own)
    if getattr(tokenizer, "backend_tokenizer", None) is None:
        raise ValueError(
            f"{setting} is a {type(tokenizer).__name__}, which is pure Python: the trainer needs a fast tokenizer "
            "(backend_tokenizer, a file tokenizer.json); set language_model.tokenizer to one, or take another "
            "language model"
        )
    return add_special_tokens(tokenizer, tokens)


def _describes_remote_code(path: Path) -> bool:
    return path.is_file() and "auto_map" in json.loads(path.read_text(encoding="utf-8"))


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
