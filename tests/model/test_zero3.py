"""The real model under DeepSpeed's ZeRO-3 with two processes, everything offloaded, against one plain process."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from model.config import FlamingoConfig, LanguageModelConfig
from model.factory import build_flamingo, build_language_model
from model.flamingo import Flamingo
from model.flops import UsefulFlops
from model.generation import generate
from model.media_index import preceding
from model.parameters import frozen_digests, trainable_parameters
from tests.distributed.processes import run_distributed
from tests.model.builders import BEYOND, random_media, random_text, text_with_media, tiny_config

IMAGE = BEYOND.image_id
STEPS = 3
SETTINGS: dict[str, Any] = {
    "train_micro_batch_size_per_gpu": 1,
    "gradient_accumulation_steps": 1,
    "steps_per_print": 10**9,
    "gradient_clipping": 1e9,
    "zero_force_ds_cpu_optimizer": False,
    "zero_allow_untested_optimizer": True,  # SGD, which does not blow up the last bit as Adam does
    "zero_optimization": {
        "stage": 3,
        "stage3_param_persistence_threshold": 0,
        "offload_param": {"device": "cpu"},
        "offload_optimizer": {"device": "cpu"},
    },
}


def optimizer(model: Flamingo) -> torch.optim.Optimizer:
    return torch.optim.SGD(trainable_parameters(model).values(), lr=0.02)


def share(ids: Tensor, media: Tensor, rank: int) -> dict[str, Tensor]:
    """One row of the batch, with its own media."""
    index = preceding(ids, IMAGE)[rank : rank + 1]
    first = (2, 0)[1 - rank]
    return {
        "input_ids": ids[rank : rank + 1],
        "labels": ids[rank : rank + 1],
        "media": media[2:] if rank else media[:2],
        "media_index": torch.where(index < 0, index, index - first),
    }


def on_one_rank(world: Any, config: FlamingoConfig) -> dict[str, Any]:
    import deepspeed

    from trainer.deepspeed_engine.engine import partitioned_loading

    with partitioned_loading(SETTINGS) as placement:
        model = build_flamingo(config, BEYOND, gather=placement.gather, partition=placement.partition)
    whole = [name for name, p in model.named_parameters() if not hasattr(p, "ds_id")]
    digests = frozen_digests(model, placement.gather)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer(model), config=SETTINGS)
    model.train()
    model.activation_checkpointing()
    ids, media = text_with_media()
    losses = []
    for _ in range(STEPS):
        loss = engine(**share(ids, media, world.rank)).loss
        engine.backward(loss)
        engine.step()
        total = loss.detach().clone()
        torch.distributed.all_reduce(total)
        losses.append(total.item())
    trained = {}
    for name, parameter in trainable_parameters(model).items():
        with placement.gather([parameter]):
            trained[name] = parameter.detach().clone().numpy()
    # one rank stops at once, the other does not
    prompt = [[1, IMAGE, 5]] if world.rank else [[1, 7]]
    text = generate(
        model,
        prompt,
        media[: world.rank],
        [world.rank],
        max_new_tokens=2 + 3 * world.rank,
        synced_ranks=True,
        stop_ids=[0],
    )
    # a rank whose batch has neither media nor labels runs the same modules as the other
    blind = {"input_ids": random_text(1, 9), "labels": torch.full((1, 9), -100), "media": random_media(1)}
    blind["media_index"] = torch.full((1, 9), -1)
    loss = engine(**(blind if world.rank else share(ids, media, 0))).loss
    engine.backward(loss)
    engine.step()
    return {
        "whole": whole,
        "digests": digests,
        "after": frozen_digests(model, placement.gather),
        "losses": losses,
        "trained": trained,
        "text": text,
        "last": loss.item(),
        "flops": UsefulFlops.of(model),
    }


@pytest.mark.distributed
@pytest.mark.parametrize("family", ["opt", "gemma3"])
def test_partitioned_training_is_the_same(family: str, tmp_path: Path) -> None:
    build_language_model(tiny_config(family).language_model, torch.float32).save_pretrained(tmp_path)
    config = replace(tiny_config(family), language_model=LanguageModelConfig(name=str(tmp_path)))
    plain = build_flamingo(config, BEYOND)
    digests = frozen_digests(plain)
    ids, media = text_with_media()
    sgd, losses = optimizer(plain), []
    for _ in range(STEPS):
        loss = plain(ids, labels=ids, media=media).loss
        sgd.zero_grad()
        (loss / 2).backward()  # DeepSpeed averages over ranks
        sgd.step()
        losses.append(loss.item())
    ranks = run_distributed(on_one_rank, 2, config)
    for rank, found in enumerate(ranks):
        assert all(name.startswith("vision_encoder") for name in found["whole"])
        assert found["digests"] == found["after"] == digests
        assert found["losses"] == pytest.approx(losses, rel=1e-5)
        for name, parameter in trainable_parameters(plain).items():
            torch.testing.assert_close(
                torch.from_numpy(found["trained"][name]), parameter.detach(), rtol=1e-4, atol=1e-6
            )
        assert len(found["text"][0]) == 2 + 3 * rank
        assert found["flops"] == UsefulFlops.of(plain)
    assert losses[-1] < losses[0]
    assert ranks[1]["last"] == 0
    assert ranks[0]["last"] > 0


def on_one_rank_bfloat16(world: Any, config: FlamingoConfig) -> dict[str, Any]:
    from trainer.deepspeed_engine.engine import partitioned_loading

    settings = SETTINGS | {"bf16": {"enabled": True}}
    with partitioned_loading(settings) as placement:
        model = build_flamingo(config, BEYOND, dtype="bfloat16", gather=placement.gather, partition=placement.partition)
    values = {}
    for name, parameter in model.named_parameters():
        with placement.gather([parameter]):
            values[name] = (str(parameter.dtype), parameter.detach().float().numpy().copy())
    return values


@pytest.mark.distributed
def test_the_start_in_bfloat16_is_the_same(tmp_path: Path) -> None:
    """``zero.Init`` changes the type that torch's constructors return: a careless draw comes out different."""
    build_language_model(tiny_config().language_model, torch.float32).save_pretrained(tmp_path)
    config = replace(tiny_config(), language_model=LanguageModelConfig(name=str(tmp_path)))
    plain = build_flamingo(config, BEYOND, dtype="bfloat16")
    (found,) = run_distributed(on_one_rank_bfloat16, 1, config)
    assert found.keys() == {name for name, _ in plain.named_parameters()}
    for name, parameter in plain.named_parameters():
        dtype, value = found[name]
        assert dtype == "torch.bfloat16", name
        assert torch.equal(torch.from_numpy(value), parameter.float()), name
