"""Test ZeRO++'s hpZ: the backward pass gathers a second copy of the parameters, which must follow every step."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.distributed.processes import run_distributed
from tests.project.commands import ROOT

# No parameter stays gathered from the forward to the backward pass, so every gradient depends on the copy.
GATHER_TWICE = {
    "stage3_param_persistence_threshold": 0,
    "stage3_max_reuse_distance": 0,
    "stage3_max_live_parameters": 0,
}


def trained(world: Any) -> dict[int, list[float]]:
    """Return loss and gradient norm of three steps, by the number of ranks that share a second copy."""
    from model.factory import build_flamingo
    from trainer.config.deepspeed_json import deepspeed_json
    from trainer.config.loader import load_config
    from trainer.config.run_config import FlamingoRunConfig
    from trainer.deepspeed_engine.engine import Engine, partitioned_loading
    from trainer.planning.random_weights import synthetic_tokens, with_random_weights

    found = {}
    for size in (1, 2):
        raw = json.dumps({"zero_optimization": GATHER_TWICE})
        overrides = ["--deepspeed.hpz_partition_size", str(size), "--deepspeed.raw", raw, "--optimizer.lr", "0.01"]
        config = load_config(ROOT / "configs" / "debug.yaml", overrides, FlamingoRunConfig, check_files=False)
        settings = deepspeed_json(config)
        shape = with_random_weights(config.model)
        tokens = synthetic_tokens(shape)
        with partitioned_loading(settings) as build:
            model = build_flamingo(shape, tokens, gather=build.gather, partition=build.partition)
        engine = Engine(model, config.optimizer, settings, world)
        batch = document(tokens, model.vision_encoder.image_size, world.rank)
        found[size] = [
            number
            for _ in range(3)
            for number in (float(engine.forward_backward(batch, 1 / 16, is_last=True)), engine.step(1.0).grad_norm)
        ]
    return found


def document(tokens: Any, image_size: int, rank: int) -> dict[str, Any]:
    """Return a row of an image and sixteen tokens."""
    import torch

    draw = torch.Generator().manual_seed(rank)
    ids = torch.randint(3, tokens.image_id, (1, 16), generator=draw)
    ids[0, 0] = tokens.image_id
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "labels": ids.masked_fill(ids == tokens.image_id, -100),
        "media_index": torch.zeros_like(ids),
        "media": torch.randint(0, 256, (1, 1, 3, image_size, image_size), dtype=torch.uint8, generator=draw),
    }


@pytest.mark.distributed
def test_a_second_copy_does_not_change_training() -> None:
    for found in run_distributed(trained, 2):
        assert found[2] == pytest.approx(found[1], rel=1e-5)
        assert found[1][-1] != pytest.approx(found[1][1], rel=1e-3)  # the weights have moved
