"""Choose which parts of a Flamingo train: the paper's new layers, or also the language model and the vision tower."""

from __future__ import annotations

from typing import Literal, get_args

from torch import nn

from model.config import TrainableConfig
from model.flamingo import Flamingo
from model.lora import LORA

Part = Literal["vision", "resampler", "cross_attention", "language_model", "new_tokens"]
PARTS: tuple[Part, ...] = get_args(Part)

_PREFIXES: tuple[tuple[str, Part], ...] = (
    ("vision_encoder.", "vision"),
    ("resampler.", "resampler"),
    ("cross_attention.", "cross_attention"),
    ("language_model.lm.", "language_model"),
    ("language_model.input_rows.", "new_tokens"),
    ("language_model.output_rows.", "new_tokens"),
)


def part_of(name: str) -> Part:
    """Return the part that a parameter of a Flamingo belongs to.

    Raises:
        KeyError: No parameter of a Flamingo has this name.
    """
    for prefix, part in _PREFIXES:
        if name.startswith(prefix):
            return part
    raise KeyError(name)


def parameters_of(model: Flamingo, part: str) -> dict[str, nn.Parameter]:
    """Return the parameters of a part by name, in the model's order."""
    return {name: parameter for name, parameter in model.named_parameters() if part_of(name) == part}


def set_trainable(model: Flamingo, config: TrainableConfig) -> None:
    """Let parts of a model train or freeze them. A part that trains whole leaves evaluation mode with the model.

    Args:
        model: Model whose adapters, if any, were added by ``model.lora.add_adapters``.
        config: What trains.

    Raises:
        ValueError: Nothing would train.
    """
    for name, parameter in model.named_parameters():
        part = part_of(name)
        mode = getattr(config, part)
        if mode == "lora":
            parameter.requires_grad_(LORA in name)
        elif part != "new_tokens" or mode == "frozen":  # each of the new tokens has a setting of its own
            parameter.requires_grad_(mode != "frozen")
    model.language_model.set_training(config.language_model)
    model.vision_encoder.set_training(config.vision)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ValueError("model.trainable freezes every part: let at least one train")
