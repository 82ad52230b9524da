"""Describe accelerators by their data sheets."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from model.config import QuantizationMethod

_GIB = 2.0**30


@dataclass(frozen=True)
class Device:
    """Describe an accelerator by its data sheet, or by what ``trainer.benchmark rates`` measured.

    Attributes:
        tflops: Peak of dense bfloat16 products, in 10^12 operations per second.
        memory: Bytes of the device, as its driver reports them.
        host_link: Bytes per second to the host, in one direction.
        node_link: Bytes per second between two devices of a node, in one direction.
        network: Bytes per second of one device to other nodes: its share of the node's adapters.
        flops: Measured operations per second of a model's blocks; None where nothing was measured.
        optimizer: Measured bytes per second of AdamW's step; None where nothing was measured.
        overlaps: Whether the device computes while it sends. A CPU does not.
        reserved: Bytes that no tensor can use: the CUDA context and the buffers of NCCL and cuBLAS.
        fragmentation: Bytes that the allocator cannot use, as a share of those in tensors.
        message_seconds: Seconds that a collective takes before its first byte, and again for each rank in the ring.
        made_whole: Measured bytes per second of weights that ZeRO-3 makes whole, where it takes time from the
            computation; None elsewhere.
        scatter_ratio: How many times as long a byte of a reduce-scatter takes as one of an all-gather.
        drive: Bytes per second that a node reads from its drives or writes to them; infinite where it is unknown.
        memory_link: Bytes per second between the device and its own memory; infinite where it is unknown.
        dequantized: Measured weights per second that turn from codes into numbers, by method.
    """

    tflops: float
    memory: float
    host_link: float
    node_link: float
    network: float
    flops: float | None = None
    optimizer: float | None = None
    overlaps: bool = True
    reserved: float = 0.0
    fragmentation: float = 0.0
    message_seconds: tuple[float, float] = (0.0, 0.0)
    made_whole: float | None = None
    scatter_ratio: float = 1.0
    drive: float = float("inf")
    memory_link: float = float("inf")
    dequantized: Mapping[QuantizationMethod, float] = field(default_factory=dict)


def _nvidia(
    tflops: float, memory_gib: float, memory_link: float, host_link: float, node_link: float, network: float
) -> Device:
    """Describe a GPU by its data sheet, with assumptions on what its libraries take.

    The context takes about 0.5 GiB, NCCL's buffers and cuBLAS's workspaces about 1 GiB. Expandable segments leave a few
    percent unused. A ring's message costs its kernel and about 2 microseconds for each rank. A node has one
    drive, on PCIe 4.0.
    """
    return Device(
        tflops,
        memory_gib * _GIB,
        host_link,
        node_link,
        network,
        reserved=1.5 * _GIB,
        fragmentation=0.04,
        message_seconds=(20e-6, 2e-6),
        drive=7e9,
        memory_link=memory_link,
    )


# Rates are those of NVIDIA's data sheets. network assumes an adapter for each device: 400 Gbit/s, and 200 Gbit/s beside
# an A100.
DEVICES = {
    "a100-40": _nvidia(312, 39.4, 1555e9, 25e9, 300e9, 25e9),
    "a100-80": _nvidia(312, 79.2, 2039e9, 25e9, 300e9, 25e9),
    "h100": _nvidia(989, 79.1, 3350e9, 50e9, 450e9, 50e9),
    "h200": _nvidia(989, 139.8, 4800e9, 50e9, 450e9, 50e9),
    "b200": _nvidia(2250, 178.3, 8000e9, 50e9, 900e9, 50e9),
    "rtx-4090": _nvidia(165, 23.6, 1008e9, 25e9, 25e9, 12e9),
}
