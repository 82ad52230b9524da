"""``python -m trainer.benchmark openflamingo``: measure a whole step against the same model written as OpenFlamingo is.

A step is forward, backward, clipping and AdamW over a mixture of documents and pairs (``synthetic_mixture``). Both
sides have the same weights and samples: a language model of 12 blocks of width 512 with 32,000 words, ViT-S/16 at 224
pixels, and cross-attention before every second block. Ours trains with packed rows through the engine, as
``trainer.train`` does. The baseline (``tests/benchmarks/openflamingo_baseline.py``) trains with padded rows and torch's
AdamW.

Each side is a process of one thread. They take turns, step by step, and processor time counts, so that other processes
matter less. Memory is the peak of the resident set: in all ("total memory"), and without what the process held after
model and samples were loaded ("memory of the step"). "bfloat16" is mixed precision on both sides. Ours has frozen
weights, activations and gradients in bfloat16 and float32 master weights; the baseline uses torch's autocast, as
OpenFlamingo's ``amp_bf16`` does.
"""

from __future__ import annotations

import importlib
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor, nn

from model.config import DType, FlamingoConfig, LanguageModelConfig, VisionEncoderConfig
from model.factory import build_flamingo, build_language_model
from model.flamingo import Flamingo
from model.presets import openflamingo
from model.tokens import SpecialTokenIds
from trainer.benchmark.result_file import Measurement
from trainer.benchmark.synthetic_mixture import (
    DOCUMENT_TOKENS,
    MOST_IMAGES,
    PAIR_TOKENS,
    Mixture,
    make_mixture,
    packed_batches,
    padding_share,
)
from trainer.config.run_config import OptimizerConfig

BENCHMARK, BASELINE = "openflamingo", "OpenFlamingo baseline"
DOCUMENTS = 8
TOKENS = SpecialTokenIds(image_id=32_000, end_of_chunk_id=32_001, bos_id=1, eos_id=2, pad_id=0)
WEIGHTS = {"documents": 1.0, "pairs": 0.2}
OPTIMIZER = OptimizerConfig()
TARGETS = {"time": 2.0, "memory of the step": 1 / 0.6, "padding": 1.0}
_GATE = 0.5  # at 0, their initial value, media would not change the loss
_ROOT = Path(__file__).parents[2]

Step = Callable[[], dict[str, float]]


def measured_model() -> FlamingoConfig:
    """Return the configuration to measure, in OpenFlamingo's variant, which the baseline implements."""
    architecture = {
        "model_type": "llama",
        "vocab_size": TOKENS.image_id,
        "hidden_size": 512,
        "intermediate_size": 1536,
        "num_hidden_layers": 12,
        "num_attention_heads": 8,
        "num_key_value_heads": 8,
        "max_position_embeddings": 2048,
        "tie_word_embeddings": True,
    }
    config = openflamingo(LanguageModelConfig(architecture=architecture), every_n_layers=2)
    return replace(config, vision=VisionEncoderConfig(name="ViT-S-16", feature_norm=False))


def build(config: FlamingoConfig, tokens: SpecialTokenIds, dtype: DType) -> Flamingo:
    """Build the model with open gates. Its weights are the same for every dtype, up to rounding."""
    model = build_flamingo(config, tokens, dtype=dtype)
    with torch.no_grad():
        for block in model.blocks_with_cross_attention().values():
            for gate in (block.attention_gate, block.feed_forward_gate):
                assert gate is not None, "the paper's gates"
                gate.fill_(_GATE)
    return model


def our_step(model: Flamingo, mixture: Mixture, dtype: DType) -> Step:
    """Return a step through DeepSpeed with packed rows; it returns the mean loss of each source."""
    from trainer.deepspeed_engine.engine import Engine
    from trainer.runtime import distributed

    settings: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_clipping": OPTIMIZER.clip_grad_norm,
        "steps_per_print": 1_000_000_000,
        "bf16": {"enabled": dtype == "bfloat16"},
        "zero_optimization": {"stage": 2, "contiguous_gradients": False, "overlap_comm": False},
    }
    if dtype == "bfloat16":
        settings["data_types"] = {"grad_accum_dtype": "fp32"}
    engine = Engine(model, OPTIMIZER, settings, distributed.initialize(60.0, threads=1))
    batches = packed_batches(mixture, model.tokens, model.vision_encoder.image_size)

    def step() -> dict[str, float]:
        losses = {}
        for number, (name, weight) in enumerate(WEIGHTS.items(), start=1):
            batch, is_last = batches[name], number == len(WEIGHTS)
            loss = engine.forward_backward(batch.inputs, weight / batch.num_trained_tokens, is_last=is_last)
            losses[name] = loss / batch.num_trained_tokens
        engine.step(1.0)
        return {name: float(loss) for name, loss in losses.items()}

    return step


def baseline_step(model: Flamingo, mixture: Mixture, dtype: DType) -> Step:
    """Return a step of the baseline with padded rows; it returns the mean loss of each source.

    It works in a clone only, because the baseline is in ``tests``.
    """
    openflamingo_baseline = importlib.import_module("tests.benchmarks.openflamingo_baseline")
    baseline: nn.Module = openflamingo_baseline.Baseline(
        model, build_language_model(model.config.language_model, torch.float32)
    )
    batches = {
        "documents": openflamingo_baseline.padded_batch(
            mixture.documents, DOCUMENT_TOKENS, MOST_IMAGES, model.tokens.pad_id
        ),
        "pairs": openflamingo_baseline.padded_batch(mixture.pairs, PAIR_TOKENS, 1, model.tokens.pad_id),
    }
    parameters = [parameter for parameter in baseline.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=OPTIMIZER.lr, fused=True)

    def step() -> dict[str, float]:
        losses = {}
        for name, weight in WEIGHTS.items():
            with torch.autocast("cpu", torch.bfloat16) if dtype == "bfloat16" else nullcontext():
                loss: Tensor = baseline(batches[name])
            (weight * loss).backward()
            losses[name] = loss.detach()
        assert OPTIMIZER.clip_grad_norm != "none"
        nn.utils.clip_grad_norm_(parameters, OPTIMIZER.clip_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        return {name: float(loss) for name, loss in losses.items()}

    return step


def run(device: str, repeats: int = 3) -> list[Measurement]:
    """Return all measurements, on the CPU.

    Raises:
        ValueError: Another device was asked for.
        RuntimeError: The losses of the two sides differ.
    """
    if device != "cpu":
        raise ValueError(
            f"--device {device}: openflamingo measures on the CPU; use --device cpu, or trainer.benchmark step"
        )
    rows = [_padding()]
    for dtype in ("float32", "bfloat16"):
        rows += _compare(dtype, repeats)
    return rows


def _padding() -> Measurement:
    # More samples than a step has, because only the last row of a whole stream stays unfilled.
    batches = packed_batches(make_mixture(40, TOKENS, image_size=1), TOKENS, image_size=1)
    share = padding_share(list(batches.values()))
    return Measurement.compared(
        BENCHMARK, "120 samples, packed", "padding", "", share, "limit", 0.05, TARGETS["padding"]
    )


def _compare(dtype: str, repeats: int) -> Iterator[Measurement]:
    found: dict[str, list[dict[str, Any]]] = {"ours": [], "baseline": []}
    processes = {side: _start(side, dtype) for side in found}
    try:
        for number in range(repeats + 1):
            for side, process in processes.items():
                result = _one_step(process)
                if number:  # the first step allocates
                    found[side].append(result)
    finally:
        for process in processes.values():
            process.kill()
            process.wait()
    tolerance = 1e-4 if dtype == "float32" else 1e-2
    for name in WEIGHTS:
        ours, baseline = (found[side][0]["losses"][name] for side in ("ours", "baseline"))
        if abs(ours - baseline) > tolerance * baseline:
            raise RuntimeError(
                f"the losses of {name} differ: {ours}, and {baseline} of the baseline; the sides run different models"
            )
    case = f"{DOCUMENTS} documents and {2 * DOCUMENTS} pairs, {dtype}"
    mebi = 2.0**20
    for measure, unit, size in (
        ("time", "s", lambda results: statistics.median(result["seconds"] for result in results)),
        ("memory of the step", "MiB", lambda results: (results[-1]["peak"] - results[-1]["loaded"]) / mebi),
        ("total memory", "MiB", lambda results: results[-1]["peak"] / mebi),
    ):
        ours, baseline = size(found["ours"]), size(found["baseline"])
        yield Measurement.compared(BENCHMARK, case, measure, unit, ours, BASELINE, baseline, TARGETS.get(measure))


def _start(side: str, dtype: str) -> subprocess.Popen[str]:
    environment = os.environ | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "trainer.benchmark.openflamingo", side, dtype]
    return subprocess.Popen(
        command, cwd=_ROOT, env=environment, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )


def _one_step(process: subprocess.Popen[str]) -> dict[str, Any]:
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write("step\n")
    process.stdin.flush()
    for line in process.stdout:
        if line.startswith("{"):  # libraries print too
            found: dict[str, Any] = json.loads(line)
            return found
    raise RuntimeError(f"a measured process ended with exit code {process.wait()}; see its message above")


def _serve_steps(side: str, dtype: DType) -> None:
    """Do a step for each line of the input, and print its measurements as a line of JSON."""
    torch.set_num_threads(1)
    ours = side == "ours"
    # Autocast needs float32 parameters. The engine makes float32 master weights of bfloat16 ones.
    model = build(measured_model(), TOKENS, dtype if ours else "float32")
    mixture = make_mixture(DOCUMENTS, TOKENS, model.vision_encoder.image_size)
    step = (our_step if ours else baseline_step)(model, mixture, dtype)
    loaded = psutil.Process().memory_info().rss
    for _ in sys.stdin:
        start = time.process_time()
        losses = step()
        seconds = time.process_time() - start
        peak = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        print(json.dumps({"seconds": seconds, "losses": losses, "loaded": loaded, "peak": peak}), flush=True)


if __name__ == "__main__":
    _serve_steps(sys.argv[1], "bfloat16" if sys.argv[2] == "bfloat16" else "float32")
