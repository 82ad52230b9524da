"""Turn a run's newest checkpoint into weights to use: ``python -m trainer.export RUN_DIR [--format FORMAT]``.

It writes safetensors and json; ``--format huggingface`` of a Flamingo adds what transformers needs to load it alone,
and makes a CLIPModel or a SiglipModel of contrastive towers where these are such.
Trained weights are the optimizer's float32 copies, whatever ``training.dtype`` is.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml
from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint
from torch import Tensor

from trainer.checkpoint.catalog import find_checkpoint, problems_of, read_state
from trainer.checkpoint.errors import CheckpointError
from trainer.checkpoint.layout import tag_of
from trainer.checkpoint.retention import best_step
from trainer.checkpoint.training_state import TrainingState
from trainer.config.loader import load_config
from trainer.config.run_config import ContrastiveRunConfig, FlamingoRunConfig, LanguageModelRunConfig, RunConfig
from trainer.entry import quiet_libraries
from trainer.errors import TrainerError
from trainer.runtime.run_folder import RunFolder


def trained_weights(config: RunConfig) -> tuple[dict[str, Tensor], TrainingState]:
    """Read the trainable tensors of a checkpoint, whole and in float32 on the CPU, and its state.

    It is the newest good one, and with ``checkpoint.patience`` the best one.

    Raises:
        CheckpointError: The run has no complete checkpoint.
    """
    checkpoint = _best_checkpoint(config) or find_checkpoint(RunFolder(config.run_dir).checkpoints)
    if checkpoint is None:
        raise CheckpointError(f"{config.run_dir} has no complete checkpoint yet")
    with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere), redirect_stderr(nowhere):  # progress of its parts
        weights = get_fp32_state_dict_from_zero_checkpoint(
            str(checkpoint.parent), tag=checkpoint.name, exclude_frozen_parameters=True
        )
    return dict(weights), read_state(checkpoint)


def _best_checkpoint(config: RunConfig) -> Path | None:
    """Return the best checkpoint of a run with ``checkpoint.patience``, if it is good."""
    folder = RunFolder(config.run_dir).checkpoints
    step = None if config.checkpoint.patience is None else best_step(folder, config.checkpoint)
    if step is None:
        return None
    checkpoint = folder / tag_of(step)
    problem = next(problems_of(checkpoint), None)
    if problem is not None:
        print(f"the best checkpoint {checkpoint} is not exported: {problem}", file=sys.stderr)
        return None
    print(f"the best checkpoint is exported: {config.checkpoint.best_metric} at step {step}")
    return checkpoint


def export_flamingo(config: FlamingoRunConfig, output: Path) -> None:
    """Write weights, configuration, processor, tokenizer and digests of frozen weights, for ``model.pretrained``."""
    import torch

    from model.factory import build_tokenizer
    from model.pretrained import SOURCE, kept_tensors, save_pretrained
    from model.vision_encoder import VisionEncoder, build_tower
    from trainer.data.samples.tower_decoder import trained_processor

    weights, state = trained_weights(config)
    if config.model.start_from is not None:
        weights |= kept_tensors(config.model.start_from, weights)
    tokenizer = build_tokenizer(config.model)
    with torch.device("meta"):  # its sizes and statistics, without its weights
        encoder = VisionEncoder(build_tower(config.model.vision), config.model.vision)
    with whole_or_not(output) as folder:
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
        if config.model.start_from is not None and (Path(config.model.start_from) / SOURCE).is_dir():
            shutil.copytree(Path(config.model.start_from) / SOURCE, folder / SOURCE)


def export_language_model(config: LanguageModelRunConfig, output: Path) -> None:
    """Write a Hugging Face folder: config, weights, tokenizer."""
    from transformers import AutoConfig, AutoModelForCausalLM

    from trainer.tasks.language_model import CausalLanguageModel, load_run_tokenizer, model_settings

    weights, _ = trained_weights(config)
    tokenizer = load_run_tokenizer(config)
    architecture = AutoConfig.for_model(**model_settings(config, tokenizer))
    language_model = AutoModelForCausalLM.from_config(architecture)
    CausalLanguageModel(language_model).load_state_dict(weights)
    with whole_or_not(output) as folder:
        language_model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)


def export_contrastive(config: ContrastiveRunConfig, output: Path) -> None:
    """Write a folder that open_clip loads as ``local-dir:``: config and weights of both towers."""
    from trainer.tasks.contrastive.architecture import write_export

    weights, _ = trained_weights(config)
    with whole_or_not(output) as folder:
        write_export(RunFolder(config.run_dir).architecture, weights, folder, output)


@dataclass(frozen=True)
class _Kind:
    """Say how the runs of one trainer are exported.

    Attributes:
        schema: Schema of the run's settings.
        write: Writes the native format.
        formats: Formats that ``--format`` may ask for; the first is what ``write`` gives.
    """

    schema: type[RunConfig]
    write: Callable[[Any, Path], None]
    formats: tuple[str, ...]


_FAMILIES = ("idefics", "mllama")  # of model.imports.convert, which takes seconds to import
_CONVERTED = ("huggingface", *_FAMILIES)  # formats that are made from a Flamingo's native export
FORMATS = ("native", "huggingface", "open_clip", *_FAMILIES)
_KINDS = {
    "flamingo": _Kind(FlamingoRunConfig, export_flamingo, ("native", "huggingface", *_FAMILIES)),
    "language_model": _Kind(LanguageModelRunConfig, export_language_model, ("native", "huggingface")),
    "contrastive": _Kind(ContrastiveRunConfig, export_contrastive, ("native", "open_clip", "huggingface")),
}


@contextmanager
def whole_or_not(output: Path) -> Iterator[Path]:
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


@dataclass(frozen=True)
class _Request:
    """Hold what the command line asks for.

    Attributes:
        format: Format of the files.
        output: Folder to write.
        include_frozen: Whether frozen parts are copied too, with the format huggingface.
        push: Repository on the hub to upload to; None for none.
        reports: Evaluations to put into the model card.
        merge_adapters: Whether adapters become part of the weights that they change.
    """

    format: str
    output: Path
    include_frozen: bool = False
    push: str | None = None
    reports: tuple[Path, ...] = ()
    merge_adapters: bool = False

    def check(self, is_flamingo: bool) -> None:
        """Check the options of a Flamingo before anything is written.

        Raises:
            ValueError: Another model or format has one, or nothing can be pushed.
        """
        if self.merge_adapters and not is_flamingo:
            raise ValueError("--merge-adapters: only a Flamingo has adapters; leave it out")
        given = {"--include-frozen": self.include_frozen, "--push": self.push, "--report": self.reports}
        for option, value in given.items():
            if value and not (self.format == "huggingface" and is_flamingo):
                raise ValueError(f"{option}: only a Flamingo with --format huggingface takes it; leave it out")
        if self.push is not None:
            from trainer.hub.publish import check_push

            check_push(self.push)


def _convert(export: Path, request: _Request, run: RunFolder | None = None) -> None:
    """Write a Flamingo's native export, of ``run`` if that is known, in another format, or with merged adapters."""
    if request.merge_adapters:
        from model.merging import write_merged

        if request.format == "native":
            with whole_or_not(request.output) as folder:
                write_merged(export, folder)
            return
        with _temporary_beside(request.output) as merged:
            write_merged(export, merged)
            _convert(merged, replace(request, merge_adapters=False), run)
        return
    if request.format == "huggingface":
        from trainer.hub.publish import push, write_with_card

        title = (request.push or str((run.path if run else export).resolve())).rpartition("/")[2]
        with whole_or_not(request.output) as folder:
            write_with_card(
                export, folder, title, run=run, include_frozen=request.include_frozen, reports=request.reports
            )
        if request.push is not None:
            print(f"pushed to {push(request.output, request.push)}")
        return
    from model.imports.convert import FAMILIES, export_transformers

    with whole_or_not(request.output) as folder:
        export_transformers(export, FAMILIES[request.format], folder)


def _convert_towers(export: Path, output: Path, config: ContrastiveRunConfig | None = None) -> None:
    """Write towers for transformers, where it has such; without ``config``, an export does not say its tokenizer."""
    from trainer.tasks.contrastive.transformers_export import Preparation, write_transformers

    preparation = Preparation() if config is None else Preparation(config.tokenizer, config.data.image_fit)
    with whole_or_not(output) as folder:
        write_transformers(export, folder, preparation)


def _export_run(folder: RunFolder, request: _Request) -> None:
    """Export a run in one of the formats that its task allows."""
    settings = yaml.safe_load(folder.config.read_text(encoding="utf-8"))
    task = settings.get("task") if isinstance(settings, dict) else None
    if task not in _KINDS:
        raise ValueError(f"{folder.config} names no task: it is not the config.yaml that a training writes")
    kind = _KINDS[task]
    if request.format not in kind.formats:
        raise ValueError(
            f"--format {request.format}: a run of the task {task} is exported as {' or '.join(kind.formats)}"
        )
    request.check(task == "flamingo")
    config = load_config(folder.config, [], kind.schema, check_files=False)
    if isinstance(config, ContrastiveRunConfig) and request.format == "huggingface":
        with _temporary_beside(request.output) as native:
            kind.write(config, native)
            _convert_towers(native, request.output, config)
        return
    if task != "flamingo" or (request.format not in _CONVERTED and not request.merge_adapters):
        kind.write(config, request.output)
        return
    with _temporary_beside(request.output) as native:
        kind.write(config, native)
        _convert(native, request, folder)


@contextmanager
def _temporary_beside(output: Path) -> Iterator[Path]:
    """Give a path for an export that is made on the way to another one."""
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output.parent, prefix=f".{output.name}.") as temporary:
        yield Path(temporary) / "native"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="trainer.export", description=__doc__)
    parser.add_argument("run_dir", type=Path, help="run folder of any of the three trainers, or an export")
    parser.add_argument(
        "--output", type=Path, help="folder to write (default: RUN_DIR/export, RUN_DIR/merged, or RUN_DIR/FORMAT)"
    )
    parser.add_argument(
        "--format",
        choices=FORMATS,
        default="native",
        help="native: for the commands here; huggingface: for transformers' Auto classes; idefics, mllama: for their "
        "own classes; open_clip: image towers (default: %(default)s)",
    )
    parser.add_argument(
        "--include-frozen",
        action="store_true",
        help="huggingface: copy the frozen language model and image tower too (default: name them)",
    )
    parser.add_argument(
        "--push",
        metavar="OWNER/NAME",
        help="huggingface: upload to this repository of the hub, made private if it is new (default: none)",
    )
    parser.add_argument(
        "--report",
        type=Path,
        metavar="FILE",
        action="append",
        default=[],
        help="huggingface: report.json of trainer.evaluate for the model card; repeat it for several (default: those "
        "of these weights in the run folder and beside it)",
    )
    parser.add_argument(
        "--merge-adapters",
        action="store_true",
        help="add the adapters to the weights that they change, and export these whole (default: keep them apart)",
    )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Export a run, or convert an export, and return the exit code."""
    arguments = _parser().parse_args(argv)
    quiet_libraries()
    source, run_folder = arguments.run_dir, RunFolder(arguments.run_dir)
    merges = arguments.merge_adapters
    native = source / "merged" if merges else run_folder.export
    output = arguments.output or (native if arguments.format == "native" else source / arguments.format)
    request = _Request(
        arguments.format, output, arguments.include_frozen, arguments.push, tuple(arguments.report), merges
    )
    try:
        if output.resolve() == source.resolve():
            raise ValueError(f"--output {output} is the folder to export: name another one")
        if run_folder.config.is_file():
            _export_run(run_folder, request)
        elif (source / "open_clip_config.json").is_file() and arguments.format == "huggingface":
            request.check(is_flamingo=False)
            _convert_towers(source, output)
        elif arguments.format in _CONVERTED or merges:
            request.check(is_flamingo=True)
            _convert(source, request)
        else:
            raise ValueError(
                f"{source} is no run folder: it has no {run_folder.config.name}. Name a run folder, or an export with "
                f"--format {' or '.join(_CONVERTED)}"
            )
    except (OSError, ValueError, RuntimeError, TrainerError) as error:
        print(f"trainer.export: {error}", file=sys.stderr)
        return 1
    print(f"exported {source} to {output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
