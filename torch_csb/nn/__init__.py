from __future__ import annotations

from torch_csb.nn._compile import DYNAMIC_SOURCES, share_code_between_layers
from torch_csb.nn.conv import CSBConv2d
from torch_csb.nn.linear import CSBLinear
from torch_csb.nn.report import Report, ReportRow
from torch_csb.nn.sparsify import densify_, sparsify_

__all__ = [
    "CSBConv2d",
    "CSBLinear",
    "DYNAMIC_SOURCES",
    "Report",
    "ReportRow",
    "densify_",
    "share_code_between_layers",
    "sparsify_",
]

share_code_between_layers()
