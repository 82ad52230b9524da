"""Test the error that a user reads when the memory of a device is too small."""

from __future__ import annotations

import pytest
import torch

from trainer.runtime.device_memory import OutOfDeviceMemoryError, explain_out_of_memory


def test_the_error_names_the_settings_to_change() -> None:
    message = "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has 1.00 GiB free."
    with pytest.raises(OutOfDeviceMemoryError, match="Tried to allocate 2.00 GiB") as caught, explain_out_of_memory():
        raise torch.OutOfMemoryError(
            f"{message} If reserved but unallocated memory is large try setting this and that."
        )
    assert "micro_batch_size" in str(caught.value) and "trainer.plan CONFIG --search" in str(caught.value)
    assert "try setting" not in str(caught.value)
    assert caught.value.exit_code == 1


def test_other_errors_pass_unchanged() -> None:
    with pytest.raises(RuntimeError, match="shapes") as caught, explain_out_of_memory():
        raise RuntimeError("shapes do not match")
    assert type(caught.value) is RuntimeError


@pytest.mark.gpu
def test_a_gpu_raises_it() -> None:
    with pytest.raises(OutOfDeviceMemoryError, match="micro_batch_size"), explain_out_of_memory():
        torch.empty(1 << 50, device="cuda")
