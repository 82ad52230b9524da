"""Describe a family of vision-language models in transformers: its settings and the map of its tensors."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from model.config import FlamingoConfig, PerceiverResamplerConfig
from model.image_geometry import ImageFit
from model.imports.tensor_map import Entry
from model.tower_statistics import OPENAI


@dataclass(frozen=True)
class TableRow:
    """Say where the embedding of an added token stands in their tables.

    Attributes:
        ours: Name of the row's parameter here.
        table: Name of their table.
        number: Row of the table.
    """

    ours: str
    table: str
    number: int


@dataclass(frozen=True)
class CutTable:
    """Name a table of theirs, and how many of its rows our language model has.

    Attributes:
        theirs: Name of their table.
        shape: Shape of their table.
        rows: Rows that our language model's table has.
    """

    theirs: str
    shape: tuple[int, ...]
    rows: int


@dataclass(frozen=True)
class Layout:
    """Hold everything that an import or export of one model needs, derived from its configuration.

    Attributes:
        family: Name of the family, for messages.
        model: Our settings, in which the language model and the tower are not named yet.
        language_model: Hugging Face config of the language model.
        tower: Hugging Face config of the tower.
        trained: Tensors that train here, apart from the rows of added tokens.
        rows: Embeddings of added tokens.
        language_model_entries: Tensors of the language model.
        tower_entries: Tensors of the tower.
        cut: Table of theirs whose first rows are a tensor of our language model, by that tensor's name.
    """

    family: str
    model: FlamingoConfig
    language_model: Any
    tower: Any
    trained: list[Entry]
    rows: list[TableRow]
    language_model_entries: list[Entry]
    tower_entries: list[Entry]
    cut: Mapping[str, CutTable] = field(default_factory=dict)


@dataclass(frozen=True)
class Family:
    """Hold the functions of a family.

    Attributes:
        name: Name that ``trainer.export --format`` takes, and ``model_type`` of the family's config.json.
        layout: Function of the family's config and of the ids of ``<image>`` and ``<|endofchunk|>``.
        config: Function of our model that returns the family's config, or raises a ValueError that names the settings
            which the family cannot express.
        image_token: Characters of the family's image token.
        end_of_chunk: Characters of its token that ends a text; None takes the end-of-sequence token.
        model_class: Name of transformers' class.
        mean: Mean of the published tower's input normalization.
        std: Standard deviation of the published tower's input normalization.
        image_fit: How the published processor makes a square of an image.
        published: Beginnings of the names in published files with those that transformers' class uses now.
    """

    name: str
    layout: Callable[[Any, int, int], Layout]
    config: Callable[..., Any]
    image_token: str
    end_of_chunk: str | None
    model_class: str
    image_fit: ImageFit
    mean: tuple[float, ...] = OPENAI[0]
    std: tuple[float, ...] = OPENAI[1]
    published: tuple[tuple[str, str], ...] = ()

    def current_name(self, name: str) -> str:
        """Return the name that transformers' class uses, from that of a file of any generation."""
        for old, new in self.published:
            if name.startswith(old):
                return new + name.removeprefix(old)
        return name

    def published_name(self, name: str) -> str:
        """Return the name in published files, which ``save_pretrained`` writes too."""
        for old, new in self.published:
            if name.startswith(new):
                return old + name.removeprefix(new)
        return name


def require_expressible(layout: Layout, ours: FlamingoConfig, num_heads: int) -> None:
    """Check that a family says everything that our settings say.

    Args:
        layout: Layout of the family's configuration that was made of our settings.
        ours: Our settings.
        num_heads: Heads of the cross-attention, which ``num_heads`` may leave to the language model's dim.

    Raises:
        ValueError: Some settings differ; the message names all of them.
    """
    found, needed = (_comparable(config, layout, num_heads) for config in (ours, layout.model))
    wrong = [f"{name} {found[name]!r} instead of {needed[name]!r}" for name in found if found[name] != needed[name]]
    if wrong:
        raise ValueError(
            f"the model cannot be written as {layout.family}, which has no setting for: {'; '.join(wrong)}. Use "
            "--format native, or train with the settings of a model that trainer.import_model made"
        )


def require_kinds(family: str, kinds: Mapping[str, tuple[object, object]]) -> None:
    """Check the kinds of the parts, which a family's configuration cannot even be made without.

    Args:
        family: Name of the family.
        kinds: What was found and what is needed, by the name of the part.

    Raises:
        ValueError: Some differ.
    """
    wrong = [f"{name} is {found!r} instead of {needed!r}" for name, (found, needed) in kinds.items() if found != needed]
    if wrong:
        raise ValueError(f"the model cannot be written as {family}: {'; '.join(wrong)}. Use --format native")


def _comparable(config: FlamingoConfig, layout: Layout, num_heads: int) -> dict[str, Any]:
    """Return the settings that a family has to express, with defaults that depend on other parts filled in."""
    cross, resampler, vision = config.cross_attention, config.resampler, config.vision
    dim, width = layout.language_model.hidden_size, layout.tower.hidden_size
    cross = replace(
        cross,
        num_heads=cross.num_heads or num_heads,
        num_kv_heads=cross.num_kv_heads or cross.num_heads or num_heads,
        ff_dim=cross.ff_dim or cross.ff_mult * dim,
        ff_mult=0,
        # Both are the same model; transformers has one code for it.
        without_media="nothing" if cross.without_media == "all_media" else cross.without_media,
    )
    if resampler.kind == "linear":
        resampler = PerceiverResamplerConfig(kind="linear", dim=resampler.dim)
    else:
        inner = resampler.dim or width
        resampler = replace(resampler, dim=inner, ff_dim=resampler.ff_dim or resampler.ff_mult * inner, ff_mult=0)
    return {
        **{f"cross_attention.{name}": value for name, value in asdict(cross).items()},
        **{f"resampler.{name}": value for name, value in asdict(resampler).items()},
        "vision.feature_block": vision.feature_block,
        "vision.feature_norm": vision.feature_norm,
        "vision.class_feature": vision.class_feature,
        "tokens.image_output": config.tokens.image_output,
    }


def check_placement(family: str, positions: list[int], num_blocks: int) -> tuple[int, int]:
    """Return ``every_n_layers`` and ``offset`` of cross-attentions before the given blocks.

    Raises:
        ValueError: They are not evenly spaced up to the last block.
    """
    offset = positions[0] if positions else 0
    every = positions[1] - offset if len(positions) > 1 else num_blocks
    if not positions or every < 1 or positions != list(range(offset, num_blocks, every)):
        raise ValueError(
            f"the cross-attentions of this {family} stand before the blocks {positions} of {num_blocks}; only evenly "
            "spaced ones can be imported (cross_attention.every_n_layers and offset)"
        )
    return every, offset
