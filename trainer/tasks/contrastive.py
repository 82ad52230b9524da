"""Build the task of ``trainer.pretrain_vision``: contrastive open_clip towers (paper, section 3.1, appendix B.1.3).

Every micro-batch is one contrastive problem over all ranks: each image against each caption.
"""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import open_clip
import torch
import torch.distributed as dist
import torch.nn.functional as F
from open_clip.loss import ClipLoss
from torch import Tensor, nn
from transformers import AutoTokenizer

from model.loading_errors import explain_loading
from trainer.config.deepspeed_json import deepspeed_json
from trainer.config.run_config import ContrastiveRunConfig
from trainer.data.batch import BatchFormat
from trainer.loop import Task
from trainer.runtime.distributed import World, barrier
from trainer.runtime.run_folder import RunFolder
from trainer.tasks.row_builders import contrastive_builders

MAX_LOGIT_SCALE = 100.0  # CLIP's own limit of the inverse temperature
CLIP_PREFIX = "clip."  # of the weights of ContrastiveTowers in a checkpoint


@dataclass
class ContrastiveOutput:
    """Hold the loss, summed over the image-caption pairs of this rank."""

    loss: Tensor


class DuplicateAwareClipLoss(ClipLoss):
    """Compute open_clip's loss so that equal captions of a batch are not each other's negatives."""

    def forward(
        self, image_features: Tensor, text_features: Tensor, logit_scale: Tensor, duplicates: Tensor | None
    ) -> Tensor:
        """Return the cross-entropy of both directions, averaged over this rank's pairs.

        Args:
            image_features: [n, dim], normalized.
            text_features: [n, dim], normalized.
            logit_scale: Inverse temperature.
            duplicates: bool [n, n * world size], True where another row of the global batch has the same caption; None
                keeps all negatives.
        """
        per_image, per_text = self.get_logits(image_features, text_features, logit_scale)
        if duplicates is not None:
            per_image = per_image.masked_fill(duplicates, -math.inf)
            per_text = per_text.masked_fill(duplicates, -math.inf)
        labels = self.get_ground_truth(image_features.device, len(per_image))
        return (F.cross_entropy(per_image, labels) + F.cross_entropy(per_text, labels)) / 2


class ContrastiveTowers(nn.Module):
    """Wrap an open_clip model so that it returns its loss."""

    mean: Tensor
    std: Tensor

    def __init__(self, clip: Any, world: World, *, mask_duplicate_captions: bool) -> None:
        super().__init__()
        # DeepSpeed cannot flatten a parameter without dimensions.
        clip.logit_scale = nn.Parameter(clip.logit_scale.detach().reshape(1))
        self.clip: Any = clip
        self._world = world
        self._mask_duplicates = mask_duplicate_captions
        # Each rank's loss is over its own rows against all columns; the average over ranks is the whole loss.
        self._loss = DuplicateAwareClipLoss(
            local_loss=True, gather_with_grad=True, rank=world.rank, world_size=world.size
        )
        self.mean_color, std = normalization(clip)
        self.register_buffer("mean", torch.tensor(self.mean_color).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(3, 1, 1), persistent=False)

    def forward(self, input_ids: Tensor, media: Tensor, **unused: Tensor) -> ContrastiveOutput:
        """Return the contrastive loss.

        Args:
            input_ids: int64 [B, context length], captions.
            media: uint8 [B, 1, 3, height, width], the image of each caption.
            unused: Other fields of a batch.
        """
        weight = self.clip.logit_scale
        images = (media[:, 0].to(weight.dtype) / 255.0 - self.mean) / self.std
        image_features = self.clip.encode_image(images, normalize=True)
        text_features = self.clip.encode_text(input_ids, normalize=True)
        scale = weight.clamp(max=math.log(MAX_LOGIT_SCALE)).exp()
        duplicates = self._duplicates(input_ids) if self._mask_duplicates else None
        return ContrastiveOutput(self._loss(image_features, text_features, scale, duplicates) * len(media))

    def _duplicates(self, input_ids: Tensor) -> Tensor:
        gathered = [torch.empty_like(input_ids) for _ in range(self._world.size)]
        dist.all_gather(gathered, input_ids.contiguous())
        same = (input_ids[:, None] == torch.cat(gathered)[None]).all(-1)
        own = torch.arange(len(input_ids), device=input_ids.device) + self._world.rank * len(input_ids)
        same[torch.arange(len(input_ids), device=input_ids.device), own] = False
        return same


def open_clip_weights(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rename the weights of ``ContrastiveTowers`` to open_clip's own names."""
    clip = {name.removeprefix(CLIP_PREFIX): tensor.contiguous() for name, tensor in weights.items()}
    return clip | {"logit_scale": clip["logit_scale"].reshape(())}


def normalization(clip: nn.Module) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return mean and standard deviation of the tower's input, for each channel, for values in 0..1."""
    settings = open_clip.get_model_preprocess_cfg(clip)
    return tuple(settings["mean"]), tuple(settings["std"])


def build_contrastive_task(config: ContrastiveRunConfig, world: World) -> Task:
    """Build towers with random weights (the paper trains them from scratch) and the tokenizer of the captions."""
    if config.deepspeed.zero_stage == 3:
        # open_clip's towers read parameters of one module in the forward of another, which ZeRO-3 has partitioned then.
        raise ValueError("deepspeed.zero_stage: the contrastive towers train with stage 1 or 2, not 3")
    warnings.filterwarnings("ignore", category=FutureWarning, module="open_clip.loss")  # one a step, of its gather
    if world.is_main:
        write_architecture(config)
    barrier()
    torch.manual_seed(config.training.seed)
    with explain_loading(f"architecture {config.architecture!r}"):
        clip = open_clip.create_model(f"local-dir:{RunFolder(config.run_dir).architecture}", load_weights=False)
    settings = deepspeed_json(config)
    towers = ContrastiveTowers(clip, world, mask_duplicate_captions=config.mask_duplicate_captions)
    if config.training.dtype == "bfloat16":
        towers = towers.to(torch.bfloat16)
    size = image_size(config)
    return Task(
        module=towers,
        builders=contrastive_builders(config.data, caption_tokenizer(config, clip), size, towers.mean_color),
        batch_format=BatchFormat(pad_id=0, image_size=size),
        deepspeed=settings,
        model={"architecture": config.architecture},
        unit="document",
    )


def model_settings(config: ContrastiveRunConfig) -> dict[str, Any]:
    """Return open_clip's model config.

    Raises:
        ValueError: open_clip does not know the architecture's name.
    """
    if isinstance(config.architecture, dict):
        return config.architecture
    settings = open_clip.get_model_config(config.architecture)
    if settings is None:
        raise ValueError(f"architecture: open_clip has no model {config.architecture!r}; see open_clip.list_models()")
    return dict(settings)


def write_architecture(config: ContrastiveRunConfig) -> None:
    """Write ``open_clip_config.json``, so that open_clip loads the folder as ``local-dir:``."""
    folder = RunFolder(config.run_dir).architecture
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"model_cfg": model_settings(config), "preprocess_cfg": {}}, indent=1)
    (folder / "open_clip_config.json").write_text(text + "\n", encoding="utf-8")


def image_size(config: ContrastiveRunConfig) -> int:
    """Return the side of the tower's square input, in pixels."""
    size = model_settings(config)["vision_cfg"].get("image_size", 224)
    return int(size[0] if isinstance(size, (list, tuple)) else size)


def caption_tokenizer(config: ContrastiveRunConfig, clip: Any) -> Callable[[str], Tensor]:
    """Return a function from a caption to int64 [context length], cut or padded.

    It uses ``config.tokenizer`` or, without one, the tokenizer of open_clip.

    Raises:
        ValueError: The tokenizer cannot be loaded, has no end-of-sequence token, or has more tokens than the tower.
    """
    context = int(clip.context_length)
    if config.tokenizer is None:
        name = config.architecture if isinstance(config.architecture, str) else "ViT-B-32"
        tokenize = open_clip.get_tokenizer(name, context_length=context)
        return lambda caption: tokenize([caption])[0].to(torch.int64)
    with explain_loading(f"tokenizer {str(config.tokenizer)!r}"):
        tokenizer = AutoTokenizer.from_pretrained(config.tokenizer, trust_remote_code=False)
    if tokenizer.eos_token_id is None:
        raise ValueError(f"tokenizer {str(config.tokenizer)!r} has no end-of-sequence token, which pads the captions")
    table, largest = getattr(clip, "vocab_size", None), max(tokenizer.get_vocab().values())
    if table is not None and largest >= table:
        raise ValueError(
            f"tokenizer {str(config.tokenizer)!r} has ids up to {largest}, but the text tower has {table} tokens: set "
            f"vocab_size of the architecture's text_cfg to {largest + 1} or more"
        )
    padding = int(tokenizer.eos_token_id)

    def encode(caption: str) -> Tensor:
        ids = tokenizer(caption, add_special_tokens=False)["input_ids"][:context]
        return F.pad(torch.tensor(ids, dtype=torch.int64), (0, context - len(ids)), value=padding)

    return encode
