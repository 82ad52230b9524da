"""Run a vision tower of transformers as the frozen tower: CLIP's, IDEFICS's, or Llama 3.2 Vision's with its tiles.

IDEFICS's tower is CLIP's, with the same names of tensors. Llama 3.2 Vision cuts an image into tiles, which are this
tower's patches for ``image_tokens``: their number is the budget, and their side is the tower's ``image_size``. Its code
fills every image up with black tiles, to which the real ones attend, so that all tiles have to run.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from safetensors import safe_open
from torch import Tensor, nn
from transformers import AutoConfig, CLIPVisionConfig, CLIPVisionModel, MllamaVisionModel

from model.config import VisionEncoderConfig
from model.loading_errors import explain_loading
from model.tower_patches import Grid, PatchLayout, tokens_of_longest_image

TRANSFORMERS = "transformers:"
_CLIP = "clip_vision_model"
_MLLAMA = "mllama_vision_model"
_FILES = ["config.json", "preprocessor_config.json", "*.safetensors", "*.safetensors.index.json"]


class TransformersTower(nn.Module):
    """Give the features of images, in the form that ``VisionEncoder`` expects of a tower.

    Attributes:
        model: Tower of transformers.
        image_size: Side of the square input in pixels; of a tile, where there are tiles.
        max_tiles: Tiles of an image; None where the tower takes whole squares only.
        features_per_tile: Features of a tile, or of a square.
        preprocess_cfg: Statistics of the input normalization, as open_clip attaches them.
    """

    def __init__(self, model: Any, config: VisionEncoderConfig, statistics: dict[str, Any]) -> None:
        """Wrap a tower of transformers.

        Raises:
            ValueError: The tower cannot give the features that ``config`` asks for.
        """
        super().__init__()
        self.model = model
        self.preprocess_cfg = statistics
        self._config = config
        settings = model.config
        self.image_size = int(settings.image_size)
        self.max_tiles: int | None = settings.max_num_tiles if settings.model_type == _MLLAMA else None
        self.features_per_tile = (self.image_size // settings.patch_size) ** 2 + int(config.class_feature)
        if config.image_size not in (None, self.image_size):
            raise ValueError(
                f"vision.image_size {config.image_size}: the tower {config.name!r} takes {self.image_size} pixels only"
            )
        if self.max_tiles is None:
            if config.padding_tiles:
                raise ValueError(f"vision.padding_tiles true: the tower {config.name!r} has no tiles; set it to false")
            self._cut(config.feature_block)
            return
        # Number that the tower gives to rows and columns of tiles. A cast of the model leaves integers alone.
        numbers = torch.zeros(2 * (self.max_tiles + 1,), dtype=torch.int64, device="cpu")
        for number, (rows, columns) in enumerate(settings.supported_aspect_ratios, start=1):
            numbers[rows, columns] = number
        self.shape_numbers: Tensor
        self.register_buffer("shape_numbers", numbers, persistent=False)
        if config.feature_block != -1 or config.feature_norm:
            raise ValueError(
                f"vision.feature_block {config.feature_block}, vision.feature_norm {config.feature_norm}: the tower "
                f"{config.name!r} chooses its features itself; set feature_block -1 and feature_norm false"
            )

    def forward(
        self, pixels_ICYX: Tensor, grids: Sequence[Grid] | None = None, layout: PatchLayout | None = None
    ) -> Tensor:
        """Return features of squares as a map [I, V, S, 1], or of tiles, one tile after the other, [S, V].

        Args:
            pixels_ICYX: Normalized pixels; of all tiles where there are ``grids``.
            grids: Frames, rows and columns of tiles of each medium.
            layout: ``PatchLayout.of(grids)``, on the device of the pixels.
        """
        if self.max_tiles is None:
            features_ISV = self.model(pixel_values=pixels_ICYX).last_hidden_state
            if self._config.feature_norm:
                features_ISV = inner_tower(self.model).post_layernorm(features_ISV)
        else:
            features_ISV = self._encode_tiles(pixels_ICYX, grids, layout)
        if not self._config.class_feature:
            features_ISV = features_ISV[:, 1:]
        if grids is not None:
            return features_ISV.flatten(0, 1)
        if self._config.padding_tiles:
            features_ISV = features_ISV.unflatten(0, (len(pixels_ICYX), -1)).flatten(1, 2)
        return features_ISV.transpose(1, 2)[..., None]

    def _encode_tiles(self, tiles_PCYX: Tensor, grids: Sequence[Grid] | None, layout: PatchLayout | None) -> Tensor:
        """Return the outputs of the tiles, [P, S, V]; with ``padding_tiles`` of those that fill images up as well."""
        assert self.max_tiles is not None
        device, each = tiles_PCYX.device, self.max_tiles
        place_P = torch.arange(len(tiles_PCYX), device=device) * each
        number_I = rows_I = torch.ones(len(tiles_PCYX), dtype=torch.int64, device=device)
        if grids is not None and layout is not None:
            self._check_shapes(grids)
            longest = tokens_of_longest_image(grids)
            image_P = layout.slots // longest
            place_P = image_P * each + layout.slots - 1 - image_P * longest
            number_I, rows_I = layout.patches_per_image, layout.rows_per_image
        shape_I = self.shape_numbers[rows_I, number_I // rows_I]
        padded = tiles_PCYX.new_zeros(len(number_I) * each, *tiles_PCYX.shape[1:]).index_copy(0, place_P, tiles_PCYX)
        mask_I1T = (torch.arange(each, device=device) < number_I[:, None])[:, None]
        output = self.model(padded.unflatten(0, (-1, 1, each)), shape_I[:, None], mask_I1T.long()).last_hidden_state
        outputs_PSV: Tensor = output.flatten(0, 2)
        return outputs_PSV if self._config.padding_tiles else outputs_PSV[place_P]

    def _check_shapes(self, grids: Sequence[Grid]) -> None:
        """Check that the tower takes images of these rows and columns of tiles.

        Raises:
            ValueError: It does not.
        """
        known = [tuple(pair) for pair in self.model.config.supported_aspect_ratios]
        for _, rows, columns in grids:
            if (rows, columns) not in known:
                raise ValueError(
                    f"an image of {rows} x {columns} tiles: the tower {self._config.name!r} takes {known} rows and "
                    f"columns; set image_tokens to {self.max_tiles} or less"
                )

    def _cut(self, block: int) -> None:
        """Remove the blocks after the one whose output becomes the features."""
        encoder = inner_tower(self.model).encoder
        number = len(encoder.layers)
        if not -number <= block < number:
            raise ValueError(f"vision.feature_block {block}: the tower has {number} blocks; set -{number} to -1")
        encoder.layers = encoder.layers[: block % number + 1]


def build_transformers_tower(config: VisionEncoderConfig) -> TransformersTower:
    """Build a tower from a folder or repository of transformers, with its weights, or from its architecture.

    The folder may hold a whole model, whose tower is taken. Weights are read from safetensors only. The classes are
    called directly, because ``from_pretrained`` partitions parameters while DeepSpeed's ZeRO-3 is configured.

    Raises:
        ValueError: The folder cannot be read, holds another kind of tower, or lacks weights.
    """
    name = config.name.removeprefix(TRANSFORMERS)
    on_meta = str(torch.get_default_device()) == "meta"
    if config.pretrained is not None:
        raise ValueError(
            f"vision.pretrained {config.pretrained!r}: {config.name!r} brings its own weights; leave it out"
        )
    if config.architecture is not None:
        values = dict(config.architecture)
        with explain_loading("vision.architecture"):
            settings = _tower_config(AutoConfig.for_model(values.pop("model_type"), **values), config.name)
        return TransformersTower(_CLASSES[settings.model_type](settings), config, {})
    with explain_loading(f"vision.name {config.name!r}"):
        files = _FILES[:2] if on_meta else _FILES
        folder = Path(name) if Path(name).is_dir() else Path(snapshot_download(name, allow_patterns=files))
        settings = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    settings = _tower_config(settings, config.name)
    model = _CLASSES[settings.model_type](settings)
    if not on_meta:
        _load(model, folder, config.name)
    return TransformersTower(model, config, _statistics(folder, config))


_CLASSES: dict[str, Any] = {_CLIP: CLIPVisionModel, _MLLAMA: MllamaVisionModel}


def clip_settings(vision: Any) -> CLIPVisionConfig:
    """Return CLIP's settings for the tower of an IDEFICS."""
    return CLIPVisionConfig(
        hidden_size=vision.embed_dim,
        intermediate_size=vision.intermediate_size,
        num_hidden_layers=vision.num_hidden_layers,
        num_attention_heads=vision.num_attention_heads,
        num_channels=vision.num_channels,
        image_size=vision.image_size,
        patch_size=vision.patch_size,
        hidden_act=vision.hidden_act,
        layer_norm_eps=vision.layer_norm_eps,
        attention_dropout=vision.attention_dropout,
    )


def _tower_config(config: Any, name: str) -> Any:
    """Return the settings of the tower in those of a tower or of a whole model."""
    kind = config.model_type
    found = config.vision_config if kind in ("clip", "idefics", "mllama") else config
    found = clip_settings(found) if found.model_type == "idefics_vision" else found
    if found.model_type not in _CLASSES:
        raise ValueError(
            f"vision.name {name!r} is a {kind}; transformers' towers of CLIP, IDEFICS and Llama 3.2 Vision (mllama) "
            "can be used. Take another one through open_clip or timm"
        )
    return found


def inner_tower(model: Any) -> Any:
    """Return the module that holds a tower's tensors, which some versions of transformers wrap once more for CLIP."""
    return getattr(model, "vision_model", model)


def _load(model: nn.Module, folder: Path, name: str) -> None:
    """Copy weights from safetensors, under whatever prefix a whole model has its tower."""
    places = tensor_places(folder.glob("*.safetensors"))
    if not places:
        raise ValueError(f"vision.name {name!r} has no .safetensors file; pickled weights are not read")
    wanted: dict[str, Tensor] = inner_tower(model).state_dict()
    some = max(wanted, key=len)
    prefixes = [key.removesuffix(some) for key in places if key.endswith(some)]
    fitting = [prefix for prefix in prefixes if all(prefix + key in places for key in wanted)]
    if not fitting:
        raise ValueError(f"vision.name {name!r}: its safetensors lack tensors of the tower, such as {some}")
    with torch.no_grad():
        for path in {places[fitting[0] + key] for key in wanted}:
            with safe_open(path, framework="pt") as opened:
                for key, target in wanted.items():
                    if places[fitting[0] + key] == path:
                        tensor = opened.get_tensor(fitting[0] + key)
                        if tensor.shape != target.shape:
                            raise ValueError(
                                f"vision.name {name!r}: {fitting[0] + key} has shape {list(tensor.shape)}, but its "
                                f"config.json says {list(target.shape)}"
                            )
                        target.copy_(tensor)


def tensor_places(files: Iterable[Path]) -> dict[str, Path]:
    """Return the file of every tensor in safetensors files, by the tensor's name."""
    places: dict[str, Path] = {}
    for path in sorted(files):
        with explain_loading(str(path)), safe_open(path, framework="pt") as opened:
            places |= dict.fromkeys(opened.keys(), path)
    return places


def _statistics(folder: Path, config: VisionEncoderConfig) -> dict[str, Any]:
    path = folder / "preprocessor_config.json"
    values = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    if {"image_mean", "image_std"} <= values.keys():
        return {"mean": values["image_mean"], "std": values["image_std"]}
    if config.mean is None:
        raise ValueError(
            f"vision.mean, vision.std: {config.name!r} has no preprocessor_config.json that says them: set both"
        )
    return {}
