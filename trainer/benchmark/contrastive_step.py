"""Build what ``trainer.benchmark step`` needs of a contrastive run: towers, full batches, and what these hold."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from itertools import cycle, repeat

import torch

from trainer.config.deepspeed_json import deepspeed_json
from trainer.config.run_config import ContrastiveRunConfig
from trainer.data.batch import IGNORED_LABEL, Batch
from trainer.data.stream.step_plan import plan_step
from trainer.deepspeed_engine.engine import Engine
from trainer.runtime.distributed import World
from trainer.tasks.contrastive.exact_step import ContrastiveStep
from trainer.tasks.contrastive.prediction import ContrastivePredictor, input_shape, random_towers
from trainer.tasks.contrastive.task import clip_parts
from trainer.tasks.contrastive.towers import ContrastiveTowers


def random_engine(config: ContrastiveRunConfig, world: World) -> Engine:
    """Return the engine of a run, with random weights."""
    torch.manual_seed(config.training.seed)
    towers = random_towers(config)
    if config.training.dtype == "bfloat16":
        towers = towers.to(torch.bfloat16)
    settings, threads = deepspeed_json(config), config.training.cpu_matmul
    return Engine(towers, config.optimizer, settings, world, threads, clip_parts(config))


def synthetic_steps(config: ContrastiveRunConfig, towers: ContrastiveTowers, world: World) -> Iterator[list[Batch]]:
    """Yield the micro-batches of a step on this rank, without end; those of one source where sources take turns."""
    batches = _synthetic_batches(config, towers, world)
    if config.training.combine != "round_robin":
        return repeat(batches)
    turns = [[batch for batch in batches if batch.source == source.name] for source in config.data.sources]
    return cycle(turns)


def _synthetic_batches(config: ContrastiveRunConfig, towers: ContrastiveTowers, world: World) -> list[Batch]:
    shape, generator = input_shape(config, towers), torch.Generator().manual_seed(world.rank)
    vocabulary = _vocabulary(towers)
    batches = []
    for plan in plan_step(config.data, world.size):
        for _ in range(plan.num_micro_batches):
            ids = torch.randint(1, vocabulary, (plan.micro_batch_size, shape.context_length), generator=generator)
            size = (plan.micro_batch_size, 1, 3, shape.image_size, shape.image_size)
            media = torch.randint(0, 256, size, dtype=torch.uint8, generator=generator)
            labels, index = torch.full_like(ids, IGNORED_LABEL), torch.full_like(ids, -1)
            batches.append(Batch(plan.source.name, ids, torch.ones_like(ids), labels, index, media))
    return batches


def _vocabulary(towers: ContrastiveTowers) -> int:
    encoder = getattr(getattr(towers.clip, "text", None), "config", None)  # of transformers
    return int(towers.clip.vocab_size if encoder is None else encoder.vocab_size)


def accumulation(config: ContrastiveRunConfig) -> Callable[[Engine, list[Batch]], None]:
    """Return a function that adds the gradient of a step."""
    step = ContrastiveStep(config.loss, config.mask_duplicate_captions, merged=config.training.combine == "merged")
    total = sum(source.batch_size for source in config.data.sources)
    factors = {
        source.name: source.weight / (total if step.merged else source.batch_size) for source in config.data.sources
    }

    def accumulate(engine: Engine, batches: list[Batch]) -> None:
        step(engine, batches, factors)

    return accumulate


def contents(
    config: ContrastiveRunConfig, towers: ContrastiveTowers, world: World
) -> Callable[[list[Batch]], Counter[str]]:
    """Return a function that counts what a step on this rank holds, and the operations that it takes."""
    predictor = ContrastivePredictor(config, towers)
    return partial(_contents, predictor, config.training.combine == "merged", world.size)


def _contents(predictor: ContrastivePredictor, merged: bool, ranks: int, batches: list[Batch]) -> Counter[str]:
    found: Counter[str] = Counter()
    problems: dict[str, list[int]] = {}
    for batch in batches:
        rows = len(batch.input_ids)
        problems.setdefault("" if merged else batch.source, []).append(rows)
        found["tokens"] += batch.input_ids.numel()
        found["positions"] += batch.input_ids.numel()
        found["images"] += rows
        found["samples"] += rows
        found["useful"] += predictor.useful_flops(rows)
    for sizes in problems.values():
        found["executed"] += predictor.executed_flops(sum(sizes), sum(sizes) * ranks, sum(sizes[1:]))
    return found
