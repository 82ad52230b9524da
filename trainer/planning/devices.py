"""Describe accelerators by their data sheets."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Device:
    """Describe an accelerator by its data sheet, or by what ``trainer.benchmark rates`` measured.

    Attributes:
        tflops: Peak of dense bfloat16 products, in 10^12 operations per second.
        memory: Bytes that a process can allocate.
        host_link: Bytes per second to the host, in one direction.
        node_link: Bytes per second between two devices of a node, in one direction.
        network: Bytes per second of one device to other nodes: its share of the node's adapters.
        flops: Measured operations per second of a model's blocks; None where nothing was measured.
        optimizer: Measured bytes per second of AdamW's step; None where nothing was measured.
        overlaps: Whether the device computes while it sends. A CPU does not.
    """

    tflops: float
    memory: float
    host_link: float
    node_link: float
    network: float
    flops: float | None = None
    optimizer: float | None = None
    overlaps: bool = True


# From NVIDIA's data sheets. memory is about 1 GB below the nominal size, which the driver and CUDA take.
# network assumes an adapter per device: 400 Gbit/s, and 200 Gbit/s beside an A100.
DEVICES = {
    "a100-40": Device(312, 39e9, 25e9, 300e9, 25e9),
    "a100-80": Device(312, 79e9, 25e9, 300e9, 25e9),
    "h100": Device(989, 79e9, 50e9, 450e9, 50e9),
    "h200": Device(989, 140e9, 50e9, 450e9, 50e9),
    "b200": Device(2250, 180e9, 50e9, 900e9, 50e9),
    "rtx-4090": Device(165, 24e9, 25e9, 25e9, 12e9),
}
