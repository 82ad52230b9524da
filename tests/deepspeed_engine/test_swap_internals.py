"""What is read ahead from a drive, and what is given up when a parameter that is needed finds no buffer."""

from __future__ import annotations

import inspect
from collections import deque
from types import SimpleNamespace
from typing import Any

import pytest
from deepspeed.runtime.swap_tensor import partitioned_param_swapper
from deepspeed.runtime.swap_tensor.partitioned_param_swapper import PartitionedParamStatus
from deepspeed.runtime.zero.offload_config import OffloadDeviceEnum
from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus
from deepspeed.runtime.zero.partitioned_param_coordinator import PartitionedParameterCoordinator

from trainer.deepspeed_engine import swap_internals

Swapper = partitioned_param_swapper.AsyncPartitionedParameterSwapper


def swapper(monkeypatch: pytest.MonkeyPatch, buffers: int) -> Any:
    """Return a swapper that notes what it reads and gives up, without a drive."""
    made: Any = object.__new__(swap_internals._Swapper)
    made._read, made.available_buffer_ids, made.available_params = {}, list(range(buffers)), set()
    made.read_ids, made.given_up, made._released_bytes = [], [], 0

    def swap_in(self: Any, params: Any, async_op: bool = True, swap_in_buffers: Any = None) -> None:
        assert len(params) <= len(self.available_buffer_ids)
        del self.available_buffer_ids[: len(params)]
        self.available_params |= {param.ds_id for param in params}
        self.read_ids.append([param.ds_id for param in params])

    def remove(self: Any, params: Any) -> None:
        self.given_up += [param.ds_id for param in params]
        self.available_params -= {param.ds_id for param in params}
        self.available_buffer_ids += [0] * len(params)

    monkeypatch.setattr(Swapper, "swap_in", swap_in)
    monkeypatch.setattr(Swapper, "remove_partition_and_release_buffers", remove)
    monkeypatch.setattr(Swapper, "synchronize_reads", lambda self: None)
    return made


def parameter(number: int, drive: Any, *, elements: int = 10, gathered: bool = False, location: str = "nvme") -> Any:
    tensor = SimpleNamespace(
        final_location=OffloadDeviceEnum(location) if location != "none" else None,
        status=PartitionedParamStatus.NOT_AVAILABLE,
    )
    status = ZeroParamStatus.AVAILABLE if gathered else ZeroParamStatus.NOT_AVAILABLE
    return SimpleNamespace(
        ds_id=number,
        nvme_swapper=drive,
        ds_tensor=tensor,
        ds_numel=elements,
        ds_status=status,
        element_size=lambda: 2,
    )


def coordinator(queue: list[Any], most: int) -> Any:
    names = {"param_queue": deque(SimpleNamespace(param=param) for param in queue), "prefetch_bucket_sz": most}
    private = {f"{swap_internals._PRIVATE}{name}": value for name, value in names.items()}
    return SimpleNamespace(is_complete_trace=lambda: True, **private)


def test_the_next_parameters_are_read_into_the_free_buffers(monkeypatch: pytest.MonkeyPatch) -> None:
    drive = swapper(monkeypatch, buffers=3)
    twice = parameter(1, drive)
    queue = [
        parameter(0, None),
        twice,
        parameter(2, drive, location="none"),
        twice,
        *(parameter(i, drive) for i in (3, 4, 5)),
    ]
    swap_internals._read_ahead(coordinator(queue, most=1000))
    assert drive.read_ids == [[1, 3, 4]]


def test_no_more_elements_are_read_ahead_than_the_setting_says(monkeypatch: pytest.MonkeyPatch) -> None:
    drive = swapper(monkeypatch, buffers=9)
    swap_internals._read_ahead(coordinator([parameter(i, drive) for i in range(9)], most=25))
    assert drive.read_ids == [[0, 1, 2]]


def test_what_was_read_ahead_makes_room_the_last_first(monkeypatch: pytest.MonkeyPatch) -> None:
    drive = swapper(monkeypatch, buffers=4)
    drive.swap_in([parameter(0, drive, gathered=True), *(parameter(i, drive) for i in (1, 2, 3))])
    drive.swap_in([parameter(8, drive), parameter(9, drive)], async_op=False)
    assert drive.given_up == [3, 2] and drive.read_ids[-1] == [8, 9]


def test_freed_memory_is_returned_once_for_many_released_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    returned: list[int] = []
    drive = swapper(monkeypatch, buffers=0)
    monkeypatch.setattr(swap_internals, "return_freed_memory", lambda: returned.append(len(drive.given_up)))
    quarter = swap_internals._MOST_KEPT_BYTES // 4
    for number in range(12):
        drive.remove_partition_and_release_buffers([parameter(number, drive, elements=quarter // 2)])
    assert returned == [5, 10]


def test_deepspeed_has_the_names_that_are_replaced_and_read() -> None:
    assert hasattr(PartitionedParameterCoordinator, f"{swap_internals._PRIVATE}prefetch_nvme_param_partitions")
    assert list(inspect.signature(Swapper.remove_partition_and_release_buffers).parameters) == ["self", "params"]
    assert list(inspect.signature(Swapper.swap_in).parameters) == ["self", "params", "async_op", "swap_in_buffers"]
    source = inspect.getsource(PartitionedParameterCoordinator)
    for name in ("__param_queue", "__prefetch_bucket_sz", "self.__prefetch_nvme_param_partitions()"):
        assert name in source
