"""List families of causal language models, each tiny and with random weights, and try out what they can do.

``python -m tests.model.language_models`` prints the tables of docs/language_models.md.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from model.config import LanguageModelConfig
from model.factory import build_flamingo, build_language_model
from model.flamingo import Flamingo
from model.flops import UsefulFlops
from model.generation import generate
from model.lm_probes import separates_packed_documents
from tests.model.builders import BEYOND, BOS, EOS, PAD, VOCAB_SIZE, random_media, text_with_media, tiny_config, wake

Settings = dict[str, Any]
_COMMON: Settings = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": PAD,
    "bos_token_id": BOS,
    "eos_token_id": EOS,
}
_HEAD: Settings = {"head_dim": 8}
_WINDOW: Settings = {"sliding_window": 4}
_GPT2: Settings = {"n_embd": 32, "n_layer": 4, "n_head": 4, "n_positions": 64}
_ROPE: Settings = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}
_EXPERTS: Settings = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
_LOCAL_EXPERTS: Settings = {"num_local_experts": 4, "num_experts_per_tok": 2}
_ROUTED: Settings = {
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_shared_experts": 1,
    "n_group": 1,
    "topk_group": 1,
    "moe_intermediate_size": 16,
    "first_k_dense_replace": 1,
}
_LATENT: Settings = {  # multi-head latent attention
    "num_key_value_heads": 4,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
}
_MAMBA: Settings = {"mamba_d_state": 4, "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_n_groups": 1}
_DELTA: Settings = {
    **_HEAD,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "layer_types": ["linear_attention", "full_attention"] * 2,
}
_PER_LAYER: Settings = {
    **_HEAD,
    **_WINDOW,
    "vocab_size_per_layer_input": VOCAB_SIZE,
    "hidden_size_per_layer_input": 8,
    "num_kv_shared_layers": 0,
    "layer_types": ["sliding_attention"] * 3 + ["full_attention"],
}
_LISTED: dict[str, Settings] = {
    "afmoe": {**_EXPERTS, **_HEAD, **_WINDOW},
    "apertus": {},
    "arcee": {},
    "bamba": {**_MAMBA, "attn_layer_indices": [1, 3]},
    "bert": {"is_decoder": True},
    "bert-generation": {"is_decoder": True},
    "biogpt": {},
    "bitnet": {},
    "bloom": {"n_layer": 4, "n_head": 4},
    "codegen": {**_GPT2, "rotary_dim": 4},
    "cohere": {"logit_scale": 0.25},
    "cohere2": {**_WINDOW, "logit_scale": 0.25},
    "ctrl": {**_GPT2, "dff": 48},
    "cwm": {**_HEAD, **_WINDOW},
    "deepseek_v2": {**_ROUTED, **_LATENT},
    "deepseek_v3": {**_ROUTED, **_LATENT},
    "deepseek_v4": {},
    "diffllama": {},
    "dots1": {**_ROUTED, **_HEAD},
    "ernie4_5": _HEAD,
    "exaone4": {**_WINDOW, "sliding_window_pattern": 4},
    "falcon": {"multi_query": True, "alibi": False},
    "falcon with alibi": {"model_type": "falcon", "alibi": True, "multi_query": False},
    "falcon with groups": {"model_type": "falcon", "new_decoder_architecture": True, "num_kv_heads": 2},
    "falcon_h1": {"mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 4, "mamba_n_groups": 1},
    "falcon_mamba": {"state_size": 4},
    "flex_olmo": _EXPERTS,
    "gemma": _HEAD,
    "gemma2": {**_HEAD, **_WINDOW, "query_pre_attn_scalar": 8},
    "gemma3_text": {**_HEAD, **_WINDOW, "query_pre_attn_scalar": 8},
    "gemma3n_text": {
        **_PER_LAYER,
        "laurel_rank": 4,
        "altup_num_inputs": 2,
        "activation_sparsity_pattern": [0.0] * 4,
        "intermediate_size": [48] * 4,
    },
    "gemma4_text": {**_PER_LAYER, "global_head_dim": 8},
    "glm": _HEAD,
    "glm4": _HEAD,
    "glm4_moe": {**_ROUTED, **_HEAD},
    "gpt2": _GPT2,
    "gpt_bigcode": _GPT2,
    "gpt_neo": {"num_layers": 4, "num_heads": 4, "attention_types": [[["global", "local"], 2]], "window_size": 4},
    "gpt_neox": {"rotary_pct": 0.25},
    "gpt_neox without parallel residual": {"model_type": "gpt_neox", "use_parallel_residual": False},
    "gpt_neox_japanese": {},
    "gpt_oss": {**_LOCAL_EXPERTS, **_HEAD, **_WINDOW, **_ROPE},
    "gptj": {**_GPT2, "rotary_dim": 4},
    "granite": {"logits_scaling": 4.0, "embedding_multiplier": 3.0, "residual_multiplier": 0.5},
    "granitemoe": _LOCAL_EXPERTS,
    "granitemoehybrid": {
        **_LOCAL_EXPERTS,
        **_MAMBA,
        "layer_types": ["mamba", "attention"] * 2,
        "shared_intermediate_size": 16,
    },
    "helium": _HEAD,
    "hrm_text": {},
    "hunyuan_v1_dense": _HEAD,
    "jamba": {
        **_EXPERTS,
        "mamba_d_state": 4,
        "mamba_dt_rank": 4,
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "expert_layer_period": 2,
        "use_mamba_kernels": False,
    },
    "jetmoe": {**_LOCAL_EXPERTS, "kv_channels": 8},
    "lfm2": {"layer_types": ["conv", "full_attention"] * 2},
    "llama": {},
    "llama with dynamic rope": {
        "model_type": "llama",
        "max_position_embeddings": 16,
        "rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0},
    },
    "llama with yarn": {
        "model_type": "llama",
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 1e4,
            "factor": 4.0,
            "original_max_position_embeddings": 32,
        },
    },
    "llama4_text": {**_LOCAL_EXPERTS, **_HEAD, "intermediate_size_mlp": 48, "attention_chunk_size": 4},
    "longcat_flash": {},
    "mamba": {"state_size": 4},
    "mamba2": {"state_size": 4, "num_heads": 8, "head_dim": 8, "n_groups": 1},
    "mimo_v2_flash": {**_ROUTED, **_HEAD, **_WINDOW},
    "minimax": {**_LOCAL_EXPERTS, **_HEAD, "layer_types": ["linear_attention", "full_attention"] * 2, "block_size": 8},
    "minimax_m2": {**_LOCAL_EXPERTS, **_HEAD},
    "ministral": {**_HEAD, **_WINDOW},
    "mistral": _WINDOW,
    "mixtral": _LOCAL_EXPERTS,
    "modernbert-decoder": {"local_attention": 4, "global_attn_every_n_layers": 2},
    "mpt": {"d_model": 32, "n_heads": 4, "n_layers": 4, "max_seq_len": 64},
    "nanochat": {},
    "nemotron": {},
    "nemotron_h": {
        **_HEAD,
        "mamba_num_heads": 4,
        "mamba_head_dim": 8,
        "ssm_state_size": 4,
        "n_groups": 1,
        "layers_block_type": ["mamba", "attention", "mamba", "mlp"],
    },
    "olmo": {},
    "olmo2": {},
    "olmo3": _WINDOW,
    "olmoe": _EXPERTS,
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32},
    "opt with projections": {
        "model_type": "opt",
        "ffn_dim": 48,
        "word_embed_proj_dim": 16,
        "do_layer_norm_before": False,
    },
    "persimmon": {},
    "phi": {},
    "phi3": _WINDOW,
    "phi3 with longrope": {
        "model_type": "phi3",
        "original_max_position_embeddings": 32,
        "rope_parameters": {
            "rope_type": "longrope",
            "rope_theta": 1e4,
            "short_factor": [1.0] * 4,
            "long_factor": [4.0] * 4,
            "original_max_position_embeddings": 32,
        },
    },
    "phimoe": {**_LOCAL_EXPERTS, **_ROPE},
    "qwen2": {},
    "qwen2_moe": {**_EXPERTS, "shared_expert_intermediate_size": 16},
    "qwen3": _HEAD,
    "qwen3_5_text": _DELTA,
    "qwen3_moe": {**_EXPERTS, **_HEAD},
    "qwen3_next": {**_EXPERTS, **_DELTA, "shared_expert_intermediate_size": 16},
    "recurrent_gemma": {
        **_HEAD,
        "lru_width": 32,
        "attention_window_size": 4,
        "block_types": ["recurrent", "recurrent", "attention"],
    },
    "rwkv": {"attention_hidden_size": 32},
    "seed_oss": _HEAD,
    "smollm3": {"no_rope_layers": [1, 1, 1, 0]},
    "solar_open": {**_ROUTED, **_HEAD},
    "stablelm": {},
    "starcoder2": _WINDOW,
    "vaultgemma": {**_HEAD, **_WINDOW, "query_pre_attn_scalar": 8},
    "xglm": {"d_model": 32, "ffn_dim": 48, "attention_heads": 4, "num_layers": 4},
    "xlstm": {"num_heads": 4, "num_blocks": 4, "chunk_size": 8},
    "zamba2": {
        "mamba_d_state": 4,
        "n_mamba_heads": 4,
        "mamba_headdim": 16,
        "mamba_ngroups": 1,
        "layers_block_type": ["mamba", "hybrid"] * 2,
        "num_mem_blocks": 1,
        "use_mem_rope": True,
        "adapter_rank": 4,
    },
}
LANGUAGE_MODELS: dict[str, Settings] = {
    name: {"model_type": name, **_COMMON, **settings} for name, settings in _LISTED.items()
}


@dataclass(frozen=True)
class Found:
    """Hold what a family can do: a row of docs/language_models.md.

    Attributes:
        refused: Message of the error when the model is built; "" where it is accepted.
        bfloat16: Whether a training step in bfloat16 works on the CPU.
        packing: Whether packed documents are kept apart.
        generation: Whether text is generated.
    """

    refused: str = ""
    bfloat16: bool = False
    packing: bool = False
    generation: bool = False


def build(family: str, dtype: str = "float32") -> Flamingo:
    """Build a Flamingo around a family's tiny language model."""
    config = tiny_config(language_model=LanguageModelConfig(architecture=LANGUAGE_MODELS[family]))
    return build_flamingo(config, BEYOND, dtype=dtype)  # type: ignore[arg-type]  # a str is no Literal


def step_loss(family: str, dtype: str) -> Tensor:
    """Return the loss of a training step with open gates, after its backward."""
    model = build(family, dtype)
    wake(model, 0.7)
    ids, media = text_with_media()
    loss = model(ids, attention_mask=torch.ones_like(ids), labels=ids, media=media).loss
    assert loss is not None
    loss.backward()
    untouched = [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert not untouched, untouched
    return loss.detach()


def starts_as_language_model(family: str) -> bool:
    """Return whether logits with media equal those of the language model alone, bit for bit, at the start."""
    model = build(family)
    lm = model.language_model.lm
    ids, media = text_with_media(replace(BEYOND, image_id=5, end_of_chunk_id=6))
    with torch.no_grad():
        found = model(ids, media=media, media_index=torch.zeros_like(ids)).logits[..., :VOCAB_SIZE]
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(1)  # build_flamingo's seed for the language model
        plain = build_language_model(LanguageModelConfig(architecture=LANGUAGE_MODELS[family]), torch.float32).eval()
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), lm.parameters(), strict=True))
    with torch.no_grad():
        return torch.equal(found, plain(input_ids=ids, use_cache=False).logits)


def try_out(family: str) -> Found:
    """Try out a family; it must be refused when the model is built, or train as the language model at the start."""
    try:
        model = build(family)
    except ValueError as error:
        return Found(refused=str(error))
    assert starts_as_language_model(family)
    loss = step_loss(family, "float32")
    assert loss.dtype == torch.float32 and loss.isfinite()
    assert UsefulFlops.of(model).lm_weights > 0
    return Found(
        bfloat16=_works(lambda: step_loss(family, "bfloat16")),
        packing=separates_packed_documents(model.language_model.lm),
        generation=_works(
            lambda: generate(model, [[BOS, BEYOND.image_id, 5, 6]], random_media(1), [1], max_new_tokens=3)
        ),
    )


def _works(call: Callable[[], Any]) -> bool:
    try:
        call()
    except Exception:  # noqa: BLE001  a family's own code may fail in any way
        return False
    return True


def main() -> None:
    """Print the tables, or the rows of the families that the command line names."""
    torch.set_num_threads(1)
    for family in sys.argv[1:] or LANGUAGE_MODELS:
        print(table_row(family, try_out(family)), flush=True)


def table_row(family: str, found: Found) -> str:
    """Return the row of docs/language_models.md."""
    if found.refused:
        return f"| {family} | {found.refused.split(', so no')[0].partition(': choose')[0]} |"
    answers = ("yes" if answer else "no" for answer in (found.bfloat16, found.packing, found.generation))
    return f"| {family} | {' | '.join(answers)} |"


if __name__ == "__main__":
    main()
