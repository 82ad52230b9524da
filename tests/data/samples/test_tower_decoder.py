"""Check that a tower that takes squares only is refused by the settings that need another one."""

from __future__ import annotations

from pathlib import Path

import open_clip
import pytest

from model.config import VisionEncoderConfig
from model.vision_encoder import VisionEncoder
from trainer.config.data_config import DataConfig, ImageTextSource
from trainer.data.samples.tower_decoder import tower_decoder
from trainer.tasks.row_builders import check_image_tokens


@pytest.fixture
def squares_only() -> VisionEncoder:
    tower = open_clip.create_model("RN50", load_weights=False, device="meta").visual
    return VisionEncoder(tower, VisionEncoderConfig("RN50"))


def test_sources_are_named(squares_only: VisionEncoder) -> None:
    squares, shapes = (ImageTextSource("pairs", Path("m.npz"), 4, image_tokens=tokens) for tokens in (None, 100))
    check_image_tokens(DataConfig((squares,)), squares_only)
    with pytest.raises(ValueError, match=r"data\.sources\.1\.image_tokens.*'RN50'"):
        check_image_tokens(DataConfig((squares, shapes)), squares_only)


def test_the_setting_of_a_prompt_is_named(squares_only: VisionEncoder) -> None:
    with pytest.raises(ValueError, match="image_tokens.*'RN50'"):
        tower_decoder(squares_only, image_tokens=9)
