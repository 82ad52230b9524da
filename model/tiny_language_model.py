"""Build a tiny causal language model of the class and kind of a large one, to try out how the large one behaves."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from typing import Any

import torch
from transformers import PreTrainedConfig

from model.internals import attention_implementation

_MOST_WEIGHTS = 100_000_000
# Largest sizes of a tiny model, by the names of its config.
_SIZES = {
    "vocab_size": 32,
    "vocab_size_per_layer_input": 32,
    "pad_token_id": 0,
    "intermediate_size": 64,
    "moe_intermediate_size": 64,
    "shared_expert_intermediate_size": 64,
    "num_experts": 16,
    "num_local_experts": 16,
}


def build_tiny(lm: Any, **settings: int) -> Any:
    """Build a tiny model of the LM's class on the CPU, in float32, always with the same random weights.

    The class is called directly. ``from_config`` would partition the weights while an ``HfDeepSpeedConfig`` lives.

    Args:
        lm: Hugging Face's causal LM; its weights are not read, so they may be partitioned.
        settings: Settings of its config to replace.

    Raises:
        ValueError: The sizes of its config have other names, so that the model would not be tiny.
    """
    config = copy.deepcopy(lm.config)
    for part in _parts(config):
        _shrink(part)
    for name, value in settings.items():
        setattr(config.get_text_config(), name, value)
    with torch.device("meta"):
        num_weights = sum(parameter.numel() for parameter in type(lm)(copy.deepcopy(config)).parameters())
    if num_weights > _MOST_WEIGHTS:
        raise ValueError(f"a tiny model would have {num_weights:,} weights")
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        torch.default_generator.manual_seed(0)
        tiny = type(lm)(config).float().eval()
        for parameter in tiny.parameters():
            if parameter.ndim > 1:  # a family's own start is so small that a difference would look like rounding
                parameter.data.normal_(std=1 / math.sqrt(parameter.shape[-1]))
    if attention_implementation(lm.config) not in ("eager", "sdpa"):
        tiny.set_attn_implementation("eager")  # the others need a GPU; their masks come from the same positions
    return tiny


def _parts(config: PreTrainedConfig) -> Iterator[PreTrainedConfig]:
    """Yield a config and the configs inside it, which models of several modalities have."""
    yield config
    for name in config.sub_configs:
        part = getattr(config, name, None)
        if isinstance(part, PreTrainedConfig):
            yield from _parts(part)


def _shrink(config: Any) -> None:
    """Reduce the sizes of a config in place. ``head_dim`` stays, since rotary settings may depend on it."""
    for name, size in _SIZES.items():
        value = getattr(config, name, None)
        if isinstance(value, list):  # one for each block
            setattr(config, name, [min(entry, size) for entry in value])
        elif value is not None:
            setattr(config, name, min(value, size))
    num_layers, num_heads = (getattr(config, name, None) for name in ("num_hidden_layers", "num_attention_heads"))
    if num_layers is not None:
        _keep_layers(config, num_layers)
    if num_heads is not None:
        few, groups = min(4, num_heads), getattr(config, "num_key_value_heads", None)
        if groups is not None:
            config.num_key_value_heads = few if groups == num_heads else min(groups, 2)
        config.hidden_size = config.hidden_size // num_heads * few
        config.num_attention_heads = few


def _keep_layers(config: Any, num_layers: int) -> None:
    """Keep two layers, and one of every kind where the config lists the kinds."""
    lists = {name: value for name, value in vars(config).items() if _is_list_of(value, num_layers)}
    kinds = next((value for name, value in lists.items() if isinstance(value[0], str)), [""] * num_layers)
    kept = sorted({*range(min(2, num_layers)), *(kinds.index(kind) for kind in kinds)})
    config.num_hidden_layers = len(kept)
    for name, value in lists.items():
        setattr(config, name, [value[index] for index in kept])


def _is_list_of(value: Any, length: int) -> bool:
    return isinstance(value, list) and len(value) == length
