"""One sparse matrix: the three operators, their gradients, and the way in and out of the format."""

from __future__ import annotations

import torch

from torch_csb import CSBMatrix, ops


def main() -> None:
    torch.manual_seed(0)
    m, k, n = 300, 500, 32
    dense = torch.randn(m, k)
    mask = torch.rand(m, k) < 0.1
    w = CSBMatrix.from_dense(dense, mask)
    masked = dense * mask
    print(
        f"{w.m} x {w.k}, {w.nnz} entries, {100 * w.sparsity:.1f} % zeros, block size {w.block_size}, {w.nbytes} bytes"
    )

    # Activations keep their features last, as for torch.nn.functional.linear; dim= names another place.
    x, y = torch.randn(n, k), torch.randn(n, m)
    torch.testing.assert_close(ops.spmm(w, x), x @ masked.T)
    torch.testing.assert_close(ops.spmm_t(w, y), y @ masked)
    torch.testing.assert_close(w @ x.T, masked @ x.T)
    torch.testing.assert_close(w.t() @ y.T, masked.T @ y.T)

    # sddmm samples A Bᵀ at the entries of W: here it is the gradient of the values for an output gradient y.
    sampled = ops.sddmm(w, y, x)
    print(f"sddmm gives one number per stored entry: {tuple(sampled.shape)}")

    w.values.requires_grad_()
    ops.linear(x, w, activation="relu").sum().backward()
    dense_weight = masked.clone().requires_grad_()
    torch.relu(x @ dense_weight.T).sum().backward()
    same_pattern = CSBMatrix.from_dense(dense_weight.grad, mask)
    torch.testing.assert_close(w.values.grad, same_pattern.values)
    print("gradient of the values = gradient of the dense weight at the kept entries")

    assert torch.equal(w.to_dense(), masked)
    assert torch.equal(CSBMatrix.from_csr(w.to_csr()).to_dense(), masked)
    print("dense and CSR round trips are exact")


if __name__ == "__main__":
    main()
