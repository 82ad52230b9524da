"""Zero-shot scores are those of open_clip's own code on the same weights, and bad data are named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image
from torch import Tensor

from tests.data.helpers import build_manifest, write_shard
from tests.distributed.launched import python
from tests.distributed.processes import run_distributed
from tests.distributed.small_run import write_settings
from trainer.config.contrastive_config import ClassificationConfig, RetrievalConfig, ZeroShotConfig
from trainer.config.data_config import DataConfig
from trainer.config.run_config import ContrastiveRunConfig, TrainingConfig
from trainer.runtime.distributed import World
from trainer.tasks.contrastive.architecture import build_clip, write_architecture, write_export
from trainer.tasks.contrastive.zero_shot_data import read_classification, read_retrieval
from trainer.tasks.contrastive.zero_shot_observer import score_towers

SIZE = 16
CLASSES = ["cat", "dog", "sea_lion"]
TEMPLATES = ("a photo of a {}.", "{} again")
ARCHITECTURE = {
    "embed_dim": 8,
    "vision_cfg": {"image_size": SIZE, "patch_size": 8, "width": 16, "layers": 1, "head_width": 8},
    "text_cfg": {"context_length": 12, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
}


def write_images(folder: Path, count: int, seed: int) -> list[Path]:
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True)
    files = [folder / f"{number:03}.png" for number in range(count)]
    for file in files:
        Image.fromarray(rng.integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8)).save(file)
    return files


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with a classification, and a retrieval in the forms of COCO and of Karpathy."""
    folder = tmp_path_factory.mktemp("zero_shot")
    for number, name in enumerate(CLASSES):
        write_images(folder / "classes" / name, 5 + number, number)
    files = write_images(folder / "images", 13, 9)
    captions = [(number, f"caption {number} {variant}") for number in range(13) for variant in "ab"]
    coco = {
        "images": [{"id": number, "file_name": file.name} for number, file in enumerate(files)],
        "annotations": [{"image_id": number, "caption": caption} for number, caption in captions],
    }
    (folder / "coco.json").write_text(json.dumps(coco))
    sentences = [[{"raw": caption} for of, caption in captions if of == number] for number in range(13)]
    karpathy = [
        {"filename": file.name, "split": "test", "sentences": sentence}
        for file, sentence in zip(files, sentences, strict=True)
    ]
    karpathy.append({"filename": "none.png", "split": "train", "sentences": [{"raw": "not in the test"}]})
    (folder / "karpathy.json").write_text(json.dumps({"images": karpathy}))
    return folder


def run_config(data: Path) -> ContrastiveRunConfig:
    tests = ZeroShotConfig(
        batch_size=4,
        classification=(ClassificationConfig("classes", data / "classes", TEMPLATES),),
        retrieval=(
            RetrievalConfig("coco", data / "coco.json", data / "images"),
            RetrievalConfig("karpathy", data / "karpathy.json", data / "images"),
        ),
    )
    return ContrastiveRunConfig(
        run_dir=data, data=DataConfig(()), training=TrainingConfig(steps=1), architecture=ARCHITECTURE, zero_shot=tests
    )


def clip_of(world: World, data: Path) -> Any:
    folder = data / f"architecture-{world.size}-{world.rank}"
    write_architecture(run_config(data), folder)
    torch.manual_seed(0)
    return build_clip(folder).eval()


def scores_of(world: World, data: str) -> dict[str, float]:
    return score_towers(run_config(Path(data)), clip_of(world, Path(data)), world)


def features_of(clip: Any, files: list[Path]) -> Tensor:
    """Return open_clip's features of images with its own transform."""
    settings = open_clip.get_model_preprocess_cfg(clip)
    transform = open_clip.image_transform(SIZE, is_train=False, mean=settings["mean"], std=settings["std"])
    return clip.encode_image(torch.stack([transform(Image.open(file)) for file in files]), normalize=True)


def expected_scores(world: World, data: str) -> dict[str, float]:
    """Compute the scores with open_clip's classifier, and the recalls by sorting, as open_clip's trainer does."""
    folder = Path(data)
    clip, tokenize = clip_of(world, folder), open_clip.get_tokenizer("ViT-B-32", context_length=12)
    names = [name.replace("_", " ") for name in CLASSES]
    with torch.no_grad():
        classifier = open_clip.build_zero_shot_classifier(clip, tokenize, names, TEMPLATES)
        files = [sorted((folder / "classes" / name).iterdir()) for name in CLASSES]
        labels = torch.tensor([label for label, group in enumerate(files) for _ in group])
        best = (
            (100 * features_of(clip, [file for group in files for file in group]) @ classifier).topk(3, dim=1).indices
        )
        images = features_of(clip, sorted((folder / "images").iterdir()))
        texts = clip.encode_text(
            tokenize([f"caption {number} {variant}" for number in range(13) for variant in "ab"]), normalize=True
        )
    scores = {"classes/top_1": float((best[:, 0] == labels).float().mean()), "classes/top_5": 1.0}
    ranking = (texts @ images.T).argsort(dim=1, descending=True)
    text_ranks = (ranking == torch.arange(26)[:, None] // 2).int().argmax(1)
    ranking = (images @ texts.T).argsort(dim=1, descending=True)
    image_ranks = (ranking // 2 == torch.arange(13)[:, None]).int().argmax(1)
    for name in ("coco", "karpathy"):
        for recall in (1, 5, 10):
            scores[f"{name}/image_to_text_recall_{recall}"] = float((image_ranks < recall).float().mean())
            scores[f"{name}/text_to_image_recall_{recall}"] = float((text_ranks < recall).float().mean())
    return scores


@pytest.mark.distributed
@pytest.mark.parametrize("world_size", [1, 2])
def test_scores_are_those_of_open_clip_on_any_number_of_processes(data: Path, world_size: int) -> None:
    [expected] = run_distributed(expected_scores, 1, str(data))
    for scores in run_distributed(scores_of, world_size, str(data)):
        assert scores == pytest.approx(expected, abs=1e-6)


def test_class_names_come_from_a_file(data: Path, tmp_path: Path) -> None:
    names = tmp_path / "names.json"
    names.write_text(json.dumps({"cat": "feline", "dog": "canine"}))
    with pytest.raises(ValueError, match=r"has no name for sea_lion"):
        read_classification(ClassificationConfig("classes", data / "classes", class_names=names))
    names.write_text(json.dumps({"cat": "feline", "dog": "canine", "sea_lion": "seal"}))
    found = read_classification(ClassificationConfig("classes", data / "classes", class_names=names))
    assert found.class_names == ["feline", "canine", "seal"] and len(found.files) == 18


def test_bad_data_are_named(data: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"'x': no such folder"):
        read_classification(ClassificationConfig("x", tmp_path / "none"))
    with pytest.raises(ValueError, match=r"'x': .* has no folders"):
        read_classification(ClassificationConfig("x", tmp_path))
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"'x': the class .* has no images"):
        read_classification(ClassificationConfig("x", tmp_path))
    file = tmp_path / "captions.json"
    with pytest.raises(ValueError, match=r"'x': .*captions.json cannot be read"):
        read_retrieval(RetrievalConfig("x", file, tmp_path))
    for content, message in (('{"a": 1}', "neither COCO's nor Karpathy's"), ('{"images": []}', "has no captions")):
        file.write_text(content)
        with pytest.raises(ValueError, match=message):
            read_retrieval(RetrievalConfig("x", file, tmp_path))


@pytest.mark.distributed
def test_the_command_tests_an_export(data: Path, tmp_path: Path) -> None:
    world = World(0, 1, 0, torch.device("cpu"))
    clip = clip_of(world, data)
    weights = {f"clip.{name}": value for name, value in clip.state_dict().items()}
    write_shard(tmp_path / "pairs" / "0.tar", [("a", {"txt": b"a"})])
    build_manifest(tmp_path / "pairs")
    test = {"name": "classes", "folder": str(data / "classes"), "templates": list(TEMPLATES)}
    source = {"type": "image_text", "name": "pairs", "batch_size": 1}
    source["manifest"] = str(tmp_path / "pairs" / "manifest.npz")
    values = {
        "run_dir": str(tmp_path / "run"),
        "architecture": ARCHITECTURE,
        "data": {"sources": [source]},
        "training": {"steps": 1, "threads": 1},
        "schedule": {"warmup_steps": 0},
        "deepspeed": {"zero_stage": 2},
        "zero_shot": {"classification": [test]},
    }
    path = write_settings(tmp_path / "run.yaml", values)
    failed = python("trainer.zero_shot", str(path))
    assert failed.returncode == 1 and "has no export; run trainer.pretrain_vision" in failed.stderr
    folder = tmp_path / "run" / "export"
    write_export(data / "architecture-1-0", weights, folder, folder)
    done = python("trainer.zero_shot", str(path))
    assert done.returncode == 0, done.stderr
    scores = json.loads((tmp_path / "run" / "zero_shot.json").read_text())
    assert json.loads(done.stdout) == scores
    assert scores == pytest.approx({k: v for k, v in expected_scores(world, str(data)).items() if "classes" in k})
