"""Import of OpenFlamingo's released checkpoints (``checkpoint.pt``), by the public names of its state dict.

``perceiver.*`` and ``lang_encoder.gated_cross_attn_layers.N.*``, N counting the language model's blocks. The config
that fits is ``model.presets.openflamingo``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from model.flamingo import Flamingo
from model.language_model import InputRow, OutputRow
from model.pretrained import load_trained

_RESAMPLER = (
    (r"latents", r"resampler.latents"),
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


def load_openflamingo(model: Flamingo, checkpoint: str | Path | Mapping[str, Tensor]) -> None:
    """Load a checkpoint into a model of the same shape.

    Args:
        model: not partitioned; its config like ``model.presets.openflamingo``.
        checkpoint: the file (read with ``weights_only=True``), or its state dict.

    Raises:
        ValueError: a name that is not OpenFlamingo's, or tensors that do not fit the model.
    """
    state: Any = checkpoint
    if not isinstance(checkpoint, Mapping):
        state = torch.load(checkpoint, map_location="cpu", weights_only=True)
    load_trained(model, openflamingo_state(model, state.get("model_state_dict", state)))


def openflamingo_state(model: Flamingo, checkpoint: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The checkpoint's tensors under our names, complete for ``model``.

    OpenFlamingo added ``<|endofchunk|>`` and then ``<image>`` at the end of the language model's table; their rows are
    taken from there. Where the checkpoint has no table the rows keep their start, and so do the time embeddings (it has
    none: they are set to 0).
    """
    order = {block: n for n, block in enumerate(model.blocks_with_cross_attention())}
    state = {"resampler.time_embeddings": torch.zeros_like(model.resampler.time_embeddings)}
    unknown = []
    for full_name, tensor in checkpoint.items():
        name = full_name.removeprefix("module.")
        if name.startswith("perceiver."):
            new = _rename(name.removeprefix("perceiver."), _RESAMPLER)
        elif found := re.fullmatch(r"lang_encoder\.gated_cross_attn_layers\.(\d+)\.(.+)", name):
            part = _rename(found[2], _CROSS_ATTENTION)
            block = order.get(int(found[1]))
            new = None if part is None or block is None else f"cross_attention.{block}.{part}"
        else:
            continue  # the language model's own tensors, which OpenFlamingo stores beside
        if new is None:
            unknown.append(full_name)
        else:
            state[new] = tensor.reshape(1) if tensor.ndim == 0 else tensor
    if unknown:
        raise ValueError(
            f"{len(unknown)} tensors of the checkpoint have no place in the model: {unknown[:3]}. Check "
            "cross_attention.every_n_layers and cross_attention.offset, and that the config is model.presets.openflamingo's"
        )
    return state | _new_rows(model, checkpoint)


def _new_rows(model: Flamingo, checkpoint: Mapping[str, Tensor]) -> dict[str, Tensor]:
    lm, tokens = model.language_model.lm, model.tokens
    names = {module: name for name, module in lm.named_modules()}
    stripped = {name.removeprefix("module."): tensor for name, tensor in checkpoint.items()}
    inputs = stripped.get(f"lang_encoder.{names[lm.get_input_embeddings()]}.weight")
    outputs = inputs  # tied tables are stored once
    for name in (names[lm.get_output_embeddings()], *_OUTPUT_EMBEDDINGS):
        outputs = stripped.get(f"lang_encoder.{name}.weight", outputs)
    base = min(tokens.image_id, tokens.end_of_chunk_id)
    row_of = {tokens.end_of_chunk_id: base, tokens.image_id: base + 1}
    rows = {}
    for side, table in (("input_rows", inputs), ("output_rows", outputs)):
        own: nn.ModuleList = getattr(model.language_model, side)
        for number, row in enumerate(own):
            assert isinstance(row, InputRow | OutputRow)
            name = f"language_model.{side}.{number}.weight"
            start = row.weight.detach() if table is None else table[row_of[row.token_id]][None]
            if row.weight.requires_grad:
                rows[name] = start
    return rows


def _rename(name: str, table: tuple[tuple[str, str], ...]) -> str | None:
    for pattern, replacement in table:
        if re.fullmatch(pattern, name):
            return re.sub(pattern, replacement, name)
    return None
