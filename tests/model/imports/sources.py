"""Build tiny random IDEFICS and Llama 3.2 Vision models of transformers' own classes, with tokenizers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken
from torch import Tensor
from transformers import (
    IdeficsConfig,
    IdeficsForVisionText2Text,
    MllamaConfig,
    MllamaForConditionalGeneration,
    PreTrainedTokenizerFast,
)

from tests.model.builders import BOS, EOS, PAD, VOCAB_SIZE, tiny_tokenizer

SIZE, PATCH = 28, 14
FAKE_ID, IMAGE_ID = VOCAB_SIZE, VOCAB_SIZE + 1  # of IDEFICS
MLLAMA_IMAGE_ID = VOCAB_SIZE
_IDS = {"bos_token_id": BOS, "eos_token_id": EOS, "pad_token_id": PAD}


def tiny_idefics(seed: int = 0, **changes: Any) -> IdeficsForVisionText2Text:
    """Return an IDEFICS of a few thousand weights with open gates."""
    values: dict[str, Any] = {
        "vocab_size": VOCAB_SIZE,
        "additional_vocab_size": 2,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "cross_layer_interval": 2,
        "qk_layer_norms": True,
        "alpha_type": "vector",
        "alpha_initializer": "normal",
        "alphas_initializer_range": 0.5,
        "initializer_range": 0.3,
        "use_resampler": True,
        "freeze_lm_head": True,
        **_IDS,
        "perceiver_config": {
            "use_resampler": True,
            "resampler_n_latents": 4,
            "resampler_depth": 2,
            "resampler_n_heads": 2,
            "resampler_head_dim": 8,
            "qk_layer_norms_perceiver": True,
        },
        "vision_config": {
            "embed_dim": 24,
            "image_size": SIZE,
            "intermediate_size": 32,
            "patch_size": PATCH,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
        },
    }
    torch.manual_seed(seed)
    return _wake(IdeficsForVisionText2Text(IdeficsConfig(**(values | changes))))


def tiny_mllama(seed: int = 0, **changes: Any) -> MllamaForConditionalGeneration:
    """Return a Llama 3.2 Vision of a few thousand weights with open gates; ``changes`` are of its text part."""
    text: dict[str, Any] = {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 6,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "cross_attention_layers": [1, 4],
        "initializer_range": 0.3,
        "max_position_embeddings": 64,
        **_IDS,
    }
    vision = {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 3,
        "num_global_layers": 2,
        "attention_heads": 2,
        "image_size": SIZE,
        "patch_size": PATCH,
        "intermediate_layers_indices": [0, 1],
        "vision_output_dim": 48,
        "initializer_range": 0.3,
    }
    torch.manual_seed(seed)
    config = MllamaConfig(vision_config=vision, text_config=text | changes, image_token_index=MLLAMA_IMAGE_ID)
    return _wake(MllamaForConditionalGeneration(config))


def _wake(model: Any) -> Any:
    """Draw everything that starts at 0 or 1, so that no tensor is without effect."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "gate" in name and parameter.numel() == 1:
                parameter.fill_(0.6)
            elif parameter.ndim == 1:
                parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def write_source(model: Any, folder: Path) -> Path:
    """Write a model and its tokenizer as a transformers folder."""
    model.save_pretrained(folder)
    tokenizer_of(model).save_pretrained(folder)
    return folder


def tokenizer_of(model: Any) -> PreTrainedTokenizerFast:
    """Return the tokenizer of a tiny model."""
    tokenizer = tiny_tokenizer(bos_token="<s>", eos_token="</s>", pad_token="<pad>")
    names = ["<fake_token_around_image>", "<image>"] if model.config.model_type == "idefics" else ["<|image|>"]
    tokenizer.add_tokens([AddedToken(name, special=True, normalized=False) for name in names], special_tokens=True)
    return tokenizer


def random_pixels(*shape: int, seed: int = 0) -> Tensor:
    """Return uint8 pixels."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
