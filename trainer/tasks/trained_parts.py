"""Tell what trains of a Flamingo: a table at the start of a run."""

from __future__ import annotations

from model.flamingo import Flamingo
from model.parameters import num_weights
from model.trainable_parts import PARTS, parameters_of
from trainer.config.run_config import FlamingoRunConfig

_HEADER = ("part", "trains", "parameters", "trained", "weights", "optimizer state", "lr", "weight decay")


def trained_parts_table(model: Flamingo, config: FlamingoRunConfig) -> str:
    """Return a table with a row for each part: what trains, how many parameters, where they live, and how they train.

    Args:
        model: The model; its parameters may be partitioned.
        config: The run.
    """
    rows: list[tuple[str, ...]] = [_HEADER]
    rows += [_row(model, config, part) for part in PARTS]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows)
    return "\n".join(lines)


def _row(model: Flamingo, config: FlamingoRunConfig, part: str) -> tuple[str, ...]:
    parameters = parameters_of(model, part)
    trained = [parameter for parameter in parameters.values() if parameter.requires_grad]
    is_replicated = config.deepspeed.replicates_frozen and not trained
    device = config.deepspeed.offload_param.device
    if device == "nvme" and trained:
        device = "cpu"  # DeepSpeed moves what trains to the host, once the model is built
    cells = (
        part,
        getattr(config.model.trainable, part),
        _short(num_weights(parameters.values())),
        _short(num_weights(trained)),
        _place(device, config.deepspeed.zero_stage == 3 and not is_replicated),
    )
    if not trained:
        return (*cells, "-", "-", "-")
    own = getattr(config.optimizer.parts, part)
    decay = config.optimizer.weight_decay if own.weight_decay is None else own.weight_decay
    if part == "new_tokens" or (part == "resampler" and config.optimizer.no_decay_resampler):
        decay = 0.0
    rate = config.optimizer.lr * own.lr_multiplier
    return (*cells, _place(config.deepspeed.offload_optimizer.device, True), f"{rate:.3g}", f"{decay:.3g}")


def _short(total: int) -> str:
    for unit, size in (("G", 10**9), ("M", 10**6), ("k", 10**3)):
        if total >= size:
            return f"{total / size:.4g} {unit}"
    return str(total)


def _place(device: str, is_partitioned: bool) -> str:
    place = {"none": "device", "cpu": "host", "nvme": "drive"}[device]
    return f"{place}, partitioned" if is_partitioned else place
