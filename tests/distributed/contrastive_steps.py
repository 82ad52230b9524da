"""Make contrastive steps in one process by definition, and on several processes with DeepSpeed."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from timm.utils.agc import adaptive_clip_grad
from torch import Tensor, nn
from transformers import BertConfig

from trainer.config.contrastive_config import ContrastiveLossConfig
from trainer.config.data_config import DataConfig
from trainer.config.run_config import ContrastiveRunConfig, OptimizerConfig, TrainingConfig
from trainer.data.batch import Batch
from trainer.deepspeed_engine.engine import Engine, gathered_parameters
from trainer.deepspeed_engine.part_clipping import PartClipping
from trainer.runtime.distributed import World
from trainer.tasks.contrastive.architecture import build_clip, write_architecture
from trainer.tasks.contrastive.exact_step import ContrastiveStep
from trainer.tasks.contrastive.losses import Features
from trainer.tasks.contrastive.towers import IMAGE_TOWER, ContrastiveTowers

ROWS, TOKENS, VOCABULARY, PAD = 16, 6, 30, 0
ADAPTIVE, NORM = 0.01, 0.05
LOSS = ContrastiveLossConfig(label_smoothing=0.1, rows_per_chunk=3)
WEIGHTS = {"web": 1.0, "books": 0.5}


def write_bert(folder: Path) -> None:
    """Write the config of a tiny BERT without dropout."""
    BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=12,
        pad_token_id=PAD,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    ).save_pretrained(folder)


def nfnet_and_bert(bert: Path, **vision: Any) -> dict[str, Any]:
    """Return open_clip's config of timm's test_nfnet and a BERT."""
    return {
        "embed_dim": 12,
        "init_logit_bias": -1.0,
        "vision_cfg": {"timm_model_name": "test_nfnet", "timm_pool": "avg", "timm_proj": "linear", "image_size": 32}
        | vision,
        "text_cfg": {
            "hf_model_name": str(bert),
            "hf_pooler_type": "mean_pooler",
            "hf_proj_type": "linear",
            "context_length": TOKENS,
        },
    }


def write_towers(folder: Path, **vision: Any) -> Path:
    """Write the architecture of the towers, for ``build_clip``."""
    write_bert(folder / "bert")
    config = ContrastiveRunConfig(
        run_dir=folder,
        data=DataConfig(()),
        training=TrainingConfig(steps=1),
        architecture=nfnet_and_bert(folder / "bert", **vision),
    )
    write_architecture(config, folder / "architecture")
    return folder / "architecture"


def towers(architecture: Path) -> ContrastiveTowers:
    """Build the towers with weights that all processes have, and gains that are not 0."""
    torch.manual_seed(0)
    clip = build_clip(architecture)
    for name, parameter in clip.named_parameters():
        if name.endswith("gain"):
            nn.init.constant_(parameter, 0.2)
    return ContrastiveTowers(clip)


def batch_of(source: str, rows: slice) -> Batch:
    """Return some rows of a global batch; captions 3 and 9 are equal."""
    generator = torch.Generator().manual_seed(len(source))
    ids = torch.randint(1, VOCABULARY, (ROWS, TOKENS), generator=generator)
    ids[:, -1] = PAD
    ids[9] = ids[3]
    media = torch.randint(0, 256, (ROWS, 1, 3, 32, 32), dtype=torch.uint8, generator=generator)
    same = torch.ones_like(ids)
    return Batch(source, ids[rows], same[rows], same[rows], same[rows] - 2, media[rows])


@dataclass(frozen=True)
class StepCase:
    """Choose how a step is made.

    Attributes:
        stage: Stage of ZeRO.
        micro_batches: Micro-batches of each source on each rank.
        merged: Whether the sources are one problem.
        clip: Whether the towers are clipped.
        loss: Settings of the loss.
    """

    stage: int
    micro_batches: int
    merged: bool = False
    clip: bool = True
    loss: ContrastiveLossConfig = LOSS

    @property
    def lr(self) -> float:
        """Learning rate; gradients that are not clipped are large, and rounding them in float32 changes the step."""
        return 1.0 if self.clip else 0.01


def factors(merged: bool) -> dict[str, float]:
    """Return the factor of each source's summed loss."""
    return dict.fromkeys(WEIGHTS, 1 / (2 * ROWS)) if merged else {name: w / ROWS for name, w in WEIGHTS.items()}


def engine_step(world: World, architecture: str, case: StepCase) -> dict[str, Any]:
    """Make a step with SGD's update (Adam without averages moves by the sign), and return what it changed."""
    module = towers(Path(architecture))
    text_clip = PartClipping(("",), norm=NORM)
    parts = (PartClipping((IMAGE_TOWER,), adaptive=ADAPTIVE), text_clip) if case.clip else ()
    settings = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_clipping": 0.0,
        "steps_per_print": 10**9,
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {"stage": case.stage, "stage3_param_persistence_threshold": 0},
    }
    # Betas of 0 and a large epsilon make Adam's step lr * gradient / (|gradient| + epsilon), nearly the gradient.
    optimizer = OptimizerConfig(lr=case.lr, betas=(0.0, 0.0), eps=1.0, weight_decay=0.0)
    engine = Engine(module, optimizer, settings, world, clip_parts=parts)
    step = ContrastiveStep(case.loss, mask_duplicates=True, merged=case.merged)
    local = ROWS // world.size
    batches = []
    for source in WEIGHTS:
        size = local // case.micro_batches
        for number in range(case.micro_batches):
            start = world.rank * local + number * size
            batches.append(batch_of(source, slice(start, start + size)))
    losses = step(engine, batches, factors(case.merged))
    result = engine.step(1.0)
    with gathered_parameters(list(module.parameters())):
        weights = {name: value.detach().clone().numpy() for name, value in module.named_parameters()}
    return {
        "losses": {name: float(loss) for name, loss in losses.items()},
        "norm": result.grad_norm,
        "applied": result.applied,
        "weights": weights if world.is_main else {},
    }


def engine_steps(world: World, architecture: str, cases: list[StepCase]) -> list[dict[str, Any]]:
    """Make the step of each case, in one start of the processes."""
    return [engine_step(world, architecture, case) for case in cases]


def full_batch_step(architecture: Path, case: StepCase) -> dict[str, Any]:
    """Make the same step in this process with plain torch: whole batches, whole logits, one backward pass."""
    module = towers(architecture)
    losses: dict[str, Tensor] = {}
    groups = [list(WEIGHTS)] if case.merged else [[name] for name in WEIGHTS]
    total = torch.zeros(())
    for names in groups:
        batches = [batch_of(name, slice(None)) for name in names]
        ids, media = torch.cat([b.input_ids for b in batches]), torch.cat([b.media for b in batches])
        rows = _row_losses(module, ids, media, case.loss)
        for name, part in zip(names, rows.split(ROWS), strict=True):
            losses[name] = part.sum()
            total = total + part.sum() * factors(case.merged)[name]
    total.backward()
    norm = torch.stack([p.grad.norm() for p in module.parameters() if p.grad is not None]).norm()
    if case.clip:
        image = [p for name, p in module.named_parameters() if name.startswith(IMAGE_TOWER)]
        adaptive_clip_grad(image, clip_factor=ADAPTIVE)
        nn.utils.clip_grad_norm_([p for n, p in module.named_parameters() if not n.startswith(IMAGE_TOWER)], NORM)
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.grad is not None:
                parameter -= case.lr * parameter.grad / (parameter.grad.abs() + 1.0)
    weights = {name: value.detach().numpy() for name, value in module.named_parameters()}
    return {"losses": {n: float(loss.detach()) for n, loss in losses.items()}, "norm": float(norm), "weights": weights}


def _row_losses(module: ContrastiveTowers, ids: Tensor, media: Tensor, loss: ContrastiveLossConfig) -> Tensor:
    """Return the loss of each row by its definition: smoothed targets over the captions that are not left out."""
    features = Features(*module(input_ids=ids, media=media))
    logits = features.logit_scale * features.image_ND @ features.text_ND.T
    same = (ids[:, None] == ids[None]).all(-1) & ~torch.eye(len(ids), dtype=torch.bool)
    if loss.kind == "sigmoid":
        signs = 2 * torch.eye(len(ids)) - 1
        return -F.logsigmoid(signs * (logits + features.logit_bias)).masked_fill(same, 0).sum(-1)
    rows = []
    for one_way in (logits, logits.T):
        for row, (values, left_out) in enumerate(zip(one_way, same, strict=True)):
            kept = values[~left_out].log_softmax(0)
            own = values[row] - values[~left_out].logsumexp(0)
            rows.append(-(1 - loss.label_smoothing) * own - loss.label_smoothing * kept.mean())
    return torch.stack(rows).view(2, -1).mean(0)
