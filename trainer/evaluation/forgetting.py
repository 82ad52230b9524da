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
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from model.factory import build_tokenizer
from model.flamingo import Flamingo
from trainer.config.run_config import FlamingoRunConfig
from trainer.deepspeed_engine.engine import Engine
from trainer.errors import ConfigError, Problem
from trainer.evaluation.held_out_text import HeldOutText, read_held_out_text
from trainer.evaluation.live import undisturbed
from trainer.evaluation.models import language_model_positions
from trainer.observers.step_observer import StepObserver
from trainer.resilience.events import EventLog
from trainer.runtime.distributed import World, any_rank, broadcast, failing_together, gather_objects
from trainer.runtime.files import write_json
from trainer.runtime.run_folder import RunFolder
from trainer.tasks.row_builders import flamingo_encoding

_log = logging.getLogger(__name__)

PREFIX = "forgetting/"
ALONE, WHOLE = "bits_per_byte", "whole_model_bits_per_byte"
DIFFERENCES = {ALONE: "difference", WHOLE: "whole_model_difference"}


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
    encoding = flamingo_encoding(build_tokenizer(config.model))
    text = read_held_out_text(settings.manifest, encoding, settings.num_documents, settings.max_tokens)
    return [Forgetting(config, text, encoding.pad_id, world)]


class Forgetting(StepObserver):
    """Measure before the first step, every so many steps, and after the last one.

    Every rank predicts a part of the text, in equally many forwards, because ZeRO-3 makes each a collective.

    Args:
        config: Settings of the run.
        text: Text to predict.
        pad_id: Token that fills rows up.
        world: Processes of the run.
    """

    def __init__(self, config: FlamingoRunConfig, text: HeldOutText, pad_id: int, world: World) -> None:
        self._config, self._text, self._pad_id, self._world = config, text, pad_id, world
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
            values |= {PREFIX + name: value, PREFIX + DIFFERENCES[name]: value - start[name]}
        return values

    def _measure(self, step: int, engine: Engine) -> dict[str, float]:
        model = _model_of(engine)
        with undisturbed(model):
            if self._is_frozen:
                self._check(step, model)
            found = {ALONE: self._bits_per_byte(model, model.language_model)}
            if self._whole_differs:
                found[WHOLE] = self._bits_per_byte(model, lambda ids: model(ids).logits)
        return found

    def _bits_per_byte(self, model: Flamingo, logits_of: Callable[[Tensor], Tensor]) -> float:
        counts_Z = model.language_model.own_tokens(self._world.device)
        nats: dict[int, float] = {}
        for numbers in self._batches():
            ids_BL = self._padded(numbers)
            with torch.no_grad():
                logits_BLZ = logits_of(ids_BL)
            for number, ids_L, logits_LZ in zip(numbers, ids_BL, logits_BLZ, strict=True):
                nats[number] = _nats(logits_LZ, ids_L[: len(self._text.pieces[number])], counts_Z)
        together: dict[int, float] = {}
        for own in gather_objects(nats, self._world):
            together |= own  # a piece that fills up a rank's last batch is there more than once, and counts once
        return math.fsum(together[number] for number in sorted(together)) / math.log(2) / self._text.num_bytes

    def _batches(self) -> Iterator[Sequence[int]]:
        """Yield the numbers of this rank's pieces, batch by batch; all ranks have equally many batches."""
        size, total = self._world.size, len(self._text.pieces)
        own = [(index * size + self._world.rank) % total for index in range(math.ceil(total / size))]
        for start in range(0, len(own), self._config.forgetting.batch_size):
            yield own[start : start + self._config.forgetting.batch_size]

    def _padded(self, numbers: Sequence[int]) -> Tensor:
        pieces = [self._text.pieces[number] for number in numbers]
        longest = max(map(len, pieces))
        rows = [[*piece, *[self._pad_id] * (longest - len(piece))] for piece in pieces]
        return torch.tensor(rows, device=self._world.device)

    def _check(self, step: int, model: Flamingo) -> None:
        """Compare the logits of a frozen language model with those of the first check of this process."""
        ids_BL = self._padded(next(self._batches()))
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
        return {name: float(saved[name]) for name in names}


def _model_of(engine: Engine) -> Flamingo:
    model = engine.module
    assert isinstance(model, Flamingo), "only the task of Flamingo has this observer"
    return model


def _own_logits(logits_BLZ: Tensor, model: Flamingo) -> Tensor:
    """Return the logits without the columns of the added tokens, which train."""
    return logits_BLZ[..., model.language_model.own_tokens(logits_BLZ.device)]


def _nats(logits_LZ: Tensor, ids_L: Tensor, counts_Z: Tensor) -> float:
    """Return -log p of all ids but the first, over the tokens that count."""
    wide = torch.promote_types(logits_LZ.dtype, torch.float32)
    logits_LZ = logits_LZ[: len(ids_L) - 1].to(wide).masked_fill(~counts_Z, -torch.inf)
    log_p_L = logits_LZ.log_softmax(-1).gather(-1, ids_L[1:, None])
    return -float(log_p_L.sum(dtype=torch.float64))
