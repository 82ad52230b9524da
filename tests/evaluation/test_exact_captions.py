"""Test the prompts of an evaluation, and that its controls change only the images."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from model.processor import Special
from tests.data.helpers import build_manifest, image_bytes, mmc4, write_shard
from trainer.config.evaluation_config import EvaluationTask
from trainer.data.samples.image_decoder import ImageDecoder
from trainer.evaluation.exact_captions import Example, Score, apply_control, prompt_of, read_examples

DECODER = ImageDecoder(8)


def example(number: int, num_images: int = 2) -> Example:
    """Return an example whose images are uniformly gray, each with its own level."""
    return Example(
        tuple(torch.full((1, 3, 8, 8), 10 * number + i, dtype=torch.uint8) for i in range(num_images)),
        tuple(f"caption {number} {i}" for i in range(num_images)),
    )


def levels(examples: list[Example]) -> list[list[int]]:
    """Return the gray level of every image."""
    return [[int(image.flatten()[0]) for image in one.images] for one in examples]


def task(**settings: object) -> EvaluationTask:
    """Return a task with the given settings."""
    return EvaluationTask(**{"name": "task", "manifest": Path("none"), **settings})  # type: ignore[arg-type]


def test_shuffled_gives_each_example_the_target_image_of_another() -> None:
    examples = [example(number) for number in range(5)]
    shuffled = apply_control(examples, task(control="shuffled"), seed=0)
    targets = [row[-1] for row in levels(shuffled)]
    assert sorted(targets) == [row[-1] for row in levels(examples)]
    assert all(a != b for a, b in zip(targets, [row[-1] for row in levels(examples)], strict=True))
    assert [row[0] for row in levels(shuffled)] == [row[0] for row in levels(examples)]
    assert [one.captions for one in shuffled] == [one.captions for one in examples]


def test_first_replaced_keeps_the_target_image() -> None:
    examples = [example(number) for number in range(5)]
    replaced = levels(apply_control(examples, task(control="first_replaced"), seed=0))
    assert [row[1] for row in replaced] == [row[1] for row in levels(examples)]
    assert all(a[0] != b[0] for a, b in zip(replaced, levels(examples), strict=True))


def test_the_prompt_ends_before_the_caption_to_generate() -> None:
    assert prompt_of(example(0)) == [Special.IMAGE, "caption 0 0", Special.END_OF_CHUNK, Special.IMAGE]


def test_documents_are_read_up_to_the_image_to_caption(tmp_path: Path) -> None:
    # image_info does not follow the order of the sentences.
    write_shard(tmp_path / "0.tar", [("d", mmc4(["one", "two", "three"], [2, 0, 1]))])
    [found] = read_examples(task(manifest=build_manifest(tmp_path), type="interleaved", image=2), DECODER, None)
    assert found.captions == ("one", "two")
    assert levels([found]) == [[20, 30]]


def test_a_sample_that_cannot_be_used_is_an_error(tmp_path: Path) -> None:
    write_shard(tmp_path / "0.tar", [("a", {"png": image_bytes(), "txt": b"fine"}), ("b", {"png": b"no", "txt": b"x"})])
    manifest = build_manifest(tmp_path)
    assert len(read_examples(task(manifest=manifest), DECODER, 1)) == 1
    with pytest.raises(ValueError, match="sample 'b'"):
        read_examples(task(manifest=manifest), DECODER, None)


@pytest.mark.parametrize(
    ("value", "bounds", "met"),
    [(0.5, {}, True), (0.5, {"minimum": 0.5}, True), (0.4, {"minimum": 0.5}, False), (0.6, {"maximum": 0.5}, False)],
)
def test_a_score_meets_its_bounds(value: float, bounds: dict[str, float], met: bool) -> None:
    assert Score(task(**bounds), value, 10, ()).met is met
