"""How times are taken. A time is a median; its spread is the distance between the quartiles."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

Call = Callable[[], Any]


class Timing(NamedTuple):
    """``regime`` is "graph" (CUDA-graph replay, cold L2), "eager" (launches one after another, cold L2) or "cpu" (warm
    caches, implementations in turns)."""

    us: float
    us_spread: float
    regime: str

    @classmethod
    def of(cls, seconds: Sequence[float], regime: str) -> Timing:
        us = sorted(1e6 * second for second in seconds)
        quarter = len(us) // 4
        return cls(statistics.median(us), us[-1 - quarter] - us[quarter], regime)


def alternate(calls: dict[str, Call], budget_s: float, calls_per_sample: int = 1) -> dict[str, list[float]]:
    """Seconds a call, sampled in turns so that a drift of the clock or a neighbour's load meets all of them alike.

    Ends after ``budget_s`` seconds, but not before every call has three samples (one, if that alone takes the budget).
    """
    samples: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        call()
    end = time.perf_counter() + budget_s
    rounds = 0
    while rounds < 1 or (time.perf_counter() < end and rounds < 2000) or (rounds < 3 and _total(samples) < budget_s):
        for name, call in calls.items():
            start = time.perf_counter()
            for _ in range(calls_per_sample):
                call()
            samples[name].append((time.perf_counter() - start) / calls_per_sample)
        rounds += 1
    return samples


def _total(samples: dict[str, list[float]]) -> float:
    return sum(sum(sample) for sample in samples.values())


def time_cpu(calls: dict[str, Call], budget_s: float = 2.0) -> dict[str, Timing]:
    return {name: Timing.of(sample, "cpu") for name, sample in alternate(calls, budget_s).items()}


def l2_bytes() -> int:
    return torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size


def copies_for_cold_cache(bytes_touched: int) -> int:
    """How many sets of inputs to go round, so that each is out of the L2 cache when its turn comes."""
    return max(2, -(-3 * l2_bytes() // max(bytes_touched, 1)))


def time_cuda(calls: Sequence[Call], replays: int = 30) -> Timing:
    """Time of one call, the calls being the same work on different copies of the inputs (see copies_for_cold_cache).

    All of them are captured into one CUDA graph, whose replay has no launch cost of Python in it. What can't be
    captured (torch's sparse products may allocate and synchronise) is launched back to back instead.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for call in calls:
            call()
    stream.synchronize()
    try:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            for call in calls:
                call()
        regime, play = "graph", graph.replay
    except RuntimeError:
        torch.cuda.synchronize()
        regime, play = "eager", lambda: [call() for call in calls]
    play()
    seconds = []
    for _ in range(replays):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        play()
        end.record()
        end.synchronize()
        seconds.append(start.elapsed_time(end) * 1e-3 / len(calls))
    return Timing.of(seconds, regime)
