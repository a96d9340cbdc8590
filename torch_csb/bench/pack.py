"""What converting a weight takes: CSBMatrix.from_dense of one large layer."""

from __future__ import annotations

import argparse
import time

import torch

from torch_csb import CSBMatrix
from torch_csb.bench.options import add_common
from torch_csb.bench.patterns import make_mask
from torch_csb.bench.report import Provenance


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_common(parser)
    parser.add_argument("--m", type=int, default=28672)
    parser.add_argument("--k", type=int, default=8192)
    parser.add_argument("--sparsity", type=float, default=0.9)


def run(options: argparse.Namespace) -> int:
    generator = torch.Generator(options.device).manual_seed(options.seed)
    print(f"{options.m} x {options.k}, {options.sparsity:.0%} zeros, {Provenance.of(options.device).device}")
    for dtype in (torch.float32, torch.bfloat16):
        mask = make_mask("uniform", options.m, options.k, options.sparsity, options.device, generator)
        weight = torch.randn(mask.shape, device=options.device, generator=generator).to(dtype).mul_(mask)
        seconds = []
        for _ in range(6):
            _synchronize(options.device)
            start = time.perf_counter()
            w = CSBMatrix.from_dense(weight, target=options.device)
            _synchronize(options.device)
            seconds.append(time.perf_counter() - start)
        if not torch.equal(w.to_dense(), weight):
            print("the packed weight does not unpack to itself")
            return 1
        name = str(dtype).removeprefix("torch.")
        print(f"{name:9} {1e3 * sorted(seconds[1:])[2]:10.2f} ms, {w.nbytes / weight.nbytes:.3f} of the dense bytes")
    return 0


def _synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()
