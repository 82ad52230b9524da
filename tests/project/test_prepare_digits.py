"""Test by reading the quickstart's shards that held-out digits and pairs never occur in training."""

from __future__ import annotations

import hashlib
import io
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import webdataset
from PIL import Image

from launch_scripts import prepare_digits
from launch_scripts.digit_sentences import caption, sentence
from trainer.data.shards.manifest import load_manifest

SETTINGS = prepare_digits.Settings(pairs=600, documents=150, sentences=2000, evaluation=40)


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("digits")
    assert prepare_digits.prepare(folder, SETTINGS) == 0
    return folder


def samples(folder: Path) -> list[dict[str, bytes]]:
    manifest = load_manifest(folder / "manifest.npz")
    read = [
        sample
        for shard in range(len(manifest))
        for sample in webdataset.WebDataset(str(manifest.shard_path(shard)), shardshuffle=False)
    ]
    assert len(read) == manifest.total_samples
    return read


def captions(folder: Path) -> set[str]:
    found = set()
    for sample in samples(folder):
        found |= {sample["txt"].decode()} if "txt" in sample else set(json.loads(sample["json"])["text_list"])
    return found


def test_held_out_pairs_are_in_no_training_image(digits: Path) -> None:
    train = captions(digits / "train/pairs") | captions(digits / "train/documents")
    splits = prepare_digits.split(SETTINGS)
    assert train == {caption(*pair) for pair in splits["train"].pairs}
    for name, count in (("validation", 8), ("test", 12)):
        held_out = {caption(*pair) for pair in splits[name].pairs}
        assert len(held_out) == count
        assert captions(digits / name / "held_out_pairs") == held_out
        assert not held_out & train
        assert captions(digits / name / "held_out") <= train
        assert captions(digits / name / "documents") <= train
    for side in (0, 1):
        assert {pair[side] for pair in splits["train"].pairs} == set(range(10))


def test_held_out_digits_are_in_no_training_image() -> None:
    for seed in range(5):
        splits = prepare_digits.split(replace(SETTINGS, seed=seed))
        sets = {name: {int(i) for images in one.digits for i in images} for name, one in splits.items()}
        assert [len(sets[name]) for name in ("train", "validation", "test")] == [1400, 100, 297]
        assert len(set().union(*sets.values())) == 1797
        assert all(len(images) for one in splits.values() for images in one.digits)


def test_pictures_are_drawn_from_their_own_split() -> None:
    """Replace each image by its number, so that the pixels of a picture tell which images it is made of."""
    splits = prepare_digits.split(SETTINGS)
    for name, one in splits.items():
        pictures = prepare_digits.Pictures(one.digits, distort=False)
        number = np.arange(1797)
        codes = np.stack([number // 256, number % 256]).astype(np.float32) / 255
        found = set()
        for code in codes:
            pictures.images[:] = pictures.images.new_tensor(code)[:, None, None, None]
            drawn = pictures.draw(np.random.default_rng(0), one.pairs * 20)
            found.add(tuple(int(v) for png in drawn for v in np.array(Image.open(io.BytesIO(png)))[16, [8, 24], 0]))
        high, low = sorted(found, key=max)
        used = {256 * first + second for first, second in zip(high, low, strict=True)}
        assert len(used) > 30
        assert used <= {int(i) for images in one.digits for i in images}, name


def test_the_layout_of_samples(digits: Path) -> None:
    pair = samples(digits / "train/pairs")[0]
    with Image.open(io.BytesIO(pair["png"])) as image:
        assert (image.size, image.mode) == ((32, 32), "RGB")
    orders = set()
    for sample in samples(digits / "train/documents"):
        content = json.loads(sample["json"])
        matches = [info["matched_text_index"] for info in content["image_info"]]
        assert sorted(matches) == list(range(len(content["text_list"])))
        assert all(info["image_name"] in sample for info in content["image_info"])
        orders.add(tuple(matches))
    assert len(orders) == 2 + 6  # all orders of two and of three images
    assert all(len(json.loads(s["json"])["image_info"]) == 3 for s in samples(digits / "test/documents"))


def test_an_image_of_a_document_belongs_to_its_sentence() -> None:
    """Make every 0 black and every 1 white, so that the pixels of a picture tell its caption."""
    pictures = prepare_digits.Pictures([np.array([0]), np.array([1])], distort=False)
    pictures.images[0], pictures.images[1] = 0, 1
    choices = ((0, 0), (0, 1), (1, 0), (1, 1))
    for members in prepare_digits.documents(np.random.default_rng(0), 20, pictures, choices, (2, 3)):
        content = json.loads(members["json"])
        for info in content["image_info"]:
            pixels = np.array(Image.open(io.BytesIO(members[info["image_name"]])))[16]
            shown = caption(int(pixels[8, 0] > 128), int(pixels[24, 0] > 128))
            assert shown == content["text_list"][info["matched_text_index"]]


def test_text_has_all_captions_and_more(digits: Path) -> None:
    texts = [sample["txt"].decode() for sample in samples(digits / "train/text")]
    assert len(texts) == 2000
    all_captions = {caption(left, right) for left in range(10) for right in range(10)}
    assert all_captions <= set(texts)
    assert 0.32 < sum(text in all_captions for text in texts) / 2000 < 0.43  # half of the sentences that do not count
    assert caption(1, 8) == "a handwritten one and an eight"
    assert caption(8, 1) == "a handwritten eight and a one"
    assert len({sentence(np.random.default_rng(i)) for i in range(100)}) > 60


@pytest.mark.slow
def test_the_same_seed_gives_the_same_bytes(digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def digest(folder: Path) -> dict[str, str]:
        files = [path for path in sorted(folder.rglob("*")) if path.suffix in (".tar", ".npz")]
        return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}

    prepare_digits.prepare(tmp_path, SETTINGS)
    first = digest(tmp_path)
    assert first == digest(digits)
    assert len(first) == 10 + 11  # manifests and shards
    capsys.readouterr()
    assert prepare_digits.prepare(tmp_path, SETTINGS) == 0
    assert capsys.readouterr().out == f"{tmp_path}: finished before with the same settings\n"
    prepare_digits.prepare(tmp_path, replace(SETTINGS, seed=1))
    assert digest(tmp_path) != first
