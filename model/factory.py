"""Builds a Flamingo from its config, whether or not DeepSpeed partitions parameters as they are made."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from model.config import DType, FlamingoConfig, LanguageModelConfig
from model.flamingo import Flamingo, cross_attention_blocks
from model.gated_cross_attention import GatedCrossAttentionBlock
from model.language_model import InputRow, LanguageModel, OutputRow
from model.parameters import Gather, no_gather
from model.perceiver_resampler import PerceiverResampler
from model.tokens import FlamingoTokenizer, SpecialTokenIds, load_tokenizer
from model.vision_encoder import VisionEncoder, build_tower

Partition = Callable[[], AbstractContextManager[Any]]

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def torch_dtype(name: DType | torch.dtype) -> torch.dtype:
    """The torch type of a config's name."""
    return name if isinstance(name, torch.dtype) else _DTYPES[name]


def build_tokenizer(config: FlamingoConfig) -> FlamingoTokenizer:
    """The language model's tokenizer with the two new tokens.

    Raises:
        ValueError: the config names no tokenizer, or it has no end-of-sequence token.
    """
    return load_tokenizer(config.language_model, config.tokens)


def build_flamingo(
    config: FlamingoConfig,
    tokens: SpecialTokenIds,
    *,
    dtype: DType | torch.dtype = "float32",
    seed: int = 0,
    gather: Gather = no_gather,
    partition: Partition = nullcontext,
) -> Flamingo:
    """The model with its frozen parts loaded and its trainable parts at their start.

    The start depends on ``config``, ``tokens`` and ``seed`` only: every draw is on the CPU, in float32.

    Args:
        config: what to build.
        tokens: ids of the special tokens (a ``FlamingoTokenizer`` is one).
        dtype: of every parameter, frozen or trained.
        seed: of the trainable parts, and of frozen parts that are not loaded from anywhere.
        gather: makes partitioned parameters whole inside its context (``deepspeed.zero.GatheredParameters``).
        partition: a context in which trainable modules are made (``deepspeed.zero.Init``). The language model is
            loaded outside of it, since Hugging Face partitions by itself while an ``HfDeepSpeedConfig`` lives; the
            tower too, since open_clip's has a parameter without dimensions until it is cut down.

    Raises:
        ValueError: names the setting to change.
    """
    dtype = torch_dtype(dtype)
    with _draws(seed, 0):
        vision_encoder = VisionEncoder(build_tower(config.vision).to(dtype), config.vision)
    with _draws(seed, 1):
        lm = build_language_model(config.language_model, dtype)
    input_start, output_start = _end_of_sequence_rows(lm, tokens.eos_id, gather)
    text_config = lm.config.get_text_config()
    with _draws(seed, 2), _default_dtype(dtype), partition():
        resampler = PerceiverResampler(config.resampler, vision_encoder.width)
        cross_attention = nn.ModuleList(
            GatedCrossAttentionBlock(config.cross_attention, text_config.hidden_size, resampler.dim)
            for _ in cross_attention_blocks(config, text_config.num_hidden_layers)
        )
        new = [(tokens.image_id, config.tokens.train_image), (tokens.end_of_chunk_id, True)]
        input_rows = [InputRow(token, input_start, trained) for token, trained in new]
        output_rows = [OutputRow(token, output_start, trained) for token, trained in new]
    language_model = LanguageModel(lm, input_rows, output_rows)
    return Flamingo(config, tokens, vision_encoder, resampler, cross_attention, language_model)


def build_language_model(config: LanguageModelConfig, dtype: torch.dtype) -> Any:
    """The Hugging Face causal LM of a config: from safetensors, or random from ``architecture``.

    Raises:
        ValueError: neither ``name`` nor ``architecture`` is set, or both are; or ``name`` has no safetensors weights.
    """
    if (config.name is None) == (config.architecture is None):
        raise ValueError("set one of language_model.name and language_model.architecture")
    if config.name is not None:
        try:
            return AutoModelForCausalLM.from_pretrained(
                config.name,
                revision=config.revision or "main",
                dtype=dtype,
                attn_implementation=config.attention,
                use_safetensors=True,
                trust_remote_code=False,
            )
        except OSError as error:
            raise ValueError(f"language_model.name {config.name!r} cannot be loaded: {error}") from error
    architecture = dict(config.architecture or {})
    if "model_type" not in architecture:
        raise ValueError("language_model.architecture needs Hugging Face's model_type, for example llama")
    hf_config = AutoConfig.for_model(architecture.pop("model_type"), **architecture)
    return AutoModelForCausalLM.from_config(hf_config, dtype=dtype, attn_implementation=config.attention)


def _end_of_sequence_rows(lm: Any, eos_id: int, gather: Gather) -> tuple[Tensor, Tensor]:
    """Input and output row of the end-of-sequence token, where the new rows start, [E] each.

    The input row is taken as the embedding module gives it: some families scale there.
    """
    embedding, head = lm.get_input_embeddings(), lm.get_output_embeddings()
    with torch.no_grad(), gather([embedding.weight]):
        input_row = embedding(torch.tensor([eos_id], device=embedding.weight.device))[0].clone()
    if head is None:
        raise ValueError(f"{type(lm).__name__} has no output embedding: language_model.name must be a causal LM")
    with torch.no_grad(), gather([head.weight]):
        output_row = head.weight[eos_id].clone()
    return input_row, output_row


@contextmanager
def _draws(seed: int, part: int) -> Iterator[None]:
    """CPU random numbers of one part of the model; the generator is put back afterwards."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed * 1_000_003 + part)
        yield


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
