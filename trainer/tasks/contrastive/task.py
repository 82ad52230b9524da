"""Build the task of ``trainer.pretrain_vision``: contrastive towers (paper, section 3.1, appendix B.1.3)."""

from __future__ import annotations

import torch

from model.loading_errors import explain_loading
from trainer.config.deepspeed_json import deepspeed_json
from trainer.config.run_config import ContrastiveRunConfig
from trainer.data.batch import BatchFormat
from trainer.deepspeed_engine.part_clipping import PartClipping
from trainer.loop import Task
from trainer.runtime.distributed import World, failing_together
from trainer.runtime.run_folder import RunFolder
from trainer.tasks.contrastive.architecture import build_clip, image_size, load_weights, write_architecture
from trainer.tasks.contrastive.captions import caption_tokenizer
from trainer.tasks.contrastive.exact_step import ContrastiveStep
from trainer.tasks.contrastive.towers import IMAGE_TOWER, ContrastiveTowers
from trainer.tasks.row_builders import contrastive_builders


def build_contrastive_task(config: ContrastiveRunConfig, world: World) -> Task:
    """Build towers with random weights, or those of ``start_from``, and the tokenizer of the captions."""
    folder = RunFolder(config.run_dir).architecture
    with failing_together(world):
        if world.is_main:
            write_architecture(config, folder)
    torch.manual_seed(config.training.seed)
    with explain_loading(f"architecture {config.architecture!r}"):
        clip = build_clip(folder)
    if config.start_from is not None:
        load_weights(clip, config.start_from)
    towers = ContrastiveTowers(clip)
    if config.training.dtype == "bfloat16":
        towers = towers.to(torch.bfloat16)
    size = image_size(config)
    return Task(
        module=towers,
        builders=contrastive_builders(config.data, caption_tokenizer(config, clip), size, towers.mean_color),
        batch_format=BatchFormat(pad_id=0, image_size=size),
        deepspeed=deepspeed_json(config),
        model={"architecture": config.architecture},
        unit="document",
        accumulate=ContrastiveStep(
            config.loss, config.mask_duplicate_captions, merged=config.training.combine == "merged"
        ),
        clip_parts=clip_parts(config),
    )


def clip_parts(config: ContrastiveRunConfig) -> tuple[PartClipping, ...]:
    """Return how the gradients of each tower are clipped; nothing where both towers are clipped together."""
    image, text = config.clip_towers.image, config.clip_towers.text
    if image == text == type(image)():
        return ()
    return (
        PartClipping((IMAGE_TOWER,), image.adaptive, image.norm),
        PartClipping(("",), text.adaptive, text.norm),
    )
