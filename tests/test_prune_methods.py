"""What holds for every method alike: the verbs, on each device, from the first step to CSB layers that train."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize, prune

import torch_csb
from torch_csb.prune import (
    L0,
    BlockMagnitude,
    Coarse,
    CubicSchedule,
    GradualMagnitude,
    GradualRandom,
    VariationalDropout,
    report,
    scratch_control,
)

SCHEDULE = CubicSchedule(0.0, 0.75, begin=0, end=4, frequency=2)
METHODS = {
    "magnitude": lambda **kw: GradualMagnitude(SCHEDULE, **kw),
    "magnitude_global": lambda **kw: GradualMagnitude(SCHEDULE, "global", **kw),
    "random": lambda **kw: GradualRandom(SCHEDULE, **kw),
    "block": lambda **kw: BlockMagnitude(SCHEDULE, (2, 1), **kw),
    "feature_maps": lambda **kw: Coarse(SCHEDULE, lambda model: float(model.training), candidates=2, **kw),
    "variational": lambda **kw: VariationalDropout(1e-4, log_sigma2=-5.0, lr=0.1, **kw),
    "l0": lambda **kw: L0(1e-4, lr=0.1, **kw),
}


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 16, 3)
        self.mix = nn.Conv2d(16, 32, 1)
        self.hidden = nn.Linear(32, 64)
        self.head = nn.Linear(64, 10)

    def forward(self, x):
        return self.head(torch.relu(self.hidden(torch.relu(self.mix(torch.relu(self.conv(x)))).mean((2, 3)))))


def train(model, optimizer, pruner=None, steps=1):
    device = next(model.parameters()).device
    for _ in range(steps):
        optimizer.zero_grad()
        loss = model(torch.randn(4, 3, 6, 6, device=device)).square().mean()
        (loss if pruner is None else loss + pruner.penalty()).backward()
        optimizer.step()
        if pruner is not None:
            pruner.step()


@pytest.mark.parametrize("name", METHODS)
def test_from_the_first_step_to_csb_layers_that_train(name, device):
    model = Net().to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
    train(model, optimizer, steps=2)
    pruner = METHODS[name](exclude="head", generator=torch.Generator().manual_seed(0)).prepare(model, optimizer)
    assert list(pruner.layers) == ["conv", "mix", "hidden"]
    train(model, optimizer, pruner, steps=6)
    if hasattr(pruner, "cut"):
        pruner.cut(0.75)
    masks = pruner.finish()
    assert 0.7 <= 1 - sum(int(m.sum()) for m in masks.values()) / sum(m.numel() for m in masks.values()) <= 0.8
    for layer_name, mask in masks.items():
        layer = model.get_submodule(layer_name)
        assert mask.dtype == torch.bool and mask.device == layer.weight.device
        assert prune.is_pruned(layer) and not parametrize.is_parametrized(layer)
        moments = [value for value in optimizer.state[layer.weight_orig].values() if value.shape == mask.shape]
        assert len(moments) == 2
        assert not any(tensor[~mask].any() for tensor in (layer.weight_orig, layer.weight_orig.grad, *moments))
    optimizer.step()  # with the gradient of before
    train(model, optimizer, steps=2)
    assert not any(model.get_submodule(n).weight_orig[~mask].any() for n, mask in masks.items())

    control = scratch_control(model, masks, torch.Generator().manual_seed(1))
    assert torch.equal(control.mix.weight_mask.bool(), masks["mix"])
    found = report(model)
    assert {row.name: row.size - row.nonzeros for row in found.rows if row.name in masks} == {
        n: int((~mask).sum()) for n, mask in masks.items()
    }
    x = torch.randn(2, 3, 6, 6, device=device)
    expected = model.eval()(x)
    converted = torch_csb.sparsify_(model, min_sparsity=0.0, exclude="head").converted
    assert [row.name for row in converted] == ["mix", "hidden"] and model.mix.nnz == masks["mix"].sum()
    torch.testing.assert_close(model(x), expected, rtol=1e-3, atol=1e-4)
    train(model.train(), torch.optim.AdamW(model.parameters(), lr=1e-2))
