"""Turn pixels into features with a frozen image tower of open_clip, timm or transformers."""

from __future__ import annotations

import functools
import json
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, Literal, cast

import open_clip
import torch
from open_clip.timm_model import TimmModel
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from model.config import VisionEncoderConfig
from model.loading_errors import explain_loading
from model.lora import adapter_dropouts
from model.standardized_convolutions import memory_format, standardize_once
from model.tower_patches import Grid, PatchLayout, encode_patches, find_patch_size
from model.tower_statistics import TIMM, tower_statistics
from model.transformers_tower import TRANSFORMERS, TransformersTower, build_transformers_tower

_LOCAL = "local-dir:"
_ROUNDING = 1e-3  # by which pixels in 0..1 may lie outside


class VisionEncoder(nn.Module):
    """Encode pixels [M, F, 3, Y, X] to features [M, F, S, V].

    Only the modules that lead to the chosen features are kept: no text tower, pooling, projection or later block. A
    frozen tower is always in evaluation mode and builds no graph.

    Attributes:
        config: Settings of the tower.
        image_size: Side of the square input in pixels.
        mean: Mean of the input normalization, for pixels in 0..1.
        std: Standard deviation of the input normalization.
        patch_size: Side of a patch in pixels, where the tower also takes media of any shape as patches; else None.
        features_per_patch: Features of one such patch.
        max_tiles: Patches that the tower fills every image up to; None where it fills none up.
        num_features: Features of a frame (S).
        dim: Dim of a feature (V).
        flops: Floating-point operations of a frame.
        blocks: Blocks of the tower, or its stages, that the tower calls as modules.
    """

    def __init__(self, tower: Any, config: VisionEncoderConfig) -> None:
        """Cut ``tower``, open_clip's ``visual``, down in place and freeze it.

        Raises:
            ValueError: The tower cannot give the features that ``config`` asks for.
        """
        super().__init__()
        self.config = config
        size = tower.image_size
        self.image_size: int = int(size[0]) if isinstance(size, tuple | list) else int(size)
        _check_borders(tower, config, self.image_size)
        self.mean, self.std = tower_statistics(config, tower)
        # An integer buffer holds the float32 bit patterns. Casting the model to bf16 (Module.to, DeepSpeed) would round
        # a float buffer.
        self.statistics_bits: Tensor  # [2, 3]: mean and std
        statistics = torch.tensor([self.mean, self.std], dtype=torch.float32, device="cpu")
        self.register_buffer("statistics_bits", statistics.view(torch.int32), persistent=False)
        self.patch_size = find_patch_size(tower)
        self.features_per_patch, self.max_tiles = 1, None
        if isinstance(tower, TransformersTower):
            self.features_per_patch, self.max_tiles = tower.features_per_tile, tower.max_tiles
            self.patch_size = None if tower.max_tiles is None else tower.image_size
        self.tower: nn.Module = _keep_features(tower, config)
        self._trains, self._builds_graph = False, False
        self._dropouts = list[nn.Module]()
        self.requires_grad_(False)
        self.train(False)
        self._standardized = standardize_once(self.tower) > 0
        self.blocks: list[nn.Module] = []
        self.num_features, self.dim, self.flops = self._probe()

    def train(self, mode: bool = True) -> VisionEncoder:
        """Set the mode, except that a frozen tower stays in evaluation mode: no dropout and no batch statistics."""
        super().train(mode and self._trains)
        for dropout in self._dropouts:
            dropout.train(mode)
        return self

    def set_training(self, mode: Literal["frozen", "full", "lora"]) -> None:
        """Follow what trains of the tower, which decides its mode and whether it builds a graph.

        Args:
            mode: ``TrainableConfig.vision``, after ``requires_grad`` of the parameters was set.
        """
        self._trains, self._builds_graph = mode == "full", mode != "frozen"
        self._dropouts = adapter_dropouts(self.tower) if mode == "lora" else []
        self.train(self.training)

    def _graph(self) -> AbstractContextManager[None]:
        return torch.set_grad_enabled(self._builds_graph and torch.is_grad_enabled())

    def forward(self, pixels: Tensor, grids: Sequence[Grid] | None = None, layout: PatchLayout | None = None) -> Tensor:
        """Return the features of every frame, in the tower's type; a frozen tower builds no graph.

        Args:
            pixels: uint8, or floating point in 0..1, [M, F, 3, Y, X]. With ``grids`` the patches of media of any shape,
                [P, 3, patch_size, patch_size]: medium after medium, frame after frame, row after row.
            grids: Frames, rows and columns of patches of each medium.
            layout: ``PatchLayout.of(grids)``, on the device of the pixels; None computes it here, which waits for a
                GPU.

        Returns:
            [M, F, S, V]. With ``grids`` ``features_per_patch`` features for each patch, [S, V].

        Raises:
            ValueError: Pixels have another type, range, number of dimensions or size, or the tower takes no patches.
        """
        if grids is not None:
            return self._encode_patches(pixels, grids, layout or PatchLayout.of(grids).to(pixels.device))
        if pixels.ndim != 5 or pixels.shape[2] != 3:
            raise ValueError(f"media have shape {list(pixels.shape)}; expected [media, frames, 3, height, width]")
        if pixels.shape[3:] != (self.image_size, self.image_size):
            raise ValueError(
                f"media are {pixels.shape[3]} x {pixels.shape[4]} pixels, the tower was built for {self.image_size}: "
                "set vision.image_size"
            )
        with self._graph():
            return self._encode(pixels.flatten(0, 1)).unflatten(0, pixels.shape[:2])

    def normalize(self, pixels: Tensor) -> Tensor:
        """Return pixels [..., 3, Y, X] as the tower was trained on them, float32.

        Args:
            pixels: uint8, or floating point in 0..1.

        Raises:
            ValueError: Pixels are of another type, or floating point beyond 0..1.
        """
        _check_pixels(pixels)
        scale = 1.0 if pixels.is_floating_point() else 255.0
        mean, std = self.statistics_bits.view(torch.float32)[..., None, None].unbind()
        return (pixels.float() / scale - mean) / std

    def _encode(self, pixels_ICYX: Tensor) -> Tensor:
        dtype = next(self.tower.parameters()).dtype
        x_ICYX = self.normalize(pixels_ICYX).to(dtype)
        if self._standardized:
            x_ICYX = x_ICYX.contiguous(memory_format=memory_format(x_ICYX.device))
        features_IVYX = self.tower(x_ICYX)
        return features_IVYX.flatten(2).transpose(1, 2).contiguous()

    def _encode_patches(self, patches_PCyx: Tensor, grids: Sequence[Grid], layout: PatchLayout) -> Tensor:
        if self.patch_size is None:
            raise ValueError(f"the tower {self.config.name!r} takes squares only, no patches")
        number = sum(num_frames * rows * columns for num_frames, rows, columns in grids)
        expected = [number, 3, self.patch_size, self.patch_size]
        if list(patches_PCyx.shape) != expected:
            raise ValueError(f"patches have shape {list(patches_PCyx.shape)}; expected {expected}")
        dtype = next(self.tower.parameters()).dtype
        with self._graph():
            features_SV: Tensor = self.tower(self.normalize(patches_PCyx).to(dtype), grids, layout)
        return features_SV

    def _probe(self) -> tuple[int, int, int]:
        """Return the number of features of a frame, their dim and the FLOPs, from a run on the meta device.

        It also finds the blocks. It runs once, at construction, because partitioned parameters could not be read later.
        """
        candidates = _outermost_members(self.tower)
        hooks = [one.register_forward_pre_hook(lambda block, _: self.blocks.append(block)) for one in candidates]
        state = {name: tensor.to("meta") for name, tensor in (*self.named_parameters(), *self.named_buffers())}
        pixels = torch.zeros(1, 1, 3, self.image_size, self.image_size, dtype=torch.uint8, device="meta")
        try:
            with FlopCounterMode(display=False) as counter:
                _, _, num_features, dim = torch.func.functional_call(self, state, (pixels,)).shape
        except RuntimeError as error:
            raise ValueError(
                f"the tower {self.config.name!r} gives no features with vision.feature_block "
                f"{self.config.feature_block} and vision.feature_norm {self.config.feature_norm} at {self.image_size} "
                f"pixels: {error}"
            ) from error
        finally:
            for hook in hooks:
                hook.remove()
        return num_features, dim, counter.get_total_flops()


def build_tower(config: VisionEncoderConfig) -> nn.Module:
    """Build open_clip's ``visual`` for a config, with its weights.

    Weights are read from safetensors, or by torch.load with ``weights_only=True``, never through pickle.

    Raises:
        ValueError: The name is unknown, a file is not safetensors, or weights that the config asks for are missing.
    """
    device = str(torch.get_default_device())
    if config.name.startswith(TRANSFORMERS):
        return build_transformers_tower(config)
    for setting in ("class_feature", "architecture", "padding_tiles"):
        if value := getattr(config, setting):
            raise ValueError(f"vision.{setting} {value}: only a tower named {TRANSFORMERS}... takes it; leave it out")
    if config.name.startswith(TIMM):
        return _build_timm(config)
    local = config.name.removeprefix(_LOCAL) if config.name.startswith(_LOCAL) else None
    if local is not None and not (Path(local) / "open_clip_config.json").is_file():
        raise ValueError(f"vision.name: the folder {local!r} has no open_clip_config.json")
    tower_alone = False
    if config.pretrained is not None and Path(config.pretrained).is_file():
        _require_safetensors(config.pretrained)
        tower_alone = _holds_tower_alone(Path(config.pretrained))
    try:
        with _quiet_about_random_weights(tower_alone):
            clip = open_clip.create_model(
                config.name,
                pretrained=None if device == "meta" or tower_alone else config.pretrained,
                load_weights=device != "meta" and not tower_alone,
                device=device,
                force_image_size=config.image_size,
                pretrained_image=False,
                pretrained_text=False,
                weights_only=True,
            )
    except RuntimeError as error:
        raise ValueError(f"vision.name {config.name!r}, vision.pretrained {config.pretrained!r}: {error}") from error
    visual: nn.Module = clip.visual
    if tower_alone and device != "meta":
        with explain_loading(f"vision.pretrained {config.pretrained!r}"):
            visual.load_state_dict(load_file(str(config.pretrained)))
    return visual


@contextmanager
def _quiet_about_random_weights(loads_tower_later: bool) -> Iterator[None]:
    """Drop open_clip's warning that nothing was loaded, where the tower's weights follow."""
    root = logging.getLogger()

    def keep(record: logging.LogRecord) -> bool:
        return not (loads_tower_later and record.msg.startswith("No pretrained weights loaded"))

    root.addFilter(keep)
    try:
        yield
    finally:
        root.removeFilter(keep)


def _holds_tower_alone(path: Path) -> bool:
    """Return whether a file has the weights of an image tower, and not those of a whole CLIP."""
    with explain_loading(f"vision.pretrained {str(path)!r}"), safe_open(path, framework="pt") as opened:
        return not any(name.startswith("visual.") for name in opened.keys())  # noqa: SIM118  it is no dict


def _build_timm(config: VisionEncoderConfig) -> nn.Module:
    """Build a timm tower; ``pretrained`` is a safetensors file of the trunk, or "timm" for timm's own weights."""
    name = config.name.removeprefix(TIMM)
    from_timm = config.pretrained == "timm"
    on_meta = str(torch.get_default_device()) == "meta"  # no weights are wanted
    try:
        # Without projection and pooling the trunk ends in its feature map.
        tower = TimmModel(name, embed_dim=0, pool="", proj="none", pretrained=from_timm and not on_meta)
    except RuntimeError as error:
        raise ValueError(f"vision.name {config.name!r}: {error}") from error
    defaults = tower.trunk.pretrained_cfg
    tower.set_input_size(config.image_size or defaults["input_size"][-1])
    tower.preprocess_cfg = {"mean": defaults["mean"], "std": defaults["std"]}
    if config.pretrained is not None and not from_timm:
        _require_safetensors(config.pretrained)
        if not on_meta:
            tower.trunk.load_state_dict(load_file(config.pretrained))
    return tower


def _require_safetensors(path: str) -> None:
    if not (path.endswith(".safetensors") and Path(path).is_file()):
        raise ValueError(f"vision.pretrained {path!r} is neither a known tag nor a .safetensors file")


def _outermost_members(module: nn.Module) -> list[nn.Module]:
    """Return the members of the outermost lists and sequences in a module."""
    members: list[nn.Module] = []
    for child in module.children():
        members += list(child) if isinstance(child, nn.ModuleList | nn.Sequential) else _outermost_members(child)
    return members


def _check_pixels(pixels: Tensor) -> None:
    """Check the type of pixels, and the range of floating-point ones; uint8, which training uses, costs no waiting."""
    if pixels.dtype == torch.uint8 or pixels.is_meta:
        return
    if not pixels.is_floating_point():
        raise ValueError(f"media have the type {pixels.dtype}: give pixels as uint8, or as floating point in 0..1")
    if pixels.numel() == 0:
        return
    low, high = (float(value) for value in pixels.aminmax())
    if not (low >= -_ROUNDING and high <= 1 + _ROUNDING):
        raise ValueError(
            f"media are floating-point pixels from {low:.4g} to {high:.4g}, but must lie in 0..1: give uint8, or "
            "divide values of 0..255 by 255; do not normalize them, the vision encoder does"
        )


def _check_borders(tower: Any, config: VisionEncoderConfig, size: int) -> None:
    """Check that the tower sees all pixels of a chosen size.

    A convolution that reads pixels without padding leaves out those beyond its last window. Some towers were trained so
    at their own size (SigLIP with patches of 14 at 384 pixels), which is therefore allowed.

    Raises:
        ValueError: Rows at the bottom and columns at the right would not be seen.
    """
    if config.image_size is None or config.image_size == _own_size(config):
        return
    for module in tower.modules():
        # Subclasses pad by themselves.
        if type(module) is not nn.Conv2d or module.in_channels != 3 or isinstance(module.padding, str):
            continue
        stride, padding = module.stride[0], module.padding[0]
        window = 1 + module.dilation[0] * (module.kernel_size[0] - 1)
        unseen = (size + 2 * padding - window) % stride - padding
        if unseen > 0:
            below = size - unseen
            raise ValueError(
                f"vision.image_size {size}: the tower {config.name!r} reads steps of {stride} pixels, so the last "
                f"{unseen} rows and columns would never be seen: set {below} or {below + stride}"
            )


def _own_size(config: VisionEncoderConfig) -> int | None:
    """Return the size that a tower was made for, where its description tells it without building it."""
    if config.name.startswith((TIMM, TRANSFORMERS)):
        return None
    if config.name.startswith(_LOCAL):
        path = Path(config.name.removeprefix(_LOCAL)) / "open_clip_config.json"
        described = json.loads(path.read_text(encoding="utf-8")).get("model_cfg")
    else:
        described = open_clip.get_model_config(config.name.replace("/", "-"))
    size = ((described or {}).get("vision_cfg") or {}).get("image_size")
    return size[0] if isinstance(size, list | tuple) else size


def _keep_features(tower: Any, config: VisionEncoderConfig) -> nn.Module:
    """Cut unused parts off the tower, and let its ``forward`` return the feature map [I, V, Y, X] or patches' features.

    ``forward`` is bound to ``forward_intermediates``, so that the module is entered through its call. Only then does
    ZeRO-3 gather the parameters that a module owns itself (class and position embeddings).
    """
    if isinstance(tower, TransformersTower):
        return tower
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
        _extract_features,
        functools.partial(extract, indices=[block], stop_early=True, intermediates_only=True),
        functools.partial(encode_patches, tower, block=block, feature_norm=config.feature_norm),
    )
    return cast(nn.Module, tower)


def _extract_features(
    extract: Callable[[Tensor], Any],
    encode: Callable[[Tensor, Sequence[Grid], PatchLayout], Tensor],
    pixels: Tensor,
    grids: Sequence[Grid] | None = None,
    layout: PatchLayout | None = None,
) -> Tensor:
    if grids is not None and layout is not None:
        return encode(pixels, grids, layout)
    found = extract(pixels)
    maps = found["image_intermediates"] if isinstance(found, dict) else found
    features: Tensor = maps[-1]
    return features
