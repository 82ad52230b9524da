"""Define every setting of a training run as dataclasses: one schema for YAML, command line and code.

``trainer.config.loader`` reads and validates them. ``--help`` prints the entries under ``Attributes``.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from model.config import FlamingoConfig
from trainer.config.contrastive_config import ContrastiveLossConfig, TowerClipConfig, ZeroShotConfig
from trainer.config.data_config import DataConfig
from trainer.config.forgetting_config import ForgettingConfig
from trainer.config.resilience_config import ResilienceConfig
from trainer.config.scoring_config import LiveEvaluationConfig
from trainer.config.types import (
    FORBID_UNKNOWN_KEYS,
    NonNegative,
    NonNegativeFloat,
    Positive,
    PositiveFloat,
    Probability,
)


@dataclass(frozen=True)
class PartOptimizerConfig:
    """Change the optimizer's settings for one part of a Flamingo.

    Attributes:
        lr_multiplier: Factor on the learning rate of the part.
        weight_decay: Weight decay of the part's matrices; None keeps that of the run.
    """

    __pydantic_config__ = FORBID_UNKNOWN_KEYS

    lr_multiplier: PositiveFloat = 1.0
    weight_decay: NonNegativeFloat | None = None


@dataclass(frozen=True)
class PartsOptimizerConfig:
    """Change the optimizer's settings for the parts that ``model.trainable`` names. Only a part that trains has any.

    Attributes:
        vision: The image tower.
        resampler: The perceiver resampler.
        cross_attention: The gated cross-attentions.
        language_model: The language model.
        new_tokens: Embeddings of the added tokens, which never decay.
    """

    __pydantic_config__ = FORBID_UNKNOWN_KEYS

    vision: PartOptimizerConfig = field(default_factory=PartOptimizerConfig)
    resampler: PartOptimizerConfig = field(default_factory=PartOptimizerConfig)
    cross_attention: PartOptimizerConfig = field(default_factory=PartOptimizerConfig)
    language_model: PartOptimizerConfig = field(default_factory=PartOptimizerConfig)
    new_tokens: PartOptimizerConfig = field(default_factory=PartOptimizerConfig)


@dataclass(frozen=True)
class OptimizerConfig:
    """Configure AdamW. Norms, gates, biases and embeddings never decay.

    Attributes:
        name: Implementation: "adamw" is torch's fused one, "cpu_adam" is DeepSpeed's for offloaded optimizer state,
            "apex_fused_adam" is NVIDIA apex's, if installed.
        lr: Peak learning rate of the schedule.
        betas: Decay rates of AdamW's running averages of the gradient and its square (the paper names none).
        eps: Constant added to AdamW's denominator.
        weight_decay: AdamW's decoupled weight decay (the paper: 0.1).
        no_decay_resampler: Whether the resampler is left out of weight decay, as in the paper.
        gate_lr_multiplier: Factor on the learning rate of the tanh gates.
        parts: Other settings for parts of a Flamingo.
        clip_grad_norm: Global norm to which the gradient of a step is clipped; "none" does not clip.
    """

    __pydantic_config__ = FORBID_UNKNOWN_KEYS

    name: Literal["adamw", "cpu_adam", "apex_fused_adam"] = "adamw"
    lr: PositiveFloat = 1e-4
    betas: tuple[Probability, Probability] = (0.9, 0.999)
    eps: PositiveFloat = 1e-8
    weight_decay: NonNegativeFloat = 0.1
    no_decay_resampler: bool = True
    gate_lr_multiplier: PositiveFloat = 1.0
    parts: PartsOptimizerConfig = field(default_factory=PartsOptimizerConfig)
    clip_grad_norm: PositiveFloat | Literal["none"] = 1.0


@dataclass(frozen=True)
class ScheduleConfig:
    """Raise the learning rate from 0 linearly, then decay it until the last step.

    Attributes:
        warmup_steps: Steps until the learning rate reaches ``optimizer.lr``.
        decay: Shape of the decay after the warm-up. "exponential" multiplies by the same factor at each step (in the
            paper's fine-tuning by 10 in all: ``final_lr_ratio`` 0.1).
        final_lr_ratio: Learning rate at the last step as a share of ``optimizer.lr``; unused by "constant".
    """

    __pydantic_config__ = FORBID_UNKNOWN_KEYS

    warmup_steps: NonNegative = 5000
    decay: Literal["constant", "cosine", "linear", "exponential"] = "constant"
    final_lr_ratio: Probability = 0.0


@dataclass(frozen=True)
class OffloadConfig:
    """Choose where ZeRO keeps partitioned parameters or optimizer state.

    Attributes:
        device: "none" keeps them on the training device, "cpu" in host memory, "nvme" on a drive.
        path: Folder on the drive, for "nvme" only.
        pin_memory: Whether host memory is page-locked: copies are faster and run beside the computation. Such memory is
            never swapped out. False where a node has too little memory for that. Has no effect without offload.
    """

    __pydantic_config__ = FORBID_UNKNOWN_KEYS

    device: Literal["none", "cpu", "nvme"] = "none"
    path: Path | None = None
    pin_memory: bool = True


FROZEN_DEVICES: dict[str, Literal["cpu", "nvme"]] = {"host": "cpu", "nvme": "nvme"}  # of offload_param


@dataclass(frozen=True)
class DeepSpeedConfig:
    """Configure ZeRO. The other sections determine all other keys of DeepSpeed's JSON.

    Attributes:
        zero_stage: Stage 1 partitions the optimizer state, 2 also the gradients, 3 also the parameters (frozen ones
            included).
        hpz_partition_size: ZeRO-3 keeps a second copy of the parameters in each group of this many neighboring
            processes (the devices of a node), so that the backward pass gathers them without the network. 1 keeps none.
        reduce_bucket_size: Gradient elements reduced in one message. Smaller buckets take less memory. A value in
            ``raw`` has precedence.
        prefetch_bucket_size: Parameter elements that ZeRO-3 gathers, or reads from a drive, ahead of their use. A value
            in ``raw`` has precedence.
        frozen: Where frozen weights live. "partitioned" divides them among all processes (ZeRO-3). "replicated" keeps
            them whole on every process, where no use gathers them; what trains stays under ``zero_stage``. "host" and
            "nvme" are ``offload_param`` with the device cpu or nvme, which also takes the parameters that train. None
            leaves it to ``zero_stage`` and ``offload_param``.
        offload_param: Offload of the partitioned parameters (ZeRO-3).
        offload_optimizer: Offload of the optimizer state.
        raw: DeepSpeed JSON, as a file or a mapping, merged over the generated one. Keys that contradict another section
            are errors.
        timeout_seconds: Seconds that a collective waits for a missing process.
    """

    __pydantic_config__ = FORBID_UNKNOWN_KEYS

    zero_stage: Literal[1, 2, 3] = 3
    hpz_partition_size: Positive = 1
    reduce_bucket_size: Positive = 50_000_000
    prefetch_bucket_size: NonNegative = 50_000_000
    frozen: Literal["partitioned", "replicated", "host", "nvme"] | None = None
    offload_param: OffloadConfig = field(default_factory=OffloadConfig)
    offload_optimizer: OffloadConfig = field(default_factory=OffloadConfig)
    raw: dict[str, Any] | Path | None = None
    timeout_seconds: PositiveFloat = 1800.0

    def __post_init__(self) -> None:
        """Let ``frozen`` choose the device of ``offload_param``, which may name no other."""
        if self.frozen in FROZEN_DEVICES and self.offload_param.device == "none":
            offload = replace(self.offload_param, device=FROZEN_DEVICES[self.frozen])
            object.__setattr__(self, "offload_param", offload)

    @property
    def replicates_frozen(self) -> bool:
        """Whether frozen weights are whole on every process under any ``zero_stage``."""
        return self.frozen == "replicated"


@dataclass(frozen=True)
class CheckpointConfig:
    """Choose when checkpoints are written and which are kept.

    Attributes:
        every: Steps between two checkpoints. The last step and a preemption always write one.
        keep_last: Number of newest checkpoints that are kept.
        keep_every: Steps between checkpoints that are kept forever, a multiple of ``every``; None keeps none forever.
        keep_best: Number of best checkpoints that are also kept.
        best_metric: What makes a checkpoint the best: "loss" is the lowest training loss (mean over the 100 steps
            before each), "eval/TASK/SHOTS" the highest score of the last ``evaluation`` before it.
        patience: Evaluations without a new highest ``best_metric`` after which the run ends early, and is complete. The
            export then is of the best checkpoint. None trains to the last step, and exports its checkpoint.
        asynchronous: Whether training continues while a checkpoint is written. Host memory then holds a copy of each
            process's own shards. False waits until the checkpoint is on the disk.
    """

    __pydantic_config__ = FORBID_UNKNOWN_KEYS

    every: Positive = 1000
    keep_last: Positive = 3
    keep_every: Positive | None = None
    keep_best: NonNegative = 0
    best_metric: str = "loss"
    patience: Positive | None = None
    asynchronous: bool = True


@dataclass(frozen=True)
class LoggingConfig:
    """Choose where metrics go besides ``metrics.jsonl``, which is always written.

    Attributes:
        log_every: Steps between console lines. Skipped steps and the last step are always printed. None adapts it to
            ``training.steps`` (about 100 lines, but at most 100 steps between two) and prints the first step too.
        tensorboard: Whether TensorBoard event files are written to the run folder.
        wandb_project: Project of Weights & Biases to log to; None does not use it.
        peak_tflops: Peak of a device in ``training.dtype``, in 10^12 operations per second; MFU and HFU are shares of
            it. None takes the bfloat16 peak from the data sheet of a known GPU; other devices then report neither.
        profile_steps: First and last step, counted from 1, that torch's profiler traces on the main process. Files in
            ``traces/`` open in Perfetto and TensorBoard. Traced steps are slow, and each enlarges the file.
        part_grad_norms: Whether metrics.jsonl has the norm of each part's gradient, before clipping
            (``grad_norm/resampler``). It reads every gradient once more. With optimizer state on a drive that takes
            long.
    """

    __pydantic_config__ = FORBID_UNKNOWN_KEYS

    log_every: Positive | None = None
    tensorboard: bool = True
    wandb_project: str | None = None
    peak_tflops: PositiveFloat | None = None
    profile_steps: tuple[Positive, Positive] | None = None
    part_grad_norms: bool = False


@dataclass(frozen=True)
class TrainingConfig:
    """Configure the training loop.

    Attributes:
        steps: Steps of the whole run.
        seed: Seed of new weights and of dropout.
        dtype: Type of activations, gradients and frozen weights. The optimizer keeps trained weights in float32.
        loss_normalization: "token_mean" divides each source's summed loss by its target tokens in the global batch;
            "token_sum" divides it by its rows, as in the paper.
        combine: How the sources make a step. "accumulate" adds a gradient of each, with its weight (the paper);
            "round_robin" takes one source a step, in turn; "merged" treats all batches as one of all sources.
        max_skipped_in_a_row: Consecutive steps with a non-finite gradient after which the run stops.
        activation_checkpointing: Language-model blocks, each with its cross-attention, that are recomputed in the
            backward pass to save memory: true for all, or a number for that many first blocks.
        activation_memory_gib: Most memory of a device for activations, in GiB. The run then recomputes as few blocks as
            possible; leave ``activation_checkpointing`` out. None does not limit it.
        threads: Threads of torch per process on the CPU; None leaves the choice to torch.
        ops: Implementation of the fused attention ops: "auto" takes the environment variable FLAMINGO_OPS, or else the
            fastest available one; "fused" fails where it is unavailable; "reference" is plain torch.
        cpu_matmul: Library that multiplies float32 matrices when training on the CPU: "torch" leaves the choice to
            torch (MKL); "onednn" fails where it is unavailable; "auto" takes oneDNN on AMD's processors with AVX-512,
            where it is about twice as fast, and else leaves the choice to torch.
    """

    __pydantic_config__ = FORBID_UNKNOWN_KEYS

    steps: Positive
    seed: int = 0
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    loss_normalization: Literal["token_mean", "token_sum"] = "token_mean"
    combine: Literal["accumulate", "round_robin", "merged"] = "accumulate"
    max_skipped_in_a_row: Positive = 10
    activation_checkpointing: bool | NonNegative = False
    activation_memory_gib: PositiveFloat | None = None
    threads: Positive | None = None
    ops: Literal["auto", "reference", "fused"] = "auto"
    cpu_matmul: Literal["auto", "onednn", "torch"] = "auto"


@dataclass(frozen=True)
class RunConfig:
    """Hold the settings that all three trainers share.

    Attributes:
        run_dir: Folder of everything the run writes. The run resumes from the checkpoints in it.
        data: Stream of samples. Global batch t is a pure function of manifests, seed, t and these settings.
        training: Training loop.
        optimizer: AdamW. Norms, gates, biases and embeddings never decay.
        schedule: Learning rate: linear warm-up from 0, then decay until the last step.
        deepspeed: ZeRO. The other sections determine all other keys of DeepSpeed's JSON.
        checkpoint: When checkpoints are written and which are kept.
        logging: Metrics besides ``metrics.jsonl``, which is always written.
        resilience: Reactions to loss spikes, hung processes and slow ranks, recorded in ``events.jsonl``.
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
    """Train a Flamingo with ``trainer.train``.

    Attributes:
        task: Kind of training; fixed.
        model: Flamingo model.
        evaluation: Scores of the model while it trains, by the tasks of ``trainer.evaluate``.
        forgetting: How well the language model predicts held-out text while the model trains.
    """

    task: Literal["flamingo"] = "flamingo"
    model: FlamingoConfig = field(default_factory=FlamingoConfig)
    evaluation: LiveEvaluationConfig = field(default_factory=LiveEvaluationConfig)
    forgetting: ForgettingConfig = field(default_factory=ForgettingConfig)


@dataclass(frozen=True)
class TokenizerTrainingConfig:
    """Train a byte-level BPE tokenizer on texts of the first source.

    Attributes:
        vocab_size: Entries of the vocabulary.
        num_samples: Number of first samples whose texts the tokenizer is trained on.
        end_of_text: Token that begins, ends and pads a row.
    """

    __pydantic_config__ = FORBID_UNKNOWN_KEYS

    vocab_size: Positive = 500
    num_samples: Positive = 4000
    end_of_text: str = "<|endoftext|>"


@dataclass(frozen=True)
class LanguageModelRunConfig(RunConfig):
    """Pretrain a language model on text with ``trainer.pretrain_lm``.

    Attributes:
        task: Kind of training; fixed.
        architecture: Hugging Face config as a mapping, with its ``model_type``.
        tokenizer: Byte-level BPE tokenizer, trained on texts of the first source.
    """

    task: Literal["language_model"] = "language_model"
    architecture: dict[str, Any] = field(default_factory=dict)
    tokenizer: TokenizerTrainingConfig = field(default_factory=TokenizerTrainingConfig)


@dataclass(frozen=True)
class ContrastiveRunConfig(RunConfig):
    """Pretrain a vision encoder on image-text pairs with ``trainer.pretrain_vision``.

    Attributes:
        task: Kind of training; fixed.
        architecture: open_clip model config (``embed_dim``, ``vision_cfg``, ``text_cfg``), or the name of one. Towers
            of timm and transformers go by ``timm_model_name`` and ``hf_model_name``, a folder with a ``config.json``.
            ``preprocess_cfg`` gives ``mean`` and ``std`` of the input; without it, a tower of timm takes its own.
        image_size: Side of the image tower's input, in pixels; None takes that of the architecture.
        tokenizer: Folder of a Hugging Face tokenizer for the captions; None takes open_clip's own.
        start_from: Export of another run with these towers, whose weights the run starts from; its images may have
            had another size. None starts from random weights.
        mask_duplicate_captions: Whether pairs with equal captions in a batch are left out of each other's negatives.
        loss: Loss that compares images with captions.
        clip_towers: Clipping of each tower's gradient by itself; needs ``optimizer.clip_grad_norm: none``.
        zero_shot: Tests on data that the towers were not trained on.
    """

    task: Literal["contrastive"] = "contrastive"
    architecture: dict[str, Any] | str = "ViT-B-32"
    image_size: Positive | None = None
    tokenizer: Path | None = None
    start_from: Path | None = None
    mask_duplicate_captions: bool = True
    loss: ContrastiveLossConfig = field(default_factory=ContrastiveLossConfig)
    clip_towers: TowerClipConfig = field(default_factory=TowerClipConfig)
    zero_shot: ZeroShotConfig = field(default_factory=ZeroShotConfig)
