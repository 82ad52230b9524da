"""Measure contrastive steps beside what the plan predicts of them."""

from __future__ import annotations

import json
from typing import Any

from tests.project.commands import ROOT
from trainer.config.loader import load_config
from trainer.config.run_config import ContrastiveRunConfig

DEBUG = ROOT / "configs" / "vision" / "debug.yaml"


def settings(stage: int, *more: str, bucket: int = 50_000, **zero: int) -> list[str]:
    """Return overrides; ``bucket`` parameters are reduced or prefetched at once."""
    values = {"reduce_bucket_size": bucket, "stage3_prefetch_bucket_size": bucket, **zero}
    values |= {"stage3_param_persistence_threshold": 0} if stage == 3 else {}
    raw = ["--deepspeed.raw", json.dumps({"zero_optimization": values})]
    return ["--deepspeed.zero_stage", str(stage), *raw, *more]


CLIPPED = "--clip_towers.text.norm=1e-9"  # so that the norm is always above its limit
NO_REUSE = {"stage3_max_reuse_distance": 0, "stage3_max_live_parameters": 0}
ONE = "--data.sources.0.micro_batch_size=null"
MANY_COLUMNS = ("--architecture.embed_dim=2048", "--data.sources.0.batch_size=512", "--loss.rows_per_chunk=200")
CASES = {
    "stage 1": settings(1, CLIPPED),
    "stage 2": settings(2, CLIPPED),
    "stage 3": settings(3, CLIPPED),
    "stage 1, one micro-batch, bfloat16": settings(1, CLIPPED, ONE, "--training.dtype=bfloat16"),
    "stage 3, one micro-batch, no reuse": settings(3, CLIPPED, ONE, **NO_REUSE),
    "stage 2, many columns": settings(2, CLIPPED, *MANY_COLUMNS),
}


def all_cases(world: Any, names: list[str]) -> dict[str, tuple[float, float]]:
    """Measure cases in the same processes, because starting processes takes most of the time."""
    return {name: measured(world, read(name)) for name in names}


def read(name: str, *more: str) -> ContrastiveRunConfig:
    """Return the run of a case, with more overrides."""
    return load_config(DEBUG, [*CASES[name], *more], ContrastiveRunConfig, check_files=False)


def predicted(names: list[str], processes: int) -> dict[str, Any]:
    """Predict cases; those with equal towers share their counts."""
    from trainer.planning.devices import DEVICES
    from trainer.planning.prediction import Cluster
    from trainer.tasks.contrastive.prediction import ContrastivePredictor, random_towers

    predictors: dict[str, ContrastivePredictor] = {}
    found = {}
    for name in names:
        config = read(name)
        key = f"{config.architecture} {config.training.dtype}"
        if key not in predictors:
            predictors[key] = ContrastivePredictor(config, random_towers(config, "meta"), exact=True)
        found[name] = predictors[key](config, Cluster(DEVICES["h100"], 1, processes))
    return found


def measured(world: Any, config: ContrastiveRunConfig) -> tuple[float, float]:
    """Return bytes of tensors at the peak of a step, and the bytes that it sends."""
    from trainer.benchmark.contrastive_step import accumulation, random_engine, synthetic_steps
    from trainer.benchmark.step_memory import tensor_memory
    from trainer.benchmark.step_timings import time_steps
    from trainer.tasks.contrastive.prediction import random_towers

    batches = synthetic_steps(config, random_towers(config, "meta"), world)
    before = tensor_memory().current  # left by earlier cases in this process, and the batches
    engine = random_engine(config, world)
    timings = time_steps(engine, batches, 1, 1, None, accumulate=accumulation(config))
    return timings.device_memory - before, sum(timings.sent.values())
