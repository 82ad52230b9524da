"""Check that prompts and training make the same media of the same files, bit for bit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from model.config import LanguageModelConfig
from model.factory import build_flamingo, build_tokenizer
from model.pretrained import from_pretrained, load_exported_tokenizer, save_flamingo
from tests.data.helpers import build_manifest, noise, saved, write_shard
from tests.model.builders import FAMILIES, tiny_config, tiny_tokenizer
from trainer import evaluate, generate
from trainer.config.data_config import DataConfig, ImageTextSource
from trainer.data.batch import Batch, BatchFormat, SampleId, collate
from trainer.data.samples.image_decoder import ImageDecoder
from trainer.data.samples.prompt_images import model_media
from trainer.data.samples.rows import sample_rng
from trainer.evaluation import exact_captions as evaluation
from trainer.tasks.row_builders import flamingo_builders

PICTURES = [saved(noise(*size, seed=seed), "PNG") for seed, size in enumerate([(30, 70), (64, 20), (16, 16)])]
SETTINGS = [{}, {"image_fit": "crop"}, {"image_tokens": 6}, {"image_tokens": 13}]


@pytest.fixture(scope="module")
def export(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    tiny_tokenizer(bos_token="<s>", eos_token="</s>", pad_token="<pad>").save_pretrained(folder / "tokenizer")
    language_model = LanguageModelConfig(architecture=FAMILIES["llama"], tokenizer=str(folder / "tokenizer"))
    config = tiny_config(language_model=language_model)
    tokenizer = build_tokenizer(config)
    save_flamingo(folder / "export", build_flamingo(config, tokenizer), tokenizer=tokenizer.tokenizer)
    return folder / "export"


@pytest.fixture
def fed(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, Any]]:
    """Record ``media`` and ``media_grids`` of each call of the model's generation."""
    found: list[tuple[Any, Any]] = []
    run = generate.generate

    def recorded(model: Any, prompts: Any, media: Any, counts: Any, **options: Any) -> Any:
        found.append((media, options["media_grids"]))
        return run(model, prompts, media, counts, **options)

    monkeypatch.setattr(generate, "generate", recorded)
    monkeypatch.setattr(evaluation, "generate", recorded)
    return found


def training_batch(export: Path, image_fit: Any = "pad", image_tokens: int | None = None) -> Batch:
    """Return the batch that training makes of the pictures."""
    encoder = from_pretrained(export).vision_encoder
    source = ImageTextSource("pairs", Path("m.npz"), 3, image_tokens=image_tokens)
    build = flamingo_builders(DataConfig((source,), image_fit=image_fit), load_exported_tokenizer(export), encoder)[
        "pairs"
    ]
    samples = [SampleId("pairs", 0, "a.tar", number, "k") for number in range(len(PICTURES))]
    members = [{"png": picture, "txt": b"w1 w2"} for picture in PICTURES]
    rows = [build(one, sample, sample_rng(0, sample)) for one, sample in zip(members, samples, strict=True)]
    batch_format = BatchFormat(pad_id=0, image_size=16, patch_size=encoder.patch_size)
    return collate(rows, batch_format, source="pairs", keeps_aspect=image_tokens is not None)


@pytest.mark.parametrize("settings", SETTINGS)
def test_generate(export: Path, tmp_path: Path, fed: list[tuple[Any, Any]], settings: dict[str, Any]) -> None:
    arguments = ["--prompt", "<image> " * len(PICTURES), "--max-new-tokens", "2", "--device", "cpu"]
    for number, picture in enumerate(PICTURES):
        (tmp_path / f"{number}.png").write_bytes(picture)
        arguments += ["--image", str(tmp_path / f"{number}.png")]
    options = [part for name, value in settings.items() for part in (f"--{name.replace('_', '-')}", str(value))]
    assert generate.main([str(export), *arguments, *options]) == 0
    check_equal(fed, training_batch(export, **settings))


@pytest.mark.parametrize("settings", SETTINGS)
def test_evaluate(export: Path, tmp_path: Path, fed: list[tuple[Any, Any]], settings: dict[str, Any]) -> None:
    write_shard(tmp_path / "0.tar", [(f"{n}", {"png": picture, "txt": b"w1"}) for n, picture in enumerate(PICTURES)])
    task = {"name": "pairs", "manifest": str(build_manifest(tmp_path)), "image_tokens": settings.get("image_tokens")}
    config = {"model": str(export), "report": str(tmp_path / "report.json"), "max_new_tokens": 2, "device": "cpu"}
    config |= {"image_fit": settings.get("image_fit", "pad"), "tasks": [task]}
    (tmp_path / "evaluate.yaml").write_text(json.dumps(config))
    assert evaluate.main([str(tmp_path / "evaluate.yaml")]) == 0
    check_equal(fed, training_batch(export, **settings))


def check_equal(fed: list[tuple[Any, Any]], batch: Batch) -> None:
    ((media, grids),) = fed
    assert torch.equal(media, batch.media)
    assert grids == batch.media_grids


def test_without_images_there_are_no_media() -> None:
    assert model_media([], ImageDecoder(16)) == (None, None)
