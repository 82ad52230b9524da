"""Train under ZeRO-3 with two processes, with and without frozen blocks that are gathered together."""

from __future__ import annotations

from typing import Any

import pytest

from model.generation import generate
from model.parameters import trainable_parameters
from model.presets import get_preset
from tests.distributed.processes import run_distributed
from tests.model.builders import BEYOND, random_media, text_with_media, tiny_config, wake
from trainer.config.run_config import OptimizerConfig
from trainer.deepspeed_engine import engine as engines
from trainer.deepspeed_engine.frozen_blocks import gather_frozen_blocks_together, hooked_modules
from trainer.planning.random_weights import build_on_meta_device
from trainer.runtime.distributed import World

LEARNING_RATE = 0.01
SETTINGS: dict[str, Any] = {
    "train_micro_batch_size_per_gpu": 1,
    "steps_per_print": 10**9,
    "gradient_clipping": 1.0,
    "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0, "stage3_prefetch_bucket_size": 1000},
}


def train(world: World, together: bool, checkpointing: bool) -> dict[str, Any]:
    """Train a few steps, generate, and return what came out."""
    from model.factory import build_flamingo

    with engines.partitioned_loading(SETTINGS) as build:
        model = build_flamingo(tiny_config("llama"), BEYOND, gather=build.gather, partition=build.partition)
    with engines.gathered_parameters(list(model.parameters())):
        wake(model, 0.5)
    model.set_activation_checkpointing(checkpointing)
    if together:  # the engine does it on a GPU
        gather_frozen_blocks_together(model)
    engine = engines.Engine(model, OptimizerConfig(lr=LEARNING_RATE), SETTINGS, world)
    ids, media = text_with_media()  # two media in the first row, one in the second
    row = ids[world.rank : world.rank + 1]
    batch = {"input_ids": row, "labels": row, "media": (media[:2], media[2:])[world.rank]}
    losses, norms = [], []
    for _ in range(3):
        losses += [float(engine.forward_backward(batch, scale=0.1, is_last=is_last)) for is_last in (False, True)]
        norms.append(engine.step(1.0).grad_norm)
    texts = generate(model, [[1, BEYOND.image_id]], random_media(1), [1], max_new_tokens=3, synced_ranks=True)
    with engines.gathered_parameters(list(model.parameters())):
        weights = {name: tensor.detach().flatten().tolist() for name, tensor in trainable_parameters(model).items()}
    hooked = sum(hasattr(module, "ds_id") for module in model.modules())
    return {"losses": losses, "norms": norms, "texts": texts, "weights": weights, "hooked": hooked}


def train_all(world: World) -> dict[tuple[bool, bool], dict[str, Any]]:
    return {
        (together, checkpointing): train(world, together, checkpointing)
        for together, checkpointing in ((True, True), (True, False), (False, False))
    }


@pytest.mark.distributed
def test_blocks_gathered_together_train_alike() -> None:
    for found in run_distributed(train_all, 2):
        alone = found[False, False]
        assert alone["losses"][-1] < alone["losses"][0]
        for result in found.values():
            assert result["texts"] == alone["texts"]
            # Parameters that are gathered together lie elsewhere in memory, which changes how products are rounded.
            assert result["losses"] == pytest.approx(alone["losses"], rel=1e-6)
            assert result["norms"] == pytest.approx(alone["norms"], rel=1e-6)
            assert result["weights"].keys() == alone["weights"].keys()
            for name, weight in result["weights"].items():
                assert weight == pytest.approx(alone["weights"][name], abs=LEARNING_RATE / 100), name
        assert found[True, True]["hooked"] < 0.7 * alone["hooked"]


def test_a_third_of_the_hooks_is_left_at_3b() -> None:
    model = build_on_meta_device(get_preset("3b"))
    before = len(hooked_modules(model))
    blocks = gather_frozen_blocks_together(model)
    after = len(hooked_modules(model))
    print(f"3b: {before} hooked modules with parameters, {after} with {len(blocks)} frozen blocks gathered together")
    assert after < before / 3


def test_blocks_that_train_stay_apart() -> None:
    model = build_on_meta_device(get_preset("debug"))
    model.language_model.decoder_blocks()[1].get_parameter("mlp.up_proj.weight").requires_grad_(True)
    marked = gather_frozen_blocks_together(model)
    assert model.language_model.decoder_blocks()[0] in marked
    assert not {*model.cross_attention, *model.resampler.layers, model.language_model.decoder_blocks()[1]} & {*marked}
