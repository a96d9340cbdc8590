"""What a fine-tuning step is done on: a model with its optimizer and one batch, its memory, gradients and time."""

from __future__ import annotations

import copy
import gc
import time
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torch_csb.bench import nets
from torch_csb.bench.timing import Timing
from torch_csb.nn import CSBLinear, sparsify_

WARM_UP, FEWEST_STEPS, MOST_STEPS = 3, 5, 30
PARTS = ("weights", "gradients", "optimizer", "activations", "workspace")


class Trainee:
    """A model with its optimizer and one batch."""

    def __init__(self, model: nn.Module, x: Tensor, target: Tensor) -> None:
        self.model, self.x, self.target = model.train(), x, target
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)

    def forward(self) -> Tensor:
        return F.mse_loss(self.model(self.x), self.target)

    def step(self) -> None:
        self.forward().backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def memory(self) -> dict[str, int | None]:
        """Bytes of one more step, after the first has made the optimizer's state."""
        on_gpu = self.x.is_cuda
        nets.forget_masked_weights(self.model)
        gc.collect()
        weights = nets.weight_bytes(self.model)
        # AdamW counts its steps in one element on the host.
        slots = [t for slots in self.optimizer.state.values() for t in slots.values() if isinstance(t, Tensor)]
        state = nets.bytes_held(*(t for t in slots if t.device == self.x.device))
        if on_gpu:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            loss = self.forward()
            activations = torch.cuda.memory_allocated() - before
        else:
            loss, activations = self._saved_for_backward()
        loss.backward()
        del loss
        gradients = nets.bytes_held(*(p.grad for p in self.model.parameters() if p.grad is not None))
        self.optimizer.step()
        peak = workspace = None
        if on_gpu:
            torch.cuda.synchronize()
            # Before the step this trainee held its weights and its optimizer's state.
            peak = torch.cuda.max_memory_allocated() - before + weights + state
            workspace = peak - weights - gradients - state - activations
        self.optimizer.zero_grad(set_to_none=True)
        held = (weights, gradients, state, activations, workspace)
        return {"peak_bytes": peak} | {f"{part}_bytes": size for part, size in zip(PARTS, held, strict=True)}

    def _saved_for_backward(self) -> tuple[Tensor, int]:
        known = {t.untyped_storage().data_ptr() for t in (*self.model.parameters(), *self.model.buffers())}
        known |= {self.x.untyped_storage().data_ptr(), self.target.untyped_storage().data_ptr()}
        saved: dict[int, int] = {}

        def pack(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in known:
                saved[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss = self.forward()
        return loss, sum(saved.values())


def make_trainees(
    device: str, dtype: torch.dtype, width: int, depth: int, batch: int, sparsity: float, seed: int
) -> dict[str, Trainee]:
    torch.manual_seed(seed)
    dense = nets.mlp(width, depth).to(device)
    masked = copy.deepcopy(dense)
    nets.prune_by_magnitude(masked, sparsity)
    nets.forget_masked_weights(masked)
    dense, masked = dense.to(dtype), masked.to(dtype)
    csb = copy.deepcopy(masked)
    report = sparsify_(csb, target=device, progress=False)
    if len(report.converted) < depth:
        raise ValueError(f"step: expected all {depth} layers to be converted\n{report}")
    x, target = (torch.randn(batch, width).to(device=device, dtype=dtype) for _ in range(2))
    return {name: Trainee(model, x, target) for name, model in (("dense", dense), ("masked", masked), ("csb", csb))}


def gradient_error(trainee: Trainee, model: nn.Module) -> float:
    """The worst relative Frobenius error of the weights' gradients against those of ``model`` in float64, at the
    entries that survived.

    Which units ReLU lets through is taken from the run under test: where its input is zero but for rounding, either
    answer is right, and one unit that differs would outweigh every rounding error.
    """
    passed: list[Tensor] = []
    relus = [module for module in trainee.model if isinstance(module, nn.ReLU)]
    handles = [relu.register_forward_hook(lambda _, __, y: passed.append(y.detach() > 0)) for relu in relus]
    trainee.forward().backward()
    for handle in handles:
        handle.remove()
    got = [_weight_gradient(layer) for layer in trainee.model if not isinstance(layer, nn.ReLU)]
    trainee.model.zero_grad(set_to_none=True)

    nets.forget_masked_weights(model)
    exact = copy.deepcopy(model).double()
    y, gates = trainee.x.double(), iter(passed)
    for layer in exact:
        y = y * next(gates) if isinstance(layer, nn.ReLU) else layer(y)
    F.mse_loss(y, trainee.target.double()).backward()
    want = [_weight_gradient(layer) for layer in exact if not isinstance(layer, nn.ReLU)]
    return max(((a.double() - b).norm() / b.norm()).item() for a, b in zip(got, want, strict=True))


def _weight_gradient(layer: Any) -> Tensor:
    """Dense [m, k], zero outside the pattern."""
    if isinstance(layer, CSBLinear):
        return layer.matrix.with_values(layer.values.grad).to_dense()
    return layer.weight.grad if "weight" in layer._parameters else layer.weight_orig.grad


def time_steps(trainee: Trainee, budget_s: float) -> Timing:
    """Steps launched one after the other, each between two CUDA events; AdamW's step is part of it."""
    for _ in range(WARM_UP):
        trainee.step()
    seconds: list[float] = []
    end = time.perf_counter() + budget_s
    while len(seconds) < FEWEST_STEPS or (time.perf_counter() < end and len(seconds) < MOST_STEPS):
        begin, done = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        begin.record()
        trainee.step()
        done.record()
        done.synchronize()
        seconds.append(begin.elapsed_time(done) * 1e-3)
    return Timing.of(seconds, "launched")
