"""Towers are built from configs alone, and an export gives open_clip the features that training saw."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from tests.distributed.contrastive_steps import TOKENS, nfnet_and_bert, towers, write_bert, write_towers
from trainer.config.data_config import DataConfig
from trainer.config.loader import load_config
from trainer.config.run_config import ContrastiveRunConfig, TrainingConfig
from trainer.tasks.contrastive.architecture import (
    build_clip,
    context_length,
    image_size,
    load_weights,
    write_architecture,
    write_export,
)
from trainer.tasks.contrastive.captions import caption_tokenizer
from trainer.tasks.contrastive.losses import Features
from trainer.tasks.contrastive.towers import ContrastiveTowers

ROOT = Path(__file__).parents[2]


def run_config(folder: Path, architecture: Any, **more: Any) -> ContrastiveRunConfig:
    return ContrastiveRunConfig(
        run_dir=folder, data=DataConfig(()), training=TrainingConfig(steps=1), architecture=architecture, **more
    )


def write_tokenizer(folder: Path, pad: str = "[PAD]") -> Path:
    """Write a tokenizer with BERT's special tokens."""
    vocabulary = {token: i for i, token in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "a", "red", "cat"])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing("[CLS] $A [SEP]", None, [("[CLS]", 2), ("[SEP]", 3)])
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token=pad, unk_token="[UNK]").save_pretrained(folder)
    return folder


@pytest.mark.slow
def test_the_papers_towers_have_their_sizes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    path = Path("configs/vision/nfnet-f6-bert.yaml")
    config = load_config(path, [], ContrastiveRunConfig, check_files=False)
    config = replace(config, tokenizer=None)  # it is not in the clone
    write_architecture(config, tmp_path)
    clip = build_clip(tmp_path, "meta")
    trunk = clip.visual.trunk
    assert sum(p.numel() for p in trunk.parameters()) == pytest.approx(435.3e6, rel=1e-3)
    assert trunk.num_features == 3072 and clip.visual.head.proj.weight.shape == (1376, 3072)
    assert clip.text.proj.weight.shape == (1376, 768)
    assert sum(p.numel() for p in clip.text.transformer.parameters()) == pytest.approx(108.9e6, rel=1e-2)
    assert (context_length(config, clip), clip.context_length, image_size(config)) == (64, 512, 288)
    # timm's statistics of the preset, not CLIP's
    assert open_clip.get_model_preprocess_cfg(clip)["mean"] == [0.485, 0.456, 0.406]


@pytest.mark.slow
def test_the_vit_has_the_size_of_clips(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    config = load_config(Path("configs/vision/vit-l-14.yaml"), [], ContrastiveRunConfig, check_files=False)
    write_architecture(config, tmp_path)
    clip = build_clip(tmp_path, "meta")
    assert sum(p.numel() for p in clip.parameters()) == pytest.approx(427.6e6, rel=1e-3)


def test_statistics_of_the_architecture_win(tmp_path: Path) -> None:
    write_bert(tmp_path / "bert")
    statistics = {"mean": [0.5, 0.5, 0.5], "std": [0.25, 0.25, 0.25]}
    architecture = nfnet_and_bert(tmp_path / "bert") | {"preprocess_cfg": statistics}
    write_architecture(run_config(tmp_path, architecture), tmp_path / "architecture")
    assert ContrastiveTowers(build_clip(tmp_path / "architecture")).mean_color == (0.5, 0.5, 0.5)


def test_captions_have_the_tokens_that_open_clip_gives_the_text_tower(tmp_path: Path) -> None:
    write_bert(tmp_path / "bert")
    config = run_config(tmp_path, nfnet_and_bert(tmp_path / "bert"), tokenizer=write_tokenizer(tmp_path / "tokenizer"))
    write_architecture(config, tmp_path / "architecture")
    tokenize = caption_tokenizer(config, build_clip(tmp_path / "architecture"))
    theirs = open_clip.get_tokenizer(f"local-dir:{tmp_path / 'architecture'}")
    for caption in ("a  red cat", "a " * 20, ""):
        assert tokenize(caption).tolist() == theirs([caption])[0].tolist()
    assert tokenize("a red cat").tolist() == [2, 4, 5, 6, 3, 0] and len(tokenize("")) == TOKENS


def test_a_tokenizer_with_another_padding_is_refused(tmp_path: Path) -> None:
    write_bert(tmp_path / "bert")
    config = run_config(
        tmp_path, nfnet_and_bert(tmp_path / "bert"), tokenizer=write_tokenizer(tmp_path / "tokenizer", pad="[SEP]")
    )
    write_architecture(config, tmp_path / "architecture")
    with pytest.raises(ValueError, match=r"pads with 3, but the text tower ignores 0"):
        caption_tokenizer(config, build_clip(tmp_path / "architecture"))


def test_open_clip_reloads_an_export_with_equal_features(tmp_path: Path) -> None:
    architecture = write_towers(tmp_path)
    module = towers(architecture).eval()
    weights = {name: value.detach() for name, value in module.named_parameters()}
    write_export(architecture, weights, tmp_path / "temporary", tmp_path / "export")
    (tmp_path / "temporary").rename(tmp_path / "export")
    description = json.loads((tmp_path / "export" / "open_clip_config.json").read_text())
    assert description["model_cfg"]["text_cfg"]["hf_model_name"] == str(tmp_path / "export")
    clip = open_clip.create_model(f"local-dir:{tmp_path / 'export'}").eval()
    media = torch.randint(0, 256, (3, 1, 3, 32, 32), dtype=torch.uint8)
    ids = torch.randint(1, 30, (3, TOKENS))
    settings = open_clip.get_model_preprocess_cfg(clip)
    mean, std = (torch.tensor(settings[name]).view(3, 1, 1) for name in ("mean", "std"))
    with torch.no_grad():
        ours = Features(*module(input_ids=ids, media=media))
        image = clip.encode_image((media[:, 0] / 255 - mean) / std, normalize=True)
        text = clip.encode_text(ids, normalize=True)
    assert torch.equal(ours.image_ND, image) and torch.equal(ours.text_ND, text)
    assert clip.logit_scale.shape == ()


def test_a_run_starts_from_an_export_at_another_image_size(tmp_path: Path) -> None:
    architecture = {
        "embed_dim": 8,
        "vision_cfg": {"image_size": 16, "patch_size": 8, "width": 16, "layers": 1, "head_width": 8},
        "text_cfg": {"context_length": 4, "vocab_size": 16, "width": 16, "heads": 2, "layers": 1},
    }
    small = run_config(tmp_path, architecture)
    write_architecture(small, tmp_path / "small")
    module = ContrastiveTowers(build_clip(tmp_path / "small"))
    weights = {name: value.detach() for name, value in module.named_parameters()}
    write_export(tmp_path / "small", weights, tmp_path / "export", tmp_path / "export")
    large = run_config(tmp_path, architecture, image_size=32)
    write_architecture(large, tmp_path / "large")
    clip = build_clip(tmp_path / "large")
    load_weights(clip, tmp_path / "export")
    assert clip.visual.positional_embedding.shape == (17, 16)  # 4 x 4 patches and the class
    assert torch.equal(clip.visual.conv1.weight, module.clip.visual.conv1.weight)
    with pytest.raises(ValueError, match=r"^start_from: no such file"):
        load_weights(clip, tmp_path)
    write_architecture(run_config(tmp_path, architecture | {"embed_dim": 4}), tmp_path / "other")
    with pytest.raises(ValueError, match=r"^start_from: the weights of .* do not fit"):
        load_weights(build_clip(tmp_path / "other"), tmp_path / "export")
