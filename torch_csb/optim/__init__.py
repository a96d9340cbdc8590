"""Optimizers and CSB layers: state at the entries alone, in their order, and the weight decay that `values` need."""

from __future__ import annotations

from torch_csb.optim.groups import param_groups
from torch_csb.optim.migrate import migrate_optimizer_
from torch_csb.optim.relayout import relayout_

__all__ = ["migrate_optimizer_", "param_groups", "relayout_"]
