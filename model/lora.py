"""Add low-rank adapters (LoRA, arXiv:2106.09685) to linear layers, with peft's own layers and file format."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from model.config import LoraConfig
from model.parameters import full_shape

LORA = ".lora_"  # in the name of every parameter of an adapter
_ADAPTER = "default"  # peft's name of the only adapter, which its files leave out
_NUM_NAMES = 8  # names of layers in a message


def add_adapters(module: nn.Module, inside: Iterable[nn.Module], config: LoraConfig, setting: str) -> None:
    """Add adapters to linear layers in place. Their product is 0 at first, so the module computes what it did.

    The draws come from torch's default generator on the CPU, in float32.

    Args:
        module: Module to change. Its parameters may be partitioned.
        inside: Submodules whose linear layers can have adapters: the blocks.
        config: Rank and targets.
        setting: Name of the setting with ``config``, for messages.

    Raises:
        ValueError: A target matches no layer, or peft is not installed.
    """
    try:
        from peft import LoraConfig as PeftConfig
        from peft import inject_adapter_in_model
    except ImportError:
        raise ValueError(f"{setting} needs peft: pip install 'flamingo-trainer[lora]'") from None

    layers = _linear_layers(module, inside)
    names = _target_names(layers, config.targets, setting)
    transposed = any(isinstance(layer, Conv1D) for layer in layers.values())
    settings = PeftConfig(
        r=config.rank,
        lora_alpha=config.scale,
        lora_dropout=config.dropout,
        target_modules=names,
        fan_in_fan_out=transposed,
        exclude_modules=_others_of_that_name(module, layers, names),
    )
    inject_adapter_in_model(settings, module, adapter_name=_ADAPTER)
    added = {name: parameter for name, parameter in module.named_parameters() if LORA in name}
    with torch.no_grad():
        for name, parameter in added.items():
            if ".lora_A." in name:
                bound = 1 / math.sqrt(full_shape(parameter)[1])  # that of a linear layer, as peft draws it
                parameter.copy_(torch.empty(full_shape(parameter)).uniform_(-bound, bound))


def adapter_dropouts(module: nn.Module) -> list[nn.Module]:
    """Return the dropout modules of all adapters."""
    return [found for name, found in module.named_modules() if name.endswith(f"lora_dropout.{_ADAPTER}")]


@contextmanager
def adapters_off(module: nn.Module) -> Iterator[None]:
    """Let a module compute without its adapters in this context.

    Every adapter still runs, but its product is multiplied by 0: ZeRO-3 then sees the same modules. peft's own way to
    turn adapters off would also freeze them.
    """
    scalings = [found.scaling for name, found in module.named_modules() if hasattr(found, "lora_A")]
    before = [dict(scaling) for scaling in scalings]
    for scaling in scalings:
        scaling.update(dict.fromkeys(scaling, 0.0))
    try:
        yield
    finally:
        for scaling, kept in zip(scalings, before, strict=True):
            scaling.update(kept)


def merge_adapters(module: nn.Module) -> None:
    """Add the product of each adapter to the weights of its layer, in place, and leave the adapter out of the forward.

    The parameters must be whole.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    for layer in module.modules():
        if isinstance(layer, BaseTunerLayer):
            layer.merge(safe_merge=True)


def save_adapter(folder: Path, state: Mapping[str, Tensor], config: LoraConfig, base: str | None) -> None:
    """Write an adapter that ``peft.PeftModel.from_pretrained`` loads over the plain module.

    Args:
        folder: Folder to make.
        state: Tensors by their names inside the module.
        config: Rank and targets.
        base: Name of the module's pretrained weights; None where it has none.

    Raises:
        ValueError: There are no tensors, or all products are still 0.
    """
    tensors = {name: tensor for name, tensor in state.items() if LORA in name}
    if not tensors:
        raise ValueError("the adapter is empty: no tensor of the checkpoint belongs to it")
    if not any(tensor.any() for name, tensor in tensors.items() if ".lora_B." in name):
        raise ValueError("every lora_B of the adapter is still 0: it was never trained")
    folder.mkdir(parents=True)
    renamed = {_peft_name(name): tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    save_file(renamed, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    targets = sorted({name.partition(LORA)[0].rpartition(".")[2] for name in tensors})
    description = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": config.rank,
        "lora_alpha": config.scale,
        "lora_dropout": config.dropout,
        "target_modules": targets,
        "bias": "none",
        "inference_mode": True,
    }
    (folder / "adapter_config.json").write_text(json.dumps(description, indent=2) + "\n", encoding="utf-8")


def _peft_name(name: str) -> str:
    return "base_model.model." + name.replace(f".{_ADAPTER}.", ".")


def _linear_layers(module: nn.Module, inside: Iterable[nn.Module]) -> dict[str, nn.Module]:
    """Return the linear layers inside some submodules, by their names in the module.

    The output projection of torch's MultiheadAttention is left out: the attention reads its weight and never calls it,
    so an adapter there would stay 0.
    """
    blocks = {id(found) for block in inside for found in block.modules()}
    uncalled = {id(found.out_proj) for found in module.modules() if isinstance(found, nn.MultiheadAttention)}
    return {
        name: layer
        for name, layer in module.named_modules()
        if isinstance(layer, nn.Linear | Conv1D) and id(layer) in blocks and id(layer) not in uncalled
    }


def _target_names(layers: Mapping[str, nn.Module], targets: tuple[str, ...] | None, setting: str) -> list[str]:
    known = sorted({name.rpartition(".")[2] for name in layers})
    if not known:
        raise ValueError(f"{setting}: the blocks have no linear layers that adapters could change")
    if targets is None:
        return known
    unknown = [target for target in targets if target not in known]
    if unknown or not targets:
        names = ", ".join(known[:_NUM_NAMES])
        raise ValueError(
            f"{setting}.targets: {', '.join(unknown) or 'an empty list'} matches no linear layer of the blocks; "
            f"choose among {names}"
        )
    return sorted(targets)


def _others_of_that_name(module: nn.Module, layers: Mapping[str, nn.Module], names: Iterable[str]) -> list[str] | None:
    wanted: set[Any] = set(names)
    others = [name for name, _ in module.named_modules() if name.rpartition(".")[2] in wanted and name not in layers]
    return others or None
