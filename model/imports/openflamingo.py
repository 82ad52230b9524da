"""Import OpenFlamingo's checkpoints by the public names of its state dict.

The resampler's names begin with ``perceiver.``. The cross-attention before block N of the language model has two names:
released checkpoints have ``lang_encoder.gated_cross_attn_layers.N.*``, and training writes the module that surrounds
the block, such as ``lang_encoder.transformer.blocks.N.gated_cross_attn_layer.*``. The wrappers of DDP, FSDP and
activation checkpointing may add parts to a name. Time embeddings have been called ``perceiver.frame_embs``. The config
that fits is ``model.presets.openflamingo``; ``read_openflamingo_settings`` finds its values in a checkpoint.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from model.config import FlamingoConfig, LanguageModelConfig
from model.flamingo import Flamingo
from model.language_model import InputRow, OutputRow
from model.presets import openflamingo
from model.pretrained import load_trained

_RESAMPLER = (
    (r"latents", r"resampler.latents"),
    (r"frame_embs", r"resampler.time_embeddings"),
    (r"norm\.(weight|bias)", r"resampler.norm.\1"),
    (r"layers\.(\d+)\.0\.norm_media\.(weight|bias)", r"resampler.layers.\1.attention.norm_features.\2"),
    (r"layers\.(\d+)\.0\.norm_latents\.(weight|bias)", r"resampler.layers.\1.attention.norm_latents.\2"),
    (r"layers\.(\d+)\.0\.to_q\.weight", r"resampler.layers.\1.attention.query.weight"),
    (r"layers\.(\d+)\.0\.to_kv\.weight", r"resampler.layers.\1.attention.key_value.weight"),
    (r"layers\.(\d+)\.0\.to_out\.weight", r"resampler.layers.\1.attention.output.weight"),
    (r"layers\.(\d+)\.1\.0\.(weight|bias)", r"resampler.layers.\1.feed_forward.norm.\2"),
    (r"layers\.(\d+)\.1\.1\.weight", r"resampler.layers.\1.feed_forward.up.weight"),
    (r"layers\.(\d+)\.1\.3\.weight", r"resampler.layers.\1.feed_forward.down.weight"),
)
_CROSS_ATTENTION = (
    (r"attn_gate", r"attention_gate"),
    (r"ff_gate", r"feed_forward_gate"),
    (r"attn\.norm\.(weight|bias)", r"attention.norm.\1"),
    (r"attn\.to_q\.weight", r"attention.query.weight"),
    (r"attn\.to_kv\.weight", r"attention.key_value.weight"),
    (r"attn\.to_out\.weight", r"attention.output.weight"),
    (r"ff\.0\.(weight|bias)", r"feed_forward.norm.\1"),
    (r"ff\.1\.weight", r"feed_forward.up.weight"),
    (r"ff\.3\.weight", r"feed_forward.down.weight"),
)

_OUTPUT_EMBEDDINGS = ("lm_head", "embed_out")  # some families have had both names
_WRAPPERS = re.compile(r"^module\.|_fsdp_wrapped_module\.|_checkpoint_wrapped_module\.")
_CROSS_ATTENTION_NAME = re.compile(
    r"lang_encoder\.(?:gated_cross_attn_layers\.(\d+)|(?:\w+\.)+?(\d+)\.gated_cross_attn_layer)\.(.+)"
)

_log = logging.getLogger(__name__)


def load_openflamingo(model: Flamingo, checkpoint: str | Path | Mapping[str, Tensor]) -> None:
    """Load a checkpoint into a model of the same shape.

    Args:
        model: Model that is not partitioned, with a config like ``model.presets.openflamingo``.
        checkpoint: File (read with ``weights_only=True``), or its state dict.

    Raises:
        ValueError: The file holds no state dict, a name is not OpenFlamingo's, or tensors do not fit the model.
    """
    state: Any = checkpoint if isinstance(checkpoint, Mapping) else read_openflamingo(checkpoint)
    load_trained(model, convert_openflamingo_state(model, state.get("model_state_dict", state)))


def read_openflamingo(path: str | Path) -> dict[str, Tensor]:
    """Read the state dict of a file: safetensors, or a pickled file that ``weights_only`` loads.

    Raises:
        ValueError: The file cannot be read safely, or holds no state dict of OpenFlamingo.
    """
    path = Path(path)
    try:
        if path.suffix == ".safetensors":
            state: Any = load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
    except (SafetensorError, UnpicklingError, RuntimeError, EOFError, KeyError, ValueError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(
            f"{path} cannot be read without running code from it: {reason}. Give a file of safetensors, or one that "
            "torch.load reads with weights_only=True"
        ) from error
    state = state.get("model_state_dict", state) if isinstance(state, Mapping) else state
    if not isinstance(state, Mapping) or not all(isinstance(tensor, Tensor) for tensor in state.values()):
        raise ValueError(f"{path} holds a {type(state).__name__} instead of OpenFlamingo's state dict")
    names = {_WRAPPERS.sub("", name) for name in state}
    if "perceiver.latents" not in names or not any(map(_CROSS_ATTENTION_NAME.fullmatch, names)):
        raise ValueError(
            f"{path} is no checkpoint of OpenFlamingo: it lacks perceiver.latents or gated_cross_attn_layers, and "
            f"has {sorted(names)[:3]}. A model of transformers is imported from its folder"
        )
    return dict(state)


def read_openflamingo_settings(state: Mapping[str, Tensor], language_model: LanguageModelConfig) -> FlamingoConfig:
    """Return the settings of a checkpoint, whose sizes and placement follow from its tensors.

    Raises:
        ValueError: It has time embeddings of media, or cross-attentions that are not evenly spaced.
    """
    stripped = {_WRAPPERS.sub("", name): tensor for name, tensor in state.items()}
    if "perceiver.media_time_embs" in stripped:
        raise ValueError(
            "the checkpoint has perceiver.media_time_embs, an embedding of each medium's number, which no released "
            "OpenFlamingo has and no setting expresses"
        )
    found = [match for name in stripped if (match := _CROSS_ATTENTION_NAME.fullmatch(name))]
    blocks = sorted({int(match[1] or match[2]) for match in found})
    every = blocks[0] + 1
    if blocks != list(range(every - 1, blocks[-1] + 1, every)):
        raise ValueError(
            f"the checkpoint has cross-attentions before the blocks {blocks}, which are not evenly spaced. "
            "OpenFlamingo has them before every Nth block, from block N - 1 on: the checkpoint is not whole"
        )
    config = openflamingo(language_model, every)
    query = stripped["perceiver.layers.0.0.to_q.weight"]
    time = stripped.get("perceiver.frame_embs")
    resampler = replace(
        config.resampler,
        num_layers=len({name.split(".")[2] for name in stripped if name.startswith("perceiver.layers.")}),
        num_heads=query.shape[0] // config.resampler.head_dim,
        num_latents=stripped["perceiver.latents"].shape[0],
        num_frames=0 if time is None else time.shape[0],
        ff_mult=stripped["perceiver.layers.0.1.1.weight"].shape[0] // query.shape[1],
    )
    return replace(config, resampler=resampler)


def convert_openflamingo_state(model: Flamingo, checkpoint: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the checkpoint's tensors under the names of ``model``, complete.

    OpenFlamingo added ``<|endofchunk|>`` and then ``<image>`` at the end of the language model's tables, from where
    their embeddings are taken. Embeddings that the checkpoint lacks keep their start, and a warning says so. Another
    warning says how many of the other rows differ from those of ``model``: OpenFlamingo may train them, but here they
    are frozen. OpenFlamingo has no time embeddings, so these become 0.

    Raises:
        ValueError: A name is not OpenFlamingo's, two names of one tensor have different values, or a table is too
            short for the added tokens.
    """
    stripped = {_WRAPPERS.sub("", name): tensor for name, tensor in checkpoint.items()}
    order = {block: n for n, block in enumerate(model.blocks_with_cross_attention())}
    state: dict[str, Tensor] = {}
    unknown, contradicting = [], []
    for name, tensor in stripped.items():
        if name.startswith("perceiver."):
            new = _rename(name.removeprefix("perceiver."), _RESAMPLER)
        elif found := _CROSS_ATTENTION_NAME.fullmatch(name):
            part = _rename(found[3], _CROSS_ATTENTION)
            block = order.get(int(found[1] or found[2]))
            new = None if part is None or block is None else f"cross_attention.{block}.{part}"
        else:
            continue  # a tensor of the language model itself
        if new is None:
            unknown.append(name)
            continue
        tensor = tensor.reshape(1) if tensor.ndim == 0 else tensor
        if new in state and not torch.equal(state[new], tensor):
            contradicting.append(name)
        state[new] = tensor
    if unknown:
        raise ValueError(
            f"{len(unknown)} tensors of the checkpoint have no place in the model: {unknown[:3]}. Check "
            "cross_attention.every_n_layers and cross_attention.offset; model.presets.openflamingo has a fitting config"
        )
    if contradicting:
        raise ValueError(
            f"the checkpoint holds {len(contradicting)} tensors under two names with different values: "
            f"{contradicting[:3]}. It was put together from several checkpoints; remove the names that are out of date"
        )
    if model.config.resampler.num_frames:
        start = model.get_parameter("resampler.time_embeddings")
        state.setdefault("resampler.time_embeddings", torch.zeros_like(start))
    return state | _added_rows(model, stripped)


def _added_rows(model: Flamingo, checkpoint: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the embeddings of the added tokens; warn of what the checkpoint lacks or what differs."""
    rows = {}
    for side, table in _tables(model, checkpoint).items():
        modules: nn.ModuleList = getattr(model.language_model, side)
        for number, row in enumerate(modules):
            assert isinstance(row, InputRow | OutputRow)
            if row.weight.requires_grad:
                start = row.weight.detach() if table is None else table[_row_of(model, row.token_id)][None]
                rows[f"language_model.{side}.{number}.weight"] = start
    return rows


def _tables(model: Flamingo, checkpoint: Mapping[str, Tensor]) -> dict[str, Tensor | None]:
    """Return the checkpoint's input and output embeddings by the name of the model's rows, None where it lacks them."""
    lm = model.language_model.lm
    embedding, head = lm.get_input_embeddings(), lm.get_output_embeddings()
    names = {module: name for name, module in lm.named_modules()}
    sides: dict[str, tuple[Any, tuple[str, ...]]] = {"input_rows": (embedding, (names[embedding],))}
    if head.weight is not embedding.weight:
        sides["output_rows"] = (head, (names[head], *_OUTPUT_EMBEDDINGS))
    tables: dict[str, Tensor | None] = {}
    for side, (module, known) in sides.items():
        name = next((name for one in known if (name := f"lang_encoder.{one}.weight") in checkpoint), None)
        tables[side] = None if name is None else checkpoint[name]
        if name is not None:
            _check_table(model, checkpoint[name], module.weight, name)
            continue
        _log.warning(
            "the checkpoint has no lang_encoder.%s.weight: the embeddings of %s and %s keep their start there. "
            "OpenFlamingo leaves out tables that it does not train; train these two before you use the model",
            known[0],
            model.config.tokens.end_of_chunk,
            model.config.tokens.image,
        )
    return {"output_rows": tables["input_rows"]} | tables  # tied tables are stored once


def _row_of(model: Flamingo, token_id: int) -> int:
    """Return an added token's row in OpenFlamingo's tables: it added ``<|endofchunk|>`` before ``<image>``."""
    tokens = model.tokens
    return min(tokens.image_id, tokens.end_of_chunk_id) + (0 if token_id == tokens.end_of_chunk_id else 1)


def _check_table(model: Flamingo, table: Tensor, frozen: Tensor, name: str) -> None:
    """Check that a table holds the added tokens; warn where its other rows are not those of the language model."""
    last = _row_of(model, model.tokens.image_id)
    if len(table) <= last:
        raise ValueError(
            f"{name} of the checkpoint has {len(table)} rows, but the added tokens are in rows {last - 1} and {last}: "
            f"language_model.tokenizer is not the tokenizer that the checkpoint was trained with"
        )
    rows = min(last - 1, len(frozen))
    # The narrower type of the two: a checkpoint in bfloat16 has rounded the rows that it did not train.
    narrow = min(table.dtype, frozen.dtype, key=lambda dtype: dtype.itemsize)
    ours, theirs = (one[:rows].detach().cpu().to(narrow).float() for one in (frozen, table))
    if ours.shape != theirs.shape:
        raise ValueError(
            f"{name} of the checkpoint has dim {theirs.shape[1]}, and the language model {ours.shape[1]}: "
            f"language_model.name is not the model that the checkpoint was trained with"
        )
    different = int((ours != theirs).any(dim=1).sum())
    if different:
        _log.warning(
            "%d of %d rows of %s differ from the frozen language model's, by up to %.3g. They were trained, or "
            "language_model.name is another model. The language model's own rows are used, so scores may differ from "
            "OpenFlamingo's",
            different,
            rows,
            name,
            float((ours - theirs).abs().max()),
        )


def _rename(name: str, table: tuple[tuple[str, str], ...]) -> str | None:
    for pattern, replacement in table:
        if re.fullmatch(pattern, name):
            return re.sub(pattern, replacement, name)
    return None
