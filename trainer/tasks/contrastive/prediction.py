"""Predict memory, time and communication of a contrastive step from a configuration, without weights.

A step with several micro-batches runs all but the first twice: a forward without a graph, then forward and backward.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from model.factory import torch_dtype
from model.loading_errors import explain_loading
from trainer.config.deepspeed_json import deepspeed_json
from trainer.config.run_config import ContrastiveRunConfig
from trainer.data.stream.step_plan import SourcePlan, plan_step
from trainer.deepspeed_engine.partitioned_linear import partitioned_linear
from trainer.planning.peak_memory import Sizes, host_memory
from trainer.planning.prediction import Cluster, Prediction, Work, seconds_of_step
from trainer.runtime.torch_internals import torch_linear
from trainer.tasks.contrastive.architecture import (
    build_clip,
    context_length,
    image_size,
    model_settings,
    write_architecture,
)
from trainer.tasks.contrastive.step_counts import (
    InputShape,
    TowerMemory,
    count_forward_flops,
    count_loss_memory,
    count_memory,
)
from trainer.tasks.contrastive.step_memory import Problem, contrastive_peak_memory
from trainer.tasks.contrastive.step_traffic import SentBytes, TowerSizes, features_sent, passes_over_parameters
from trainer.tasks.contrastive.towers import ContrastiveTowers


def random_towers(config: ContrastiveRunConfig, device: str = "cpu") -> ContrastiveTowers:
    """Build the towers with random weights; those on the meta device take no memory. No tokenizer is needed.

    Raises:
        ValueError: The architecture is not known, or a part of it cannot be read.
    """
    with TemporaryDirectory() as folder, explain_loading(f"architecture {config.architecture!r}"):
        write_architecture(replace(config, tokenizer=None), Path(folder))
        with torch.device(device):
            return ContrastiveTowers(build_clip(Path(folder), device))


def input_shape(config: ContrastiveRunConfig, towers: ContrastiveTowers) -> InputShape:
    """Return the shapes of a pair."""
    return InputShape(image_size(config), context_length(config, towers.clip))


class ContrastivePredictor:
    """Predict a step of configurations that differ in their batches, devices and ZeRO settings.

    Attributes:
        dim: Length of a feature.
    """

    def __init__(self, config: ContrastiveRunConfig, towers: ContrastiveTowers, *, exact: bool = False) -> None:
        """Count what does not depend on these settings.

        Args:
            config: One of the configurations.
            towers: Its towers, on any device.
            exact: Whether to count the memory of every micro-batch. Otherwise that of one pair and two is counted, and
                extrapolated.
        """
        self._towers, self._exact = towers, exact
        self._shape = input_shape(config, towers)
        self._sizes = TowerSizes(towers)
        self._biased = getattr(towers.clip, "logit_bias", None) is not None
        self._counted: dict[tuple[int, bool], TowerMemory] = {}
        self.dim = int(model_settings(config)["embed_dim"])
        self._flops: int | None = None

    @property
    def flops(self) -> int:
        """Operations of a forward of both towers for one pair."""
        if self._flops is None:
            self._flops = count_forward_flops(self._towers, self._shape)
        return self._flops

    def __call__(self, config: ContrastiveRunConfig, cluster: Cluster) -> Prediction:
        """Predict a step of ``config`` on ``cluster``: the mean of a turn where the sources take turns.

        Raises:
            ValueError: The batches cannot be divided among the devices.
        """
        steps = self.steps(config, cluster.size)
        zero = deepspeed_json(config)["zero_optimization"]
        itemsize, total = torch_dtype(config.training.dtype).itemsize, self._sizes.total
        sizes = Sizes(total, total, self._sizes.image, itemsize, cluster.size)
        work = _mean([self._work(config, sizes, zero, problems) for problems in steps])
        peaks = [contrastive_peak_memory(sizes, zero, problems) for problems in steps]
        return Prediction(
            total,
            total,
            max(peaks, key=lambda peak: sum(peak.parts.values())),
            host_memory(sizes, zero, cluster.devices_per_node),
            seconds_of_step(config, sizes, zero, cluster, work),
            work.sent,
            work.messages,
            sum(source.batch_size for source in config.data.sources) // len(steps),
            cluster.device,
        )

    def steps(self, config: ContrastiveRunConfig, ranks: int) -> list[list[Problem]]:
        """Return the problems of each kind of step; there are several kinds where the sources take turns."""
        plans = plan_step(config.data, ranks)
        if config.training.combine == "merged":
            return [[self._problem(config, plans, ranks)]]
        problems = [self._problem(config, [plan], ranks) for plan in plans]
        return [[problem] for problem in problems] if config.training.combine == "round_robin" else [problems]

    def _problem(self, config: ContrastiveRunConfig, plans: Sequence[SourcePlan], ranks: int) -> Problem:
        rows = sum(plan.micro_batch_size * plan.num_micro_batches for plan in plans)
        partitioned = config.deepspeed.zero_stage == 3
        return Problem(
            name=" and ".join(plan.source.name for plan in plans),
            rows=rows,
            rows_again=rows - plans[0].micro_batch_size,
            columns=rows * ranks,
            dim=self.dim,
            micro_batches=sum(plan.num_micro_batches for plan in plans),
            towers=self._memory(config, max(plan.micro_batch_size for plan in plans), partitioned),
            first_saved=self._memory(config, plans[0].micro_batch_size, partitioned).saved,
            loss=count_loss_memory(
                rows,
                rows * ranks,
                self.dim,
                config.loss,
                biased=self._biased,
                masked=config.mask_duplicate_captions,
            ),
        )

    def _memory(self, config: ContrastiveRunConfig, rows: int, partitioned: bool) -> TowerMemory:
        """Return the memory of a micro-batch, counted once for each of its sizes."""
        if rows > 2 and not self._exact:
            one, two = (self._memory(config, number, partitioned) for number in (1, 2))
            values = zip(vars(one).values(), vars(two).values(), strict=True)
            return TowerMemory(*(first + (rows - 1) * (second - first) for first, second in values))
        if (rows, partitioned) not in self._counted:
            linear = partitioned_linear if partitioned else torch_linear
            dtype = torch_dtype(config.training.dtype)
            self._counted[rows, partitioned] = count_memory(self._towers, self._shape, rows, dtype, linear)
        return self._counted[rows, partitioned]

    def _work(
        self, config: ContrastiveRunConfig, sizes: Sizes, zero: Mapping[str, Any], problems: Sequence[Problem]
    ) -> Work:
        counts = [problem.micro_batches for problem in problems]
        captions = self._shape.context_length if config.mask_duplicate_captions else None
        sent = [SentBytes(0.0, 0)]
        if sizes.ranks > 1:
            sent = [
                self._sizes.parameters_and_gradients(zero, sizes.ranks, sizes.itemsize, counts),
                self._sizes.clipping(config, sizes.ranks),
                features_sent(problems, sizes.ranks, captions, self._biased),
            ]
        return Work(
            flops=sum(self.executed_flops(one.rows, one.columns, one.rows_again) for one in problems),
            streamed=passes_over_parameters(counts) * sizes.total,
            sent=sum(part.size for part in sent),
            messages=sum(part.messages for part in sent),
        )

    def useful_flops(self, rows: int) -> int:
        """Return the operations of forward and backward of the towers for some pairs."""
        return 3 * rows * self.flops

    def executed_flops(self, rows: int, columns: int, rows_again: int) -> int:
        """Return the operations of this process for a problem: the towers, and the logits in both directions.

        Args:
            rows: Pairs of this process.
            columns: Pairs of all processes.
            rows_again: Pairs of this process whose forward is run twice.
        """
        return self.useful_flops(rows) + rows_again * self.flops + 3 * 4 * rows * columns * self.dim


def _mean(works: Sequence[Work]) -> Work:
    count = len(works)
    return Work(
        flops=sum(work.flops for work in works) / count,
        streamed=sum(work.streamed for work in works) / count,
        sent=sum(work.sent for work in works) / count,
        messages=round(sum(work.messages for work in works) / count),
    )
