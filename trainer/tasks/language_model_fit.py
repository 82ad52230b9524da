"""Check that a language model suits the rows of a run, as only the built model shows."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from model.lm_probes import separates_packed_documents, takes_rows_beyond_positions
from trainer.config.data_config import DataConfig
from trainer.errors import ConfigError, Problem


def check_language_model(data: DataConfig, lm: nn.Module) -> None:
    """Check that the language model suits every source.

    Raises:
        ConfigError: Rows are longer than its positions, or it would let the documents of a packed row see one another;
            the error names every such source.
    """
    problems = [*_position_problems(data, lm), *_packing_problems(data, lm)]
    if problems:
        raise ConfigError(problems)


def _position_problems(data: DataConfig, lm: nn.Module) -> Iterator[Problem]:
    positions = num_positions(lm)
    too_long = [
        (f"data.sources.{number}.max_tokens", source.max_tokens)
        for number, source in enumerate(data.sources)
        if positions is not None and source.max_tokens > positions
    ]
    if not too_long or takes_rows_beyond_positions(lm):
        return
    for path, max_tokens in too_long:
        message = (
            f"{max_tokens} is more than the {positions} positions of {type(lm).__name__}; set at most {positions}, or "
            "use another language model"
        )
        yield Problem(path, message)


def num_positions(lm: nn.Module) -> int | None:
    """Return the number of positions in the config of a Hugging Face causal LM; None where it says none."""
    text_config = lm.config.get_text_config()  # type: ignore[operator,union-attr]  # nn.Module says Tensor | Module
    number = getattr(text_config, "max_position_embeddings", None)
    return number if isinstance(number, int) and number > 0 else None


def _packing_problems(data: DataConfig, lm: nn.Module) -> Iterator[Problem]:
    packed = [f"data.sources.{number}.packing" for number, source in enumerate(data.sources) if source.packing]
    if not packed:
        return
    try:
        if separates_packed_documents(lm):
            return
        message = (
            f"{type(lm).__name__} does not keep packed documents apart (its attention mask ignores their positions, or "
            "some of its layers are not attention): set packing to false, or use another language model"
        )
    except ValueError as error:
        message = str(error)
    for path in packed:
        yield Problem(path, message)
