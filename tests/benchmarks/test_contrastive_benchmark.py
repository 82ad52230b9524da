"""The baseline of ``trainer.benchmark contrastive`` is open_clip's step: exact but for the temperature."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from open_clip.loss import ClipLoss

from tests.benchmarks.accumulation_baseline import accumulate
from trainer.config.data_config import DataConfig
from trainer.config.run_config import ContrastiveRunConfig, TrainingConfig
from trainer.tasks.contrastive.architecture import build_clip, write_architecture

ARCHITECTURE: dict[str, Any] = {
    "embed_dim": 8,
    "vision_cfg": {"image_size": 16, "patch_size": 8, "width": 16, "layers": 1, "head_width": 8},
    "text_cfg": {"context_length": 4, "vocab_size": 16, "width": 16, "heads": 2, "layers": 1},
}


def test_the_baseline_multiplies_the_temperatures_gradient_by_the_micro_batches(tmp_path: Path) -> None:
    data, training = DataConfig(()), TrainingConfig(steps=1)
    config = ContrastiveRunConfig(run_dir=tmp_path, data=data, training=training, architecture=ARCHITECTURE)
    write_architecture(config, tmp_path)
    torch.manual_seed(0)
    clip = build_clip(tmp_path)
    exact = copy.deepcopy(clip)
    batches = [(torch.randn(2, 3, 16, 16), torch.randint(1, 16, (2, 4))) for _ in range(4)]
    images, captions = (torch.cat(parts) for parts in zip(*batches, strict=True))
    ClipLoss()(*exact(images, captions)).backward()
    accumulate(clip, batches)
    for (name, ours), theirs in zip(clip.named_parameters(), exact.parameters(), strict=True):
        factor = 4 if name == "logit_scale" else 1
        assert ours.grad is not None and theirs.grad is not None
        assert torch.allclose(ours.grad, factor * theirs.grad, atol=1e-5), name
