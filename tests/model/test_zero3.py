"""Compare the model under ZeRO-3 with two processes, everything offloaded, to one process without DeepSpeed."""

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
from model.lm_probes import separates_packed_documents
from model.media_index import preceding
from model.parameters import frozen_digests, trainable_parameters
from tests.distributed.processes import run_distributed
from tests.model.builders import BEYOND, random_media, random_text, text_with_media, tiny_config

IMAGE = BEYOND.image_id
STEPS = 3
SETTINGS: dict[str, Any] = {
    "train_micro_batch_size_per_gpu": 1,
    "steps_per_print": 10**9,
    "gradient_clipping": 1e9,
    "zero_force_ds_cpu_optimizer": False,
    "zero_allow_untested_optimizer": True,  # SGD: Adam would enlarge rounding errors
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
    """Return the row of a rank, with its media."""
    index = preceding(ids, IMAGE)[rank : rank + 1]
    first = (2, 0)[1 - rank]
    return {
        "input_ids": ids[rank : rank + 1],
        "labels": ids[rank : rank + 1],
        "media": media[2:] if rank else media[:2],
        "media_index": torch.where(index < 0, index, index - first),
    }


def train_on_rank(world: Any, config: FlamingoConfig) -> dict[str, Any]:
    import deepspeed

    from trainer.deepspeed_engine.engine import partitioned_loading
    from trainer.deepspeed_engine.internals import is_partitioned

    with partitioned_loading(SETTINGS) as build:
        model = build_flamingo(config, BEYOND, gather=build.gather, partition=build.partition)
    separates = separates_packed_documents(model.language_model.lm)
    whole = [name for name, p in model.named_parameters() if not is_partitioned(p)]
    digests = frozen_digests(model, build.gather)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer(model), config=SETTINGS)
    model.train()
    model.set_activation_checkpointing()
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
        with build.gather([parameter]):
            trained[name] = parameter.detach().clone().numpy()
    # Rank 0 generates fewer tokens than rank 1, and must still run the same modules.
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
    # Rank 1 has neither media nor labels, and must still run the same modules.
    blind = {"input_ids": random_text(1, 9), "labels": torch.full((1, 9), -100), "media": random_media(1)}
    blind["media_index"] = torch.full((1, 9), -1)
    loss = engine(**(blind if world.rank else share(ids, media, 0))).loss
    engine.backward(loss)
    engine.step()
    return {
        "separates": separates,
        "whole": whole,
        "digests": digests,
        "after": frozen_digests(model, build.gather),
        "losses": losses,
        "trained": trained,
        "text": text,
        "last": loss.item(),
        "flops": UsefulFlops.of(model),
    }


@pytest.mark.distributed
@pytest.mark.parametrize("family", ["opt", "gemma3"])
def test_partitioned_training_equals_plain_training(family: str, tmp_path: Path) -> None:
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
    ranks = run_distributed(train_on_rank, 2, config)
    for rank, found in enumerate(ranks):
        assert found["separates"] == (family == "gemma3"), "partitioned weights do not change the probe's verdict"
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


def initial_values(world: Any, config: FlamingoConfig) -> dict[str, Any]:
    from trainer.deepspeed_engine.engine import partitioned_loading

    settings = SETTINGS | {"bf16": {"enabled": True}}
    with partitioned_loading(settings) as build:
        model = build_flamingo(config, BEYOND, dtype="bfloat16", gather=build.gather, partition=build.partition)
    values = {}
    for name, parameter in model.named_parameters():
        with build.gather([parameter]):
            values[name] = (str(parameter.dtype), parameter.detach().float().numpy().copy())
    return values


@pytest.mark.distributed
def test_initial_values_in_bfloat16_are_the_same(tmp_path: Path) -> None:
    """Guard against draws in another type: ``zero.Init`` changes the default type of torch's constructors."""
    build_language_model(tiny_config().language_model, torch.float32).save_pretrained(tmp_path)
    config = replace(tiny_config(), language_model=LanguageModelConfig(name=str(tmp_path)))
    plain = build_flamingo(config, BEYOND, dtype="bfloat16")
    (found,) = run_distributed(initial_values, 1, config)
    assert found.keys() == {name for name, _ in plain.named_parameters()}
    for name, parameter in plain.named_parameters():
        dtype, value = found[name]
        assert dtype == "torch.bfloat16", name
        assert torch.equal(torch.from_numpy(value), parameter.float()), name
