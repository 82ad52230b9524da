"""A frozen open_clip or timm image tower, as a source of features.

Shape suffixes: M media, F frames, S features of a frame, V width of the tower, C channels, Y and X pixels, P patches of
all media.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

import open_clip
import torch
from open_clip.timm_model import TimmModel
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from model.config import VisionEncoderConfig
from model.tower_patches import Grid, features_of_patches, patch_size_of

_TIMM = "timm:"


class VisionEncoder(nn.Module):
    """[media, frames, 3, height, width] pixels -> [media, frames, features, width].

    Only what leads to the chosen features is kept of the tower: no text tower, pooling, projection or later block. It
    is always in evaluation mode and builds no graph. Attributes: ``features`` of a frame and their ``width``, ``flops``
    of a frame, ``image_size`` in pixels, ``mean`` and ``std`` of the input normalization (for pixels in 0..1),
    ``patch_size`` in pixels where the tower also takes media of any shape as patches, else None.
    """

    def __init__(self, tower: Any, config: VisionEncoderConfig) -> None:
        """tower: open_clip's ``visual``; it is cut down in place.

        Raises:
            ValueError: the tower cannot give the features that ``config`` asks for.
        """
        super().__init__()
        self.config = config
        size = tower.image_size
        self.image_size: int = int(size[0]) if isinstance(size, tuple | list) else int(size)
        preprocess = _preprocessing(tower)
        self.mean: tuple[float, ...] = tuple(preprocess["mean"])
        self.std: tuple[float, ...] = tuple(preprocess["std"])
        # The float32 bit patterns stand in an integer buffer: casting the model to bf16 (Module.to, DeepSpeed) would
        # otherwise round the statistics too.
        self.statistics_bits: Tensor  # [2, 3]: mean and std
        statistics = torch.tensor([self.mean, self.std], dtype=torch.float32, device="cpu")
        self.register_buffer("statistics_bits", statistics.view(torch.int32), persistent=False)
        self.patch_size = patch_size_of(tower)
        self.tower: nn.Module = _features_only(tower, config)
        self.requires_grad_(False)
        self.train(False)
        self.features, self.width, self.flops = self._probe()

    def train(self, mode: bool = True) -> VisionEncoder:
        """Stays in evaluation mode: a frozen tower has no dropout and no batch statistics."""
        return super().train(False)

    def forward(self, pixels: Tensor, grids: Sequence[Grid] | None = None) -> Tensor:
        """Features of every frame.

        Args:
            pixels: uint8, or floating point in 0..1, [M, F, 3, Y, X]; or, with ``grids``, the patches of media of any
                shape, [P, 3, patch_size, patch_size]: medium after medium, frame after frame, row after row.
            grids: frames, rows and columns of each medium.

        Returns:
            [M, F, S, V], or [P, V] with ``grids``, in the tower's type, without a graph.

        Raises:
            ValueError: pixels of another rank or size; patches for a tower that takes none.
        """
        if grids is not None:
            return self._encode_patches(pixels, grids)
        if pixels.ndim != 5 or pixels.shape[2] != 3:
            raise ValueError(f"media have shape {list(pixels.shape)}; expected [media, frames, 3, height, width]")
        if pixels.shape[3:] != (self.image_size, self.image_size):
            raise ValueError(
                f"media are {pixels.shape[3]} x {pixels.shape[4]} pixels, the tower was built for {self.image_size}: "
                "set vision.image_size"
            )
        with torch.no_grad():
            return self._encode(pixels.flatten(0, 1)).unflatten(0, pixels.shape[:2])

    def normalize(self, pixels_BCYX: Tensor) -> Tensor:
        """uint8, or floating point in 0..1 -> what the tower was trained on, float32."""
        scale = 1.0 if pixels_BCYX.is_floating_point() else 255.0
        mean, std = self.statistics_bits.view(torch.float32)[..., None, None].unbind()
        return (pixels_BCYX.float() / scale - mean) / std

    def _encode(self, pixels_BCYX: Tensor) -> Tensor:
        dtype = next(self.tower.parameters()).dtype
        features_BVyx = self.tower(self.normalize(pixels_BCYX).to(dtype))
        return features_BVyx.flatten(2).transpose(1, 2).contiguous()

    @torch.no_grad()
    def _encode_patches(self, patches: Tensor, grids: Sequence[Grid]) -> Tensor:
        if self.patch_size is None:
            raise ValueError(f"the tower {self.config.name!r} takes squares only, no patches")
        number = sum(frames * rows * columns for frames, rows, columns in grids)
        if patches.shape != (number, 3, self.patch_size, self.patch_size):
            raise ValueError(
                f"patches have shape {list(patches.shape)}; expected {[number, 3, self.patch_size, self.patch_size]}"
            )
        dtype = next(self.tower.parameters()).dtype
        features_PV: Tensor = self.tower(self.normalize(patches).to(dtype), grids)
        return features_PV

    def _probe(self) -> tuple[int, int, int]:
        """Features of a frame, their width and the FLOPs, from a run without data: no table of architectures needed.

        Only here, before anything partitions the parameters.
        """
        state = {name: tensor.to("meta") for name, tensor in (*self.named_parameters(), *self.named_buffers())}
        pixels = torch.zeros(1, 1, 3, self.image_size, self.image_size, dtype=torch.uint8, device="meta")
        try:
            with FlopCounterMode(display=False) as counter:
                _, _, features, width = torch.func.functional_call(self, state, (pixels,)).shape
        except RuntimeError as error:
            raise ValueError(
                f"the tower {self.config.name!r} gives no features with vision.feature_block "
                f"{self.config.feature_block} and vision.feature_norm {self.config.feature_norm} at {self.image_size} "
                f"pixels: {error}"
            ) from error
        return features, width, counter.get_total_flops()


def build_tower(config: VisionEncoderConfig) -> nn.Module:
    """open_clip's ``visual`` for a config, with its weights; see ``VisionEncoderConfig``.

    Weights are read from safetensors, or by torch.load with ``weights_only=True``: never through pickle.

    Raises:
        ValueError: an unknown name, a file that is not safetensors, or no weights where the config asks for some.
    """
    device = str(torch.get_default_device())
    if config.name.startswith(_TIMM):
        return _build_timm(config)
    local = config.name.removeprefix("local-dir:") if config.name.startswith("local-dir:") else None
    if local is not None and not (Path(local) / "open_clip_config.json").is_file():
        raise ValueError(f"vision.name: the folder {local!r} has no open_clip_config.json")
    if config.pretrained is not None and Path(config.pretrained).is_file():
        _require_safetensors(config.pretrained)
    try:
        clip = open_clip.create_model(
            config.name,
            pretrained=None if device == "meta" else config.pretrained,
            load_weights=device != "meta",
            device=device,
            force_image_size=config.image_size,
            pretrained_image=False,
            pretrained_text=False,
            weights_only=True,
        )
    except RuntimeError as error:
        raise ValueError(f"vision.name {config.name!r}, vision.pretrained {config.pretrained!r}: {error}") from error
    visual: nn.Module = clip.visual
    return visual


def _build_timm(config: VisionEncoderConfig) -> nn.Module:
    """``pretrained``: a safetensors file with the trunk's weights, or "timm" for those that timm has for the name."""
    name = config.name.removeprefix(_TIMM)
    from_timm = config.pretrained == "timm"
    try:
        # Without a projection open_clip passes the pooling on; without a pooling the trunk ends in its feature map.
        tower = TimmModel(name, embed_dim=0, pool="", proj="none", pretrained=from_timm)
    except RuntimeError as error:
        raise ValueError(f"vision.name {config.name!r}: {error}") from error
    defaults = tower.trunk.pretrained_cfg
    tower.set_input_size(config.image_size or defaults["input_size"][-1])
    tower.preprocess_cfg = {"mean": defaults["mean"], "std": defaults["std"]}
    if config.pretrained is not None and not from_timm:
        from safetensors.torch import load_file

        _require_safetensors(config.pretrained)
        tower.trunk.load_state_dict(load_file(config.pretrained))
    return tower


def _require_safetensors(path: str) -> None:
    if not (path.endswith(".safetensors") and Path(path).is_file()):
        raise ValueError(f"vision.pretrained {path!r} is neither a known tag nor a .safetensors file")


def _preprocessing(tower: Any) -> dict[str, Any]:
    """Mean and standard deviation, which open_clip attaches to the tower."""
    preprocess: dict[str, Any] = getattr(tower, "preprocess_cfg", None) or {}
    if "mean" not in preprocess or "std" not in preprocess:
        raise ValueError("the tower has no preprocess_cfg with mean and std: build it with open_clip.create_model")
    return preprocess


def _features_only(tower: Any, config: VisionEncoderConfig) -> nn.Module:
    """The tower without unused parts, whose ``forward`` gives the feature map [B, V, y, x], or features of patches.

    ``forward`` is bound to ``forward_intermediates``, so that the module is entered through its call: ZeRO-3 gathers
    the parameters that a module owns itself (class and position embeddings) only then.
    """
    if isinstance(tower, TimmModel):
        tower = tower.trunk
        extract = functools.partial(tower.forward_intermediates, norm=config.feature_norm)
    else:
        extract = functools.partial(tower.forward_intermediates, normalize_intermediates=config.feature_norm)
    if hasattr(tower, "attn_pool"):
        tower.attn_pool = None
    if hasattr(tower, "attnpool"):
        tower.attnpool = nn.Identity()
    block = config.feature_block
    if hasattr(tower, "prune_intermediate_layers"):
        try:
            tower.prune_intermediate_layers([block], prune_norm=not config.feature_norm, prune_head=True)
        except AssertionError as error:
            raise ValueError(f"vision.feature_block {block}: the tower has no such block ({error})") from error
        block = -1
    tower.forward = functools.partial(
        _features,
        functools.partial(extract, indices=[block], stop_early=True, intermediates_only=True),
        functools.partial(features_of_patches, tower, block=block, feature_norm=config.feature_norm),
    )
    return cast(nn.Module, tower)


def _features(
    extract: Callable[[Tensor], Any],
    of_patches: Callable[[Tensor, Sequence[Grid]], Tensor],
    pixels: Tensor,
    grids: Sequence[Grid] | None = None,
) -> Tensor:
    if grids is not None:
        return of_patches(pixels, grids)
    found = extract(pixels)
    maps = found["image_intermediates"] if isinstance(found, dict) else found
    features: Tensor = maps[-1]
    return features
