"""Name the tensors of a Llama, which both IDEFICS and Llama 3.2 Vision have as their language model."""

from __future__ import annotations

from transformers import LlamaConfig

from model.imports.tensor_map import Entry, same


def block_entries(config: LlamaConfig, ours: str, theirs: str) -> list[Entry]:
    """Return the entries of one block, whose names begin with ``ours`` here and ``theirs`` there."""
    dim, hidden = config.hidden_size, config.intermediate_size
    head_dim = dim // config.num_attention_heads
    kv = config.num_key_value_heads * head_dim
    shapes = {
        "self_attn.q_proj": (dim, dim),
        "self_attn.k_proj": (kv, dim),
        "self_attn.v_proj": (kv, dim),
        "self_attn.o_proj": (dim, dim),
        "mlp.gate_proj": (hidden, dim),
        "mlp.up_proj": (hidden, dim),
        "mlp.down_proj": (dim, hidden),
        "input_layernorm": (dim,),
        "post_attention_layernorm": (dim,),
    }
    return [same(f"{ours}.{name}.weight", f"{theirs}.{name}.weight", *shape) for name, shape in shapes.items()]
