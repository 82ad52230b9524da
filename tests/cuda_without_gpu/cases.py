"""Run the loop's micro-steps, generation and evaluation on the fake accelerator.

``python -m tests.cuda_without_gpu`` prints what they did.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Any
from unittest import mock

import deepspeed
import torch
from torch import Tensor, nn

from model import language_model
from model.config import DType, FlamingoConfig, VisionEncoderConfig
from model.flamingo import Flamingo
from model.generation import generate
from model.generation_probes import probe_batches
from model.presets import get_preset
from model.tower_patches import PatchLayout
from tests.cuda_without_gpu.fake_accelerator import Watch, fake_tensors, place, register, watching
from tests.project.commands import ROOT
from trainer import loop
from trainer.benchmark.synthetic_mixture import make_mixture, packed_rows
from trainer.benchmark.synthetic_run import synthetic_step
from trainer.config.loader import load_config
from trainer.config.run_config import FlamingoRunConfig
from trainer.data.batch import Batch, BatchFormat, Row, collate
from trainer.deepspeed_engine import engine as engines
from trainer.deepspeed_engine.frozen_blocks import hooked_modules
from trainer.planning.random_weights import build_on_meta_device
from trainer.runtime.distributed import World

DTYPE: DType = "bfloat16"
SOURCE = "documents"


class _StandIn:
    """Stand in for DeepSpeed's engine, which refuses a device that torch does not bring."""

    def __init__(self, module: nn.Module, watch: Watch) -> None:
        self.module, self.watch = module, watch

    def __call__(self, **inputs: Any) -> Any:
        return self.module(**inputs)

    def backward(self, loss: Tensor, scale_wrt_gas: bool) -> None:
        loss.backward()

    def set_gradient_accumulation_boundary(self, is_last: bool) -> None:
        self.watch.kernels.clear()  # those of the last micro-step are left


def debug_config(**changes: Any) -> FlamingoConfig:
    """Return the debug preset with heads as wide as the GPU's kernels need, with any field replaced."""
    preset = get_preset("debug")
    resampler = replace(preset.resampler, head_dim=64)
    config = replace(preset, resampler=resampler, cross_attention=replace(preset.cross_attention, head_dim=64))
    return replace(config, **changes)


def documents(model: Flamingo, packed: bool) -> list[Batch]:
    """Return two micro-batches of documents with several images."""
    size, tokens = model.vision_encoder.image_size, model.tokens
    rows = make_mixture(6, tokens, size).documents
    rows = packed_rows(rows[:2], 512) + packed_rows(rows[2:], 768) if packed else [shorter(rows[0]), *rows[1:]]
    return [collate(part, BatchFormat(tokens.pad_id, size), source=SOURCE) for part in (rows[:2], rows[2:])]


def shorter(row: Row) -> Row:
    """Return a row without its last token, so that a batch has padding."""
    return replace(row, input_ids=row.input_ids[:-1], labels=row.labels[:-1], media_index=row.media_index[:-1])


def patches(model: Flamingo) -> list[Batch]:
    """Return a micro-batch of media of different shapes, one of them a video."""
    size = model.vision_encoder.patch_size
    assert size is not None
    rows = make_mixture(3, model.tokens, size).pairs[:3]
    shapes = [(1, 3, 2 * size, 3 * size), (2, 3, size, size), (1, 3, size, 4 * size)]
    rows = [
        replace(row, media=(torch.zeros(shape, dtype=torch.uint8),)) for row, shape in zip(rows, shapes, strict=True)
    ]
    batch_format = BatchFormat(model.tokens.pad_id, model.vision_encoder.image_size, size)
    return [collate(rows, batch_format, source=SOURCE, keeps_aspect=True)]


def videos(model: Flamingo) -> list[Batch]:
    """Return a micro-batch of videos of three frames."""
    size, tokens = model.vision_encoder.image_size, model.tokens
    pairs = make_mixture(2, tokens, size).pairs
    rows = [replace(row, media=(row.media[0].expand(3, -1, -1, -1),)) for row in pairs]
    return [collate(rows, BatchFormat(tokens.pad_id, size), source=SOURCE, num_frames=3)]


@dataclass(frozen=True)
class Case:
    """Describe micro-steps of the loop.

    Attributes:
        config: Model.
        batches: Makes the micro-batches.
        put_back: Context that puts a mended defect back, for tests of the tests.
    """

    config: FlamingoConfig
    batches: Callable[[Flamingo], list[Batch]]
    put_back: Callable[[], Any] = nullcontext


def benchmark_batches(model: Flamingo) -> list[Batch]:
    """Return the batches of ``trainer.benchmark step configs/benchmark/3b.yaml``."""
    config = load_config(ROOT / "configs/benchmark/3b.yaml", [], FlamingoRunConfig, check_files=False)
    batches = synthetic_step(config, model, World(0, 1, 0, torch.device("cpu")))
    return [replace(batch, source=SOURCE) for batch in (batches[0], batches[-1])]


def with_inputs(**changes: Callable[[Batch], Any]) -> Callable[[], Any]:
    """Return a context in which batches give the model other inputs than they do."""
    original: Any = Batch.inputs

    def inputs(batch: Batch) -> dict[str, Any]:
        return original.fget(batch) | {name: change(batch) for name, change in changes.items()}

    return lambda: mock.patch.object(Batch, "inputs", property(inputs))


def cases() -> dict[str, Case]:
    """Return all cases by name."""
    attend_all = replace(debug_config().cross_attention, attend="all")
    vit = VisionEncoderConfig(name="ViT-B-32", image_size=64)
    return {
        "debug, padded": Case(debug_config(), lambda model: documents(model, packed=False)),
        "debug, packed": Case(debug_config(), lambda model: documents(model, packed=True)),
        "debug, packed, attend all": Case(
            debug_config(cross_attention=attend_all), lambda model: documents(model, packed=True)
        ),
        "debug, padded, attend all": Case(
            debug_config(cross_attention=attend_all), lambda model: documents(model, packed=False)
        ),
        "debug, image_tokens": Case(debug_config(vision=vit), patches),
        "debug, video": Case(debug_config(), videos),
        "3b, padded": Case(get_preset("3b"), benchmark_batches),
        "3b, packed, attend all": Case(
            replace(get_preset("3b"), cross_attention=replace(get_preset("3b").cross_attention, attend="all")),
            lambda model: documents(model, packed=True)[:1],
        ),
    }


def put_back() -> dict[str, Case]:
    """Return cases in which a mended defect is put back, by its number in the review of the CUDA path."""
    mended = cases()
    padded, packed, tokens = mended["debug, padded"], mended["debug, packed"], mended["debug, image_tokens"]
    look = mock.patch.object(language_model, "known_packing", return_value=nullcontext())
    return {
        "1: buffers stay on the CPU": replace(padded, put_back=lambda: mock.patch.object(engines, "move_buffers")),
        "10: right-padded rows have a mask": replace(
            padded, put_back=with_inputs(attention_mask=lambda batch: batch.attention_mask)
        ),
        "10: transformers looks for documents in packed rows": replace(packed, put_back=lambda: look),
        "10: transformers looks for documents in other rows": replace(padded, put_back=lambda: look),
        "11: the layout of patches is made in the micro-step": replace(
            tokens, put_back=with_inputs(patch_layout=lambda batch: None)
        ),
        "12: target positions are found in the micro-step": replace(
            padded, put_back=with_inputs(target_positions=lambda batch: None)
        ),
        "batches are not pinned": replace(
            padded, put_back=lambda: mock.patch.object(Batch, "pin_memory", lambda batch: batch)
        ),
    }


def run_micro_steps(case: Case, device: torch.device) -> Watch:
    """Run the micro-steps of one step of ``trainer.loop``; DeepSpeed leaves the buffers on the CPU, as under ZeRO-3.

    The kernels are those of the last micro-step.
    """
    model = build_on_meta_device(case.config, DTYPE)
    batches = case.batches(model)
    config = load_config(ROOT / "configs/benchmark/3b.yaml", [], FlamingoRunConfig, check_files=False)
    world = World(0, 1, 0, device)
    with ExitStack() as stack:
        mode = stack.enter_context(fake_tensors())
        batches = [_map(batch, mode.from_tensor) for batch in batches]
        place(model, parameters=device, buffers=torch.device("cpu"))
        stack.enter_context(case.put_back())
        watch = stack.enter_context(watching())
        initialize = partial(_initialize, watch)
        stack.enter_context(mock.patch.object(deepspeed, "initialize", initialize))
        engine = engines.Engine(model, config.optimizer, {"zero_optimization": {"stage": 3}}, world)
        watch.waits.clear()  # the engine is built once
        watch.hooked = len(hooked_modules(model))
        loop.accumulate_micro_batches(engine, [batch.pin_memory() for batch in batches], {SOURCE: 1.0})
        watch.failure = _wrong_gradients(model, device)
    return watch


def _initialize(watch: Watch, model: nn.Module, optimizer: Any, config: Any) -> tuple[Any, Any, None, None]:
    return _StandIn(model, watch), optimizer, None, None


def _map(batch: Batch, function: Callable[[Tensor], Tensor]) -> Batch:
    values = {field.name: getattr(batch, field.name) for field in fields(batch)}
    mapped: dict[str, Any] = {name: function(value) for name, value in values.items() if isinstance(value, Tensor)}
    if batch.patch_layout is not None:
        layout = batch.patch_layout
        mapped["patch_layout"] = PatchLayout(*(function(getattr(layout, field.name)) for field in fields(layout)))
    return replace(batch, **mapped)


def _wrong_gradients(model: nn.Module, device: torch.device) -> str | None:
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and (parameter.grad is None or parameter.grad.device != device):
            return f"the gradient of {name} is missing or on another device"
    return None


def run_generation(device: torch.device, new_tokens: int = 3) -> Watch:
    """Generate captions of two prompts of different lengths, as evaluation does."""
    model = build_on_meta_device(debug_config(), DTYPE)
    probe_batches(model.language_model.lm)  # on real tensors; the answers are kept
    size, image = model.vision_encoder.image_size, model.tokens.image_id
    with fake_tensors():
        place(model, parameters=device, buffers=device)
        media = torch.zeros(3, 1, 3, size, size, dtype=torch.uint8)
        # After each token, transformers asks whether all rows have ended; then the tokens are read.
        answers = [False] * (new_tokens - 1) + [True] + [5] * 2 * new_tokens
        with watching(answers) as watch:
            generate(model, [[1, image, 5, image], [1, image]], media, [2, 1], max_new_tokens=new_tokens)
    return watch


def run_logits(device: torch.device) -> Watch:
    """Compute the logits of a batch without labels."""
    model = build_on_meta_device(debug_config(), DTYPE)
    [batch, _] = documents(model, packed=False)
    with fake_tensors() as mode:
        place(model, parameters=device, buffers=device)
        inputs = _map(batch, mode.from_tensor).to(device).inputs
        with torch.no_grad(), watching() as watch:
            model(**{name: inputs[name] for name in ("input_ids", "media", "media_index")})
    return watch


def run_all(world: World | None = None) -> dict[str, Watch]:
    """Run every case on the accelerator, which this registers; so it runs in a process of its own."""
    device = register()
    found = {name: run_micro_steps(case, device) for name, case in (cases() | put_back()).items()}
    return found | {"generation": run_generation(device), "logits": run_logits(device)}
