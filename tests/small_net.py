"""The net that tests save and load."""

from __future__ import annotations

import torch
from torch import nn

from torch_csb import sparsify_
from torch_csb.prune import share_


class Net(nn.Module):
    """A bit of everything: a convolution, buffers, two Linears, a shared module, tied weights."""

    def __init__(self, sparsity=0.9):
        super().__init__()
        self.embed = nn.Embedding(10, 48)
        self.conv = nn.Conv2d(8, 64, 1, stride=2)
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
