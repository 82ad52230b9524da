"""Score a model while it trains, without disturbing the run."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import nn

from model.factory import build_tokenizer
from model.flamingo import Flamingo
from model.processor import ProcessorConfig, TextLayout
from trainer.config.run_config import FlamingoRunConfig
from trainer.data.samples.prompt_media import override, with_video_settings
from trainer.data.samples.tower_decoder import puts_space_after_images, trained_processor
from trainer.deepspeed_engine.engine import Engine
from trainer.evaluation.answering import Answerer
from trainer.evaluation.cells import answer_cells, cell_fingerprints, collect
from trainer.evaluation.media import MediaDecoder
from trainer.evaluation.models import language_model_positions
from trainer.evaluation.predictions import Prediction
from trainer.evaluation.prepare import check_lengths, prepare
from trainer.evaluation.prepared_task import Cell, PreparedTask
from trainer.evaluation.ranks import Ranks
from trainer.evaluation.report import score_all
from trainer.evaluation.scoring import summarize
from trainer.observers.step_observer import StepObserver
from trainer.runtime.distributed import World, gather_objects


def evaluation_observers(config: FlamingoRunConfig, world: World) -> list[StepObserver]:
    """Return the observer of a run that has tasks in ``evaluation``.

    Raises:
        ConfigError: Files or settings of the tasks are wrong; the error names every problem.
    """
    if not config.evaluation.tasks:
        return []
    tasks = prepare(config.evaluation, prefix="evaluation.")
    layout = TextLayout(build_tokenizer(config.model), puts_space_after_images(config.data))
    positions = language_model_positions(config.model.language_model)
    check_lengths(tasks, layout, positions, prefix="evaluation.")
    return [LiveEvaluation(config, tasks, layout, world)]


class MemoryLog:
    """Keep the predictions of this process in memory, with the methods of ``PredictionLog``."""

    def __init__(self) -> None:
        self.predictions: dict[str, dict[str, Prediction]] = {}

    def read(self) -> dict[str, dict[str, Prediction]]:
        """Return the predictions so far."""
        return self.predictions

    def append(self, cell: str, batch: Sequence[Prediction]) -> None:
        """Keep a batch."""
        self.predictions.setdefault(cell, {}).update({one.id: one for one in batch})

    def close(self) -> None:
        """Do nothing."""

    def gather(self, world: World) -> None:
        """Take the predictions of all ranks; a collective."""
        for own in gather_objects(self.predictions, world):
            for cell, found in own.items():
                self.predictions.setdefault(cell, {}).update(found)


class LiveEvaluation(StepObserver):
    """Evaluate every so many steps; every rank answers a part of the queries.

    Args:
        config: Settings of the run.
        tasks: Its tasks, whose files are read.
        layout: Encodes prompts.
        world: Processes of the run.
    """

    def __init__(
        self, config: FlamingoRunConfig, tasks: Sequence[PreparedTask], layout: TextLayout, world: World
    ) -> None:
        self._every, self._last = config.evaluation.every, config.training.steps
        self._config, self._tasks, self._layout, self._world = config, tasks, layout, world
        self._decoders: dict[str, MediaDecoder] = {}

    def measures(self, step: int) -> bool:
        """Return whether the model is evaluated after this step."""
        return step % self._every == 0 or step == self._last

    def measure(self, step: int, engine: Engine) -> Mapping[str, float]:
        """Return the main score of every cell: ``eval/<task>/<shots>``, and ``.../<control>`` of a control."""
        model = engine.module
        assert isinstance(model, Flamingo), "only the task of Flamingo has this observer"
        ranks = Ranks(self._world, synced=self._config.deepspeed.zero_stage == 3)
        fingerprints = cell_fingerprints(self._tasks, {"step": step})
        log = MemoryLog()
        with undisturbed(model), ranks.failing_together():
            answerers = {
                task.name: Answerer(model, self._layout, self._decoder(number, task, model), ranks)
                for number, task in enumerate(self._tasks)
            }
            answer_cells(self._tasks, answerers, fingerprints, log, ranks)
        log.gather(self._world)
        predictions = collect(self._tasks, fingerprints, log)
        scores = score_all(self._tasks, predictions)
        tasks = {task.name: task for task in self._tasks}
        return {
            metric_name(cell): summarize(tasks[cell.task], found)["score"]
            for cell, found in scores.items()
            if found is not None
        }

    def _decoder(self, number: int, task: PreparedTask, model: Flamingo) -> MediaDecoder:
        if task.name not in self._decoders:
            processor = self._processor(number, task, model)
            self._decoders[task.name] = MediaDecoder(processor)
        return self._decoders[task.name]

    def _processor(self, number: int, task: PreparedTask, model: Flamingo) -> ProcessorConfig:
        processor = override(
            trained_processor(self._config.data, model.vision_encoder),
            self._config.run_dir,
            image_fit=("data.image_fit", None),
            image_tokens=(f"evaluation.tasks.{number}.image_tokens", task.settings.image_tokens),
        )
        if task.has_videos:
            processor = with_video_settings(processor, None, None, model.config.resampler.num_frames or 1)
        return processor


def metric_name(cell: Cell) -> str:
    """Return the name of a cell's score in metrics.jsonl."""
    control = "" if cell.control == "none" else f"/{cell.control}"
    return f"eval/{cell.task}/{cell.shots}{control}"


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Put a model into evaluation mode; afterwards restore the mode of each module and the random states."""
    modes = {module: module.training for module in model.modules()}
    device = next(model.parameters()).device
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        model.eval()
        try:
            yield
        finally:
            for module, mode in modes.items():
                module.training = mode
