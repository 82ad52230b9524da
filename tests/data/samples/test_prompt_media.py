"""Check that prompts and training make the same media of the same files, bit for bit."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from model.config import LanguageModelConfig
from model.factory import build_flamingo, build_tokenizer
from model.image_geometry import PatchBudget
from model.media_inputs import from_patches
from model.pretrained import from_pretrained, load_exported_tokenizer, save_flamingo
from model.processor import ProcessorConfig
from model.vision_encoder import VisionEncoder
from tests.data.helpers import build_manifest, noise, saved, write_shard
from tests.data.videos import video_bytes
from tests.model.builders import FAMILIES, tiny_config, tiny_tokenizer
from trainer import evaluate, generate
from trainer.config.data_config import DataConfig, ImageTextSource, InterleavedSource, Source, VideoTextSource
from trainer.data.batch import Batch, BatchFormat, SampleId, collate
from trainer.data.samples.image_decoder import ImageDecoder
from trainer.data.samples.prompt_media import model_media
from trainer.data.samples.rows import sample_rng
from trainer.data.samples.tower_decoder import trained_processor
from trainer.evaluation import answering
from trainer.tasks.row_builders import flamingo_builders

PICTURES = [saved(noise(*size, seed=seed), "PNG") for seed, size in enumerate([(30, 70), (64, 20), (16, 16)])]
SETTINGS = [{}, {"image_fit": "crop"}, {"image_tokens": 6}, {"image_tokens": 13}]


def write_export(folder: Path, processor: Callable[[VisionEncoder], ProcessorConfig] | None = None) -> Path:
    """Write the export of a tiny model, and return its folder."""
    tiny_tokenizer(bos_token="<s>", eos_token="</s>", pad_token="<pad>").save_pretrained(folder / "tokenizer")
    language_model = LanguageModelConfig(architecture=FAMILIES["llama"], tokenizer=str(folder / "tokenizer"))
    config = tiny_config(language_model=language_model)
    tokenizer = build_tokenizer(config)
    model = build_flamingo(config, tokenizer)
    made = None if processor is None else processor(model.vision_encoder)
    save_flamingo(folder / "export", model, processor=made, tokenizer=tokenizer.tokenizer)
    return folder / "export"


@pytest.fixture(scope="module")
def export(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_export(tmp_path_factory.mktemp("model"))


def trained_export(folder: Path, *sources: Source, **data: Any) -> Path:
    """Write the export of a run with these sources."""
    return write_export(folder, lambda encoder: trained_processor(DataConfig(sources, **data), encoder))


@pytest.fixture
def fed(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, Any]]:
    """Record ``media`` and ``media_grids`` of each call of the model's generation."""
    found: list[tuple[Any, Any]] = []
    run = generate.generate

    def recorded(model: Any, prompts: Any, media: Any, counts: Any, **options: Any) -> Any:
        found.append((media, options["media_grids"]))
        return run(model, prompts, media, counts, **options)

    monkeypatch.setattr(generate, "generate", recorded)
    monkeypatch.setattr(answering, "generate", recorded)
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
    task = {"type": "shards", "name": "pairs", "manifest": str(build_manifest(tmp_path)), "max_new_tokens": 2}
    task["image_tokens"] = settings.get("image_tokens")
    config = {"model": str(export), "output": str(tmp_path / "evaluation"), "device": "cpu", "tasks": [task]}
    config |= {"image_fit": settings.get("image_fit"), "prompt_style": "plain", "zero_shot_examples": 0}
    (tmp_path / "evaluate.yaml").write_text(json.dumps(config))
    assert evaluate.main([str(tmp_path / "evaluate.yaml")]) == 0
    check_equal(fed, training_batch(export, **settings))


def check_equal(fed: list[tuple[Any, Any]], batch: Batch) -> None:
    ((media, grids),) = fed
    assert torch.equal(media, batch.media)
    assert grids == batch.media_grids


def test_without_images_there_are_no_media() -> None:
    assert model_media([], ImageDecoder(16)) == (None, None)


def arguments_of(folder: Path, *options: str) -> list[str]:
    """Return arguments that show all pictures to a model."""
    files = [folder / f"{number}.png" for number in range(len(PICTURES))]
    for file, picture in zip(files, PICTURES, strict=True):
        file.write_bytes(picture)
    return [
        *options,
        "--max-new-tokens",
        "2",
        "--device",
        "cpu",
        *(part for f in files for part in ("--image", str(f))),
    ]


@pytest.mark.parametrize("settings", SETTINGS)
def test_the_settings_of_the_export_are_taken(
    tmp_path: Path, fed: list[tuple[Any, Any]], caplog: pytest.LogCaptureFixture, settings: dict[str, Any]
) -> None:
    data = {name: value for name, value in settings.items() if name == "image_fit"}
    source = ImageTextSource("pairs", Path("m.npz"), 3, image_tokens=settings.get("image_tokens"))
    export = trained_export(tmp_path, source, **data)
    with caplog.at_level(logging.WARNING):
        assert generate.main([str(export), *arguments_of(tmp_path)]) == 0
    assert caplog.text == ""
    check_equal(fed, training_batch(export, **settings))


def test_other_settings_than_those_of_training_are_named(
    tmp_path: Path, fed: list[tuple[Any, Any]], caplog: pytest.LogCaptureFixture
) -> None:
    export = trained_export(tmp_path, ImageTextSource("pairs", Path("m.npz"), 3, image_tokens=6), image_fit="crop")
    options = ("--image-fit", "stretch", "--image-tokens", "0")
    assert generate.main([str(export), *arguments_of(tmp_path, *options)]) == 0
    assert "--image-fit: stretch, but training had crop" in caplog.text
    assert "--image-tokens: squares, but training had 6" in caplog.text
    check_equal(fed, training_batch(export, image_fit="stretch"))


def test_sources_that_differ_are_named(
    tmp_path: Path, fed: list[tuple[Any, Any]], caplog: pytest.LogCaptureFixture
) -> None:
    pairs = ImageTextSource("pairs", Path("m.npz"), 3, image_tokens=6)
    export = trained_export(tmp_path, pairs, InterleavedSource("documents", Path("m.npz"), 3))
    assert generate.main([str(export), *arguments_of(tmp_path)]) == 0
    assert "pairs: 6, documents: squares" in caplog.text and "--image-tokens" in caplog.text
    caplog.clear()
    assert generate.main([str(export), *arguments_of(tmp_path, "--image-tokens", "0")]) == 0
    assert caplog.text == ""
    check_equal(fed[1:], training_batch(export))


def video_of(folder: Path, source: VideoTextSource, export: Path) -> torch.Tensor:
    """Write a video, and return the medium that training makes of it."""
    data = video_bytes(4)
    (folder / "clip.mp4").write_bytes(data)
    build = flamingo_builders(
        DataConfig((source,)), load_exported_tokenizer(export), from_pretrained(export).vision_encoder
    )["videos"]
    sample = SampleId("videos", 0, "a.tar", 0, "k")
    return build({"mp4": data, "txt": b"w1"}, sample, sample_rng(0, sample)).media[0]


@pytest.mark.parametrize("image_tokens", [None, 6])
def test_videos(tmp_path: Path, fed: list[tuple[Any, Any]], image_tokens: int | None) -> None:
    source = VideoTextSource(
        "videos", Path("m.npz"), 3, num_frames=2, frames_per_second=1.0, start="center", image_tokens=image_tokens
    )
    export = trained_export(tmp_path, source)
    medium = video_of(tmp_path, source, export)
    arguments = [str(export), "--max-new-tokens", "2", "--device", "cpu"]
    assert generate.main([*arguments, "--video", str(tmp_path / "clip.mp4")]) == 0
    expected, grids = model_media([medium], ImageDecoder(16, budget=image_tokens and PatchBudget(image_tokens, 8)))
    assert torch.equal(fed[0][0], expected) and fed[0][1] == grids


def test_images_and_videos_keep_their_order(
    tmp_path: Path, fed: list[tuple[Any, Any]], caplog: pytest.LogCaptureFixture
) -> None:
    export = trained_export(tmp_path, ImageTextSource("pairs", Path("m.npz"), 3))
    source = VideoTextSource("videos", Path("m.npz"), 3, num_frames=2, frames_per_second=2.0, start="center")
    medium = video_of(tmp_path, source, export)
    clip = ["--video", str(tmp_path / "clip.mp4"), "--num-frames", "2", "--frames-per-second", "2"]
    arguments = arguments_of(tmp_path, "--prompt", "<image>w1" * 4, *clip)
    assert generate.main([str(export), *arguments]) == 0
    assert "trained without videos: each one becomes 2 frames, 2 a second" in caplog.text
    assert fed[0][1] == ((2, 2, 2), (1, 2, 2), (1, 2, 2), (1, 2, 2))
    assert torch.equal(from_patches(fed[0][0][:8], (2, 2, 2)), medium)


def test_more_frames_than_the_model_has_times_for_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = VideoTextSource("videos", Path("m.npz"), 3, num_frames=2, image_tokens=6)
    export = trained_export(tmp_path, source)
    video_of(tmp_path, source, export)
    arguments = ["--device", "cpu", "--video", str(tmp_path / "clip.mp4"), "--num-frames", "5"]
    assert generate.main([str(export), *arguments]) == 1
    assert "5 frames, but the resampler has time embeddings of 2" in capsys.readouterr().err
    assert generate.main([str(export), *arguments, "--image-tokens", "0", "--max-new-tokens", "1"]) == 0
