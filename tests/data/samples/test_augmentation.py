"""Test the effect of each setting of ``augment``, and that the draws depend on the sample alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import torchvision.transforms.v2.functional as TF

from tests.data.helpers import document_builder, mmc4, noise, pair_builder, saved
from trainer.config.data_config import AugmentConfig
from trainer.data.batch import SampleId
from trainer.data.samples.augmentation import Augmentation, draw_augmentation
from trainer.data.samples.image_decoder import ImageDecoder
from trainer.data.samples.rows import sample_rng

ALL = AugmentConfig(0.5, (0.3, 1.0), (0.75, 1.33), 0.4, 0.4, 0.4, 0.1)
IMAGE = saved(noise(40, 60), "PNG")


def sample(index: int = 0, epoch: int = 0) -> SampleId:
    return SampleId("source", epoch, "a.tar", index, "k")


def decoded(settings: AugmentConfig | None, index: int = 0, epoch: int = 0, **options: Any) -> torch.Tensor:
    decoder = ImageDecoder(16, augment=settings, **options)
    return decoder(IMAGE, sample_rng(0, sample(index, epoch)))


def test_default_settings_change_nothing() -> None:
    plain = decoded(None)
    for index in range(5):
        assert torch.equal(decoded(AugmentConfig(), index), plain)
    assert torch.equal(ImageDecoder(16, augment=ALL)(IMAGE), plain)  # without a generator, as in evaluation


def test_draws_depend_on_sample_and_epoch() -> None:
    assert torch.equal(decoded(ALL, 3), decoded(ALL, 3))
    different = {decoded(ALL, index, epoch).numpy().tobytes() for index in range(4) for epoch in range(3)}
    assert len(different) == 12


def test_flip() -> None:
    plain = decoded(None, fit="stretch")
    flipped = [not torch.equal(decoded(AugmentConfig(0.5), i, fit="stretch"), plain) for i in range(100)]
    assert 30 < sum(flipped) < 70
    always = decoded(AugmentConfig(1.0), fit="stretch")
    assert int((always.flip(-1).int() - plain.int()).abs().max()) <= 1


def test_one_setting_does_not_shift_the_draws_of_another() -> None:
    for index in range(20):
        both = draw_augmentation(replace(ALL, hue=0.0, brightness=0.0), sample_rng(0, sample(index)))
        alone = draw_augmentation(AugmentConfig(horizontal_flip=0.5), sample_rng(0, sample(index)))
        assert both.flip == alone.flip and alone.crop is None


def test_crops_keep_to_their_bounds() -> None:
    image = torch.arange(100 * 200).reshape(1, 100, 200).expand(3, -1, -1)
    settings = AugmentConfig(crop_scale=(0.25, 0.5), crop_ratio=(0.8, 1.25))
    places = set()
    for index in range(200):
        cropped = draw_augmentation(settings, sample_rng(0, sample(index))).cut(image)
        share, aspect = cropped.shape[1] * cropped.shape[2] / 20000, cropped.shape[2] / cropped.shape[1] / 2
        assert 0.24 < share < 0.51 and 0.78 < aspect < 1.28
        places.add(int(cropped[0, 0, 0]))
    assert len(places) > 150
    widest = Augmentation(crop=(1.0, 1.3, 0.5, 0.5)).cut(image)  # a window wider than the image is cut
    assert widest.shape[2] == 200


def test_colors_of_the_padding_do_not_change() -> None:
    mean = ImageDecoder(16).mean_color
    padded = decoded(AugmentConfig(brightness=1.0, contrast=1.0, saturation=1.0, hue=0.5), 5, mean_color=mean)
    assert padded[:, 0, 0].tolist() == list(mean)
    assert not torch.equal(padded, decoded(None))
    dark = Augmentation(brightness=0.0).change_colors(torch.full((3, 4, 4), 200, dtype=torch.uint8))
    assert dark.dtype == torch.uint8 and int(dark.max()) == 0


@pytest.mark.parametrize("fit", ["pad", "crop", "stretch"])
def test_the_result_is_the_square_of_the_tower(fit: Any) -> None:
    for index in range(10):
        image = decoded(ALL, index, fit=fit)
        assert (image.shape, image.dtype) == ((3, 16, 16), torch.uint8)


def test_each_image_of_a_document_has_its_own_draws() -> None:
    document = mmc4(["one", "two"], [0, 1])
    document["0.png"] = document["1.png"] = IMAGE
    row = document_builder(ImageDecoder(16, augment=ALL))(document, sample(), sample_rng(0, sample()))
    assert not torch.equal(row.media[0], row.media[1])
    # All other draws are the same without augmentation.
    plain = document_builder(ImageDecoder(16))(document, sample(), sample_rng(0, sample()))
    assert torch.equal(row.input_ids, plain.input_ids)
    members = {"png": IMAGE, "txt": b"a"}
    for index in range(10):
        rows = [
            pair_builder(decoder, space_prefix_probability=0.5)(members, sample(index), sample_rng(0, sample(index)))
            for decoder in (ImageDecoder(16, augment=ALL), ImageDecoder(16))
        ]
        assert torch.equal(rows[0].input_ids, rows[1].input_ids)


@pytest.mark.parametrize(
    ("change", "apply"),
    [
        (Augmentation(brightness=0.7), lambda image: TF.adjust_brightness(image, 0.7)),
        (Augmentation(contrast=0.6), lambda image: TF.adjust_contrast(image, 0.6)),
        (Augmentation(saturation=0.4), lambda image: TF.adjust_saturation(image, 0.4)),
        (Augmentation(saturation=0.0), lambda image: TF.rgb_to_grayscale(image, 3)),
    ],
)
def test_colors_change_as_in_torchvision(change: Augmentation, apply: Callable[[torch.Tensor], torch.Tensor]) -> None:
    image = torch.randint(0, 256, (3, 9, 7), dtype=torch.uint8)
    assert (change.change_colors(image).int() - apply(image).int()).abs().max() <= 1


def test_no_sum_of_the_map_of_colors_is_rounded() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (3, 500)).astype(np.float32)
    pixels[:, 0] = 255
    for change in (Augmentation(hue=0.37), Augmentation(brightness=1.9, contrast=1.9, saturation=1.9, hue=0.5)):
        matrix = change.color_map()
        assert np.array_equal(matrix @ pixels, matrix.astype(np.float64) @ pixels.astype(np.float64))
        assert abs(matrix[0].sum() - change.brightness * change.contrast) < 1e-3, "gray stays gray"


def test_the_hue_turns_about_gray() -> None:
    gray = torch.arange(0, 250, 10, dtype=torch.uint8).view(1, 5, 5).repeat(3, 1, 1)
    assert (Augmentation(hue=0.3).change_colors(gray).int() - gray.int()).abs().max() <= 1
    color = torch.tensor([150, 100, 90], dtype=torch.uint8).view(3, 1, 1)
    third = Augmentation(hue=1 / 3)
    turned = color
    for _ in range(3):
        turned = third.change_colors(turned)
    assert (turned.int() - color.int()).abs().max() <= 3
    assert (third.change_colors(color).int() - color.int()).abs().max() > 10
