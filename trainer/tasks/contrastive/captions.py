"""Turn captions into the tokens that a text tower takes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import open_clip
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from model.loading_errors import explain_loading
from trainer.config.run_config import ContrastiveRunConfig
from trainer.tasks.contrastive.architecture import context_length

Tokenize = Callable[[str], Tensor]


def caption_tokenizer(config: ContrastiveRunConfig, clip: Any) -> Tokenize:
    """Return a function from a caption to int64 [context length], cut or padded.

    It uses ``config.tokenizer`` or, without one, the tokenizer of open_clip. A Hugging Face text tower gets the special
    tokens of its tokenizer, and its own padding, which it does not attend to.

    Raises:
        ValueError: The tokenizer cannot be loaded, or does not suit the tower.
    """
    context = context_length(config, clip)
    if config.tokenizer is None:
        name = config.architecture if isinstance(config.architecture, str) else "ViT-B-32"
        tokenize = open_clip.get_tokenizer(name, context_length=context)
        return lambda caption: tokenize([caption])[0].to(torch.int64)
    with explain_loading(f"tokenizer {str(config.tokenizer)!r}"):
        tokenizer = AutoTokenizer.from_pretrained(config.tokenizer, trust_remote_code=False)
    _check_size(config, tokenizer, getattr(clip, "vocab_size", None))
    tower = getattr(getattr(clip, "text", None), "config", None)  # of transformers, where the text tower is
    if tower is not None:
        return _tokens_of_encoder(config, tokenizer, tower.pad_token_id, context)
    if tokenizer.eos_token_id is None:
        raise ValueError(f"tokenizer {str(config.tokenizer)!r} has no end-of-sequence token, which pads the captions")
    padding = int(tokenizer.eos_token_id)

    def encode(caption: str) -> Tensor:
        ids = tokenizer(caption, add_special_tokens=False)["input_ids"][:context]
        return F.pad(torch.tensor(ids, dtype=torch.int64), (0, context - len(ids)), value=padding)

    return encode


def _check_size(config: ContrastiveRunConfig, tokenizer: PreTrainedTokenizerBase, table: int | None) -> None:
    largest = max(tokenizer.get_vocab().values())
    if table is not None and largest >= table:
        raise ValueError(
            f"tokenizer {str(config.tokenizer)!r} has ids up to {largest}, but the text tower has {table} tokens: set "
            f"vocab_size of the architecture's text_cfg, or of the text tower's config.json, to {largest + 1} or more"
        )


def _tokens_of_encoder(
    config: ContrastiveRunConfig, tokenizer: PreTrainedTokenizerBase, padding: int | None, context: int
) -> Tokenize:
    if padding is None or tokenizer.pad_token_id != padding:
        raise ValueError(
            f"tokenizer {str(config.tokenizer)!r} pads with {tokenizer.pad_token_id}, but the text tower ignores "
            f"{padding}: set pad_token_id of the text tower's config.json to that of its tokenizer"
        )

    def encode(caption: str) -> Tensor:
        # open_clip's own tokenizer collapses white space too.
        text = " ".join(caption.split())
        encoded = tokenizer(text, max_length=context, truncation=True, padding="max_length", return_tensors="pt")
        return encoded["input_ids"][0]

    return encode
