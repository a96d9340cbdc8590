"""Clear errors for devices that this build has no kernels for."""

from __future__ import annotations

import torch

from torch_csb import _load  # noqa: F401  (registers the operators)

_OPERATORS = ("spmm", "spmm_t", "sddmm", "count", "pack", "unpack")
_OPERATORS += ("csr_row_split", "csr_merge", "csr_row_swizzle", "csr_sddmm")
_library = torch.library.Library("torch_csb", "IMPL")


def _refuse(backend: str, reason: str) -> None:
    def kernel(*args, **kwargs):
        raise RuntimeError(reason)

    for name in _OPERATORS:
        if not torch._C._dispatch_has_kernel_for_dispatch_key(f"torch_csb::{name}", backend):
            _library.impl(name, kernel, backend)


if torch.version.hip is not None:
    _refuse("CUDA", "torch_csb has no ROCm kernels: expected tensors on the CPU or an NVIDIA GPU")
else:
    _refuse(
        "CUDA",
        "torch_csb was built without CUDA kernels: build it again with TORCH_CSB_CUDA=1 and nvcc, "
        "or move the model to the CPU (python -m torch_csb info says what was built)",
    )
_refuse("MPS", "torch_csb has no MPS kernels: expected tensors on the CPU or an NVIDIA GPU, move the model to the CPU")
