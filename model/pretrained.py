"""Write a trained Flamingo to a folder, the export, and read it back.

The folder has ``model.safetensors`` (trained tensors only), ``config.json``, ``preprocessor_config.json`` (how pixels
and text become input), ``frozen.json`` (a digest of every frozen tensor) and ``tokenizer/``. The frozen weights
themselves stay where they came from. A language model's adapters are also in ``adapter/``, in peft's format.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from model.config import DType, FlamingoConfig, VisionEncoderConfig
from model.factory import build_flamingo, build_tokenizer, torch_dtype
from model.flamingo import Flamingo
from model.lora import save_adapter
from model.parameters import (
    Gather,
    combine_digests,
    explain_difference,
    frozen_digests,
    full_shape,
    no_gather,
    trainable_parameters,
    trained_buffers,
)
from model.processor import ProcessorConfig, read_processor_config
from model.tokens import FlamingoTokenizer, SpecialTokenIds
from model.tower_patches import resize_positions
from model.tower_statistics import with_statistics_of_old_exports
from model.transformers_tower import TRANSFORMERS

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_FORMAT = 1
_PREFIXES = ("local-dir:", TRANSFORMERS)  # of vision.name, before a path
SOURCE = "source"  # folder with what only the way back to another project needs (``model.imports.convert``)
_LM = "language_model.lm."
_PRETRAINED = (_LM, "vision_encoder.")  # prefixes of the parameters that have a source of their own
_POSITIONS = "vision_encoder.tower.positional_embedding"


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
    whole = {name: tensor.detach().cpu().contiguous() for name, tensor in _once(state).items()}
    save_file(whole, folder / "model.safetensors")
    if config.trainable.language_model == "lora":
        lm = {name.removeprefix(_LM): tensor for name, tensor in whole.items() if name.startswith(_LM)}
        save_adapter(folder / "adapter", lm, config.language_model_lora, config.language_model.name)
    config = replace(_map_paths(config, lambda path: _relative_to(path, folder)), start_from=None)
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
    load_trained(model, read_trained(folder))
    if verify_frozen:
        expected = json.loads((folder / "frozen.json").read_text())
        difference = explain_difference(expected, frozen_digests(model))
        if difference:
            raise ValueError(
                f"the frozen weights are not those that {folder} was trained with ({difference}). Let language_model "
                f"and vision in {folder}/config.json name those, or pass verify_frozen=False"
            )
    if dtype is not None:
        cast_parameters(model, torch_dtype(dtype))
    return model.to(device).eval()


@dataclass(frozen=True)
class ExportDescription:
    """Describe an export whose weights are not read yet.

    Attributes:
        config: Settings of the model; local paths in it are found from the current folder.
        tokens: Ids of the special tokens.
        dtype: Type that the model was trained in.
        seed: Seed that the model was built with.
        frozen: Digest of every frozen tensor, by name.
    """

    config: FlamingoConfig
    tokens: SpecialTokenIds
    dtype: DType
    seed: int
    frozen: Mapping[str, str]


def describe_export(folder: str | Path) -> ExportDescription:
    """Read what an export says about itself.

    Raises:
        ValueError: The folder is no export.
    """
    folder = Path(folder)
    description, config = _read_description(folder)
    tokens = SpecialTokenIds(**description["tokens"])
    frozen = json.loads((folder / "frozen.json").read_text())
    return ExportDescription(config, tokens, description["dtype"], description["seed"], frozen)


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


def load_trained(model: nn.Module, state: Mapping[str, Tensor], overwrite: Gather = no_gather) -> None:
    """Copy trained tensors into a model.

    Args:
        model: Model whose parameters that train are to be replaced.
        state: Every trained tensor, by name. It may also hold the statistics of trained batch norms, and tensors that
            trained in an earlier run and are frozen now.
        overwrite: Context that makes partitioned parameters whole and keeps what is written to them.

    Raises:
        ValueError: Names or shapes differ.
    """
    known = dict(model.named_parameters())
    missing = sorted(trainable_parameters(model).keys() - state.keys())
    buffers = trained_buffers(model)
    unexpected = sorted(state.keys() - known.keys() - buffers.keys())
    known = {name: parameter for name, parameter in known.items() if name in state}
    shapes = [
        f"{name} {list(state[name].shape)} instead of {list(full_shape(parameter))}"
        for name, parameter in known.items()
        if tuple(state[name].shape) != full_shape(parameter)
    ]
    if missing or unexpected or shapes:
        raise ValueError(
            f"the tensors do not fit the model's config: {len(missing)} missing {missing[:3]}, {len(unexpected)} "
            f"unexpected {unexpected[:3]}, {len(shapes)} of another shape {shapes[:3]}"
        )
    with torch.no_grad():
        for name, parameter in known.items():
            with overwrite([parameter]):
                parameter.copy_(state[name])
        for name in buffers.keys() & state.keys():
            buffers[name].copy_(state[name])


def start_from_export(model: nn.Module, folder: str | Path, overwrite: Gather = no_gather) -> None:
    """Give a model the trained weights of an export; parts that the export did not train keep their own.

    The images may have another size than those of the export: a trained ViT's position embeddings are interpolated.

    Args:
        model: Model with the settings of the export, apart from what trains.
        folder: Export folder.
        overwrite: As for ``load_trained``.

    Raises:
        ValueError: The folder is no export, or its model has other tensors.
    """
    folder = Path(folder)
    _read_description(folder)
    state = read_trained(folder)
    if _POSITIONS in state:
        state[_POSITIONS] = _positions_of_size(model, state[_POSITIONS])
    own = {name: p for name, p in trainable_parameters(model).items() if name.startswith(_PRETRAINED)}
    missing = [name for name in own if name not in state]
    with torch.no_grad(), overwrite([own[name] for name in missing]):
        state |= {name: own[name].detach().clone() for name in missing}
    try:
        load_trained(model, state, overwrite)
    except ValueError as error:
        raise ValueError(f"model.start_from {folder}: {error}") from error


def _positions_of_size(model: nn.Module, table_PV: Tensor) -> Tensor:
    """Return position embeddings for the images of a model; the class token keeps its own."""
    tower = model.get_submodule("vision_encoder.tower")
    rows, columns = cast("tuple[int, int]", tower.grid_size)
    side = math.isqrt(len(table_PV) - 1)
    patches_PV = resize_positions(table_PV[1:], (side, side), (rows, columns))
    return torch.cat([table_PV[:1], patches_PV])


def kept_tensors(folder: str | Path, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return what a run that started from an export leaves as it is, so that the run's own export is whole.

    Args:
        folder: Export that the run started from.
        state: Tensors that the run trained, by name.

    Returns:
        Tensors of the export that the run did not train.

    Raises:
        ValueError: The folder is no export.
    """
    _read_description(Path(folder))
    there = read_trained(Path(folder))
    return {name: tensor for name, tensor in there.items() if name not in state}


def _once(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors without those that share memory with an earlier one, such as a tied head."""
    found: dict[int, str] = {}
    for name, tensor in state.items():
        found.setdefault(tensor.data_ptr() if tensor.numel() else id(tensor), name)
    return {name: state[name] for name in found.values()}


def trained_files(folder: Path) -> list[Path]:
    """Return the files with the trained weights of an export: one, or several where they are large."""
    return sorted(folder.glob("model-*-of-*.safetensors")) or [folder / "model.safetensors"]


def read_trained(folder: Path) -> dict[str, Tensor]:
    """Return the trained weights of an export by name.

    Raises:
        ValueError: A file cannot be read.
    """
    state: dict[str, Tensor] = {}
    for path in trained_files(folder):
        try:
            state |= load_file(path)
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{path} cannot be read: {error}; export the run again") from error
    return state


def cast_parameters(model: nn.Module, dtype: torch.dtype) -> None:
    """Change the type of all parameters but codes. ``model.to`` would also round the LM's rotary frequencies."""
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(dtype)


def _map_paths(config: FlamingoConfig, change: Callable[[str], str]) -> FlamingoConfig:
    vision, language_model = config.vision, config.language_model
    for prefix in _PREFIXES:
        if vision.name.startswith(prefix):
            vision = replace(vision, name=prefix + change(vision.name.removeprefix(prefix)))
    if vision.pretrained is not None:
        vision = replace(vision, pretrained=change(vision.pretrained))
    if language_model.name is not None:
        language_model = replace(language_model, name=change(language_model.name))
    if language_model.tokenizer is not None:
        language_model = replace(language_model, tokenizer=change(language_model.tokenizer))
    return replace(config, vision=vision, language_model=language_model)


def moved_config(export: Path, folder: Path) -> FlamingoConfig:
    """Return the config of an export for another folder: local paths that are not absolute are seen from there.

    Raises:
        ValueError: The folder is no export.
    """
    description, _ = _read_description(export)

    def move(path: str) -> str:
        is_seen_from_export = not Path(path).is_absolute() and (export / path).exists()
        return os.path.relpath(export / path, folder) if is_seen_from_export else path

    return _map_paths(FlamingoConfig.from_dict(description["model"]), move)


def _relative_to(path: str, folder: Path) -> str:
    """Return a relative path that exists as seen from ``folder``, and an absolute path or a hub's name unchanged."""
    return path if Path(path).is_absolute() or not Path(path).exists() else os.path.relpath(path, folder)


def _resolve(path: str, folder: Path) -> str:
    """Return a path that exists in ``folder`` with the folder before it, and anything else unchanged."""
    return str(folder / path) if (folder / path).exists() else path
