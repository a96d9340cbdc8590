"""A small net with CSB layers, and its state to the bit, for the tests of sharing and of compressed files."""

from __future__ import annotations

import torch
from torch import nn

from torch_csb import CSBLinear, sparsify_
from torch_csb.prune import share_


class Net(nn.Module):
    """A convolution, buffers, two Linears, a shared module, tied weights."""

    def __init__(self, sparsity=0.9):
        super().__init__()
        self.embed = nn.Embedding(10, 48)
        self.conv = nn.Conv2d(8, 64, 1)
        self.norm = nn.BatchNorm2d(64)
        self.fc = nn.Linear(64, 48)
        self.again = nn.ModuleList([self.fc])
        self.out = nn.Linear(48, 10, bias=False)
        self.out.weight = self.embed.weight
        for layer in (self.conv, self.fc):
            layer.weight.data *= torch.rand_like(layer.weight) >= sparsity

    def forward(self, x):
        return self.out(self.fc(self.norm(self.conv(x)).mean((2, 3))))


def sparse_net(sparsity=0.9, bits=None):
    net = Net(sparsity).eval()
    net.norm.running_mean.normal_()
    sparsify_(net)
    if bits:
        share_(net, bits).finish()
    return net


def layer_of(matrix):
    return nn.ModuleDict({"fc": CSBLinear(matrix)})


def bits_of(tensor):
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)


def state_of(model):
    return {key: (t.dtype, tuple(t.shape), bits_of(t).clone()) for key, t in model.state_dict().items()}


def assert_same_state(state, expected):
    assert list(state) == list(expected)
    for key, (dtype, shape, bits) in expected.items():
        assert state[key][:2] == (dtype, shape) and torch.equal(state[key][2], bits), key
