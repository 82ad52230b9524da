"""Provide a tiny export whose answers depend on its images."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest

from model.config import LanguageModelConfig
from model.factory import build_flamingo, build_tokenizer
from model.pretrained import save_flamingo
from tests.data.helpers import noise, saved
from tests.data.videos import video_bytes
from tests.model.builders import FAMILIES, tiny_config, tiny_tokenizer, wake
from trainer.prompting.exported_model import ExportedModel, load_exported_model, load_layout

FLAGS = argparse.Namespace(
    dtype=None, device="cpu", image_fit=None, image_tokens=None, num_frames=None, frames_per_second=None
)


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with an export and files to upload."""
    made = tmp_path_factory.mktemp("demo")
    tiny_tokenizer(bos_token="<s>", eos_token="</s>", pad_token="<pad>").save_pretrained(made / "tokenizer")
    language_model = LanguageModelConfig(architecture=FAMILIES["gpt2"], tokenizer=str(made / "tokenizer"))
    config = tiny_config(language_model=language_model)
    tokenizer = build_tokenizer(config)
    model = build_flamingo(config, tokenizer)
    wake(model, 0.8)
    save_flamingo(made / "export", model, tokenizer=tokenizer.tokenizer)
    for number in range(3):
        (made / f"{number}.png").write_bytes(saved(noise(20, 30, seed=number), "PNG"))
    (made / "clip.mp4").write_bytes(video_bytes(2))
    (made / "cut.mp4").write_bytes(video_bytes(2)[:-200])
    (made / "cut.png").write_bytes((made / "0.png").read_bytes()[:-30])
    (made / "text.png").write_text("no image")
    (made / "notes.txt").write_text("no image")
    (made / "empty.jpg").write_bytes(b"")
    return made


@pytest.fixture(scope="session")
def exported(folder: Path) -> ExportedModel:
    """Model of the export."""
    return load_exported_model(folder / "export", load_layout(folder / "export"), FLAGS, with_videos=True)
