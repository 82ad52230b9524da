"""Towers become transformers' CLIPModel and SiglipModel with equal features, or are refused with the reason."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import timm
import torch
from open_clip.model import CLIPVisionCfg
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModel, AutoProcessor, PreTrainedTokenizerFast

from tests.distributed.contrastive_steps import nfnet_and_bert, write_bert
from tests.tasks.test_contrastive_architecture import run_config
from trainer import export
from trainer.tasks.contrastive.architecture import build_clip, write_architecture, write_export
from trainer.tasks.contrastive.towers import ContrastiveTowers
from trainer.tasks.contrastive.transformers_export import NotInTransformersError, Preparation, write_transformers

VISION = {"image_size": 16, "patch_size": 8, "width": 16, "layers": 2, "head_width": 8}
TEXT = {"context_length": 6, "vocab_size": 16, "width": 24, "heads": 2, "layers": 2}
CLIP: dict[str, Any] = {"embed_dim": 8, "vision_cfg": VISION, "text_cfg": TEXT}
SIGLIP: dict[str, Any] = {
    "embed_dim": 16,
    "init_logit_bias": -10.0,
    "custom_text": True,
    "preprocess_cfg": {"mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5]},
    "vision_cfg": {"timm_model_name": "tiny_siglip", "timm_pool": "map", "timm_proj": "none", "image_size": 16},
    "text_cfg": TEXT
    | {"no_causal_mask": True, "proj_bias": True, "pool_type": "last", "norm_kwargs": {"eps": 1e-6}}
    | {"act_kwargs": {"approximate": "tanh"}},
}


@timm.models.register_model
def tiny_siglip(pretrained: bool = False, **settings: Any) -> Any:
    """Build timm's ViT of SigLIP, two blocks of it; "fc" of a test with its own pool is left to timm."""
    settings = {name: value for name, value in settings.items() if name in ("img_size", "global_pool", "num_classes")}
    sizes = {"patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2, "class_token": False}
    return timm.models.VisionTransformer(**({"img_size": 16} | settings | sizes))


def write_run(folder: Path, architecture: dict[str, Any]) -> Path:
    """Export random towers for open_clip."""
    torch.manual_seed(0)
    write_architecture(run_config(folder, architecture), folder / "architecture")
    towers = ContrastiveTowers(build_clip(folder / "architecture"))
    for parameter in towers.parameters():
        if parameter.numel() > 1:
            torch.nn.init.normal_(parameter, std=0.3)  # biases and gains too, so that a mix-up shows
    weights = {name: value.detach() for name, value in towers.named_parameters()}
    write_export(folder / "architecture", weights, folder / "export", folder / "export")
    return folder / "export"


def write_tokenizer(folder: Path) -> Path:
    vocabulary = {"<end>": 15, "[UNK]": 0, "a": 4, "red": 5, "cat": 6}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>", unk_token="[UNK]").save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("architecture", "kind"),
    [(CLIP, "CLIPModel"), (CLIP | {"quick_gelu": True}, "CLIPModel"), (SIGLIP, "SiglipModel")],
)
def test_features_are_equal(tmp_path: Path, architecture: dict[str, Any], kind: str) -> None:
    folder = write_run(tmp_path, architecture)
    write_transformers(folder, tmp_path / "hf", Preparation(write_tokenizer(tmp_path / "tokenizer"), "stretch"))
    model, processor = (kind.from_pretrained(tmp_path / "hf") for kind in (AutoModel, AutoProcessor))
    assert type(model).__name__ == kind
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8))
    inputs = processor(text=["a red cat"], images=[image], return_tensors="pt", padding="max_length", truncation=True)
    assert inputs["input_ids"].tolist() == [[4, 5, 6, 15, 15, 15]]
    clip = open_clip.create_model(f"local-dir:{folder}").eval()
    settings = open_clip.get_model_preprocess_cfg(clip)
    mean, std = (torch.tensor(settings[name]).view(3, 1, 1) for name in ("mean", "std"))
    pixels = (torch.from_numpy(np.array(image)).permute(2, 0, 1)[None] / 255 - mean) / std
    with torch.no_grad():
        found = model.eval()(input_ids=inputs["input_ids"], pixel_values=inputs["pixel_values"])
        image_features = clip.encode_image(pixels, normalize=True)
        text_features = clip.encode_text(inputs["input_ids"], normalize=True)
        logits = clip.logit_scale.exp() * image_features @ text_features.T + (clip.logit_bias or 0)
    assert torch.allclose(found.image_embeds, image_features, atol=1e-5)
    assert torch.allclose(found.text_embeds, text_features, atol=1e-5)
    assert torch.allclose(found.logits_per_image, logits, atol=1e-3)


def test_clips_own_tokenizer(tmp_path: Path) -> None:
    folder = write_run(tmp_path, CLIP | {"text_cfg": TEXT | {"vocab_size": 49408, "context_length": 12}})
    write_transformers(folder, tmp_path / "hf", Preparation())
    processor = AutoProcessor.from_pretrained(tmp_path / "hf")
    captions = ["A photo  of\ta Cat, isn't it?", "naïve café — 3 dogs"]
    theirs = open_clip.get_tokenizer("ViT-B-32", context_length=12)(captions)
    ours = processor(text=captions, return_tensors="pt", padding="max_length", truncation=True)["input_ids"]
    ends = theirs.argmax(-1)
    assert torch.equal(ours.argmax(-1), ends)
    for row, end in enumerate(ends):  # behind the end token, the padding differs, and nothing sees it
        assert torch.equal(ours[row, : end + 1], theirs[row, : end + 1])


@pytest.mark.parametrize(
    ("architecture", "reason"),
    [
        (CLIP | {"vision_cfg": VISION | {"pool_type": "avg"}}, "pool_type is avg"),
        (CLIP | {"text_cfg": TEXT | {"pool_type": "last"}}, "text_cfg.pool_type is last"),
        (CLIP | {"text_cfg": TEXT | {"no_causal_mask": True}}, "is causal"),
        (CLIP | {"vision_cfg": VISION | {"ls_init_value": 0.1}}, "vision_cfg.ls_init_value is 0.1"),
        (CLIP | {"init_logit_bias": -1.0}, "the logits have a bias"),
        (CLIP | {"vision_cfg": VISION | {"act_kwargs": {"approximate": "tanh"}}}, "image tower differ by"),
        (SIGLIP | {"vision_cfg": SIGLIP["vision_cfg"] | {"timm_pool": "avg"}}, "tiny_siglip is no ViT with attention"),
        (SIGLIP | {"text_cfg": TEXT}, "text tower of a SiglipModel"),
        (SIGLIP | {"init_logit_bias": None}, "have no bias"),
    ],
)
def test_other_towers_are_refused(tmp_path: Path, architecture: dict[str, Any], reason: str) -> None:
    folder = write_run(tmp_path, architecture)
    with pytest.raises(NotInTransformersError, match=reason):
        write_transformers(folder, tmp_path / "hf", Preparation(write_tokenizer(tmp_path / "tokenizer")))
    assert not (tmp_path / "hf").exists()


def test_nfnet_and_bert_are_refused_by_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_bert(tmp_path / "bert")
    folder = write_run(tmp_path, nfnet_and_bert(tmp_path / "bert"))
    assert export.main([str(folder), "--format", "huggingface"]) == 1
    message = capsys.readouterr().err
    assert "test_nfnet is no ViT" in message and "hf_model_name" in message and "Use the format open_clip" in message
    assert not (folder / "huggingface").exists()


def test_the_command_converts_an_export(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_run(tmp_path, CLIP)
    assert export.main([str(folder), "--format", "huggingface"]) == 1
    assert "name the run folder instead" in capsys.readouterr().err
    assert export.main([str(folder), "--format", "idefics"]) == 1
    assert export.main([str(folder), "--format", "huggingface", "--include-frozen"]) == 1
    assert "--include-frozen" in capsys.readouterr().err


def test_every_setting_of_open_clips_towers_was_looked_at() -> None:
    """A setting that a new open_clip adds needs a decision in ``transformers_export``."""
    known = {"layers", "width", "head_width", "mlp_ratio", "patch_size", "image_size", "patch_dropout", "pool_type"}
    known |= {"attn_pooler_queries", "attn_pooler_heads", "pos_embed_type", "final_ln_after_pool", "output_tokens"}
    known |= {"act_kwargs", "norm_kwargs", "ls_init_value", "attentional_pool", "no_ln_pre", "block_type", "qk_norm"}
    known |= {"scaled_cosine_attn", "scale_heads", "scale_attn_inner", "scale_attn", "scale_fc"}
    assert {name for name in vars(CLIPVisionCfg()) if not name.startswith("timm_")} == known
