"""Reach into the parts of DeepSpeed that run before there is an engine; all others are in ``deepspeed_engine``.

Checked with DeepSpeed 0.19.8. ``tests/runtime/test_deepspeed_internals.py`` fails when the name disappears.
"""

from __future__ import annotations

import deepspeed


def skip_shared_memory_op() -> None:
    """Keep ``deepspeed.init_distributed`` from compiling the op ``deepspeed_shm_comm``; call this before it.

    Reason: on a CPU, DeepSpeed compiles the op at its first initialization, for 1 to 4 minutes. Only
    ``inference_all_reduce`` uses it.
    Upstream issue: none found.
    """
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
