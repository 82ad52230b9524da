"""Probe how a Hugging Face causal language model is built and how it behaves.

So no table of families is needed. No probe reads a weight, so all of them work while ZeRO-3 has weights partitioned.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig
from transformers.modeling_outputs import BaseModelOutputWithPast

from model.internals import attention_implementation

# Largest sizes of a tiny model, by the names of its config.
_SIZES = {
    "vocab_size": 32,
    "pad_token_id": 0,
    "intermediate_size": 64,
    "moe_intermediate_size": 64,
    "shared_expert_intermediate_size": 64,
    "num_experts": 16,
    "num_local_experts": 16,
}
# Documents; the second follows the first or the other. The ids suit vocabularies of 16 tokens and more.
_FIRST, _OTHER, _SECOND = [1, 4, 7, 10, 13, 3], [2, 5, 8, 11, 14, 6], [3, 6, 9, 12, 15, 4, 7]
# Rounding changes the logits by a millionth of their size; a visible document changes them by more than a hundredth.
_MOST_DIFFERENCE = 1e-3


def find_decoder_blocks(lm: Any) -> nn.ModuleList:
    """Return the decoder blocks of a causal LM: its outermost list that is as long as the config says.

    Raises:
        ValueError: The LM has no such list, or several.
    """
    blocks: nn.ModuleList = lm.get_submodule(_find_blocks_name(lm))
    return blocks


def _find_blocks_name(lm: Any) -> str:
    count = lm.config.get_text_config().num_hidden_layers
    found: dict[str, nn.ModuleList] = {}
    for name, module in lm.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == count:
            if not any(name.startswith(outer + ".") for outer in found):
                found[name] = module
    if len(found) != 1:
        raise ValueError(
            f"{type(lm).__name__} has {len(found)} lists of {count} blocks ({', '.join(found) or 'none'}), but one was "
            "expected: choose another language_model"
        )
    return next(iter(found))


class _DecoderOutput(BaseModelOutputWithPast):
    """Output of a decoder whose other fields, which differ by family, are all None."""

    def __getattr__(self, name: str) -> None:
        return None


def gives_logits_unchanged(lm: Any, head: Any) -> bool:
    """Return whether a causal LM returns the output of its output embedding without scaling or capping it.

    The LM's own ``forward`` runs around a decoder that gives zeros and an output embedding that gives one known tensor,
    which must come out again.
    """
    device = head.weight.device
    decoder = lm.get_submodule(_find_blocks_name(lm).rpartition(".")[0])
    given = torch.zeros(1, 1, 1, device=device)
    hidden = _DecoderOutput(last_hidden_state=torch.zeros(1, 1, head.in_features, device=device))
    decoder.forward, head.forward = lambda *args, **kwargs: hidden, lambda *args: given
    try:
        with torch.no_grad():
            output = lm(input_ids=torch.zeros(1, 1, dtype=torch.int64, device=device), use_cache=False)
    finally:
        del decoder.forward, head.forward
    return output.logits is given


@torch.no_grad()
def separates_packed_documents(lm: Any) -> bool:
    """Return whether a causal LM keeps packed documents apart when it gets only positions that restart.

    Many families derive their attention mask from the positions. Others do not (OPT, BLOOM), and state-space layers
    carry their state on. A tiny model of the same class and config, with random weights on the CPU, reads two packed
    documents: the second must get the same logits when the first changes, and when it stands alone.

    Raises:
        ValueError: No such tiny model can be built or run, so nothing is known about this LM.
    """
    try:
        small = _build_small(lm)
        together = _run(small, torch.tensor([_FIRST + _SECOND, _OTHER + _SECOND]), [len(_FIRST), len(_SECOND)])
        alone = _run(small, torch.tensor([_SECOND]), [len(_SECOND)])
    except Exception as error:  # a family's own code may fail in any way
        raise ValueError(
            f"{type(lm).__name__} cannot be probed for packed documents ({type(error).__name__}: {error}): set packing "
            "to false, or use another language model"
        ) from error
    return bool((together[:, len(_FIRST) :] - alone).abs().max() <= _MOST_DIFFERENCE * alone.abs().max())


def _run(small: Any, input_ids: Tensor, lengths: list[int]) -> Tensor:
    positions = torch.cat([torch.arange(length) for length in lengths]).expand_as(input_ids)
    logits: Tensor = small(input_ids=input_ids, position_ids=positions, use_cache=False).logits
    return logits


def _build_small(lm: Any) -> Any:
    """Build a tiny model of the LM's class on the CPU, in float32, always with the same random weights.

    The class is called directly. ``from_config`` would partition the weights while an ``HfDeepSpeedConfig`` lives.
    """
    config = copy.deepcopy(lm.config)
    for part in _parts(config):
        _shrink(part)
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        torch.default_generator.manual_seed(0)
        small = type(lm)(config).float().eval()
        for parameter in small.parameters():
            if parameter.ndim > 1:  # a family's own start is so small that a leak would look like rounding
                parameter.normal_(std=1 / math.sqrt(parameter.shape[-1]))
    if attention_implementation(lm.config) not in ("eager", "sdpa"):
        small.set_attn_implementation("eager")  # the others need a GPU; their masks come from the same positions
    return small


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
        if (value := getattr(config, name, None)) is not None:
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
