"""Activation checkpointing and offloading: the same bits, and what is recomputed or moved is counted."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    checkpoint_sequential,
    create_selective_checkpoint_contexts,
)
from transform_cases import Calls, pruned

from torch_csb import CSBLinear


def blocks(device: str) -> tuple[nn.Sequential, Tensor]:
    layers = [CSBLinear.from_dense(pruned(nn.Linear(40, 40), i), activation=act, block_size=16)
              for i, act in enumerate(("relu", None, "relu6", None))]  # fmt: skip
    return nn.Sequential(*layers).to(device), torch.randn(6, 40, device=device, requires_grad=True)


def gradients(model: nn.Module, y: Tensor, x: Tensor) -> list[Tensor]:
    # backward() and not grad(): the reentrant kind knows nothing else
    y.square().sum().backward()
    got = [x.grad, *(p.grad for p in model.parameters())]
    model.zero_grad()
    x.grad = None
    return got


def equal(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(torch.equal(p, q) for p, q in zip(a, b, strict=True))


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpoint(use_reentrant: bool, device: str) -> None:
    model, x = blocks(device)
    want = gradients(model, model(x), x)
    with Calls() as calls:
        got = gradients(model, checkpoint(model, x, use_reentrant=use_reentrant), x)
    assert equal(got, want)
    assert calls.names.count("spmm") == 8, "each product runs a second time in the backward"
    assert equal(gradients(model, checkpoint_sequential(model, 2, x, use_reentrant=use_reentrant), x), want)


def test_selective_checkpoint_can_keep_our_products(device: str) -> None:
    model, x = blocks(device)
    want = gradients(model, model(x), x)

    def policy(ctx, op, *args, **kwargs):
        kept = op == torch.ops.torch_csb.spmm.default
        return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE

    def contexts():
        return create_selective_checkpoint_contexts(policy)

    with Calls() as calls:
        y = checkpoint(model, x, use_reentrant=False, context_fn=contexts)
        got = gradients(model, y, x)
    assert equal(got, want)
    assert calls.names.count("spmm") == 4


def test_offloaded_activations(device: str) -> None:
    """save_on_cpu moves what the backward needs, which is never the pattern."""
    model, x = blocks(device)
    want = gradients(model, model(x), x)
    with torch.autograd.graph.save_on_cpu(pin_memory=device == "cuda"):
        y = model(x)
    assert equal(gradients(model, y, x), want)
    with torch.autograd.graph.save_on_cpu(pin_memory=device == "cuda"):
        y = checkpoint(model, x, use_reentrant=False)
    assert equal(gradients(model, y, x), want)
    seen: list[torch.dtype] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: seen.append(t.dtype) or t, lambda t: t):
        model(x)
    assert seen and set(seen) == {torch.float32}
