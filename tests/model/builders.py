"""Build tiny models, tokenizers and batches for the tests of the model, without downloads."""

from __future__ import annotations

import functools
import json
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import open_clip
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from model.config import (
    CrossAttentionConfig,
    FlamingoConfig,
    LanguageModelConfig,
    PerceiverResamplerConfig,
    VisionEncoderConfig,
)
from model.factory import build_flamingo
from model.flamingo import Flamingo
from model.tokens import SpecialTokenIds

VOCAB_SIZE = 48
BOS, EOS, PAD = 1, 2, 0
IMAGE_SIZE = 16
_COMMON = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "bos_token_id": BOS,
    "eos_token_id": EOS,
    "pad_token_id": PAD,
    "initializer_range": 0.2,  # logits far from flat, so that greedy search has something to decide
}
# Dropout is on where a family has it, so that leaving evaluation mode would be noticed.
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {**_COMMON, "model_type": "llama", "intermediate_size": 48, "num_key_value_heads": 2},
    "gpt_neox": {**_COMMON, "model_type": "gpt_neox", "intermediate_size": 48, "hidden_dropout": 0.2},
    "opt": {**_COMMON, "model_type": "opt", "ffn_dim": 48, "word_embed_proj_dim": 24, "dropout": 0.2, "init_std": 0.2},
    "qwen3": {**_COMMON, "model_type": "qwen3", "intermediate_size": 48, "num_key_value_heads": 2, "head_dim": 8},
    "gemma3": {
        **_COMMON,
        "model_type": "gemma3_text",
        "intermediate_size": 48,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "sliding_window": 4,
        "final_logit_softcapping": 5.0,
        "query_pre_attn_scalar": 8,
    },
    "mistral": {
        **_COMMON,
        "model_type": "mistral",
        "intermediate_size": 48,
        "num_key_value_heads": 2,
        "sliding_window": 6,
    },
    "bloom": {**_COMMON, "model_type": "bloom", "n_layer": 3, "n_head": 4, "hidden_dropout": 0.2},
    "gpt2": {
        "model_type": "gpt2",
        "vocab_size": VOCAB_SIZE,
        "n_embd": 32,
        "n_layer": 3,
        "n_head": 4,
        "n_positions": 64,
        "bos_token_id": BOS,
        "eos_token_id": EOS,
        "resid_pdrop": 0.2,
        "embd_pdrop": 0.2,
        "initializer_range": 0.2,
    },
    "phi": {**_COMMON, "model_type": "phi", "intermediate_size": 48, "resid_pdrop": 0.2},
}
# Added tokens lie beyond the table where the tokenizer fills it, and inside it where the table is padded.
BEYOND = SpecialTokenIds(image_id=VOCAB_SIZE, end_of_chunk_id=VOCAB_SIZE + 1, bos_id=BOS, eos_id=EOS, pad_id=PAD)
INSIDE = replace(BEYOND, image_id=VOCAB_SIZE - 3, end_of_chunk_id=VOCAB_SIZE - 2)
STRADDLING = replace(BEYOND, image_id=VOCAB_SIZE - 1, end_of_chunk_id=VOCAB_SIZE + 2)


@functools.cache
def tower_folder() -> str:
    """Return a folder with a tiny open_clip model, removed when the process ends."""
    holder = tempfile.TemporaryDirectory()
    tower_folder.holder = holder  # type: ignore[attr-defined]
    write_tower(Path(holder.name))
    return holder.name


def write_tower(folder: Path, seed: int = 0) -> None:
    """Write a ViT in open_clip's folder format: 16 px, patches of 8, dim 24, 3 blocks."""
    architecture = {
        "embed_dim": 16,
        "vision_cfg": {"image_size": IMAGE_SIZE, "patch_size": 8, "width": 24, "layers": 3, "head_width": 12},
        "text_cfg": {"context_length": 8, "vocab_size": VOCAB_SIZE, "width": 16, "heads": 2, "layers": 1},
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        clip = open_clip.model.CLIP(**architecture)
    preprocess = {"mean": [0.5, 0.4, 0.3], "std": [0.2, 0.25, 0.3]}
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": architecture, "preprocess_cfg": preprocess}))
    save_file(clip.state_dict(), folder / "open_clip_model.safetensors")


def tiny_config(family: str = "llama", **changes: Any) -> FlamingoConfig:
    """Describe a Flamingo of a few thousand parameters around a random LM of a family, with any field replaced."""
    config = FlamingoConfig(
        vision=VisionEncoderConfig(name=f"local-dir:{tower_folder()}"),
        resampler=PerceiverResamplerConfig(num_layers=2, dim=20, num_heads=2, head_dim=8, num_latents=4, num_frames=2),
        cross_attention=CrossAttentionConfig(every_n_layers=1, head_dim=8, num_heads=4),
        language_model=LanguageModelConfig(architecture=FAMILIES[family]),
    )
    return replace(config, **changes)


def tiny_flamingo(
    family: str = "llama", tokens: SpecialTokenIds = BEYOND, *, seed: int = 0, gates: float = 0.0, **changes: Any
) -> Flamingo:
    """Build a tiny model at its start; with ``gates`` one that looks trained."""
    model = build_flamingo(tiny_config(family, **changes), tokens, seed=seed)
    if gates:
        wake(model, gates)
    return model


def wake(model: Flamingo, gates: float) -> None:
    """Open every gate, so that media matter, and make the added tokens differ.

    At the start their embeddings are equal, and rounding would decide greedy search.
    """
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for block in model.cross_attention:
            block.attention_gate.fill_(gates)
            block.feed_forward_gate.fill_(gates)
        for row in (*model.language_model.input_rows, *model.language_model.output_rows):
            row.weight.add_(0.2 * torch.randn(row.weight.shape, generator=generator))


def random_media(count: int, *, num_frames: int = 1, seed: int = 0, size: int = IMAGE_SIZE) -> Tensor:
    """Return uint8 media [count, num_frames, 3, size, size]."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, num_frames, 3, size, size), dtype=torch.uint8, generator=generator)


def random_text(rows: int, length: int, *, seed: int = 0) -> Tensor:
    """Return ids of ordinary tokens, [rows, length]."""
    return torch.randint(3, VOCAB_SIZE - 4, (rows, length), generator=torch.Generator().manual_seed(seed))


def text_with_media(tokens: SpecialTokenIds = BEYOND, *, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Return ids [2, 12] with two media in the first row and one in the second, and the three media."""
    ids = random_text(2, 12, seed=seed)
    ids[0, [1, 6]] = tokens.image_id
    ids[1, 3] = tokens.image_id
    ids[:, 9] = tokens.end_of_chunk_id
    return ids, random_media(3, seed=seed)


def tiny_tokenizer(**special: str) -> PreTrainedTokenizerFast:
    """Build a word-level tokenizer of ``VOCAB_SIZE`` entries."""
    words = ["<pad>", "<s>", "</s>", "<unk>", *(f"w{i}" for i in range(VOCAB_SIZE - 4))]
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", **special)
