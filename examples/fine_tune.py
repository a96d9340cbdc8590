"""A pruned model in; CSB layers fine-tuned, saved, loaded and turned back into dense ones."""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import prune

import torch_csb


def make_model() -> nn.Sequential:
    return nn.Sequential(nn.Linear(64, 512), nn.ReLU(), nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 1))


def train(model: nn.Module, x: Tensor, y: Tensor, steps: int) -> tuple[float, torch.optim.Optimizer]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for _ in range(steps):
        loss = F.mse_loss(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return loss.item(), optimizer


def optimizer_bytes(optimizer: torch.optim.Optimizer) -> int:
    return sum(t.nbytes for slots in optimizer.state.values() for t in slots.values() if isinstance(t, Tensor))


def main() -> None:
    torch.manual_seed(0)
    x = torch.randn(512, 64)
    y = (x[:, :1] * x[:, 1:2]).tanh() + x[:, 2:3].sin()

    model = make_model()
    loss, optimizer = train(model, x, y, 100)
    print(f"dense          loss {loss:.1e}, optimizer state {optimizer_bytes(optimizer):>9,} bytes")

    for index in (0, 2):
        prune.l1_unstructured(model[index], "weight", amount=0.9)
    print(f"pruned to 90 % loss {F.mse_loss(model(x), y).item():.1e}")

    print(torch_csb.sparsify_(model))
    # The optimizer is made after the conversion: the dense weights are gone, their moments with them.
    loss, optimizer = train(model, x, y, 100)
    print(f"fine-tuned CSB loss {loss:.1e}, optimizer state {optimizer_bytes(optimizer):>9,} bytes")

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.safetensors"
        torch_csb.save(model, path)
        loaded = make_model()
        torch_csb.load_into(loaded, path)
    with torch.no_grad():
        expected = model(x)
        assert torch.equal(loaded(x), expected)
        torch_csb.densify_(loaded)
        assert type(loaded[0]) is nn.Linear
        torch.testing.assert_close(loaded(x), expected, rtol=1e-4, atol=1e-5)
    print("loaded: bit-equal; densified: equal within rounding")


if __name__ == "__main__":
    main()
