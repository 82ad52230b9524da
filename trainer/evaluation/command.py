"""Run an evaluation from its settings to its results; all processes of a launch call it."""

from __future__ import annotations

import logging
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from transformers.utils.logging import disable_progress_bar

from model.flamingo import Flamingo
from model.media_cache import MediaCache
from model.pretrained import describe_export, load_exported_tokenizer
from model.processor import TextLayout, load_processor_config, read_processor_config
from trainer.config.evaluation_config import EvaluationConfig
from trainer.config.loader import to_plain
from trainer.data.samples.prompt_media import override, with_video_settings
from trainer.entry import quiet_libraries
from trainer.errors import ConfigError, TrainerError
from trainer.evaluation.answering import Answerer
from trainer.evaluation.bounds import describe
from trainer.evaluation.cells import answer_cells, cell_fingerprints, collect
from trainer.evaluation.evalai import write_results
from trainer.evaluation.media import MediaDecoder
from trainer.evaluation.models import describe_model, language_model_positions, load_model
from trainer.evaluation.page import write_page
from trainer.evaluation.page_examples import page_examples
from trainer.evaluation.predictions import PREDICTIONS_FILE, Prediction, PredictionLog, write_lines
from trainer.evaluation.prepare import check_lengths, prepare
from trainer.evaluation.prepared_task import Cell, PreparedTask
from trainer.evaluation.ranks import Ranks
from trainer.evaluation.report import build_report, prediction_lines, print_table, score_all
from trainer.evaluation.rices import similarity_selector
from trainer.runtime import distributed
from trainer.runtime.files import write_json
from trainer.runtime.launch_environment import complete_environment

REPORT_FILE = "report.json"
PAGE_FILE = "report.html"
# Neither answers nor scores depend on them.
_NOT_IN_REPORT = (
    "model",
    "output",
    "html",
    "device",
    "num_examples",
    "threads",
    "deepspeed",
    "batch_size",
    "rices_cache",
)
_REPORT_SECONDS = 30.0

_log = logging.getLogger("trainer.evaluate")


def run(config: EvaluationConfig) -> int:
    """Evaluate, print the table and return the exit code: 1 after an error or a missed bound, 2 for wrong settings."""
    is_first = os.environ.get("RANK", "0") == "0"
    logging.basicConfig(level=logging.INFO if is_first else logging.ERROR, format="%(message)s", force=True)
    quiet_libraries()
    disable_progress_bar()
    try:
        return evaluate(config, lambda: _join(config))
    except ConfigError as error:
        if os.environ.get("LOCAL_RANK", "0") == "0":
            print(error, file=sys.stderr)
        return error.exit_code
    except (TrainerError, OSError, ValueError, RuntimeError) as error:
        print(f"trainer.evaluate: {error}", file=sys.stderr)
        return 1
    finally:
        distributed.shut_down()


def evaluate(config: EvaluationConfig, join: Callable[[], Ranks]) -> int:
    """Evaluate and return 1 if a bound is missed, else 0.

    Args:
        config: Settings.
        join: Joins the processes of the launch, once the settings are known to be good.

    Raises:
        ConfigError: Settings or files are wrong; the error names every problem.
        ValueError: The model or a medium cannot be used.
    """
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    tasks = prepare(config)
    description = describe_export(config.model)
    processor = read_processor_config(config.model)
    space = processor is not None and processor.space_after_image
    layout = TextLayout(load_exported_tokenizer(config.model), space)
    positions = language_model_positions(description.config.language_model)
    check_lengths(tasks, layout, positions)
    ranks = join()
    model = load_model(config, ranks)
    answerers = _answerers(config, tasks, model, layout, ranks)
    if config.demonstrations == "rices":
        with ranks.failing_together():
            for task in tasks:
                if task.most_drawn:
                    decoder = answerers[task.name].decoder
                    select = similarity_selector(task, model, decoder, config.rices_cache, synced_ranks=ranks.synced)
                    task.use_selector(select)
        check_lengths(tasks, layout, positions)  # these demonstrations may be longer
    identity = describe_model(config.model)
    fingerprints = cell_fingerprints(tasks, {**identity, "dtype": config.dtype, "image_fit": config.image_fit})
    log = PredictionLog(config.output, ranks.rank)
    with ranks.failing_together():
        answer_cells(tasks, answerers, fingerprints, log, ranks, _progress())
    code = 0
    with ranks.failing_together():
        if ranks.is_main:
            predictions = collect(tasks, fingerprints, log)
            code = _write(config, tasks, predictions, identity, answerers)
            log.remove()
    return code


def _join(config: EvaluationConfig) -> Ranks:
    """Join the processes of a launch; a process that was started alone needs no group without ZeRO-3."""
    partitioned = config.deepspeed.zero_stage == 3
    if not partitioned and not complete_environment():
        return Ranks()
    return Ranks(distributed.initialize(config.deepspeed.timeout_seconds, config.threads), synced=partitioned)


def _answerers(
    config: EvaluationConfig, tasks: Sequence[PreparedTask], model: Flamingo, layout: TextLayout, ranks: Ranks
) -> dict[str, Answerer]:
    trained = load_processor_config(config.model, model.vision_encoder)
    decoders: dict[str, MediaDecoder] = {}
    answerers, media_cache = {}, MediaCache()
    for number, task in enumerate(tasks):
        processor = override(
            trained,
            config.model,
            image_fit=("image_fit", config.image_fit),
            image_tokens=(f"tasks.{number}.image_tokens", task.settings.image_tokens),
        )
        if task.has_videos:
            processor = with_video_settings(processor, None, None, model.config.resampler.num_frames or 1)
        key = repr(processor)  # tasks with one processor share the decoded media
        if key not in decoders:
            decoders[key] = MediaDecoder(processor)
        answerers[task.name] = Answerer(model, layout, decoders[key], ranks, media_cache)
    return answerers


def _progress() -> Any:
    last = time.monotonic()

    def report(cell: Cell, done: int, batches: int) -> None:
        nonlocal last
        if time.monotonic() - last > _REPORT_SECONDS:
            last = time.monotonic()
            _log.info("%s, %d shots, %s: %d of %d batches", cell.task, cell.shots, cell.control, done, batches)

    return report


def report_settings(config: EvaluationConfig) -> dict[str, Any]:
    """Return the settings that the scores depend on."""
    return {name: value for name, value in to_plain(config).items() if name not in _NOT_IN_REPORT}


def _write(
    config: EvaluationConfig,
    tasks: Sequence[PreparedTask],
    predictions: Mapping[Cell, Mapping[str, Prediction]],
    model: Mapping[str, Any],
    answerers: Mapping[str, Answerer],
) -> int:
    """Write and print the results; return the exit code."""
    config.output.mkdir(parents=True, exist_ok=True)
    scores = score_all(tasks, predictions)
    report = build_report(tasks, scores, report_settings(config), model)
    write_lines(config.output / PREDICTIONS_FILE, prediction_lines(tasks, predictions, scores))
    write_json(config.output / REPORT_FILE, report)
    if config.html:
        write_page(config.output / PAGE_FILE, report, page_examples(tasks, predictions, scores, answerers))
    for task in tasks:
        if task.data.results is not None:
            for cell in task.cells:
                if cell.control == "none":
                    write_results(config.output, task, cell, predictions[cell])
    print_table(report)
    _print_examples(tasks[0], predictions, config.num_examples)
    missed = [row for row in report["bounds"] if not row["met"]]
    for row in missed:
        print(f"missed: {describe(row)}: {_shown(row)}", file=sys.stderr)
    if report["bounds"] and not missed:
        print(f"all {len(report['bounds'])} bounds are met")
    return 1 if missed else 0


def _shown(row: Mapping[str, Any]) -> str:
    value = "no score" if row["value"] is None else f"{row['value']:.4g}"
    limits = [f">= {row['minimum']:g}" if row["minimum"] is not None else ""]
    limits += [f"<= {row['maximum']:g}" if row["maximum"] is not None else ""]
    return f"{value}, should be {' and '.join(filter(None, limits))}"


def _print_examples(task: PreparedTask, predictions: Mapping[Cell, Mapping[str, Prediction]], count: int) -> None:
    cell = task.cells[0]
    for query in task.queries[:count]:
        truth = query.answers[0] if query.answers else None
        print(f"  {truth!r} -> {predictions[cell][query.id].answer!r}")
