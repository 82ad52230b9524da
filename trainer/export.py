"""Turn a run's newest checkpoint into weights to use: ``python -m trainer.export RUN_DIR [--output FOLDER]``.

It writes safetensors and json. Trained weights are the optimizer's float32 copies, whatever ``training.dtype`` is.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import yaml
from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint
from safetensors.torch import save_file
from torch import Tensor

from trainer.checkpoint.catalog import find_checkpoint, read_state
from trainer.checkpoint.errors import CheckpointError
from trainer.checkpoint.training_state import TrainingState
from trainer.config.loader import load_config
from trainer.config.run_config import ContrastiveRunConfig, FlamingoRunConfig, LanguageModelRunConfig, RunConfig
from trainer.entry import quiet_libraries
from trainer.runtime.run_folder import RunFolder


def trained_weights(config: RunConfig) -> tuple[dict[str, Tensor], TrainingState]:
    """Read the trainable tensors of the newest good checkpoint, whole and in float32 on the CPU, and its state.

    Raises:
        CheckpointError: The run has no complete checkpoint.
    """
    checkpoint = find_checkpoint(RunFolder(config.run_dir).checkpoints)
    if checkpoint is None:
        raise CheckpointError(f"{config.run_dir} has no complete checkpoint yet")
    with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere), redirect_stderr(nowhere):  # progress of its parts
        weights = get_fp32_state_dict_from_zero_checkpoint(
            str(checkpoint.parent), tag=checkpoint.name, exclude_frozen_parameters=True
        )
    return dict(weights), read_state(checkpoint)


def export_flamingo(config: FlamingoRunConfig, output: Path) -> None:
    """Write weights, configuration, processor, tokenizer and digests of frozen weights, for ``model.pretrained``."""
    import torch

    from model.factory import build_tokenizer
    from model.pretrained import save_pretrained
    from model.vision_encoder import VisionEncoder, build_tower
    from trainer.data.samples.tower_decoder import trained_processor

    weights, state = trained_weights(config)
    tokenizer = build_tokenizer(config.model)
    with torch.device("meta"):  # its sizes and statistics, without its weights
        encoder = VisionEncoder(build_tower(config.model.vision), config.model.vision)
    with _whole_or_not(output) as folder:
        save_pretrained(
            folder,
            weights,
            config.model,
            tokens=tokenizer.ids,
            dtype=config.training.dtype,
            frozen=state.frozen,
            processor=trained_processor(config.data, encoder),
            seed=config.training.seed,
            tokenizer=tokenizer.tokenizer,
        )


def export_language_model(config: LanguageModelRunConfig, output: Path) -> None:
    """Write a Hugging Face folder: config, weights, tokenizer."""
    from transformers import AutoConfig, AutoModelForCausalLM

    from trainer.tasks.language_model import CausalLanguageModel, load_run_tokenizer, model_settings

    weights, _ = trained_weights(config)
    tokenizer = load_run_tokenizer(config)
    architecture = AutoConfig.for_model(**model_settings(config, tokenizer))
    language_model = AutoModelForCausalLM.from_config(architecture)
    CausalLanguageModel(language_model).load_state_dict(weights)
    with _whole_or_not(output) as folder:
        language_model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)


def export_contrastive(config: ContrastiveRunConfig, output: Path) -> None:
    """Write a folder that open_clip loads as ``local-dir:``: config and weights of both towers."""
    from trainer.tasks.contrastive import open_clip_weights

    weights, _ = trained_weights(config)
    with _whole_or_not(output) as folder:
        shutil.copytree(RunFolder(config.run_dir).architecture, folder, dirs_exist_ok=True)
        save_file(open_clip_weights(weights), folder / "open_clip_model.safetensors")


_KINDS: dict[str, tuple[type[RunConfig], Callable[[Any, Path], None]]] = {
    "flamingo": (FlamingoRunConfig, export_flamingo),
    "language_model": (LanguageModelRunConfig, export_language_model),
    "contrastive": (ContrastiveRunConfig, export_contrastive),
}


@contextmanager
def _whole_or_not(output: Path) -> Iterator[Path]:
    """Give a temporary folder that takes the name ``output`` when it is complete, in place of an older one."""
    temporary = output.with_name(f".{output.name}.{os.getpid()}.tmp")
    temporary.mkdir(parents=True)
    try:
        yield temporary
        if output.exists():
            shutil.rmtree(output)
        temporary.rename(output)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def main(argv: Sequence[str] | None = None) -> int:
    """Export a run and return the exit code."""
    parser = argparse.ArgumentParser(prog="trainer.export", description=__doc__)
    parser.add_argument("run_dir", type=Path, help="run folder of any of the three trainers")
    parser.add_argument("--output", type=Path, help="folder to write (default: RUN_DIR/export)")
    arguments = parser.parse_args(argv)
    quiet_libraries()
    run_folder = RunFolder(arguments.run_dir)
    try:
        kind = yaml.safe_load(run_folder.config.read_text(encoding="utf-8"))["task"]
        schema, export = _KINDS[kind]
        output = arguments.output or run_folder.export
        export(load_config(run_folder.config, [], schema, check_files=False), output)
    except (OSError, ValueError, RuntimeError) as error:
        print(f"trainer.export: {error}", file=sys.stderr)
        return 1
    print(f"exported {arguments.run_dir} to {output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
