"""Write a trained Flamingo to a folder, the export, and read it back.

The folder has ``model.safetensors`` (trained tensors only), ``config.json``, ``preprocessor_config.json`` (how pixels
and text become input), ``frozen.json`` (a digest of every frozen tensor) and ``tokenizer/``. The frozen weights
themselves stay where they came from.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from model.config import DType, FlamingoConfig, VisionEncoderConfig
from model.factory import build_flamingo, build_tokenizer, torch_dtype
from model.flamingo import Flamingo
from model.parameters import combine_digests, explain_difference, frozen_digests, full_shape, trainable_parameters
from model.processor import ProcessorConfig, read_processor_config
from model.tokens import FlamingoTokenizer, SpecialTokenIds
from model.tower_statistics import with_statistics_of_old_exports

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_FORMAT = 1
_LOCAL = "local-dir:"


def save_pretrained(
    folder: str | Path,
    state: Mapping[str, Tensor],
    config: FlamingoConfig,
    *,
    tokens: SpecialTokenIds,
    dtype: DType | torch.dtype,
    frozen: Mapping[str, str],
    processor: ProcessorConfig,
    seed: int = 0,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> None:
    """Write an export. One process calls this.

    Args:
        folder: Folder to write to, which is made if it does not exist.
        state: Trained tensors by their names in ``trainable_parameters``, of any floating type.
        config: Settings of the model. Local paths in it that are not absolute are rewritten relative to ``folder``.
        tokens: Ids of the special tokens.
        dtype: Type that the model was trained in, for which the digests hold.
        frozen: ``frozen_digests`` of the model.
        processor: How training made pixels and text.
        seed: Seed that the model was built with. It decides frozen parts that were not loaded from anywhere.
        tokenizer: Tokenizer with the added tokens, to write as well.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    whole = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
    save_file(whole, folder / "model.safetensors")
    config = _map_paths(config, lambda path: _relative_to(path, folder))
    if tokenizer is not None:
        tokenizer.save_pretrained(folder / "tokenizer")
        config = replace(config, language_model=replace(config.language_model, tokenizer="tokenizer"))
    ids = {name: getattr(tokens, name) for name in SpecialTokenIds.__dataclass_fields__}
    description = {
        "format": _FORMAT,
        "dtype": str(torch_dtype(dtype)).removeprefix("torch."),
        "seed": seed,
        "tokens": ids,
        "frozen_fingerprint": combine_digests(frozen),
        "model": asdict(config),
    }
    processor.save(folder)
    (folder / "frozen.json").write_text(json.dumps(frozen, indent=1) + "\n")
    (folder / "config.json").write_text(json.dumps(description, indent=2) + "\n")


def save_flamingo(
    folder: str | Path,
    model: Flamingo,
    *,
    processor: ProcessorConfig | None = None,
    seed: int = 0,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> None:
    """Write an export of a model that is whole in this process.

    ``save_pretrained`` explains the arguments; without a processor, images become padded squares.
    """
    trained = trainable_parameters(model)
    save_pretrained(
        folder,
        trained,
        model.config,
        tokens=model.tokens,
        dtype=next(iter(trained.values())).dtype,
        frozen=frozen_digests(model),
        processor=processor or ProcessorConfig.of(model.vision_encoder),
        seed=seed,
        tokenizer=tokenizer,
    )


def from_pretrained(
    folder: str | Path,
    *,
    dtype: DType | torch.dtype | None = None,
    device: torch.device | str = "cpu",
    verify_frozen: bool = True,
) -> Flamingo:
    """Load a model from an export, in evaluation mode.

    Args:
        folder: Folder that ``save_pretrained`` wrote.
        dtype: Type of the parameters; None takes the type of the training. Parameters are converted after the frozen
            ones were verified.
        device: Device to put the model on.
        verify_frozen: Whether frozen weights that differ from those of the training are an error.

    Raises:
        ValueError: The folder is no export, or the frozen weights differ; the message names them.
    """
    folder = Path(folder)
    description, config = _read_description(folder)
    tokens = SpecialTokenIds(**description["tokens"])
    model = build_flamingo(config, tokens, dtype=description["dtype"], seed=description["seed"])
    if verify_frozen:
        expected = json.loads((folder / "frozen.json").read_text())
        difference = explain_difference(expected, frozen_digests(model))
        if difference:
            raise ValueError(
                f"the frozen weights are not those that {folder} was trained with ({difference}). Let language_model "
                f"and vision in {folder}/config.json name those, or pass verify_frozen=False"
            )
    try:
        trained = load_file(folder / "model.safetensors")
    except SafetensorError as error:
        raise ValueError(f"{folder}/model.safetensors cannot be read: {error}; export the run again") from error
    load_trained(model, trained)
    if dtype is not None:
        cast_parameters(model, torch_dtype(dtype))
    return model.to(device).eval()


def load_exported_tokenizer(folder: str | Path) -> FlamingoTokenizer:
    """Load the tokenizer of an export.

    Raises:
        ValueError: The folder is no export.
    """
    return build_tokenizer(_read_description(Path(folder))[1])


def _read_description(folder: Path) -> tuple[dict[str, Any], FlamingoConfig]:
    path = folder / "config.json"
    if not path.is_file():
        raise ValueError(f"{folder} is not an exported Flamingo: it has no config.json")
    try:
        description = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    if not isinstance(description, dict) or not {"format", "model", "tokens", "dtype", "seed"} <= description.keys():
        raise ValueError(f"{folder} is not an exported Flamingo: its config.json was not written by trainer.export")
    if description["format"] != _FORMAT:
        raise ValueError(f"{path} has format {description['format']!r}; this version reads {_FORMAT}")
    config = _map_paths(FlamingoConfig.from_dict(description["model"]), lambda name: _resolve(name, folder))
    return description, replace(config, vision=_with_statistics(config.vision, folder))


def _with_statistics(vision: VisionEncoderConfig, folder: Path) -> VisionEncoderConfig:
    """Return the tower's config with the normalization of the training, whatever this version would choose."""
    processor = read_processor_config(folder)
    if processor is None:
        return with_statistics_of_old_exports(vision)
    return replace(vision, mean=processor.image_mean, std=processor.image_std)


def load_trained(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Copy trained tensors into a model that is not partitioned.

    Raises:
        ValueError: Names or shapes differ.
    """
    trained = trainable_parameters(model)
    missing, unexpected = sorted(trained.keys() - state.keys()), sorted(state.keys() - trained.keys())
    shapes = [
        f"{name} {list(state[name].shape)} instead of {list(full_shape(parameter))}"
        for name, parameter in trained.items()
        if name in state and tuple(state[name].shape) != full_shape(parameter)
    ]
    if missing or unexpected or shapes:
        raise ValueError(
            f"the tensors do not fit the model's config: {len(missing)} missing {missing[:3]}, {len(unexpected)} "
            f"unexpected {unexpected[:3]}, {len(shapes)} of another shape {shapes[:3]}"
        )
    with torch.no_grad():
        for name, parameter in trained.items():
            parameter.copy_(state[name])


def cast_parameters(model: nn.Module, dtype: torch.dtype) -> None:
    """Change the type of all parameters. ``model.to`` would also round the LM's rotary frequencies."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)


def _map_paths(config: FlamingoConfig, change: Callable[[str], str]) -> FlamingoConfig:
    vision, language_model = config.vision, config.language_model
    if vision.name.startswith(_LOCAL):
        vision = replace(vision, name=_LOCAL + change(vision.name.removeprefix(_LOCAL)))
    if vision.pretrained is not None:
        vision = replace(vision, pretrained=change(vision.pretrained))
    if language_model.name is not None:
        language_model = replace(language_model, name=change(language_model.name))
    if language_model.tokenizer is not None:
        language_model = replace(language_model, tokenizer=change(language_model.tokenizer))
    return replace(config, vision=vision, language_model=language_model)


def _relative_to(path: str, folder: Path) -> str:
    """Return a relative path that exists as seen from ``folder``, and an absolute path or a hub's name unchanged."""
    return path if Path(path).is_absolute() or not Path(path).exists() else os.path.relpath(path, folder)


def _resolve(path: str, folder: Path) -> str:
    """Return a path that exists in ``folder`` with the folder before it, and anything else unchanged."""
    return str(folder / path) if (folder / path).exists() else path
