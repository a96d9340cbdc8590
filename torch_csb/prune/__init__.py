from __future__ import annotations

from torch_csb.prune.base import Pruner
from torch_csb.prune.block import BlockMagnitude
from torch_csb.prune.coarse import Candidate, Coarse
from torch_csb.prune.compressed import CompressedSizes, load_compressed, save_compressed
from torch_csb.prune.l0 import L0
from torch_csb.prune.magnitude import GradualMagnitude
from torch_csb.prune.random import GradualRandom
from torch_csb.prune.report import SizeReport, SizeRow, report
from torch_csb.prune.schedule import CubicSchedule
from torch_csb.prune.scratch import scratch_control
from torch_csb.prune.sharing import SharedValues, Sharing, share_
from torch_csb.prune.variational import VariationalDropout

__all__ = [
    "BlockMagnitude",
    "Candidate",
    "Coarse",
    "CompressedSizes",
    "CubicSchedule",
    "GradualMagnitude",
    "GradualRandom",
    "L0",
    "Pruner",
    "SharedValues",
    "Sharing",
    "SizeReport",
    "SizeRow",
    "VariationalDropout",
    "load_compressed",
    "report",
    "save_compressed",
    "scratch_control",
    "share_",
]
