"""Check that a tokenizer that does not suit the contrastive towers is refused with the setting's name."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.model.builders import VOCAB_SIZE, tiny_tokenizer
from trainer.config.data_config import DataConfig
from trainer.config.run_config import ContrastiveRunConfig, TrainingConfig
from trainer.tasks.contrastive.captions import caption_tokenizer


def encode(folder: Path, vocab_size: int = VOCAB_SIZE) -> Any:
    config = ContrastiveRunConfig(
        run_dir=folder, training=TrainingConfig(steps=1), data=DataConfig(()), tokenizer=folder
    )
    return caption_tokenizer(config, SimpleNamespace(context_length=4, vocab_size=vocab_size))


def test_captions_are_padded(tmp_path: Path) -> None:
    tiny_tokenizer(eos_token="</s>").save_pretrained(tmp_path)
    assert encode(tmp_path)("w0 w1").tolist() == [4, 5, 2, 2]


def test_a_tokenizer_that_does_not_suit_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^tokenizer .*cannot be loaded"):
        encode(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"^tokenizer .*end-of-sequence"):
        encode(tmp_path)
    tiny_tokenizer(eos_token="</s>").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"^tokenizer .*ids up to 47.*vocab_size.*48 or more"):
        encode(tmp_path, VOCAB_SIZE - 1)
