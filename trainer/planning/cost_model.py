"""What a run will cost, from its configuration alone: sizes of the model, and the speeds of known devices."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from model.activations import Activations, MicroBatch, count_activations
from model.config import DType, FlamingoConfig
from model.factory import build_flamingo, torch_dtype
from model.flamingo import Flamingo
from model.flops import UsefulFlops, Workload
from model.presets import PRESETS, preset
from model.tokens import SpecialTokenIds
from trainer.config.data_config import InterleavedSource, Source, TextSource, VideoTextSource
from trainer.config.run_config import FlamingoRunConfig
from trainer.data.stream.step_plan import SourcePlan
from trainer.deepspeed_engine.partitioned_linear import partitioned_linear

_TORCH_LINEAR = torch._C._nn.linear  # DeepSpeed replaces torch.nn.functional's for good once it has partitioned a model


@dataclass(frozen=True)
class Device:
    """An accelerator, by its data sheet.

    tflops: dense bfloat16. memory: bytes. host_link: bytes a second to the host, one way. node_link: between devices of
    a node, each way. network: of one device to other nodes (its share of the node's adapters). flops, optimizer: where
    measured (``trainer.benchmark rates``), operations a second of real products, bytes a second of AdamW's step.
    overlaps: whether it computes while it sends, which a CPU does not.
    """

    tflops: float
    memory: float
    host_link: float
    node_link: float
    network: float
    flops: float | None = None
    optimizer: float | None = None
    overlaps: bool = True


# memory: what a process can have of the nominal one. network: a 400 Gbit/s adapter a device (200 for A100).
DEVICES = {
    "a100-40": Device(312, 39e9, 25e9, 300e9, 25e9),
    "a100-80": Device(312, 79e9, 25e9, 300e9, 25e9),
    "h100": Device(989, 79e9, 50e9, 450e9, 50e9),
    "h200": Device(989, 140e9, 50e9, 450e9, 50e9),
    "b200": Device(2250, 180e9, 50e9, 900e9, 50e9),
    "rtx-4090": Device(165, 24e9, 25e9, 25e9, 12e9),
}


def without_weights(config: FlamingoConfig) -> FlamingoConfig:
    """The same model with random weights, that needs no hub: for measuring and planning.

    A language model with a name becomes the architecture in its local folder, or else that of ``preset``.

    Raises:
        ValueError: neither is there.
    """
    language_model = config.language_model
    if language_model.name is not None:
        if (Path(language_model.name) / "config.json").is_file():
            from transformers import AutoConfig

            architecture = AutoConfig.from_pretrained(language_model.name, local_files_only=True).to_dict()
        elif config.preset in PRESETS:
            architecture = copy.deepcopy(preset(config.preset).language_model.architecture)
        else:
            raise ValueError(
                f"model.language_model.name {language_model.name!r} is no local folder with a config.json, and the hub "
                "is not asked: set model.language_model.architecture (and name to null), or model.preset"
            )
        language_model = replace(language_model, name=None, revision=None, architecture=architecture)
    name = config.vision.name
    pretrained = None if not name.startswith(("local-dir:", "hf-hub:")) else config.vision.pretrained
    return replace(config, language_model=language_model, vision=replace(config.vision, pretrained=pretrained))


def synthetic_tokens(config: FlamingoConfig) -> SpecialTokenIds:
    """New tokens behind the language model's table, for a config from ``without_weights``."""
    from transformers import AutoConfig

    architecture = dict(config.language_model.architecture or {})
    text = AutoConfig.for_model(architecture.pop("model_type"), **architecture).get_text_config()
    return SpecialTokenIds(text.vocab_size, text.vocab_size + 1, bos_id=1, eos_id=2, pad_id=0)


def build_without_weights(config: FlamingoConfig, dtype: DType = "float32") -> Flamingo:
    """The model on the meta device: shapes, and no memory. Raises ValueError like ``without_weights``."""
    config = without_weights(config)
    with torch.device("meta"):
        return build_flamingo(config, synthetic_tokens(config), dtype=dtype)


def expected_media(source: Source) -> tuple[int, int]:
    """(media of a row, frames of each): the most that the source's settings allow."""
    match source:
        case InterleavedSource():
            return source.max_images, 1
        case VideoTextSource():
            return 1, source.num_frames
        case TextSource():
            return 0, 1
    return 1, 1


def executed_flops(sizes: UsefulFlops, workload: Workload, recompute: bool | int) -> float:
    """FLOPs that the devices execute for one sequence: the useful ones, and what checkpointing computes again.

    recompute: whether, or how many of the language model's blocks.
    """
    parts = sizes.parts(workload)
    share = float(recompute) if isinstance(recompute, bool) else recompute / sizes.blocks
    # A forward of what stands in the blocks: half of 4 N, a third of 6 N.
    again = parts["language_model"] / 2 + (parts["cross_attention_text"] + parts["cross_attention_media"]) / 3
    return sum(parts.values()) + share * again


def micro_batch(plan: SourcePlan, rows: int | None = None) -> MicroBatch:
    """The largest micro-batch that the source's settings allow; with another number of rows."""
    source, rows = plan.source, plan.micro_batch_size if rows is None else rows
    media, frames = expected_media(source)
    grid = None
    most: int | None = getattr(source, "image_tokens", None)
    if most is not None:
        grid = (math.isqrt(most), most // math.isqrt(most))
    return MicroBatch(rows, source.max_tokens, rows * media, frames, grid, source.packing)


class ActivationMemory:
    """What micro-batches of a run keep, each counted once; a count takes seconds. See ``model.activations``."""

    def __init__(self, config: FlamingoRunConfig, model: Flamingo, *, interpolate: bool = False) -> None:
        """model: on the meta device, or any other, or partitioned, but before DeepSpeed's engine has it. interpolate:
        count only one and two rows, and draw a line through them: for a search over micro-batches."""
        self.model = model
        self._interpolate = interpolate
        self._dtype = torch_dtype(config.training.dtype)
        self._linear = partitioned_linear if config.deepspeed.zero_stage == 3 else _TORCH_LINEAR
        self._counted: dict[tuple[MicroBatch, int], Activations] = {}

    def count(self, batch: MicroBatch, checkpointed: int) -> Activations:
        """With the first ``checkpointed`` blocks recomputed."""
        if self._interpolate and batch.rows > 2:
            media = batch.media // batch.rows
            one, two = (self.count(replace(batch, rows=n, media=n * media), checkpointed) for n in (1, 2))
            return _on_the_line(one, two, batch.rows)
        key = (batch, checkpointed)
        if key not in self._counted:
            before = self.model.language_model.checkpointed
            self.model.activation_checkpointing(checkpointed)
            self._counted[key] = count_activations(self.model, batch, self._dtype, self._linear)
            self.model.activation_checkpointing(before)
        return self._counted[key]

    def estimate(self, batch: MicroBatch, checkpointed: int) -> Activations:
        """The same from the counts for no block and for all: what kept blocks leave, under what exists besides when
        the backward starts; or what a recomputed block needs, after those behind it are done."""
        blocks = self.model.language_model.blocks
        if checkpointed in (0, blocks):
            return self.count(batch, checkpointed)
        none, every = self.count(batch, 0), self.count(batch, blocks)
        kept = (*every.blocks[:checkpointed], *none.blocks[checkpointed:])
        saved = none.saved - sum(none.blocks) + sum(kept)
        return Activations(saved, max(saved + none.peak - none.saved, every.peak), kept, none.vision)


def _on_the_line(one: Activations, two: Activations, rows: int) -> Activations:
    """Of so many rows, from those of one and of two."""

    def at(first: int, second: int) -> int:
        return first + (rows - 1) * (second - first)

    blocks = tuple(at(first, second) for first, second in zip(one.blocks, two.blocks, strict=True))
    vision = at(one.vision, two.vision)
    return Activations(at(one.saved, two.saved), at(one.peak, two.peak), blocks, vision)


def checkpointed_blocks(config: FlamingoRunConfig, memory: ActivationMemory, plans: Iterable[SourcePlan]) -> int:
    """How many of the language model's first blocks are recomputed: as ``training.activation_checkpointing`` says, or
    the fewest with which no micro-batch's activations need more than ``training.activation_memory_gib``.

    Raises:
        ValueError: the language model has fewer; or not even all of them are enough.
    """
    wanted, budget = config.training.activation_checkpointing, config.training.activation_memory_gib
    blocks = memory.model.language_model.blocks
    if budget is None:
        if wanted > blocks:
            raise ValueError(
                f"training.activation_checkpointing {wanted}: the language model has {blocks} blocks; set a number up "
                f"to {blocks}, or true for all"
            )
        return wanted if not isinstance(wanted, bool) else blocks if wanted else 0
    batches = [micro_batch(plan) for plan in plans]
    most = budget * 2**30
    estimated = (number for number in range(blocks) if _peak(memory.estimate, batches, number) <= most)
    number = next(estimated, blocks)
    while number < blocks and _peak(memory.count, batches, number) > most:
        number += 1
    if (least := _peak(memory.count, batches, number)) > most:
        raise ValueError(
            f"training.activation_memory_gib {budget:g}: with every block recomputed the activations of a micro-batch "
            f"still need {least / 2**30:.4g} GiB; set more, or smaller data.sources.*.micro_batch_size"
        )
    return number


def _peak(count: Callable[[MicroBatch, int], Activations], batches: Sequence[MicroBatch], checkpointed: int) -> int:
    return max(count(batch, checkpointed).peak for batch in batches)
