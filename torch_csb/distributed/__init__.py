"""CSB layers in DistributedDataParallel, fully_shard and tensor-parallel plans. Import it yourself; torch_csb does not.

| name | what |
|---|---|
| :func:`prepare_` | before DistributedDataParallel or ``fully_shard``: equal patterns, sent once |
| :class:`CSBColwiseParallel`, :class:`CSBRowwiseParallel` | styles for ``parallelize_module`` |
| :func:`full_state_dict` | the whole model's state, from all ranks |
| :func:`split_matrix`, :func:`join_matrices` | a matrix in parts, without any process group |
"""

from torch_csb.distributed._gather import full_state_dict
from torch_csb.distributed._linear import TensorParallelCSBLinear
from torch_csb.distributed._prepare import Preparation, prepare_
from torch_csb.distributed._split import join_matrices, split_matrix
from torch_csb.distributed._style import CSBColwiseParallel, CSBRowwiseParallel

__all__ = [
    "CSBColwiseParallel",
    "CSBRowwiseParallel",
    "Preparation",
    "TensorParallelCSBLinear",
    "full_state_dict",
    "join_matrices",
    "prepare_",
    "split_matrix",
]
