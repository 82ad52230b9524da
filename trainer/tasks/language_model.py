"""Pretraining of a small causal language model on text, with a tokenizer of its own."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from model.factory import torch_dtype
from model.loss import labels_after, summed_cross_entropy, target_positions
from trainer.config.deepspeed_json import deepspeed_json
from trainer.config.run_config import LanguageModelRunConfig, TokenizerTrainingConfig
from trainer.data.samples.decode import text_member
from trainer.data.shards.manifest import load_manifest
from trainer.data.shards.reader import ShardReader
from trainer.data.stream.loader import micro_batches_per_step
from trainer.deepspeed_engine.engine import partitioned_loading
from trainer.loop import Task
from trainer.runtime.distributed import World, barrier
from trainer.tasks.row_builders import check_packing, text_builders


@dataclass
class LanguageModelOutput:
    """loss: summed over the labels."""

    loss: Tensor


class CausalLanguageModel(nn.Module):
    """A Hugging Face causal language model that returns the summed loss of the batch."""

    def __init__(self, language_model: nn.Module) -> None:
        super().__init__()
        self.language_model = language_model

    def forward(
        self,
        input_ids: Tensor,
        labels: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        positions: Tensor | None = None,
        **unused: Tensor,
    ) -> LanguageModelOutput:
        """All int64 [B, L]; labels at their token's own position, -100 ignored. Packed documents come as position_ids
        that restart with each, and without an attention mask. positions: ``target_positions`` of the labels, if known.
        """
        attention = {"attention_mask": attention_mask} if position_ids is None else {"position_ids": position_ids}
        logits = self.language_model(input_ids=input_ids, use_cache=False, **attention).logits
        positions = target_positions(labels) if positions is None else positions
        loss = summed_cross_entropy(logits.flatten(0, 1)[positions], labels_after(labels, positions))
        return LanguageModelOutput(loss)


def read_texts(manifest: Path) -> Iterator[str]:
    """The texts of a manifest, shard after shard. Raises: ShardError, SampleError for text that is not UTF-8."""
    reader = ShardReader(load_manifest(manifest))
    try:
        for shard, samples in enumerate(reader.manifest.samples):
            for index in range(int(samples)):
                yield text_member(reader.read(shard, index)[1])
    finally:
        reader.close()


def train_tokenizer(texts: Iterable[str], config: TokenizerTrainingConfig) -> PreTrainedTokenizerFast:
    """A byte-level BPE: every text can be encoded, and nothing but ``end_of_text`` is special."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=config.vocabulary,
        special_tokens=[config.end_of_text],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=config.end_of_text, eos_token=config.end_of_text
    )


def tokenizer_folder(config: LanguageModelRunConfig) -> Path:
    """Where the run keeps its tokenizer."""
    return config.run_dir / "tokenizer"


def load_run_tokenizer(config: LanguageModelRunConfig) -> PreTrainedTokenizerFast:
    """The tokenizer that the run trained at its start."""
    tokenizer: PreTrainedTokenizerFast = PreTrainedTokenizerFast.from_pretrained(tokenizer_folder(config))
    return tokenizer


def model_settings(config: LanguageModelRunConfig, tokenizer: PreTrainedTokenizerFast) -> dict[str, Any]:
    """The Hugging Face config as values: the run's architecture, with what the tokenizer decides."""
    return {
        **config.architecture,
        "vocab_size": len(tokenizer),
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }


def build_language_model_task(config: LanguageModelRunConfig, world: World) -> Task:
    """A model with random weights, and the tokenizer: trained now, or in an earlier start of this run."""
    folder = tokenizer_folder(config)
    if world.is_main and not (folder / "tokenizer.json").exists():
        texts = islice(read_texts(config.data.sources[0].manifest), config.tokenizer.samples)
        train_tokenizer(texts, config.tokenizer).save_pretrained(folder)
    barrier()
    tokenizer = load_run_tokenizer(config)
    settings = deepspeed_json(
        config, world_size=world.size, micro_batches_per_step=micro_batches_per_step(config.data, world.size)
    )
    architecture = model_settings(config, tokenizer)
    torch.manual_seed(config.training.seed)
    with partitioned_loading(settings):
        language_model = AutoModelForCausalLM.from_config(
            AutoConfig.for_model(**architecture), dtype=torch_dtype(config.training.dtype)
        )
    check_packing(config.data, language_model)
    return Task(
        module=CausalLanguageModel(language_model),
        builders=text_builders(config.data, tokenizer),
        pad_id=tokenizer.eos_token_id,
        media_shape=(1, 3, 1, 1),
        deepspeed=settings,
        model={"architecture": architecture},
    )
