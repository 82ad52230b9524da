"""Write small data sets in the layouts of the original files, and a tiny export that answers them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import yaml

from model.config import LanguageModelConfig
from model.factory import build_flamingo, build_language_model, build_tokenizer
from model.pretrained import save_flamingo
from tests.data.helpers import image_bytes
from tests.data.videos import video_bytes
from tests.model.builders import tiny_config, tiny_tokenizer, wake
from trainer.config.evaluation_config import EvaluationConfig
from trainer.config.loader import load_config

WORDS = [f"w{number}" for number in range(12)]


def write_json(path: Path, value: Any) -> Path:
    """Write a JSON file and return its path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))
    return path


def write_json_lines(path: Path, values: Sequence[Any]) -> Path:
    """Write a JSON lines file and return its path."""
    path.write_text("".join(json.dumps(value) + "\n" for value in values))
    return path


def write_image(path: Path, number: int) -> Path:
    """Write an image of a color of its own and return its path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(image_bytes((37 * number % 256, 101 * number % 256, 211 * number % 256), (16, 16)))
    return path


def word(number: int) -> str:
    """Return one of a few words."""
    return WORDS[number % len(WORDS)]


def write_coco(folder: Path, count: int = 6, first: int = 1) -> dict[str, Any]:
    """Write COCO's layout; two captions an image."""
    images = [{"id": number, "file_name": f"{number:012}.jpg"} for number in range(first, first + count)]
    captions = [
        {"id": 10 * number + i, "image_id": number, "caption": f"{word(number)} {word(number + i)}"}
        for number in range(first, first + count)
        for i in range(2)
    ]
    for image in images:
        write_image(folder / "images" / str(image["file_name"]), int(str(image["id"])))
    annotations = write_json(folder / f"captions_{first}.json", {"images": images, "annotations": captions})
    return {"annotations": str(annotations), "images": str(folder / "images")}


def write_karpathy(folder: Path) -> dict[str, Any]:
    """Write Karpathy's file of COCO, with all splits."""
    images = []
    for number, split in enumerate(["test", "test", "train", "restval", "val", "train"], 1):
        name = f"COCO_val2014_{number:012}.jpg"
        write_image(folder / "val2014" / name, number)
        sentences = [{"raw": f"{word(number)} {word(number + 1)}", "tokens": [], "imgid": number, "sentid": number}]
        image = {"filepath": "val2014", "filename": name, "cocoid": number, "imgid": number, "split": split}
        images.append({**image, "sentids": [number], "sentences": sentences})
    annotations = write_json(folder / "dataset_coco.json", {"images": images, "dataset": "coco"})
    return {"annotations": str(annotations), "images": str(folder)}


def write_vqa(folder: Path, count: int = 6, first: int = 1) -> dict[str, Any]:
    """Write VQAv2's questions and annotations: two questions an image, ten answers a question."""
    questions, annotations = [], []
    for number in range(first, first + count):
        image = 1 + (number - 1) // 2
        write_image(folder / "val2014" / f"COCO_val2014_{image:012}.jpg", image)
        questions.append({"image_id": image, "question": f"{word(number)} w30", "question_id": 1000 * number})
        answers = [
            {"answer": word(number if i < 7 else number + 1), "answer_confidence": "yes", "answer_id": i}
            for i in range(1, 11)
        ]
        annotations.append(
            {
                "question_id": 1000 * number,
                "image_id": image,
                "question_type": "what" if number % 2 else "how many",
                "answer_type": "other",
                "multiple_choice_answer": word(number),
                "answers": answers,
            }
        )
    info = {"info": {}, "license": {}, "data_subtype": "val2014"}
    return {
        "questions": str(write_json(folder / f"questions_{first}.json", {**info, "questions": questions})),
        "annotations": str(write_json(folder / f"annotations_{first}.json", {**info, "annotations": annotations})),
        "images": str(folder / "val2014" / "COCO_val2014_{image_id:012d}.jpg"),
    }


def write_textvqa(folder: Path) -> dict[str, Any]:
    """Write TextVQA's file."""
    data = []
    for number in range(4):
        write_image(folder / "train_images" / f"i{number}.jpg", number)
        entry = {"question_id": number, "image_id": f"i{number}", "question": "w30 w31", "answers": [word(number)] * 10}
        data.append({**entry, "image_width": 16, "image_height": 16, "set_name": "val"})
    annotations = write_json(folder / "TextVQA_val.json", {"data": data, "dataset_type": "val"})
    return {"annotations": str(annotations), "images": str(folder / "train_images" / "{image_id}.jpg")}


def write_vizwiz(folder: Path) -> dict[str, Any]:
    """Write VizWiz's file, whose answers have no ids."""
    entries = []
    for number in range(4):
        name = f"VizWiz_val_{number:08}.jpg"
        write_image(folder / "val" / name, number)
        answers = [{"answer": word(number), "answer_confidence": "yes"}] * 10
        entry = {"image": name, "question": "w30", "answers": answers, "answer_type": "other", "answerable": 1}
        entries.append(entry)
    return {"annotations": str(write_json(folder / "val.json", entries)), "images": str(folder / "val")}


def write_gqa(folder: Path) -> dict[str, Any]:
    """Write GQA's questions."""
    questions = {}
    for number in range(4):
        write_image(folder / "images" / f"{number}.jpg", number)
        kind = {"structural": "verify", "semantic": "attr"}
        entry = {"imageId": str(number), "question": "w30 w31?", "answer": word(number), "types": kind}
        questions[f"0{number}"] = {**entry, "isBalanced": True}
    return {
        "questions": str(write_json(folder / "val_balanced_questions.json", questions)),
        "images": str(folder / "images" / "{image_id}.jpg"),
    }


def write_classes(folder: Path, split: str = "val") -> dict[str, Any]:
    """Write ImageNet's layout: a folder of images for each class."""
    for place, wnid in enumerate(["n01440764", "n01443537", "n01484850"]):
        for number in range(2):
            write_image(folder / split / wnid / f"{split}_{number}.JPEG", 10 * place + number)
    names = {"0": ["n01440764", "w1"], "1": ["n01443537", "w2 w3"], "2": ["n01484850", "w4"]}
    class_names = write_json(folder / "imagenet_class_index.json", names)
    return {"images": str(folder / split), "class_names": str(class_names)}


def write_memes(folder: Path, name: str = "dev_seen", first: int = 0, count: int = 6) -> dict[str, Any]:
    """Write Hateful Memes' lines."""
    lines = []
    for number in range(first, first + count):
        write_image(folder / "img" / f"{number:05}.png", number)
        lines.append({"id": number, "img": f"img/{number:05}.png", "label": number % 2, "text": word(number)})
    return {"annotations": str(write_json_lines(folder / f"{name}.jsonl", lines)), "images": str(folder)}


def write_video_qa(folder: Path) -> dict[str, Any]:
    """Write questions about videos, with choices."""
    entries = []
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(2):
        color = (80 * number, 200, 40)
        video = video_bytes(3, rate=5, size=(24, 16), color=lambda _, color=color: color)  # type: ignore[misc]
        (folder / f"v{number}.mp4").write_bytes(video)
        choices = [{"choice_id": i, "choice": word(number + i)} for i in range(3)]
        entry = {"question_id": f"q{number}", "video_id": f"v{number}", "question": "w30", "answer": word(number)}
        entries.append({**entry, "choices": choices})
    return {"annotations": str(write_json(folder / "qa.json", entries)), "videos": str(folder / "{video}.mp4")}


def write_episodes(folder: Path, count: int = 4) -> dict[str, Any]:
    """Write episodes of two demonstrations that exchange their images."""
    lines = []
    for number in range(count):
        images = [f"{number}_{place}.png" for place in range(3)]
        for place, name in enumerate(images):
            write_image(folder / name, 10 * number + place)
        lines.append(
            {
                "id": f"e{number}",
                "demonstrations": [{"image": images[0], "text": "w1"}, {"image": images[1], "text": "w2"}],
                "query": {"image": images[2]},
                "answers": ["w1"],
                "other": "w2",
                "exchange": [1, 0],
            }
        )
    return {"episodes": str(write_json_lines(folder / "episodes.jsonl", lines))}


def write_export(folder: Path, family: str = "llama") -> Path:
    """Write the export of a tiny model that looks trained; its frozen parts are beside it."""
    tiny_tokenizer(bos_token="<s>", eos_token="</s>", pad_token="<pad>").save_pretrained(folder / "lm")
    language_model = tiny_config(family).language_model
    torch.manual_seed(0)
    build_language_model(language_model, torch.float32).save_pretrained(folder / "lm")
    config = tiny_config(language_model=LanguageModelConfig(name=str(folder / "lm")))
    tokenizer = build_tokenizer(config)
    model = build_flamingo(config, tokenizer)
    wake(model, gates=1.0)
    save_flamingo(folder / "export", model, tokenizer=tokenizer.tokenizer)
    return folder / "export"


def evaluation(folder: Path, export: Path, tasks: Sequence[dict[str, Any]], **settings: Any) -> EvaluationConfig:
    """Return the settings of an evaluation that writes to ``folder / "out"``."""
    values = {"model": str(export), "output": str(folder / "out"), "tasks": list(tasks), "max_new_tokens": 4}
    path = folder / "evaluate.yaml"
    path.write_text(yaml.safe_dump({**values, "batch_size": 4, "threads": 1, "num_examples": 0, **settings}))
    return load_config(path, [], EvaluationConfig)
