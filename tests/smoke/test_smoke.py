"""The main parts work together: configurations, the model, every kind of source, the training loop, a resume."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from model.factory import build_flamingo, build_tokenizer
from tests.data.helpers import build_manifest
from tests.distributed.processes import run_distributed
from tests.distributed.small_run import losses, make_assets, read_ledger, run_settings, write_settings, write_videos
from tests.distributed.train_in_process import train_run
from tests.model.builders import EOS, FAMILIES, VOCAB_SIZE, text_with_media, tiny_flamingo
from tests.project.commands import ROOT
from trainer.config.loader import load_config
from trainer.config.run_config import FlamingoRunConfig
from trainer.data.batch import BatchFormat
from trainer.data.stream.loader import StepLoader
from trainer.tasks.row_builders import flamingo_builders

pytestmark = pytest.mark.smoke


@pytest.fixture(scope="module")
def assets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a language model, a tower and shards of every kind of source."""
    folder = tmp_path_factory.mktemp("assets")
    make_assets(folder)
    write_videos(folder / "data" / "videos")
    build_manifest(folder / "data" / "videos")
    return folder


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda path: path.stem)
def test_a_configuration_loads(path: Path) -> None:
    assert load_config(path, [], FlamingoRunConfig, check_files=False).data.sources


def test_a_new_model_has_the_logits_of_its_language_model() -> None:
    model = tiny_flamingo()
    bare = AutoModelForCausalLM.from_config(AutoConfig.for_model(**FAMILIES["llama"])).eval()
    bare.load_state_dict(model.language_model.lm.state_dict())
    ids, media = text_with_media()
    # The language model does not know the new tokens; their rows start as the row of the end of the sequence.
    known = ids.masked_fill(ids >= VOCAB_SIZE, EOS)
    with torch.no_grad():
        found, expected = model(ids, media=media).logits, bare(known).logits
    assert torch.equal(found[..., :VOCAB_SIZE], expected)


def test_every_kind_of_source_gives_a_batch_that_the_model_trains_on(assets: Path, tmp_path: Path) -> None:
    settings = run_settings(assets, tmp_path / "run")
    videos = {"name": "videos", "type": "video_text", "manifest": str(assets / "data/videos/manifest.npz")}
    settings["data"]["sources"].append({**videos, "batch_size": 2, "num_frames": 2})
    config = load_config(write_settings(tmp_path / "run.yaml", settings), [], FlamingoRunConfig)
    tokenizer = build_tokenizer(config.model)
    model = build_flamingo(config.model, tokenizer)
    tower = model.vision_encoder
    builders = flamingo_builders(config.data, tokenizer, tower)
    batch_format = BatchFormat(tokenizer.pad_id, tower.image_size, tower.patch_size)
    loader = StepLoader(config.data, builders, batch_format, rank=0, world_size=1, start_step=0, stop_step=1)
    [step] = list(loader)
    batches = {batch.source: batch for batch in step.micro_batches}
    assert batches.keys() == {"pairs", "documents", "texts", "videos"}
    for source, batch in batches.items():
        assert bool((batch.media_index >= 0).any()) == (source != "texts")
        loss = model(**batch.inputs).loss
        loss.backward()
        assert loss > 0
    gates = [block.attention_gate.grad for block in model.cross_attention]
    assert all(gate is not None and gate.abs().sum() > 0 for gate in gates)


@pytest.mark.distributed
def test_a_resumed_run_is_the_same_and_two_processes_train_like_one(assets: Path, tmp_path: Path) -> None:
    settings = {name: run_settings(assets, tmp_path / name, steps=3) for name in ("whole", "resumed", "two")}
    settings["resumed"]["checkpoint"]["every"] = 1
    run_distributed(train_run, 1, settings["whole"])
    run_distributed(train_run, 1, settings["resumed"], 1)
    run_distributed(train_run, 1, settings["resumed"])
    run_distributed(train_run, 2, settings["two"])
    assert losses(tmp_path / "resumed") == losses(tmp_path / "whole"), "bit for bit"
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "whole"), rel=1e-5)
    assert read_ledger(tmp_path / "resumed") == read_ledger(tmp_path / "two") == read_ledger(tmp_path / "whole")
