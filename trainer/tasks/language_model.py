"""Build the task of ``trainer.pretrain_lm``: a small causal language model and a tokenizer of its own."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast

from model.factory import build_architecture, torch_dtype
from model.language_model import run_causal_lm
from model.loss import find_target_positions, gather_labels, summed_cross_entropy
from trainer.config.deepspeed_json import deepspeed_json
from trainer.config.run_config import LanguageModelRunConfig, TokenizerTrainingConfig
from trainer.data.batch import BatchFormat
from trainer.data.samples.sample_members import text_member
from trainer.data.shards.manifest import load_manifest
from trainer.data.shards.reader import ShardReader
from trainer.deepspeed_engine.engine import partitioned_loading
from trainer.loop import Task
from trainer.runtime.distributed import World, barrier
from trainer.runtime.run_folder import RunFolder
from trainer.tasks.language_model_fit import check_language_model
from trainer.tasks.row_builders import text_builders


@dataclass
class LanguageModelOutput:
    """Hold the loss, summed over the labels."""

    loss: Tensor


class CausalLanguageModel(nn.Module):
    """Wrap a Hugging Face causal language model so that it returns the summed loss of a batch."""

    def __init__(self, language_model: nn.Module) -> None:
        super().__init__()
        self.language_model = language_model

    def forward(
        self,
        input_ids: Tensor,
        labels: Tensor,
        position_ids: Tensor | None = None,
        target_positions: Tensor | None = None,
        document_offsets: Tensor | None = None,
        longest_document: int | None = None,
        **unused: Any,
    ) -> LanguageModelOutput:
        """Return the summed cross-entropy.

        Args:
            input_ids: int64 [B, L].
            labels: int64 [B, L] at their token's own position; -100 is ignored.
            position_ids: int64 [B, L] of packed rows, restarting at 0 with each document.
            target_positions: ``model.loss.find_target_positions`` of the labels; None computes them.
            document_offsets: ``model.media_index.find_documents`` of packed rows.
            longest_document: Tokens of the longest packed document.
            unused: Other fields of a batch.
        """
        documents = (position_ids, document_offsets, longest_document)
        logits = run_causal_lm(self.language_model, input_ids, None, *documents)
        positions = find_target_positions(labels) if target_positions is None else target_positions
        loss = summed_cross_entropy(logits.flatten(0, 1)[positions], gather_labels(labels, positions))
        return LanguageModelOutput(loss)


def read_texts(manifest: Path) -> Iterator[str]:
    """Yield the texts of a manifest, shard after shard.

    Raises:
        ShardError: A shard cannot be read.
        SampleError: A text is not UTF-8.
    """
    reader = ShardReader(load_manifest(manifest))
    try:
        for shard, samples in enumerate(reader.manifest.samples):
            for index in range(int(samples)):
                yield text_member(reader.read(shard, index)[1])
    finally:
        reader.close()


def train_tokenizer(texts: Iterable[str], config: TokenizerTrainingConfig) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE: it encodes every text, and only ``end_of_text`` is special."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=config.vocab_size,
        special_tokens=[config.end_of_text],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=config.end_of_text, eos_token=config.end_of_text
    )


def load_run_tokenizer(config: LanguageModelRunConfig) -> PreTrainedTokenizerFast:
    """Load the tokenizer that the run trained at its start."""
    tokenizer: PreTrainedTokenizerFast = PreTrainedTokenizerFast.from_pretrained(RunFolder(config.run_dir).tokenizer)
    return tokenizer


def model_settings(config: LanguageModelRunConfig, tokenizer: PreTrainedTokenizerFast) -> dict[str, Any]:
    """Return the Hugging Face config as a mapping: the run's architecture with the tokenizer's vocabulary."""
    return {
        **config.architecture,
        "vocab_size": len(tokenizer),
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }


def build_language_model_task(config: LanguageModelRunConfig, world: World) -> Task:
    """Build a model with random weights; train the tokenizer unless an earlier start of this run did."""
    folder = RunFolder(config.run_dir).tokenizer
    if world.is_main and not (folder / "tokenizer.json").exists():
        texts = islice(read_texts(config.data.sources[0].manifest), config.tokenizer.num_samples)
        train_tokenizer(texts, config.tokenizer).save_pretrained(folder)
    barrier()
    tokenizer = load_run_tokenizer(config)
    settings = deepspeed_json(config)
    architecture = model_settings(config, tokenizer)
    torch.manual_seed(config.training.seed)
    with partitioned_loading(settings):
        language_model = build_architecture("architecture", architecture, torch_dtype(config.training.dtype))
    check_language_model(config.data, language_model)
    return Task(
        module=CausalLanguageModel(language_model),
        builders=text_builders(config.data, tokenizer),
        batch_format=BatchFormat(tokenizer.eos_token_id, image_size=1),
        deepspeed=settings,
        model={"architecture": architecture},
    )
