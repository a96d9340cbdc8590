"""What a device allows: the shortest time for a product is the longer of its bytes at full bandwidth and its operations
at full rate."""

from __future__ import annotations

from typing import NamedTuple

import torch


class Limits(NamedTuple):
    bytes_per_s: float  # read from main memory
    flops_16_bit: float
    flops_32_bit: float


# Measured (CUDA-graph replays: a reading kernel, cuBLAS), keyed by a part of the device's name.
DEVICES = {"H200": Limits(4.4e12, 700e12, 51e12)}


def limit_us(device_name: str, dtype: torch.dtype, bytes_moved: float, flops: float) -> float | None:
    """Shortest time in µs, or None for a device (or float64) that nobody measured."""
    limits = next((limits for part, limits in DEVICES.items() if part in device_name), None)
    if limits is None or dtype == torch.float64:
        return None
    rate = limits.flops_16_bit if dtype.itemsize == 2 else limits.flops_32_bit
    return 1e6 * max(bytes_moved / limits.bytes_per_s, flops / rate)
