"""Read the images and captions of zero-shot tests: a folder of classes, COCO's or Karpathy's captions."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainer.config.contrastive_config import ClassificationConfig, RetrievalConfig

_IMAGE_ENDINGS = frozenset((".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".avif", ".ppm"))


@dataclass(frozen=True)
class LabeledImages:
    """Hold the images of a classification.

    Attributes:
        files: Images.
        labels: Number of the class of each image.
        class_names: Name of each class.
    """

    files: list[Path]
    labels: list[int]
    class_names: list[str]


@dataclass(frozen=True)
class CaptionedImages:
    """Hold the images and captions of a retrieval.

    Attributes:
        files: Images.
        captions: Captions of all images.
        image_of: Number of the image of each caption.
    """

    files: list[Path]
    captions: list[str]
    image_of: list[int]


def read_classification(config: ClassificationConfig) -> LabeledImages:
    """List the images of a folder of classes, both in the order of their names.

    Raises:
        ValueError: The folder has no classes, a class has no images or no name.
    """
    where = f"zero_shot.classification {config.name!r}"
    if not config.folder.is_dir():
        raise ValueError(f"{where}: no such folder: {config.folder}")
    folders = sorted(path for path in config.folder.iterdir() if path.is_dir())
    if not folders:
        raise ValueError(f"{where}: {config.folder} has no folders; give each class a folder of its images")
    names = {folder.name: folder.name.replace("_", " ") for folder in folders}
    if config.class_names is not None:
        given = _read_json(where, config.class_names)
        missing = [name for name in names if not isinstance(given, dict) or name not in given]
        if missing:
            raise ValueError(f"{where}: {config.class_names} has no name for {', '.join(missing[:5])}")
        names = {name: str(given[name]) for name in names}
    files: list[Path] = []
    labels: list[int] = []
    for label, folder in enumerate(folders):
        images = sorted(path for path in folder.rglob("*") if path.suffix.lower() in _IMAGE_ENDINGS)
        if not images:
            raise ValueError(f"{where}: the class {folder} has no images")
        files += images
        labels += [label] * len(images)
    return LabeledImages(files, labels, list(names.values()))


def read_retrieval(config: RetrievalConfig) -> CaptionedImages:
    """Read captions and their images in the order of the file.

    Raises:
        ValueError: The file has another form, or no pairs.
    """
    where = f"zero_shot.retrieval {config.name!r}"
    content = _read_json(where, config.captions)
    try:
        pairs = _coco_pairs(content) if "annotations" in content else _karpathy_pairs(content)
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{where}: {config.captions} is neither COCO's nor Karpathy's form: {error!r}") from error
    numbers: dict[str, int] = {}
    for name, _ in pairs:
        numbers.setdefault(name, len(numbers))
    if not pairs:
        raise ValueError(f"{where}: {config.captions} has no captions (of the split test)")
    files = [config.images / name for name in numbers]
    return CaptionedImages(files, [caption for _, caption in pairs], [numbers[name] for name, _ in pairs])


def _coco_pairs(content: dict[str, Any]) -> list[tuple[str, str]]:
    names = {image["id"]: image["file_name"] for image in content["images"]}
    return [(names[entry["image_id"]], entry["caption"]) for entry in content["annotations"]]


def _karpathy_pairs(content: dict[str, Any]) -> list[tuple[str, str]]:
    return [
        (str(Path(image.get("filepath", "")) / image["filename"]), sentence["raw"])
        for image in content["images"]
        if image.get("split", "test") == "test"
        for sentence in image["sentences"]
    ]


def _read_json(where: str, file: Path) -> Any:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{where}: {file} cannot be read: {error}") from error
