from __future__ import annotations

import pytest
import torch
from cases import random_matrix
from torch import nn

from torch_csb import CSBLinear, CSBMatrix, explain, ops

pytest.importorskip("torch_csb._plan", reason="the planner module is not built")


def test_explain_names_the_steps_of_a_layer_and_its_bytes() -> None:
    linear = nn.Linear(512, 256)
    linear.weight.data *= torch.rand(256, 512) < 0.1
    layer = CSBLinear.from_dense(linear)
    found = explain(layer, 64)
    assert [step.operator for step in found.steps] == ["spmm", "spmm_t", "sddmm"]
    assert found.dense_bytes == 4 * (256 * 512 + 64 * (256 + 512))
    w = layer.matrix
    assert {step.bytes_moved for step in found.steps} == {w.nbytes + 4 * 64 * (256 + 512)}
    text = str(found)
    assert "256 x 512" in text and all(step.reason in text for step in found.steps)


def test_a_transposed_matrix_multiplies_by_spmm_t_first() -> None:
    w = random_matrix(300, 200, 0.9)
    assert explain(w.t(), 8).steps[0].operator == "spmm_t"
    assert explain(w.t(), 8).shape == (200, 300)


def test_workspace_is_what_the_operator_allocates(device: str) -> None:
    """The scratch of a call, told beforehand, against what the allocator of the device sees."""
    density = torch.linspace(0.3, 0, 2048)[:, None]  # uneven strips are shared
    w = CSBMatrix.from_dense((torch.randn(2048, 2048) * (torch.rand(2048, 2048) < density)).to(device))
    x = torch.randn(8, 2048, device=device)
    step = explain(w, 8).steps[0]
    assert step.split and step.workspace > 0
    ops.spmm(w, x)
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        y = ops.spmm(w, x)
        extra = torch.cuda.max_memory_allocated() - before - y.numel() * 4
    else:
        with torch.profiler.profile(profile_memory=True) as profile:
            y = ops.spmm(w, x)
        # Scratch is freed within the call, so count what was allocated.
        allocated = [e.nbytes() for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
        extra = sum(size for size in allocated if size > 0) - y.numel() * 4
    assert step.workspace <= extra <= step.workspace + 4096


def test_balance_is_that_of_the_heaviest_unit() -> None:
    w = random_matrix(1024, 1024, 0.9)
    w.units = torch.tensor([[0, 64, 256], [0, 128, 256]], dtype=torch.int32)  # of 256 blocks
    rows, columns, _ = explain(w, 8).steps
    blocks = w.blk_ptr.diff() - w.blk_pad
    assert rows.balance == pytest.approx(2 * blocks[64:].sum().item() / w.nnz)
    left = blocks.view(16, 16)[:, :8].sum().item()
    assert columns.balance == pytest.approx(2 * max(left, w.nnz - left) / w.nnz)
    assert explain(random_matrix(300, 200, 1.0), 8).steps[0].balance == 1.0


def test_dense_wins_where_little_is_zero() -> None:
    assert explain(random_matrix(512, 512, 0.2), 64).dense_faster
    assert not explain(random_matrix(512, 512, 0.95), 64).dense_faster


def test_every_step_says_whether_dense_is_faster() -> None:
    found = explain(random_matrix(512, 512, 0.2), 64)
    assert found.dense_faster == found.steps[0].dense_faster
    assert str(found).count("dense would be faster") == sum(step.dense_faster for step in found.steps) > 0
    assert str(found).count("dense would be slower") == sum(not step.dense_faster for step in found.steps)


def test_batch_must_be_positive() -> None:
    with pytest.raises(ValueError, match="batch: expected at least 1, got 0"):
        explain(random_matrix(64, 64, 0.5), 0)
