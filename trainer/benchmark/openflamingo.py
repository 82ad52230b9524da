"""``python -m trainer.benchmark openflamingo``: one whole update against the same model in the manner of OpenFlamingo.

Forward, backward, clipping and AdamW over a mixture of documents and pairs (``trainer.benchmark.mixture``), with the
same weights and the same samples on both sides: a language model of 12 x 512 with 32,000 words, ViT-S/16 at 224 px,
cross-attention before every second block. Ours trains through ``trainer.deepspeed_engine.engine`` as ``trainer.train`` does, with packed
rows; the baseline (``tests/benchmarks/openflamingo_baseline.py``) with padded ones and torch's AdamW.

Each is a process of its own on one thread; they take turns, update by update, and processor time counts, so that other
processes matter less. Memory is the peak of the resident set, above what the process held when model and samples were
loaded ("of the update") and in all. "bfloat16" is mixed precision on both sides: frozen weights, activations and
gradients of ours in bfloat16 with float32 master weights, torch's autocast for the baseline (its ``amp_bf16``).
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
from trainer.benchmark.measurements import Measurement
from trainer.benchmark.mixture import (
    DOCUMENT_TOKENS,
    MOST_IMAGES,
    PAIR_TOKENS,
    Mixture,
    make_mixture,
    packed_batches,
    padding_share,
)
from trainer.config.run_config import OptimizerConfig

BENCHMARK, BASELINE = "openflamingo", "OpenFlamingo's manner"
DOCUMENTS = 8
TOKENS = SpecialTokenIds(image_id=32_000, end_of_chunk_id=32_001, bos_id=1, eos_id=2, pad_id=0)
WEIGHTS = {"documents": 1.0, "pairs": 0.2}
OPTIMIZER = OptimizerConfig()
TARGETS = {"time": 2.0, "memory of the update": 1 / 0.6, "padding": 1.0}
_GATES = 0.5  # as if it had been trained: at 0 media would not matter to the loss
_ROOT = Path(__file__).parents[2]

Update = Callable[[], dict[str, float]]


def measured_model() -> FlamingoConfig:
    """The model of the benchmark: OpenFlamingo's variant, for the baseline has no other."""
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
    config = openflamingo(LanguageModelConfig(architecture=architecture), every=2)
    return replace(config, vision=VisionEncoderConfig(name="ViT-S-16", feature_norm=False))


def build(config: FlamingoConfig, tokens: SpecialTokenIds, dtype: DType) -> Flamingo:
    """The model with open gates; the same weights whatever the type, up to its rounding."""
    model = build_flamingo(config, tokens, dtype=dtype)
    with torch.no_grad():
        for block in model.blocks_with_cross_attention().values():
            block.attention_gate.fill_(_GATES)
            block.feed_forward_gate.fill_(_GATES)
    return model


def our_step(model: Flamingo, mixture: Mixture, dtype: DType) -> Update:
    """An update through DeepSpeed, of packed rows; returns each source's mean loss."""
    from trainer.deepspeed_engine.engine import Engine
    from trainer.runtime import distributed

    settings: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": len(WEIGHTS),
        "gradient_clipping": OPTIMIZER.clip_grad_norm,
        "steps_per_print": 1_000_000_000,
        "bf16": {"enabled": dtype == "bfloat16"},
        "zero_optimization": {"stage": 2, "contiguous_gradients": False, "overlap_comm": False},
    }
    if dtype == "bfloat16":
        settings["data_types"] = {"grad_accum_dtype": "fp32"}
    engine = Engine(model, OPTIMIZER, settings, distributed.initialize(60.0, threads=1))
    batches = packed_batches(mixture, model.tokens, model.vision_encoder.image_size)

    def update() -> dict[str, float]:
        losses = {}
        for name, weight in WEIGHTS.items():
            batch = batches[name]
            losses[name] = engine.forward_backward(batch.inputs, weight / batch.trained_tokens) / batch.trained_tokens
        engine.step(1.0)
        return {name: float(loss) for name, loss in losses.items()}

    return update


def baseline_step(model: Flamingo, mixture: Mixture, dtype: DType) -> Update:
    """An update of the baseline, of padded rows; returns each source's mean loss. Run it from the clone."""
    manner = importlib.import_module("tests.benchmarks.openflamingo_baseline")
    baseline: nn.Module = manner.Baseline(model, build_language_model(model.config.language_model, torch.float32))
    batches = {
        "documents": manner.padded_batch(mixture.documents, DOCUMENT_TOKENS, MOST_IMAGES, model.tokens.pad_id),
        "pairs": manner.padded_batch(mixture.pairs, PAIR_TOKENS, 1, model.tokens.pad_id),
    }
    parameters = [parameter for parameter in baseline.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=OPTIMIZER.lr, fused=True)

    def update() -> dict[str, float]:
        losses = {}
        for name, weight in WEIGHTS.items():
            with torch.autocast("cpu", torch.bfloat16) if dtype == "bfloat16" else nullcontext():
                loss: Tensor = baseline(batches[name])
            (weight * loss).backward()
            losses[name] = loss.detach()
        nn.utils.clip_grad_norm_(parameters, OPTIMIZER.clip_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        return {name: float(loss) for name, loss in losses.items()}

    return update


def run(device: str, repeats: int = 3) -> list[Measurement]:
    """All measurements, on the CPU. Raises ValueError for another device, RuntimeError where the two disagree."""
    if device != "cpu":
        raise ValueError("the update benchmark measures on the CPU: use --device cpu, or trainer.benchmark step")
    rows = [_padding()]
    for dtype in ("float32", "bfloat16"):
        rows += _compare(dtype, repeats)
    return rows


def _padding() -> Measurement:
    # Longer than one update, as a run is: only the last row of a stream stays unfilled.
    batches = packed_batches(make_mixture(40, TOKENS, image_size=1), TOKENS, image_size=1)
    share = padding_share(list(batches.values()))
    return Measurement(
        BENCHMARK, "120 samples, packed", "padding", "", share, "limit", 0.05, 0.05 / share, TARGETS["padding"]
    )


def _compare(dtype: str, repeats: int) -> Iterator[Measurement]:
    found: dict[str, list[dict[str, Any]]] = {"ours": [], "baseline": []}
    contestants = {who: _start(who, dtype) for who in found}
    try:
        for number in range(repeats + 1):
            for who, process in contestants.items():
                result = _one_step(process)
                if number:  # the first one allocates
                    found[who].append(result)
    finally:
        for process in contestants.values():
            process.kill()
            process.wait()
    tolerance = 1e-4 if dtype == "float32" else 1e-2
    for name in WEIGHTS:
        ours, baseline = (found[who][0]["losses"][name] for who in ("ours", "baseline"))
        if abs(ours - baseline) > tolerance * baseline:
            raise RuntimeError(
                f"the losses of {name} differ: {ours} and the baseline's {baseline}: these are two models"
            )
    case = f"{DOCUMENTS} documents and {2 * DOCUMENTS} pairs, {dtype}"
    mebi = 2.0**20
    for measure, unit, size in (
        ("time", "s", lambda results: statistics.median(result["seconds"] for result in results)),
        ("memory of the update", "MiB", lambda results: (results[-1]["peak"] - results[-1]["loaded"]) / mebi),
        ("memory in all", "MiB", lambda results: results[-1]["peak"] / mebi),
    ):
        ours, baseline = size(found["ours"]), size(found["baseline"])
        yield Measurement(
            BENCHMARK, case, measure, unit, ours, BASELINE, baseline, baseline / ours, TARGETS.get(measure)
        )


def _start(who: str, dtype: str) -> subprocess.Popen[str]:
    environment = os.environ | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "trainer.benchmark.openflamingo", who, dtype]
    return subprocess.Popen(
        command, cwd=_ROOT, env=environment, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )


def _one_step(process: subprocess.Popen[str]) -> dict[str, Any]:
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write("update\n")
    process.stdin.flush()
    for line in process.stdout:
        if line.startswith("{"):  # libraries print, too
            found: dict[str, Any] = json.loads(line)
            return found
    raise RuntimeError(f"a contestant ended with exit code {process.wait()}; its own message stands above")


def _contest(who: str, dtype: DType) -> None:
    """A contestant's process: an update for each line that comes in, its measurements as a line that goes out."""
    torch.set_num_threads(1)
    ours = who == "ours"
    # Autocast wants float32 parameters; the engine makes float32 masters of the bfloat16 ones itself.
    model = build(measured_model(), TOKENS, dtype if ours else "float32")
    mixture = make_mixture(DOCUMENTS, TOKENS, model.vision_encoder.image_size)
    update = (our_step if ours else baseline_step)(model, mixture, dtype)
    loaded = psutil.Process().memory_info().rss
    for _ in sys.stdin:
        start = time.process_time()
        losses = update()
        seconds = time.process_time() - start
        peak = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        print(json.dumps({"seconds": seconds, "losses": losses, "loaded": loaded, "peak": peak}), flush=True)


if __name__ == "__main__":
    _contest(sys.argv[1], "bfloat16" if sys.argv[2] == "bfloat16" else "float32")
