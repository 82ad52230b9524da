"""Measure what the language model of a run forgets, without disturbing the run.

Two models predict held-out text. The language model alone has its adapters, and no cross-attention. The whole model
without images differs from it where the feed-forwards of the cross-attentions act on text without images, as in the
paper (``model.cross_attention.without_media``).

A language model that is frozen predicts the same at every step, bit for bit. An event and an error message say so when
it does not: its weights are damaged then.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from model.factory import build_tokenizer
from model.flamingo import Flamingo
from model.tokens import FlamingoTokenizer
from trainer.config.run_config import FlamingoRunConfig
from trainer.deepspeed_engine.engine import Engine
from trainer.errors import ConfigError, Problem
from trainer.evaluation.held_out_text import HeldOutText, read_held_out_text
from trainer.evaluation.live import undisturbed
from trainer.evaluation.models import language_model_positions
from trainer.evaluation.text_scores import TextScorer
from trainer.observers.step_observer import StepObserver
from trainer.resilience.events import EventLog
from trainer.runtime.distributed import World, any_rank, broadcast, failing_together
from trainer.runtime.files import write_json
from trainer.runtime.run_folder import RunFolder
from trainer.tasks.row_builders import flamingo_encoding

_log = logging.getLogger(__name__)

PREFIX = "forgetting/"
ALONE, WHOLE = "bits_per_byte", "whole_model_bits_per_byte"
DIFFERENCES = {ALONE: "difference", WHOLE: "whole_model_difference"}


def difference_name(name: str) -> str:
    """Return the name of the difference of a value to the one at the start."""
    return DIFFERENCES.get(name, f"{name}_difference")


def forgetting_observers(config: FlamingoRunConfig, world: World) -> list[StepObserver]:
    """Return the observer of a run that has ``forgetting.manifest``.

    Raises:
        ConfigError: The pieces are longer than what the language model can see.
        ShardError: A shard cannot be read.
        ValueError: The manifest has no text that can be measured.
    """
    settings = config.forgetting
    if settings.manifest is None:
        return []
    positions = language_model_positions(config.model.language_model)
    if positions is not None and settings.max_tokens > positions:
        message = (
            f"{settings.max_tokens} is more than the {positions} positions of the language model; set at most that"
        )
        raise ConfigError([Problem("forgetting.max_tokens", message)])
    tokenizer = build_tokenizer(config.model)
    encoding = flamingo_encoding(tokenizer)
    text = read_held_out_text(settings.manifest, encoding, settings.num_documents, settings.max_tokens)
    return [Forgetting(config, text, tokenizer, world)]


class Forgetting(StepObserver):
    """Measure before the first step, every so many steps, and after the last one.

    Args:
        config: Settings of the run.
        text: Text to predict.
        tokenizer: Tokenizer of the run.
        world: Processes of the run.
    """

    def __init__(
        self, config: FlamingoRunConfig, text: HeldOutText, tokenizer: FlamingoTokenizer, world: World
    ) -> None:
        self._config, self._text, self._tokenizer, self._world = config, text, tokenizer, world
        self._folder = RunFolder(config.run_dir)
        self._start: Mapping[str, float] | None = None
        self._logits_at_first: str | None = None
        cross_attention = config.model.cross_attention
        self._whole_differs = cross_attention.without_media == "feed_forward"
        self._is_frozen = config.model.trainable.language_model == "frozen"

    def begin(self, step: int, engine: Engine, skip_reason: str | None) -> None:
        """Measure before the first step of this process, unless an earlier start of the run did."""
        if self._start is not None:
            return
        start = None if step == 1 else self._saved_start()
        if start is None:
            if step > 1:
                _log.warning("forgetting: nothing was measured before step 1; differences are to step %d", step - 1)
            start = self._measure(step - 1, engine)
            with failing_together(self._world):
                if self._world.is_main:
                    write_json(self._folder.forgetting, {"step": step - 1, "text": self._text.digest, **start})
        elif self._is_frozen:
            with undisturbed(_model_of(engine)):
                self._check(step - 1, _model_of(engine))
        self._start = start

    def measures(self, step: int) -> bool:
        """Return whether forgetting is measured after this step."""
        return step % self._config.forgetting.every == 0 or step == self._config.training.steps

    def measure(self, step: int, engine: Engine) -> Mapping[str, float]:
        """Return bits per byte, and by how many they are more than at the start."""
        found = self._measure(step, engine)
        start = self._start or found
        values: dict[str, float] = {}
        for name, value in found.items():
            values |= {PREFIX + name: value, PREFIX + difference_name(name): value - start[name]}
        return values

    def _measure(self, step: int, engine: Engine) -> dict[str, float]:
        model = _model_of(engine)
        with undisturbed(model):
            if self._is_frozen:
                self._check(step, model)
            found = {ALONE: self._bits_per_byte(model, model.language_model)}
            if self._whole_differs:
                found[WHOLE] = self._bits_per_byte(model, lambda ids: model(ids).logits)
            return found | self._task_scores(model)

    def _task_scores(self, model: Flamingo) -> dict[str, float]:
        """Return the scores of the language model alone in lm_eval's tasks."""
        settings = self._config.forgetting
        if not settings.tasks:
            return {}
        from trainer.evaluation.lm_eval_model import LanguageModelForLmEval, task_scores  # needs the extra lm_eval

        scored = LanguageModelForLmEval.of_model(
            model,
            self._tokenizer,
            max_tokens=settings.max_tokens,
            batch_size=settings.batch_size,
            world=self._world,
        )
        return task_scores(scored, settings.tasks, settings.task_folder, settings.task_limit)

    def _bits_per_byte(self, model: Flamingo, logits_of: Callable[[Tensor], Tensor]) -> float:
        scores = self._scorer(model, logits_of).scores(self._text.pieces)
        return math.fsum(score.nats for score in scores) / math.log(2) / self._text.num_bytes

    def _scorer(self, model: Flamingo, logits_of: Callable[[Tensor], Tensor]) -> TextScorer:
        settings, counts_Z = self._config.forgetting, model.language_model.own_tokens(self._world.device)
        return TextScorer(logits_of, counts_Z, self._tokenizer.pad_id, settings.batch_size, self._world)

    def _check(self, step: int, model: Flamingo) -> None:
        """Compare the logits of a frozen language model with those of the first check of this process."""
        scorer = self._scorer(model, model.language_model)
        numbers = next(scorer.batches(len(self._text.pieces)))
        ids_BL = scorer.padded([self._text.pieces[number] for number in numbers])
        with torch.no_grad():
            alone = _own_logits(model.language_model(ids_BL), model)
            whole = alone if self._whole_differs else _own_logits(model(ids_BL).logits, model)
        digest = hashlib.sha256(alone.cpu().contiguous().view(torch.uint8).numpy().data).hexdigest()
        self._logits_at_first = self._logits_at_first or digest
        changed = any_rank(digest != self._logits_at_first, self._world)
        differs = any_rank(not torch.equal(alone, whole), self._world)
        if not changed and not differs:
            return
        what = "differ from those at the start of this process" if changed else "differ without images"
        EventLog(self._folder, self._world.is_main).write("frozen_model_changed", step, logits=what)
        _log.error(
            "after step %d the logits of the frozen language model %s: its weights or the machine are damaged. Start "
            "the run again from a checkpoint before that, on other devices",
            step,
            what,
        )

    def _saved_start(self) -> dict[str, float] | None:
        """Return the first measurement of the run; None if there is none of this text. A collective."""
        saved = None
        if self._world.is_main:
            try:
                saved = json.loads(self._folder.forgetting.read_text(encoding="utf-8"))
            except (OSError, ValueError):
                saved = None
        saved = broadcast(saved, self._world)
        names = [ALONE, WHOLE] if self._whole_differs else [ALONE]
        if not isinstance(saved, dict) or saved.get("text") != self._text.digest or not set(names) <= saved.keys():
            return None
        tasks = self._config.forgetting.tasks
        of_tasks = [name for name in saved if name.partition("/")[0] in tasks]
        if {name.partition("/")[0] for name in of_tasks} != set(tasks):
            return None
        return {name: float(saved[name]) for name in [*names, *of_tasks]}


def _model_of(engine: Engine) -> Flamingo:
    model = engine.module
    assert isinstance(model, Flamingo), "only the task of Flamingo has this observer"
    return model


def _own_logits(logits_BLZ: Tensor, model: Flamingo) -> Tensor:
    """Return the logits without the columns of the added tokens, which train."""
    return logits_BLZ[..., model.language_model.own_tokens(logits_BLZ.device)]
