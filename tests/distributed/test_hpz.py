"""ZeRO++'s hpZ: what the backward gathers from is a copy of the parameters, which must not fall behind them."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.distributed.processes import run_distributed
from tests.project.commands import ROOT

# Nothing stays gathered from the forward to the backward, so everything trained comes out of the copy.
GATHERED_AGAIN = {
    "stage3_param_persistence_threshold": 0,
    "stage3_max_reuse_distance": 0,
    "stage3_max_live_parameters": 0,
}


def trained(world: Any) -> dict[int, list[float]]:
    """Loss and gradient norm of three updates, by the size of the groups that share a copy."""
    from model.factory import build_flamingo
    from trainer.config.deepspeed_json import deepspeed_json
    from trainer.config.loader import load_config
    from trainer.config.run_config import FlamingoRunConfig
    from trainer.deepspeed_engine.engine import Engine, partitioned_loading
    from trainer.planning.cost_model import synthetic_tokens, without_weights

    found = {}
    for size in (1, 2):
        raw = json.dumps({"zero_optimization": GATHERED_AGAIN})
        overrides = ["--deepspeed.hpz_partition_size", str(size), "--deepspeed.raw", raw, "--optimizer.lr", "0.01"]
        config = load_config(ROOT / "configs" / "debug.yaml", overrides, FlamingoRunConfig, check_files=False)
        settings = deepspeed_json(config, world_size=world.size, micro_batches_per_step=1)
        shape = without_weights(config.model)
        tokens = synthetic_tokens(shape)
        with partitioned_loading(settings) as placement:
            model = build_flamingo(shape, tokens, gather=placement.gather, partition=placement.partition)
        engine = Engine(model, config.optimizer, settings, world)
        batch = document(tokens, model.vision_encoder.image_size, world.rank)
        found[size] = [
            number
            for _ in range(3)
            for number in (float(engine.forward_backward(batch, 1 / 16)), engine.step(1.0).grad_norm)
        ]
    return found


def document(tokens: Any, image_size: int, rank: int) -> dict[str, Any]:
    """An image and sixteen tokens behind it."""
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
def test_training_is_the_same_with_a_second_copy() -> None:
    for found in run_distributed(trained, 2):
        assert found[2] == pytest.approx(found[1], rel=1e-5)
        assert found[1][-1] != pytest.approx(found[1][1], rel=1e-3)  # of weights that have moved
