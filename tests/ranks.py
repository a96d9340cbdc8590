"""Two processes that stay up and run functions together, as the ranks of one process group.

Starting a process that imports torch takes longer than most tests. So the processes live on, and with them their group.
"""

from __future__ import annotations

import contextlib
import faulthandler
import multiprocessing
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

WORLD = 2
BACKENDS = {"cpu": "gloo", "cuda": "nccl"}
# A rank that waits for another one in vain is told so before the tests give up on both.
TIMEOUT = 60


def mesh_of(device: str) -> DeviceMesh:
    return init_device_mesh(device, (WORLD,))


def _serve(rank: int, device: str, store: str, pipe: Connection) -> None:
    faulthandler.enable()
    torch.set_num_threads(1)
    if device == "cuda":
        torch.cuda.set_device(rank)
    while (job := pipe.recv()) is not None:
        function, arguments = job
        try:
            torch.manual_seed(0)
            # One group for all jobs: torch 2.11 remembers groups by name, also of a world that was destroyed. No
            # device_id: with one it splits NCCL's communicator for a mesh of two dimensions, and crashes.
            if not dist.is_initialized():
                dist.init_process_group(
                    BACKENDS[device],
                    init_method=f"file://{store}",
                    rank=rank,
                    world_size=WORLD,
                    timeout=timedelta(seconds=TIMEOUT),
                )
            pipe.send((True, function(device, *arguments)))
        except BaseException:
            pipe.send((False, traceback.format_exc()))
            return  # The other rank may wait in a collective that never comes: both processes go.
    if dist.is_initialized():
        dist.destroy_process_group()


class Ranks:
    """``run(function, *arguments)`` calls ``function(device, *arguments)`` on both ranks and returns both results.

    Results are numbers and text, not tensors. What a rank raises, the test raises.
    """

    def __init__(self, device: str) -> None:
        self.device = device
        self._processes: list[Any] = []

    def run(self, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        if not self._processes:
            self._start()
        try:
            for pipe in self._pipes:
                pipe.send((function, arguments))
            return self._collect(function.__name__, time.monotonic() + 2 * TIMEOUT)
        except BaseException:
            self.stop()
            raise

    def _collect(self, name: str, deadline: float) -> list[Any]:
        results: dict[int, Any] = {}
        while len(results) < WORLD:
            waiting = [pipe for rank, pipe in enumerate(self._pipes) if rank not in results]
            ready = wait(waiting, max(0.0, deadline - time.monotonic()))
            if not ready:
                raise TimeoutError(f"{name}: rank {', '.join(self._silent(results))} gave no answer in time")
            for pipe in ready:
                rank = self._pipes.index(pipe)
                try:
                    fine, results[rank] = pipe.recv()
                except EOFError:
                    self._processes[rank].join(5)
                    code = self._processes[rank].exitcode
                    raise RuntimeError(f"{name}: the process of rank {rank} died with exit code {code}") from None
                if not fine:
                    raise AssertionError(f"{name}, rank {rank} of {WORLD} on {self.device}:\n{results[rank]}")
        return [results[rank] for rank in range(WORLD)]

    def _silent(self, results: dict[int, Any]) -> list[str]:
        return [str(rank) for rank in range(WORLD) if rank not in results]

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._folder = tempfile.TemporaryDirectory()
        store = f"{self._folder.name}/store"
        self._pipes, ends = zip(*(context.Pipe() for _ in range(WORLD)), strict=True)
        self._processes = [
            context.Process(target=_serve, args=(rank, self.device, store, end), daemon=True)
            for rank, end in enumerate(ends)
        ]
        for process, end in zip(self._processes, ends, strict=True):
            process.start()
            end.close()

    def stop(self, *, at_once: bool = True) -> None:
        pipes = self._pipes if self._processes else ()
        for pipe in () if at_once else pipes:
            with contextlib.suppress(OSError):  # It may be gone already.
                pipe.send(None)
        for process, pipe in zip(self._processes, pipes, strict=True):
            process.join(0 if at_once else 5)
            process.kill()
            process.join()
            pipe.close()
        if self._processes:
            self._folder.cleanup()
        self._processes = []
