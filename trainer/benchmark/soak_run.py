"""Write a tiny run for a soak: generated shards, a tokenizer, an image tower, and the YAML.

The run uses what long runs use: packed documents beside pairs, loader processes, many shards and epochs, a ledger,
TensorBoard, ZeRO-3, and checkpoints in the background. The model has few modules, because ZeRO-3 takes more time for
each module than modules this small compute.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import yaml
from PIL import Image
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from trainer.data.shards.writer import MANIFEST_NAME, IndexedShardWriter

RUN = "run"  # run folder, below the folder of the soak
WORKERS = 2
CHECKPOINT_EVERY = 500

_WORDS = "a and big blue dark green light red round sky small tree".split()
_IMAGE_SIZE = 32
_PAIRS, _DOCUMENTS, _SAMPLES_PER_SHARD = 1500, 600, 25
_LANGUAGE_MODEL = {
    "model_type": "llama",
    "vocab_size": 32,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}


def write_soak_run(folder: Path, steps: int) -> Path:
    """Write the data and the settings of the run below ``folder``; return the YAML."""
    rng = np.random.default_rng(0)
    data = folder / "data"
    _write_tokenizer(folder / "tokenizer")
    _write_tower(folder / "tower")
    for name, samples in (("pairs", _pairs(rng)), ("documents", _documents(rng))):
        with IndexedShardWriter(data / name, _SAMPLES_PER_SHARD) as writer:
            for number, members in enumerate(samples):
                writer.write(f"{number:06d}", members)
            writer.close()
    path = folder / "soak.yaml"
    path.write_text(yaml.safe_dump(_settings(folder, data, steps)))
    return path


def _settings(folder: Path, data: Path, steps: int) -> dict[str, Any]:
    pairs = {"type": "image_text", "name": "pairs", "batch_size": 4, "max_tokens": 24}
    documents = {"type": "interleaved", "name": "documents", "batch_size": 2, "max_tokens": 48, "packing": True}
    sources = [one | {"manifest": str(data / str(one["name"]) / MANIFEST_NAME)} for one in (pairs, documents)]
    return {
        "run_dir": str(folder / RUN),
        "model": {
            "vision": {"name": f"local-dir:{folder / 'tower'}"},
            "resampler": {"num_layers": 1, "dim": 32, "num_heads": 2, "head_dim": 16, "num_latents": 4},
            "cross_attention": {"every_n_layers": 2, "head_dim": 16},
            "language_model": {"architecture": _LANGUAGE_MODEL, "tokenizer": str(folder / "tokenizer")},
        },
        "data": {
            "sources": sources,
            "read_block": 10,
            "shuffle_window": 50,
            "num_workers": WORKERS,
            "ledger": True,
        },
        "training": {"steps": steps, "dtype": "float32", "threads": 1},
        "schedule": {"warmup_steps": 10},
        "deepspeed": {"zero_stage": 3},
        "checkpoint": {"every": CHECKPOINT_EVERY, "keep_last": 2},
        "logging": {"log_every": 100},
    }


def _write_tokenizer(folder: Path) -> None:
    vocabulary = {token: number for number, token in enumerate(["<unk>", "<s>", "</s>", *_WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>").save_pretrained(folder)


def _write_tower(folder: Path) -> None:
    architecture = {
        "embed_dim": 16,
        "vision_cfg": {"image_size": _IMAGE_SIZE, "patch_size": 16, "width": 32, "layers": 1, "head_width": 16},
        "text_cfg": {"context_length": 8, "vocab_size": 32, "width": 16, "heads": 2, "layers": 1},
    }
    folder.mkdir()
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": architecture, "preprocess_cfg": {}}))
    save_file(open_clip.model.CLIP(**architecture).state_dict(), folder / "open_clip_model.safetensors")


def _pairs(rng: np.random.Generator) -> Iterator[dict[str, bytes]]:
    for _ in range(_PAIRS):
        yield {"png": _image(rng), "txt": _caption(rng).encode()}


def _documents(rng: np.random.Generator) -> Iterator[dict[str, bytes]]:
    for _ in range(_DOCUMENTS):
        count = int(rng.integers(1, 4))
        info = [{"image_name": f"{place}.png", "matched_text_index": place} for place in range(count)]
        document = {"text_list": [_caption(rng) for _ in range(count)], "image_info": info}
        yield {"json": json.dumps(document).encode()} | {f"{place}.png": _image(rng) for place in range(count)}


def _caption(rng: np.random.Generator) -> str:
    return " ".join(rng.choice(_WORDS, size=int(rng.integers(2, 7))))


def _image(rng: np.random.Generator) -> bytes:
    buffer = io.BytesIO()
    pixels = rng.integers(0, 256, (_IMAGE_SIZE // 8, _IMAGE_SIZE // 8, 3), dtype=np.uint8)
    Image.fromarray(pixels).resize((_IMAGE_SIZE, _IMAGE_SIZE)).save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()
