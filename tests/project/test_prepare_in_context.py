"""Read what ``prepare_in_context.py`` writes: episodes hold what they promise, and nothing of them is in training."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from launch_scripts import prepare_digits, prepare_in_context
from launch_scripts.in_context_language import (
    HELD_OUT_STYLE_WORDS,
    PAIRS,
    SINGLES,
    STYLE_WORDS,
    Line,
    Style,
    binding_page,
    invented_words,
    random_style,
)
from tests.project.test_prepare_digits import samples

SETTINGS = prepare_in_context.Settings(text=300, pictures=60, captions=60, episodes=60, evaluation=20)
DIGITS = prepare_digits.split(prepare_digits.Settings())


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("in_context")
    assert prepare_in_context.prepare(folder, SETTINGS) == 0
    return folder


def records(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def digits_of(file: str) -> tuple[int, ...]:
    """Return the number that a picture shows, by the digit images that its name lists."""
    target = {
        int(index): digit for one in DIGITS.values() for digit, images in enumerate(one.digits) for index in images
    }
    return tuple(target[int(index)] for index in Path(file).stem.split("-"))


def labels_of(folder: Path) -> Iterator[str]:
    for sample in samples(folder):
        yield from json.loads(sample["json"])["text_list"]


@pytest.mark.parametrize("split", ["validation", "test"])
@pytest.mark.parametrize("kind", ["binding", "binding_pairs"])
def test_binding_episodes(data: Path, split: str, kind: str) -> None:
    classes = SINGLES if kind == "binding" else DIGITS[split].pairs
    for record in records(data / split / f"{kind}.jsonl"):
        shown = [digits_of(piece["image"]) for piece in record["demonstrations"]]
        label = dict(zip(shown, (piece["text"] for piece in record["demonstrations"]), strict=True))
        assert len(shown) == 8
        assert len(label) == 2
        assert set(label) <= set(classes)
        assert [label[number] for number in shown] == [piece["text"] for piece in record["demonstrations"]]
        query = digits_of(record["query"]["image"])
        assert record["answers"] == [label[query]]
        assert {record["other"], *record["answers"]} == set(label.values())
        for shots in (2, 4, 8):
            assert set(Counter(shown[-shots:]).values()) == {shots // 2}
            exchanged = {shown[place]: shown[record["exchange"][place]] for place in range(8 - shots, 8)}
            assert all(number != other for number, other in exchanged.items())
            assert min(record["exchange"][-shots:]) == 8 - shots


def test_style_episodes_share_a_style_of_held_out_words(data: Path) -> None:
    for record in records(data / "test" / "styles.jsonl"):
        pieces = [*record["demonstrations"], {**record["query"], "text": record["answers"][0]}]
        words = [set(piece["text"].split()) & {*STYLE_WORDS, *HELD_OUT_STYLE_WORDS} for piece in pieces]
        assert words[0] <= set(HELD_OUT_STYLE_WORDS)
        assert all(one == words[0] for one in words)
        assert all(digits_of(piece["image"]) in DIGITS["train"].pairs for piece in pieces)


@pytest.mark.parametrize("split", ["validation", "test"])
def test_pictures_are_of_digits_that_training_never_shows(data: Path, split: str) -> None:
    allowed = {int(index) for images in DIGITS[split].digits for index in images}
    files = list((data / split / "images").iterdir())
    assert len(files) > 50
    assert {int(index) for file in files for index in file.stem.split("-")} <= allowed


def test_words_of_the_evaluation_are_in_no_training_data(data: Path) -> None:
    words = invented_words()
    assert not set(words.train) & {*words.validation, *words.test}
    assert not set(words.validation) & set(words.test)
    asked = {record["answers"][0] for record in records(data / "test" / "binding.jsonl")}
    assert asked <= set(words.test)
    assert set(labels_of(data / "train/episodes")) <= set(words.train)
    shown = {word for label in labels_of(data / "train/captions") for word in label.split()}
    assert not shown & set(HELD_OUT_STYLE_WORDS)


def test_an_episode_as_text_says_the_same(data: Path) -> None:
    for kind in ("binding", "binding_pairs", "styles"):
        with_images = records(data / "test" / f"{kind}.jsonl")
        for record, text in zip(with_images, records(data / "test" / f"{kind}_text.jsonl"), strict=True):
            for piece, as_text in zip(
                [*record["demonstrations"], record["query"]], [*text["demonstrations"], text["query"]], strict=True
            ):
                assert as_text["before"] == "".join(map(str, digits_of(piece["image"])))
                assert as_text.get("text", "").strip() == piece.get("text", "")
            assert text["answers"] == record["answers"]


def test_documents_of_training(data: Path) -> None:
    sizes = {"captions": range(3, 8), "episodes": range(4, 9)}
    for name, possible in sizes.items():
        for sample in samples(data / "train" / name):
            content = json.loads(sample["json"])
            assert len(content["text_list"]) == len(content["image_info"])
            assert len(content["text_list"]) in possible
            assert all(info["image_name"] in sample for info in content["image_info"])


def test_a_class_has_one_word_in_a_page() -> None:
    rng = np.random.default_rng(0)
    for _ in range(300):
        page = binding_page(rng, SINGLES * 8 + PAIRS, invented_words().train, 8, max_classes=3)
        assert len({line.number for line in page}) == len({line.label for line in page}) == len(set(page))


def test_captions() -> None:
    style = Style("small", "bird", "lamp", figures=False)
    assert style.caption((3, 5)) == "small three bird five lamp"
    assert str(Line((3, 5), style.caption((3, 5)))) == "35small three bird five lamp"
    rng = np.random.default_rng(0)
    for drawn in (random_style(rng, STYLE_WORDS) for _ in range(200)):
        assert drawn.before or not drawn.figures  # "35" and "3" would join to "353"


def test_the_same_seed_gives_the_same_episodes(data: Path, tmp_path: Path) -> None:
    small = prepare_in_context.Settings(text=1, pictures=1, captions=1, episodes=1, evaluation=20)
    assert prepare_in_context.prepare(tmp_path, small) == 0
    for path in sorted(data.glob("test/*.jsonl")):
        assert path.read_bytes() == (tmp_path / "test" / path.name).read_bytes()
