"""Test that the private name of DeepSpeed that ``trainer.runtime`` uses is there."""

from __future__ import annotations

import deepspeed
from deepspeed.comm.torch import build_shm_op

from trainer.runtime.deepspeed_internals import skip_shared_memory_op


def test_the_shared_memory_op_is_not_compiled() -> None:
    assert "deepspeed_shm_comm" in deepspeed.ops.__compatible_ops__
    skip_shared_memory_op()
    assert build_shm_op() is None
