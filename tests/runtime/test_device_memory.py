"""What a user reads when a device's memory does not suffice."""

from __future__ import annotations

import pytest
import torch

from trainer.runtime.device_memory import OutOfDeviceMemoryError, exhaustion_explained


def test_it_says_what_to_set() -> None:
    said = "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has 1.00 GiB free."
    with pytest.raises(OutOfDeviceMemoryError, match="Tried to allocate 2.00 GiB") as caught, exhaustion_explained():
        raise torch.OutOfMemoryError(f"{said} If reserved but unallocated memory is large try setting this and that.")
    assert "micro_batch_size" in str(caught.value) and "trainer.plan CONFIG --search" in str(caught.value)
    assert "try setting" not in str(caught.value)
    assert caught.value.exit_code == 1


def test_other_errors_pass() -> None:
    with pytest.raises(RuntimeError, match="shapes") as caught, exhaustion_explained():
        raise RuntimeError("shapes do not match")
    assert type(caught.value) is RuntimeError


@pytest.mark.gpu
def test_what_a_gpu_says() -> None:
    with pytest.raises(OutOfDeviceMemoryError, match="micro_batch_size"), exhaustion_explained():
        torch.empty(1 << 50, device="cuda")
