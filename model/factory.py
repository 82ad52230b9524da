"""Build a Flamingo from its config, whether or not DeepSpeed partitions parameters as they are made."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from model.config import DType, FlamingoConfig, LanguageModelConfig
from model.flamingo import Flamingo, cross_attention_blocks
from model.gated_cross_attention import GatedCrossAttentionBlock
from model.language_model import InputRow, LanguageModel, OutputRow, read_sizes, table_size
from model.lm_probes import find_decoder_blocks
from model.loading_errors import explain_loading
from model.lora import add_adapters
from model.parameters import Gather, Partition, Redraw, no_gather
from model.perceiver_resampler import build_resampler
from model.quantization import quantize_language_model
from model.tokens import FlamingoTokenizer, SpecialTokenIds, load_tokenizer
from model.trainable_parts import set_trainable
from model.vision_encoder import VisionEncoder, build_tower

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def torch_dtype(name: DType | torch.dtype) -> torch.dtype:
    """Return the torch type that a config names."""
    return name if isinstance(name, torch.dtype) else _DTYPES[name]


def build_tokenizer(config: FlamingoConfig) -> FlamingoTokenizer:
    """Load the language model's tokenizer and add the two new tokens.

    Raises:
        ValueError: The config names no tokenizer, or one that does not suit.
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
    redraw: Redraw | None = None,
) -> Flamingo:
    """Build the model with its frozen parts loaded and its trainable parts at their start.

    The start depends on ``config``, ``tokens`` and ``seed`` only: every draw is on the CPU, in float32.

    Args:
        config: Settings of the model.
        tokens: Ids of the special tokens (a ``FlamingoTokenizer`` is one).
        dtype: Type of every parameter, frozen or trained.
        seed: Seed of the trainable parts, and of frozen parts that are not loaded from anywhere.
        gather: Context that makes partitioned parameters whole (``deepspeed.zero.GatheredParameters``).
        partition: Context in which trainable modules are made (``deepspeed.zero.Init``). The language model is loaded
            outside it, because Hugging Face partitions by itself while an ``HfDeepSpeedConfig`` lives. The tower is
            built outside it, because open_clip's has a parameter without dimensions until it is cut down.
        redraw: Gives a language model the weights of one that a function builds whole. transformers draws partitioned
            random weights in another order; an export does not hold frozen ones, so they have to be those of any run.

    Raises:
        ValueError: A setting does not fit; the message names it.
    """
    dtype, trainable = torch_dtype(dtype), config.trainable
    if config.language_model.quantization != "none" and trainable.language_model != "frozen":
        raise ValueError(
            f"model.language_model.quantization {config.language_model.quantization} is for a frozen language model, "
            f"not model.trainable.language_model {trainable.language_model}"
        )
    with _seeded(seed, 0):
        vision_encoder = VisionEncoder(build_tower(config.vision).to(dtype), config.vision)

    def build_lm() -> Any:
        with _seeded(seed, 1):
            return build_language_model(config.language_model, dtype, random=trainable.language_model == "from_random")

    lm = build_lm()
    if redraw is not None and config.language_model.name is None and trainable.language_model in ("frozen", "lora"):
        redraw(lm, build_lm)
    tokens.require_table(table_size(lm))
    input_start, output_start = _end_of_sequence_rows(lm, tokens.eos_id, gather)
    dim, num_blocks = read_sizes(lm)
    error = None
    if config.language_model.quantization != "none":
        blocks = find_decoder_blocks(lm)
        error = quantize_language_model(lm, blocks, config.language_model.quantization, gather, partition)
    with _seeded(seed, 2), _default_dtype(dtype), partition():
        resampler = build_resampler(config.resampler, vision_encoder.dim)
        cross_attention = nn.ModuleList(
            GatedCrossAttentionBlock(config.cross_attention, dim, resampler.dim)
            for _ in cross_attention_blocks(config, num_blocks)
        )
        added = [(tokens.image_id, config.tokens.train_image), (tokens.end_of_chunk_id, True)]
        input_rows = [InputRow(token, input_start, trained) for token, trained in added]
        predicted = added if config.tokens.image_output else added[1:]
        output_rows = [OutputRow(token, output_start, trained) for token, trained in predicted]
    # Adapters are made whole: peft draws them in a way that a partitioned parameter does not allow.
    with _seeded(seed, 3):
        if trainable.language_model == "lora":
            add_adapters(lm, find_decoder_blocks(lm), config.language_model_lora, "model.language_model_lora")
        if trainable.vision == "lora":
            add_adapters(vision_encoder.tower, [vision_encoder.tower], config.vision_lora, "model.vision_lora")
    language_model = LanguageModel(lm, input_rows, output_rows)
    language_model.quantization_error = error
    model = Flamingo(config, tokens, vision_encoder, resampler, cross_attention, language_model)
    set_trainable(model, trainable)
    return model


def build_language_model(config: LanguageModelConfig, dtype: torch.dtype, *, random: bool = False) -> Any:
    """Build the Hugging Face causal LM of a config: from safetensors, or random from ``architecture``.

    Args:
        config: Settings of the language model.
        dtype: Type of the parameters.
        random: Whether a model with a name gets random weights too.

    Raises:
        ValueError: ``name`` and ``architecture`` are both set or both left out, or Hugging Face cannot load the model.
    """
    if (config.name is None) == (config.architecture is None):
        raise ValueError("set one of language_model.name and language_model.architecture")
    attention = "" if config.attention is None else f", language_model.attention {config.attention!r},"
    if config.name is not None:
        revision = "" if config.revision is None else f", language_model.revision {config.revision!r}"
        with explain_loading(f"language_model.name {config.name!r}{revision}{attention}"):
            if random:
                architecture = AutoConfig.from_pretrained(config.name, revision=config.revision or "main")
                return AutoModelForCausalLM.from_config(architecture, dtype=dtype, attn_implementation=config.attention)
            return AutoModelForCausalLM.from_pretrained(
                config.name,
                revision=config.revision or "main",
                dtype=dtype,
                attn_implementation=config.attention,
                use_safetensors=True,
                trust_remote_code=False,
            )
    return build_architecture("language_model.architecture", config.architecture or {}, dtype, config.attention)


def build_architecture(
    setting: str, architecture: Mapping[str, Any], dtype: torch.dtype, attention: str | None = None
) -> Any:
    """Build a Hugging Face causal LM with random weights.

    Args:
        setting: Name of the setting that holds ``architecture``, for the error.
        architecture: Hugging Face config as a mapping with its ``model_type``.
        dtype: Type of the parameters.
        attention: Hugging Face's ``attn_implementation``.

    Raises:
        ValueError: The ``model_type`` is missing, or Hugging Face cannot build the model.
    """
    values = dict(architecture)
    if "model_type" not in values:
        raise ValueError(f"{setting} needs Hugging Face's model_type, for example llama")
    settings = f"{setting} (model_type {values['model_type']!r})"
    settings += "" if attention is None else f", language_model.attention {attention!r},"
    with explain_loading(settings):
        config = AutoConfig.for_model(values.pop("model_type"), **values)
        return AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=attention)


def _end_of_sequence_rows(lm: Any, eos_id: int, gather: Gather) -> tuple[Tensor, Tensor]:
    """Return the input and output embeddings of the end-of-sequence token, [E] each, where added tokens start.

    The input embedding comes from the embedding module's call, because some families scale it there.
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
def _seeded(seed: int, part: int) -> Iterator[None]:
    """Seed the CPU's random numbers for one part of the model, and restore the generator afterwards."""
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
