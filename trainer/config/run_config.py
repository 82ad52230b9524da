"""Every setting of a run, as dataclasses: the one schema of YAML, command line, documentation and code.

``trainer.config.loader`` reads YAML, applies dotted overrides (tyro) and validates with pydantic; nothing else in the
project parses settings. Units are in the names or in the docstrings; sizes named ``batch_size`` are always global
(over all ranks), so that the number of processes never changes what is trained.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from model.config import DType, FlamingoConfig
from trainer.config.data_config import DataConfig
from trainer.config.resilience_config import ResilienceConfig
from trainer.config.types import (
    FORBID_UNKNOWN_KEYS,
    NonNegative,
    NonNegativeFloat,
    Positive,
    PositiveFloat,
    Probability,
)


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW (paper: betas and eps are absent there; weight decay 0.1, 0 on the resampler).

    name: "adamw" is torch's fused one, "cpu_adam" DeepSpeed's for optimizer state that is offloaded, "apex_fused_adam"
        NVIDIA apex's, where it is installed.
    lr: the peak of the schedule. betas, eps, weight_decay: AdamW's own.
    gate_lr_multiplier: multiplies the learning rate of the tanh gates.
    no_decay_resampler: the paper's rule; norms, gates, biases and embeddings never decay.
    clip_grad_norm: the global norm that the gradient of the whole update is clipped to.
    """

    __pydantic_config__ = FORBID_UNKNOWN_KEYS

    name: Literal["adamw", "cpu_adam", "apex_fused_adam"] = "adamw"
    lr: PositiveFloat = 1e-4
    betas: tuple[Probability, Probability] = (0.9, 0.999)
    eps: PositiveFloat = 1e-8
    weight_decay: NonNegativeFloat = 0.1
    no_decay_resampler: bool = True
    gate_lr_multiplier: PositiveFloat = 1.0
    clip_grad_norm: PositiveFloat = 1.0


@dataclass(frozen=True)
class ScheduleConfig:
    """Linear warm-up from 0 over ``warmup_steps``, then ``decay`` down to ``final_lr_ratio`` at the last step."""

    __pydantic_config__ = FORBID_UNKNOWN_KEYS

    warmup_steps: NonNegative = 5000
    decay: Literal["constant", "cosine", "linear"] = "constant"
    final_lr_ratio: Probability = 0.0


@dataclass(frozen=True)
class OffloadConfig:
    """Where ZeRO keeps partitioned parameters or optimizer state.

    device: "none" is the GPU itself. path: a folder on the drive, for nvme only.
    pin_memory: page-locked host memory: faster copies, and the memory cannot be swapped out.
    """

    __pydantic_config__ = FORBID_UNKNOWN_KEYS

    device: Literal["none", "cpu", "nvme"] = "none"
    path: Path | None = None
    pin_memory: bool = False


@dataclass(frozen=True)
class DeepSpeedConfig:
    """ZeRO settings; all other keys of DeepSpeed's json follow from the other sections.

    zero_stage: 1 partitions the optimizer state, 2 also the gradients, 3 also the parameters, frozen ones included.
    hpz_partition_size: ZeRO-3 keeps a second copy of the parameters in each group of that many neighboring processes
        (a node's devices), from which the backward gathers without the network; 1 keeps none.
    reduce_bucket_size, prefetch_bucket_size: numbers whose gradients are reduced at once, and that are gathered ahead
        of their use (ZeRO-3). Smaller ones take less memory, larger ones fewer messages; a raw json's are taken first.
    raw: a json (file or mapping) merged over the generated one; keys that contradict another section are refused.
    timeout_seconds: how long a collective waits for a process that does not come.
    """

    __pydantic_config__ = FORBID_UNKNOWN_KEYS

    zero_stage: Literal[1, 2, 3] = 3
    hpz_partition_size: Positive = 1
    reduce_bucket_size: Positive = 50_000_000
    prefetch_bucket_size: NonNegative = 50_000_000
    offload_param: OffloadConfig = field(default_factory=OffloadConfig)
    offload_optimizer: OffloadConfig = field(default_factory=OffloadConfig)
    raw: dict[str, Any] | Path | None = None
    timeout_seconds: PositiveFloat = 1800.0


@dataclass(frozen=True)
class CheckpointConfig:
    """When a run is saved, and what is kept of it.

    every: steps between checkpoints; the last update and a preemption get theirs in any case.
    keep_last: the newest so many are kept. keep_every: every so many steps, one is kept for good.
    keep_best: that many with the lowest training loss (the mean over the 100 steps before each) are kept as well.
    asynchronous: training goes on while a checkpoint is written, after the tensors were copied to host memory, which
        has to hold each process's own shards once more. False: training waits until it is on the disk.
    """

    __pydantic_config__ = FORBID_UNKNOWN_KEYS

    every: Positive = 1000
    keep_last: Positive = 3
    keep_every: Positive | None = None
    keep_best: NonNegative = 0
    asynchronous: bool = True


@dataclass(frozen=True)
class LoggingConfig:
    """metrics.jsonl is always written; the others are choices.

    log_every: steps between console lines; skipped updates and the last one always get theirs.
    tensorboard: event files in the run folder. wandb_project: where wandb logs to; None does not use it.
    peak_tflops: 10^12 operations a second that a device can do at most in ``training.dtype``, of which MFU and HFU are
        shares; None takes the data sheet's of a known GPU in bfloat16, and leaves them out on others.
    profile_steps: [first, last] update, counted from 1, that torch profiler traces on the main process, into ``traces/``
        in the run folder; opens in Perfetto and TensorBoard. Traced updates are slow, and a file grows by each.
    """

    __pydantic_config__ = FORBID_UNKNOWN_KEYS

    log_every: Positive = 1
    tensorboard: bool = True
    wandb_project: str | None = None
    peak_tflops: PositiveFloat | None = None
    profile_steps: tuple[Positive, Positive] | None = None


@dataclass(frozen=True)
class TrainingConfig:
    """The loop.

    steps: updates of the whole run. seed: of new weights and of dropout.
    dtype: of activations, gradients and frozen weights; what is trained has float32 copies in the optimizer.
    loss_normalization: "token_mean" divides each source's summed loss by its trained tokens in the global batch;
        "token_sum" by its sequences, as in the paper (a sum over tokens).
    max_skipped_in_a_row: that many non-finite updates one after another abort the run.
    activation_checkpointing: recompute language-model blocks (each with its cross-attention) in the backward instead of
        keeping their activations: true for all, or how many; the first ones, which the backward reaches last.
    activation_memory_gib: the most that activations may take of a device, in GiB. As few blocks are recomputed as that
        allows, counted at the start; activation_checkpointing is left out then.
    threads: torch threads a process on the CPU; None leaves torch's own choice.
    ops: implementation of the fused attention ops: "auto" takes the fastest that is there (or what the
        environment variable FLAMINGO_OPS says), "fused" insists on it.
    """

    __pydantic_config__ = FORBID_UNKNOWN_KEYS

    steps: Positive
    seed: int = 0
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    loss_normalization: Literal["token_mean", "token_sum"] = "token_mean"
    max_skipped_in_a_row: Positive = 10
    activation_checkpointing: bool | NonNegative = False
    activation_memory_gib: PositiveFloat | None = None
    threads: Positive | None = None
    ops: Literal["auto", "reference", "fused"] = "auto"


@dataclass(frozen=True)
class RunConfig:
    """What all three trainers share (``trainer.train``, ``pretrain_lm``, ``pretrain_vision``).

    run_dir: the folder of everything the run writes. It resumes from what is in there.
    """

    __pydantic_config__ = FORBID_UNKNOWN_KEYS

    run_dir: Path
    data: DataConfig
    training: TrainingConfig
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    deepspeed: DeepSpeedConfig = field(default_factory=DeepSpeedConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)
    resilience: ResilienceConfig = field(default_factory=ResilienceConfig)


@dataclass(frozen=True)
class FlamingoRunConfig(RunConfig):
    """``trainer.train``."""

    task: Literal["flamingo"] = "flamingo"
    model: FlamingoConfig = field(default_factory=FlamingoConfig)


@dataclass(frozen=True)
class TokenizerTrainingConfig:
    """A byte-level BPE of ``vocabulary`` entries, trained on the first ``samples`` texts of the first source.

    end_of_text: the token that begins, ends and pads.
    """

    __pydantic_config__ = FORBID_UNKNOWN_KEYS

    vocabulary: Positive = 500
    samples: Positive = 4000
    end_of_text: str = "<|endoftext|>"


@dataclass(frozen=True)
class LanguageModelRunConfig(RunConfig):
    """``trainer.pretrain_lm``. ``architecture`` is a Hugging Face config with its ``model_type``."""

    task: Literal["language_model"] = "language_model"
    architecture: dict[str, Any] = field(default_factory=dict)
    tokenizer: TokenizerTrainingConfig = field(default_factory=TokenizerTrainingConfig)


@dataclass(frozen=True)
class ContrastiveRunConfig(RunConfig):
    """``trainer.pretrain_vision``.

    architecture: an open_clip model config (embed_dim, vision_cfg, text_cfg) or the name of one.
    tokenizer: folder of a Hugging Face tokenizer for the captions; None takes open_clip's own for ``architecture``.
    mask_duplicate_captions: equal captions in a batch are not each other's negatives.
    """

    task: Literal["contrastive"] = "contrastive"
    architecture: dict[str, Any] | str = "ViT-B-32"
    tokenizer: Path | None = None
    mask_duplicate_captions: bool = True


__all__ = [name for name in globals() if name.endswith("Config")] + ["DType"]
