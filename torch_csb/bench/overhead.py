"""What a call of a 64 x 64 layer costs beside F.linear: the price of the Python and dispatcher path."""

from __future__ import annotations

import argparse
import statistics

import torch
import torch.nn.functional as F
from torch import nn

from torch_csb import CSBLinear
from torch_csb.bench.timing import Call, alternate

# Largest extra cost in µs that a call may have on the CPU.
GOALS = {"no gradient": 4.0, "autograd": 9.0}
CALLS_PER_SAMPLE = 200


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--seconds", type=float, default=6.0, help="for each comparison")
    parser.add_argument("--batch", type=int, default=1)


def run(options: argparse.Namespace) -> int:
    torch.manual_seed(0)
    linear = nn.Linear(64, 64)
    linear.weight.data *= torch.rand(64, 64) < 0.1
    layer = CSBLinear.from_dense(linear)
    weight, bias = linear.weight, linear.bias
    x = torch.randn(options.batch, 64)
    grad = torch.randn(options.batch, 64)
    torch.testing.assert_close(layer(x), linear(x))

    def backward(call: Call) -> Call:
        return lambda: call().backward(grad)

    print(
        f"64 x 64, 90 %, batch {options.batch}, {torch.get_num_threads()} threads, torch {torch.__version__}; µs a call"
    )
    print(f"{'':22}{'F.linear':>10}{'CSBLinear':>11}{'extra':>8}{'goal':>7}")
    missed = False
    with torch.no_grad():
        missed |= _compare("no gradient", lambda: F.linear(x, weight, bias), lambda: layer(x), options.seconds)
    missed |= _compare("autograd", lambda: F.linear(x, weight, bias), lambda: layer(x), options.seconds)
    dense_step, csb_step = backward(lambda: F.linear(x, weight, bias)), backward(lambda: layer(x))
    _compare("forward and backward", dense_step, csb_step, options.seconds)
    return 1 if missed else 0


def _compare(name: str, dense: Call, csb: Call, seconds: float) -> bool:
    """Prints a line; True where the goal is missed. The difference is taken turn by turn, then its median."""
    samples = alternate({"dense": dense, "csb": csb}, seconds, CALLS_PER_SAMPLE)
    extra = 1e6 * statistics.median(b - a for a, b in zip(samples["dense"], samples["csb"], strict=True))
    dense_us, csb_us = (1e6 * statistics.median(samples[key]) for key in ("dense", "csb"))
    goal = GOALS.get(name)
    print(f"{name:22}{dense_us:10.2f}{csb_us:11.2f}{extra:8.2f}{'' if goal is None else f'{goal:7.1f}'}")
    return goal is not None and extra > goal
