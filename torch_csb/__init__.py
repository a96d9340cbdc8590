"""Unstructured sparse weights in Compressed Sparse Blocks, for training and serving."""

from torch_csb import _fake, _unsupported, ops
from torch_csb._build_info import build_info
from torch_csb._version import __version__
from torch_csb.explain import explain
from torch_csb.io import load_into, save
from torch_csb.matrix import CSBMatrix
from torch_csb.nn import CSBConv2d, CSBLinear, densify_, sparsify_
from torch_csb.optim import migrate_optimizer_, param_groups, relayout_

__all__ = [
    "CSBConv2d",
    "CSBLinear",
    "CSBMatrix",
    "__version__",
    "build_info",
    "densify_",
    "explain",
    "load_into",
    "migrate_optimizer_",
    "ops",
    "param_groups",
    "relayout_",
    "save",
    "sparsify_",
]

del _fake, _unsupported
