"""The state of a model to the bit, for the tests of sharing and of compressed files."""

from __future__ import annotations

import torch
from torch import nn

from torch_csb import CSBLinear


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
