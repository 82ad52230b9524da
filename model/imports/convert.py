"""Turn a transformers folder of IDEFICS or Llama 3.2 Vision into an export of this project, and an export back.

An export that was made here keeps a folder ``source`` with the files that only the other side needs: its config.json,
its processor's settings, and rows of its tables that have no place here.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoTokenizer

from model.config import LanguageModelConfig, SpecialTokensConfig
from model.factory import build_flamingo, build_language_model
from model.flamingo import Flamingo
from model.imports.family import Family, Layout, require_expressible
from model.imports.idefics import IDEFICS
from model.imports.mllama import MLLAMA
from model.imports.tensor_map import Checkpoint, check_names, split_all, their_shapes, write_shards
from model.loading_errors import explain_loading
from model.pretrained import SOURCE, from_pretrained, load_exported_tokenizer, load_trained, save_flamingo
from model.processor import ProcessorConfig
from model.tokens import FlamingoTokenizer, add_special_tokens
from model.transformers_tower import TRANSFORMERS, TransformersTower, build_transformers_tower, inner_tower

FAMILIES: Mapping[str, Family] = {family.name: family for family in (IDEFICS, MLLAMA)}
WithoutMedia = Literal["nothing", "all_media"]
_KEPT = ("config.json", "generation_config.json", "preprocessor_config.json", "processor_config.json")
_TABLES = ("model.embed_tokens.weight", "lm_head.weight")
_ROWS = "rows.safetensors"


@dataclass(frozen=True)
class Choices:
    """Say what an import takes from elsewhere.

    Attributes:
        language_model: Name or folder of a language model with the same weights; None writes the checkpoint's own.
        vision: Name or folder of a tower of transformers with the same weights; None writes the checkpoint's own.
        tokenizer: Name or folder of the tokenizer; None takes the one in the checkpoint's folder.
        without_media: ``cross_attention.without_media`` of a Llama 3.2 Vision: "nothing", or "all_media" to be exactly
            what transformers computes.
    """

    language_model: str | None = None
    vision: str | None = None
    tokenizer: str | None = None
    without_media: WithoutMedia = "nothing"


def import_transformers(folder: Path, output: Path, choices: Choices) -> Flamingo:
    """Write an export from a transformers folder, and return its model.

    Raises:
        ValueError: The folder is of another family or damaged, or a chosen part has other weights.
    """
    family, config = _read_source(folder)
    if choices.without_media != "nothing" and family is not MLLAMA:
        raise ValueError(
            f"--without-media {choices.without_media}: only Llama 3.2 Vision leaks; {family.name} does not"
        )
    checkpoint = Checkpoint(folder, family.current_name)
    tokenizer, tokens = _tokenizer(folder, family, choices.tokenizer)
    layout = family.layout(config, tokenizer.image_id, tokenizer.end_of_chunk_id)
    entries = [*layout.trained, *layout.language_model_entries, *layout.tower_entries]
    expected = their_shapes(entries) | {table.theirs: table.shape for table in layout.cut.values()}
    check_names(checkpoint, expected, layout.family)
    output.mkdir(parents=True, exist_ok=True)
    dtype = checkpoint.read(layout.trained[0].theirs[0]).dtype
    settings = replace(
        layout.model,
        tokens=tokens,
        language_model=_place_language_model(layout, checkpoint, output, choices.language_model, dtype),
        vision=_place_tower(family, layout, checkpoint, folder, output, choices.vision),
    )
    if choices.without_media == "all_media":
        settings = replace(
            settings,
            vision=replace(settings.vision, padding_tiles=True),
            cross_attention=replace(settings.cross_attention, without_media="all_media"),
        )
    _keep_source(folder, layout, checkpoint, output)
    model = build_flamingo(settings, tokenizer.ids, dtype=dtype)
    load_trained(model, _trained_state(layout, checkpoint))
    tiles = model.vision_encoder.max_tiles
    processor = ProcessorConfig.of(model.vision_encoder, image_fit=family.image_fit, image_tokens=tiles)
    save_flamingo(output, model, processor=processor, tokenizer=tokenizer.tokenizer)
    return model


def export_transformers(export: Path, family: Family, output: Path) -> None:
    """Write an export of this project as a transformers folder of a family.

    Raises:
        ValueError: The folder is no export, or its model has settings that the family cannot express.
    """
    model = from_pretrained(export)
    tokens = load_exported_tokenizer(export)
    layout, config = _layout_of(model, family, tokens, export / SOURCE)
    tower = model.vision_encoder.tower
    assert isinstance(tower, TransformersTower)
    trained = {name: parameter.detach() for name, parameter in model.named_parameters()}
    lm = _with_whole_tables(model.language_model.lm.state_dict(), layout)
    found = split_all(layout.trained, trained)
    found |= split_all(layout.tower_entries, inner_tower(tower.model).state_dict())
    found |= split_all(layout.language_model_entries, lm)
    rest = load_file(export / SOURCE / _ROWS) if (export / SOURCE / _ROWS).is_file() else {}
    for name, cut in layout.cut.items():
        missing = (cut.shape[0] - cut.rows, *cut.shape[1:])
        found[cut.theirs] = torch.cat([lm[name], rest.get(cut.theirs, lm[name].new_zeros(missing)).to(lm[name])])
    for row in layout.rows:
        found[row.table] = found[row.table].clone()
    written: dict[tuple[str, int], Tensor] = {}
    for row in layout.rows:
        own = trained[row.ours][0]
        if not torch.equal(written.setdefault((row.table, row.number), own), own):
            raise ValueError(
                f"the model cannot be written as {layout.family}: it has one table for input and output "
                "(tie_word_embeddings), but training gave an added token two embeddings. Use --format native"
            )
        found[row.table][row.number] = own
    output.mkdir(parents=True, exist_ok=True)
    for name in _KEPT[1:]:
        if (export / SOURCE / name).is_file():
            shutil.copyfile(export / SOURCE / name, output / name)
    tokens.tokenizer.save_pretrained(output)
    config.architectures = [family.model_class]
    config.dtype = str(lm["model.norm.weight"].dtype).removeprefix("torch.")
    config.save_pretrained(output)
    write_shards(output, ((family.published_name(name), found[name]) for name in sorted(found)))


def _read_source(folder: Path) -> tuple[Family, Any]:
    """Return the family and the configuration of a folder."""
    path = folder / "config.json"
    if not path.is_file():
        raise ValueError(
            f"{folder} is no folder of a transformers model: it has no config.json. Give such a folder, or a file of "
            "OpenFlamingo's weights"
        )
    try:
        kind = json.loads(path.read_text(encoding="utf-8")).get("model_type")
    except (ValueError, AttributeError) as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    if kind not in FAMILIES:
        raise ValueError(
            f"{path} has model_type {kind!r}; models of {', '.join(FAMILIES)} can be imported, and OpenFlamingo's "
            "weights from their file"
        )
    with explain_loading(str(path)):
        return FAMILIES[kind], AutoConfig.from_pretrained(folder, trust_remote_code=False)


def _tokenizer(folder: Path, family: Family, name: str | None) -> tuple[FlamingoTokenizer, SpecialTokensConfig]:
    """Return the tokenizer and the settings of the two special tokens, which it has already."""
    with explain_loading(f"the tokenizer of {name or folder}; --tokenizer names another one"):
        tokenizer = AutoTokenizer.from_pretrained(name or folder, trust_remote_code=False)
    end_of_chunk = family.end_of_chunk or tokenizer.eos_token
    absent = [token for token in (family.image_token, end_of_chunk) if token not in tokenizer.get_vocab()]
    if absent:
        raise ValueError(
            f"the tokenizer of {name or folder} lacks the tokens {absent} of {family.name}: name the right one with "
            "--tokenizer"
        )
    settings = SpecialTokensConfig(family.image_token, end_of_chunk, image_output=family is not MLLAMA)
    return add_special_tokens(tokenizer, settings), settings


def _language_model_tensors(layout: Layout, checkpoint: Checkpoint) -> Iterator[tuple[str, Tensor]]:
    for entry in layout.language_model_entries:
        yield entry.ours, entry.join(checkpoint.read)
    for name, table in layout.cut.items():
        yield name, checkpoint.read(table.theirs)[: table.rows].clone()


def _place_language_model(
    layout: Layout, checkpoint: Checkpoint, output: Path, name: str | None, dtype: torch.dtype
) -> LanguageModelConfig:
    """Write the language model into the export, or compare it with the one that is named."""
    if name is not None:
        lm = build_language_model(LanguageModelConfig(name=name), dtype)
        _compare(lm.state_dict(), _language_model_tensors(layout, checkpoint), f"--language-model {name}")
        return LanguageModelConfig(name=name)
    folder = output / "language_model"
    layout.language_model.architectures = ["LlamaForCausalLM"]
    layout.language_model.dtype = str(dtype).removeprefix("torch.")
    layout.language_model.save_pretrained(folder)
    write_shards(folder, _language_model_tensors(layout, checkpoint))
    return LanguageModelConfig(name=os.path.relpath(folder))  # an export names its own folders relative to itself


def _place_tower(
    family: Family, layout: Layout, checkpoint: Checkpoint, source: Path, output: Path, name: str | None
) -> Any:
    """Write the tower into the export, or compare it with the one that is named."""
    mean, std = family.mean, family.std
    path = source / "preprocessor_config.json"
    values = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    if {"image_mean", "image_std"} <= values.keys():
        mean, std = tuple(values["image_mean"]), tuple(values["image_std"])
    tensors = ((entry.ours, entry.join(checkpoint.read)) for entry in layout.tower_entries)
    if name is not None:
        settings = replace(layout.model.vision, name=f"{TRANSFORMERS}{name}", mean=mean, std=std)
        _compare(inner_tower(build_transformers_tower(settings).model).state_dict(), tensors, f"--vision {name}")
        return settings
    folder = output / "vision"
    layout.tower.save_pretrained(folder)
    write_shards(folder, tensors)
    return replace(layout.model.vision, name=f"{TRANSFORMERS}{os.path.relpath(folder)}", mean=mean, std=std)


def _compare(named: Mapping[str, Tensor], tensors: Iterator[tuple[str, Tensor]], option: str) -> None:
    """Check that a named part has the weights of the checkpoint; its tables may lack the last rows."""
    different = []
    for name, tensor in tensors:
        found = named.get(name)
        if found is not None and name in _TABLES:
            tensor = tensor[: len(found)]
        if found is None or found.shape != tensor.shape or not torch.equal(found, tensor.to(found.dtype)):
            different.append(name)
    if different:
        raise ValueError(
            f"{option} has other weights than the checkpoint in {len(different)} tensors: {different[:3]}. Leave it "
            "out, so that the export gets the checkpoint's own"
        )


def _keep_source(folder: Path, layout: Layout, checkpoint: Checkpoint, output: Path) -> None:
    """Keep what the way back needs and this project does not."""
    kept = output / SOURCE
    kept.mkdir(exist_ok=True)
    for name in _KEPT:
        if (folder / name).is_file():
            shutil.copyfile(folder / name, kept / name)
    rest = {table.theirs: checkpoint.read(table.theirs)[table.rows :].clone() for table in layout.cut.values()}
    if rest:
        save_file(rest, kept / _ROWS)


def _trained_state(layout: Layout, checkpoint: Checkpoint) -> dict[str, Tensor]:
    """Return our trained tensors."""
    state = {entry.ours: entry.join(checkpoint.read) for entry in layout.trained}
    for row in layout.rows:
        state[row.ours] = checkpoint.read(row.table)[row.number][None]
    return state


def _with_whole_tables(lm: Mapping[str, Tensor], layout: Layout) -> dict[str, Tensor]:
    """Return the language model's tensors, with rows for added tokens that lie beyond its tables."""
    found = dict(lm)
    for entry in layout.language_model_entries:
        rows = sum(shape[0] for shape in entry.shapes)
        if len(entry.theirs) > 1 and len(found[entry.ours]) < rows:
            beyond = found[entry.ours].new_zeros(rows - len(found[entry.ours]), *found[entry.ours].shape[1:])
            found[entry.ours] = torch.cat([found[entry.ours], beyond])
    return found


def _layout_of(model: Flamingo, family: Family, tokens: FlamingoTokenizer, source: Path) -> tuple[Layout, Any]:
    """Return layout and configuration of our model as a family, with the values of the imported one where it was one.

    Raises:
        ValueError: The family cannot express the model.
    """
    tower, lm = model.vision_encoder.tower, model.language_model.lm.config
    if not isinstance(tower, TransformersTower):
        raise ValueError(
            f"the model cannot be written as {family.name}: its tower {model.config.vision.name!r} is not one of "
            "transformers. Use --format native"
        )
    if "lora" in (model.config.trainable.language_model, model.config.trainable.vision):
        raise ValueError(
            f"the model has adapters (trainable.language_model or trainable.vision: lora), which {family.name} has no "
            "place for: merge them first, or use --format native"
        )
    config = family.config(model.config, lm, tower.model.config, tokens)
    layout = family.layout(config, tokens.image_id, tokens.end_of_chunk_id)
    num_heads = next(iter(model.blocks_with_cross_attention().values())).attention.num_heads
    require_expressible(layout, model.config, num_heads)
    if (source / "config.json").is_file() and json.loads((source / "config.json").read_text())["model_type"] == (
        family.name
    ):
        known = AutoConfig.from_pretrained(source, trust_remote_code=False)
        if _same_shapes(family.layout(known, tokens.image_id, tokens.end_of_chunk_id), layout):
            return layout, known
    return layout, config


def _same_shapes(one: Layout, other: Layout) -> bool:
    parts = ("model", "trained", "rows", "language_model_entries", "tower_entries")
    return all(getattr(one, part) == getattr(other, part) for part in parts)
