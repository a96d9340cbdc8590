"""How times are taken. A time is a median; its spread is the distance between the quartiles."""

from __future__ import annotations

import functools
import statistics
import time
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

Call = Callable[[], Any]
# Sees the result of a timed call, and raises where it is wrong.
Judge = Callable[[Any], None]

# A call that takes longer is timed once.
LONG_CALL_S = 2.0
WARM_UP_S = 0.02
MOST_SAMPLES = 50
FEWEST_SAMPLES = 3
MOST_COPIES = 256


class Timing(NamedTuple):
    """``mode`` is "graph" (CUDA-graph replay, cold L2), "launched" (calls one after another from Python, cold L2; what
    allocates or synchronises can't be captured) or "cpu" (warm caches, implementations in turns)."""

    us: float
    us_spread: float
    mode: str

    @classmethod
    def of(cls, seconds: Sequence[float], mode: str) -> Timing:
        us = sorted(1e6 * second for second in seconds)
        quarter = len(us) // 4
        return cls(statistics.median(us), us[-1 - quarter] - us[quarter], mode)


def alternate(
    calls: dict[str, Call], budget_s: float, calls_per_sample: int = 1, judge: Callable[[str, Any], None] | None = None
) -> dict[str, list[float]]:
    """Seconds a call, sampled in turns so that a drift of the clock or a neighbour's load meets all of them alike.

    Ends after ``budget_s`` seconds, but not before every call has three samples; a call that takes longer than
    ``LONG_CALL_S`` gets one. ``judge(name, result)`` sees the result of each call's last sample.
    """
    samples: dict[str, list[float]] = {name: [] for name in calls}
    results: dict[str, Any] = {}
    for call in calls.values():
        call()
    end = time.perf_counter() + budget_s
    rounds = 0
    while rounds < FEWEST_SAMPLES or (time.perf_counter() < end and rounds < 2000):
        for name, call in calls.items():
            if samples[name] and samples[name][0] * calls_per_sample > LONG_CALL_S:
                continue
            results[name] = None  # the memory of the last result may serve the next
            start = time.perf_counter()
            for _ in range(calls_per_sample):
                results[name] = call()
            samples[name].append((time.perf_counter() - start) / calls_per_sample)
        rounds += 1
    if judge is not None:
        for name, result in results.items():
            judge(name, result)
    return samples


def time_cpu(
    calls: dict[str, Call], budget_s: float = 2.0, judge: Callable[[str, Any], None] | None = None
) -> dict[str, Timing]:
    return {name: Timing.of(sample, "cpu") for name, sample in alternate(calls, budget_s, judge=judge).items()}


def l2_bytes() -> int:
    return torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size


def copies_for_cold_cache(bytes_touched: int) -> int:
    """How many sets of inputs to go round, so that each is out of the L2 cache when its turn comes.

    At most MOST_COPIES: tiny cases would need ten thousands. For these time_cuda empties the cache between two rounds.
    """
    return min(max(2, -(-3 * l2_bytes() // max(int(bytes_touched), 1))), MOST_COPIES)


def _empty_l2() -> None:
    """Reads, and doesn't write: lines that must be written back would slow down what follows."""
    _reader().sum()


@functools.cache
def _reader() -> Tensor:
    return torch.ones(3 * l2_bytes() // 4, device="cuda")


def time_cuda(calls: Sequence[Call], budget_s: float = 0.15, judge: Judge | None = None) -> Timing:
    """Time of one call, the calls being the same work on different copies of the inputs (see copies_for_cold_cache).

    All of them are captured into one CUDA graph, whose replay has no launch cost of Python in it. Their results are
    filled with NaN before the first replay, and ``judge`` sees the first and the last afterwards, so what is judged is
    what was timed.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        calls[0]()  # a first call may compile, choose an algorithm or allocate
        estimate, result = _sample(lambda: calls[-1]())
        if estimate > LONG_CALL_S:
            if judge is not None:
                judge(result)
            return Timing.of([estimate], "launched")
        del result
        captured = _capture(calls, stream)
        if captured is None:
            mode, play = "launched", lambda: [call() for call in calls]
        else:
            graph, results = captured
            for result in results:
                _poison(result)

            def play() -> list[Any]:
                graph.replay()
                return results

            mode = "graph"
        tiny = len(calls) >= MOST_COPIES
        warm_up_end = time.perf_counter() + WARM_UP_S
        while time.perf_counter() < warm_up_end:
            _sample(play)
        seconds: list[float] = []
        end = time.perf_counter() + budget_s
        while len(seconds) < FEWEST_SAMPLES or (time.perf_counter() < end and len(seconds) < MOST_SAMPLES):
            if tiny:
                _empty_l2()
            taken, results = _sample(play)
            seconds.append(taken / len(calls))
        if judge is not None:
            judge(results[0])
            judge(results[-1])
    torch.cuda.current_stream().wait_stream(stream)
    return Timing.of(seconds, mode)


def time_all(
    device: str,
    calls: dict[str, Sequence[Call]],
    budget_s: float | None = None,
    judge: Callable[[str, Any], None] | None = None,
) -> dict[str, Timing]:
    """Times every implementation: on a GPU each over its copies, on a CPU in turns (only its first call).

    Args:
        calls: for each name the same work on copies of its inputs, one of them enough on a CPU.
        budget_s: seconds of sampling, on a GPU for each name and on a CPU for all together.
        judge: ``judge(name, result)`` sees results of the timed calls and raises where one is wrong.
    """
    if device == "cpu":
        return time_cpu({name: copies[0] for name, copies in calls.items()}, budget_s or 2.0, judge)

    def judge_of(name: str) -> Judge | None:
        return None if judge is None else lambda result: judge(name, result)

    return {name: time_cuda(copies, budget_s or 0.15, judge_of(name)) for name, copies in calls.items()}


def _sample(play: Call) -> tuple[float, Any]:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    result = play()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) * 1e-3, result


def _capture(calls: Sequence[Call], stream: torch.cuda.Stream) -> tuple[torch.cuda.CUDAGraph, list[Any]] | None:
    """The calls as one graph, None where one of them can't be captured."""
    torch.cuda.synchronize()
    # torch.cuda.graph would collect garbage and empty the allocator's cache every time, which takes longer than the
    # timing. What earlier graphs held stays in the cache, though.
    if torch.cuda.memory_reserved() > torch.cuda.get_device_properties(stream.device).total_memory // 2:
        torch.cuda.empty_cache()
    # A capture that fails leaves the random number generator believing that it goes on.
    generator = torch.cuda.default_generators[torch.cuda.current_device()]
    before = generator.clone_state()
    graph = torch.cuda.CUDAGraph()
    graph.capture_begin()
    try:
        results = [call() for call in calls]
    except RuntimeError:
        results = None
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "The CUDA Graph is empty")
            graph.capture_end()
    except RuntimeError:
        results = None
    if results is None:
        generator.graphsafe_set_state(before)
        torch.cuda.synchronize()
        return None
    return graph, results


def _poison(result: Any) -> None:
    if isinstance(result, Tensor):
        values = result.values() if result.layout == torch.sparse_csr else result
        if values.is_floating_point():
            values.fill_(torch.nan)
