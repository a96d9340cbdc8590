from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

from torch_csb import CSBLinear, CSBMatrix, ops
from torch_csb.testing import compare, expect_spmm


def pruned_linear(m=50, k=70, sparsity=0.9, bias=True, dtype=torch.float64, device="cpu"):
    layer = nn.Linear(k, m, bias=bias, dtype=dtype)
    layer.weight.data *= torch.rand(m, k) >= sparsity
    return layer.to(device)


def convert(layer, **options):
    # Several blocks in each direction, also for the small layers of these tests.
    return CSBLinear.from_dense(layer, **{"block_size": 16, **options})


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bias", [True, False])
def test_forward_is_the_dense_layer_within_bounds(device, dtype, bias):
    layer = convert(pruned_linear(dtype=dtype, bias=bias, device=device))
    x = torch.randn(3, 5, 70, dtype=dtype, device=device)
    compare(layer(x), expect_spmm(layer.matrix, x, layer.bias))


@pytest.mark.parametrize("shape", [(70,), (1, 70), (0, 70), (2, 0, 70), (2, 3, 4, 5, 70)])
def test_any_leading_shape_as_nn_linear(device, shape):
    dense = pruned_linear(device=device)
    x = torch.randn(shape, dtype=torch.float64, device=device)
    torch.testing.assert_close(convert(dense)(x), dense(x))


def test_a_strided_input_gives_a_contiguous_output(device):
    dense = pruned_linear(device=device)
    x = torch.randn(70, 9, dtype=torch.float64, device=device).t()
    y = convert(dense)(x)
    assert y.is_contiguous()
    torch.testing.assert_close(y, dense(x))


@pytest.mark.parametrize("activation", ["relu", "relu6", "silu", "gelu"])
@pytest.mark.parametrize("grad", [True, False])
def test_activation_is_applied_to_the_output(device, activation, grad):
    dense = pruned_linear(device=device)
    layer = convert(dense, activation=activation)
    x = 4 * torch.randn(9, 70, dtype=torch.float64, device=device)
    with torch.set_grad_enabled(grad):
        torch.testing.assert_close(layer(x), getattr(F, activation)(dense(x)))


def test_activation_can_be_changed_and_an_unknown_one_is_refused():
    layer = convert(pruned_linear(), activation="relu")
    layer.activation = None
    assert layer.activation is None and layer(torch.randn(4, 70, dtype=torch.float64)).min() < 0
    with pytest.raises(ValueError, match=r"activation: expected .* got 'tanh'"):
        layer.activation = "tanh"


def test_gradients_are_the_dense_ones_at_the_pattern(device):
    dense = pruned_linear(device=device)
    layer = convert(dense)
    x = torch.randn(6, 70, dtype=torch.float64, device=device)
    x_dense, x_csb = x.clone().requires_grad_(), x.clone().requires_grad_()
    dense(x_dense).square().sum().backward()
    layer(x_csb).square().sum().backward()
    torch.testing.assert_close(x_csb.grad, x_dense.grad)
    torch.testing.assert_close(layer.bias.grad, dense.bias.grad)
    sampled = layer.matrix.with_values(layer.values.grad).to_dense()
    torch.testing.assert_close(sampled, dense.weight.grad * (dense.weight != 0))


def test_training_moves_the_entries_and_nothing_else(device):
    layer = convert(pruned_linear(device=device))
    pattern = layer.to_dense().weight != 0
    optimizer = torch.optim.AdamW(layer.parameters(), lr=0.1)
    before = layer.values.detach().clone()
    x = torch.randn(6, 70, dtype=torch.float64, device=device)
    for _ in range(3):
        optimizer.zero_grad()
        layer(x).square().sum().backward()
        optimizer.step()
    entries = layer.matrix.is_entry
    assert (layer.values != before)[entries].all()
    assert (layer.values[~entries] == 0).all()
    assert (layer.to_dense().weight[~pattern] == 0).all()
    state = sum(v.numel() for s in optimizer.state.values() for v in s.values() if v.dim())
    assert state == 2 * (layer.values.numel() + 50)


def test_zero_entries_inside_a_mask_are_kept():
    dense = pruned_linear()
    mask = torch.rand(50, 70) > 0.8
    dense.weight.data[mask.nonzero()[0].unbind()] = 0
    layer = convert(dense, mask=mask)
    assert layer.nnz == mask.sum()
    torch.testing.assert_close(layer.to_dense().weight, dense.weight * mask)
    assert torch.equal(convert(dense, mask=mask.int()).codes, layer.codes)
    with pytest.raises(ValueError, match="mask: expected shape"):
        convert(dense, mask=mask.t())


@pytest.mark.parametrize("m, k", [(0, 5), (5, 0), (0, 0), (1, 1), (16, 16), (17, 33)])
@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
def test_any_size_down_to_nothing(device, m, k):
    dense = nn.Linear(k, m, dtype=torch.float64, device=device)
    layer = convert(dense)
    x = torch.randn(3, k, dtype=torch.float64, device=device)
    torch.testing.assert_close(layer(x), dense(x))
    assert layer.to_dense().weight.shape == (m, k)
    assert layer.sparsity == (0.0 if m * k == 0 else 1 - layer.nnz / (m * k))


def test_an_all_zero_weight_gives_the_bias():
    dense = pruned_linear(sparsity=1.1)
    layer = convert(dense)
    assert layer.nnz == 0 and layer.sparsity == 1.0
    assert torch.equal(layer(torch.randn(3, 70, dtype=torch.float64)), dense.bias.expand(3, -1))


def test_to_dense_is_the_inverse_of_from_dense(device):
    dense = pruned_linear(dtype=torch.bfloat16, device=device).eval()
    dense.weight.requires_grad_(False)
    layer = convert(dense)
    assert not layer.training and not layer.values.requires_grad and layer.bias.requires_grad
    back = layer.to_dense()
    assert type(back) is nn.Linear and not back.training
    assert (back.in_features, back.out_features) == (70, 50)
    assert torch.equal(back.weight, dense.weight) and torch.equal(back.bias, dense.bias)
    assert back.weight.dtype == torch.bfloat16 and back.weight.device == dense.weight.device
    assert not back.weight.requires_grad and back.bias.requires_grad
    assert convert(pruned_linear(bias=False)).to_dense().bias is None


def test_from_dense_leaves_its_source_alone_and_shares_nothing():
    dense = pruned_linear()
    before = copy.deepcopy(dense.state_dict())
    layer = convert(dense)
    with torch.no_grad():
        layer.values.fill_(7), layer.bias.fill_(7)
    layer.register_forward_hook(lambda *_: None)
    assert not dense._forward_hooks
    assert all(torch.equal(dense.state_dict()[key], before[key]) for key in before)


def test_conversion_draws_no_random_numbers():
    dense = pruned_linear()
    state = torch.get_rng_state()
    convert(dense).to_dense()
    assert torch.equal(torch.get_rng_state(), state)


def test_to_dense_refuses_a_layer_with_an_activation():
    with pytest.raises(ValueError, match="activation: a dense layer has none, got 'relu'"):
        convert(pruned_linear(), activation="relu").to_dense()


def test_hooks_keep_their_ids_and_fire_both_ways():
    dense = pruned_linear()
    seen = []
    handles = [
        dense.register_forward_pre_hook(lambda *_: seen.append("pre")),
        dense.register_forward_hook(lambda *_, **__: seen.append("post"), with_kwargs=True, always_call=True),
        dense.register_full_backward_hook(lambda *_: seen.append("backward")),
        dense.register_full_backward_pre_hook(lambda *_: seen.append("pre backward")),
    ]
    layer = convert(dense)
    for hooked in (layer, layer.to_dense()):
        seen.clear()
        hooked(torch.randn(2, 70, dtype=torch.float64, requires_grad=True)).sum().backward()
        assert seen == ["pre", "post", "pre backward", "backward"]
        assert handles[0].id in hooked._forward_pre_hooks and handles[1].id in hooked._forward_hooks_with_kwargs


def test_attributes_of_the_user_come_along():
    dense = pruned_linear()
    dense.my_tag = "head"
    layer = convert(dense)
    assert layer.my_tag == "head" and layer.to_dense().my_tag == "head"
    assert not hasattr(layer.to_dense(), "block_size")


def test_pruning_masks_are_resolved():
    dense = pruned_linear(sparsity=0.0)
    prune.random_unstructured(dense, "weight", 0.5)
    prune.l1_unstructured(dense, "weight", 0.8)
    prune.random_unstructured(dense, "bias", 0.5)
    # The hook has not run since: the attribute `weight` is stale, the effective weight is not.
    dense.weight_orig.data *= 2
    dense.weight_orig.data[dense.weight_mask.bool().nonzero()[0].unbind()] = 0
    layer = convert(dense)
    assert layer.nnz == dense.weight_mask.sum()
    assert not layer._forward_pre_hooks and set(layer.state_dict()) == {
        *("values", "codes", "blk_ptr", "blk_pad", "layout", "bias")
    }
    x = torch.randn(3, 70, dtype=torch.float64)
    torch.testing.assert_close(layer(x), dense(x))
    assert prune.is_pruned(dense)


def test_a_pruning_mask_of_other_numbers_is_refused():
    dense = pruned_linear()
    prune.custom_from_mask(dense, "weight", torch.full((50, 70), 0.5))
    with pytest.raises(ValueError, match="pruning mask: expected zeros and ones"):
        convert(dense)


def parametrized(dense):
    parametrizations.weight_norm(dense)
    assert parametrize.is_parametrized(dense)


@pytest.mark.parametrize(
    "change, reason",
    [
        (parametrized, "parametrized"),
        (torch.nn.utils.spectral_norm, "hooks"),
        (lambda dense: setattr(dense, "forward", lambda x: x), "forward was replaced"),
        (lambda dense: dense.register_buffer("scale", torch.ones(1)), "'scale'"),
        (lambda dense: dense.add_module("adapter", nn.Identity()), "'adapter'"),
        (lambda dense: dense.to(torch.complex64), "complex64"),
        (lambda dense: dense.to("meta"), "meta"),
        (lambda dense: setattr(dense, "bias", nn.Parameter(dense.bias.half())), "unsupported bias"),
    ],
)
@pytest.mark.filterwarnings("ignore:Complex modules")
def test_what_cant_be_converted_is_refused_with_a_reason(change, reason):
    dense = pruned_linear()
    change(dense)
    with pytest.raises(ValueError, match=f"can't convert this .*{reason}"):
        convert(dense)


def test_other_types_and_subclasses_are_refused():
    with pytest.raises(TypeError, match=r"mod: expected nn.Linear, got Conv2d"):
        convert(nn.Conv2d(1, 1, 1))
    with pytest.raises(ValueError, match="NonDynamicallyQuantizableLinear"):
        convert(nn.MultiheadAttention(4, 1).out_proj)


def test_constructor_checks_matrix_and_bias():
    matrix = CSBMatrix.from_dense(torch.eye(4), block_size=16)
    with pytest.raises(ValueError, match="matrix: expected an untransposed"):
        CSBLinear(matrix.t())
    with pytest.raises(ValueError, match=r"bias: expected 4 elements of torch.float32, got \(3,\)"):
        CSBLinear(matrix, torch.zeros(3))
    assert torch.equal(CSBLinear(matrix, torch.ones(4))(torch.zeros(4)), torch.ones(4))


def test_matrix_is_a_view_of_the_layers_tensors(device):
    layer = convert(pruned_linear(device=device))
    assert layer.matrix.values is layer.values and layer.matrix.codes is layer.codes
    x = torch.randn(4, 70, dtype=torch.float64, device=device)
    assert torch.equal(ops.linear(x, layer.matrix, layer.bias), layer(x))
    layer.matrix.validate()


def test_repr_tells_size_and_sparsity():
    layer = convert(pruned_linear(), activation="gelu")
    expected = f"nnz={layer.nnz}, sparsity={layer.sparsity:.4f}, block_size=16, activation=gelu"
    assert repr(layer) == f"CSBLinear(in_features=70, out_features=50, bias=True, {expected})"
    assert "stored=" in repr(layer.to("meta"))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_a_cast_changes_values_and_bias_only(dtype):
    layer = convert(pruned_linear(dtype=torch.float32))
    codes = layer.codes.clone()
    assert layer.to(dtype).values.dtype == layer.bias.dtype == dtype
    assert {name: b.dtype for name, b in layer.named_buffers()} == {
        "codes": torch.uint8,
        "blk_ptr": torch.int32,
        "blk_pad": torch.uint8,
        "layout": torch.int32,
        "units": torch.int32,
    }
    assert torch.equal(layer.codes, codes)
    x = torch.randn(3, 70, dtype=dtype)
    compare(layer(x), expect_spmm(layer.matrix, x, layer.bias))


def test_weight_shows_shape_dtype_and_device():
    layer = convert(pruned_linear(dtype=torch.float16))
    weight = layer.weight
    assert weight.shape == (50, 70) and weight.size() == (50, 70) and weight.size(-1) == 70
    assert (weight.dtype, weight.device, weight.requires_grad) == (torch.float16, torch.device("cpu"), True)
    assert (weight.ndim, weight.dim(), weight.numel()) == (2, 2, 3500)
    assert hash(weight) and weight is not None
    assert not hasattr(weight, "quant_state") and getattr(weight, "ds_id", 3) == 3
    layer.requires_grad_(False)
    assert not layer.weight.requires_grad


@pytest.mark.parametrize(
    "use",
    [
        lambda w: torch.add(w, 1),
        lambda w: torch.cat([torch.zeros(1), w]),
        lambda w: F.linear(torch.zeros(2, 70), w),
        lambda w: torch.zeros(2, 70) @ w,
        lambda w: torch.zeros(50, 70) + w,
        lambda w: w + 1,
        lambda w: 2 * w,
        lambda w: -w,
        lambda w: w == 0,
        lambda w: w[0],
        lambda w: w.__setitem__(0, 1),
        lambda w: list(w),
        lambda w: float(w),
        lambda w: bool(w),
        lambda w: w.data,
        lambda w: w.T,
        lambda w: w.grad,
        lambda w: w.abs(),
        lambda w: w.to("cpu"),
        lambda w: np.asarray(w),
        lambda w: np.zeros(3) + w,
        lambda w: nn.init.zeros_(w),
        lambda w: w.requires_grad_(False),
        lambda w: setattr(w, "requires_grad", False),
    ],
)
def test_weight_used_as_data_says_what_to_do(use):
    with pytest.raises(TypeError, match=r"call to_dense\(\)"):
        use(convert(pruned_linear()).weight)


def test_weight_is_read_only():
    layer = convert(pruned_linear())
    for weight in (torch.zeros(50, 70), nn.Parameter(torch.zeros(50, 70)), None):
        with pytest.raises(TypeError, match="read-only"):
            layer.weight = weight


@pytest.mark.parametrize("batch_first", [True, False])
def test_transformer_encoder_layer_works_in_train_and_eval(device, batch_first):
    encoder = nn.TransformerEncoderLayer(32, 4, 64, dropout=0.0, batch_first=batch_first, dtype=torch.float64)
    for name in ("linear1", "linear2"):
        layer = getattr(encoder, name)
        layer.weight.data *= torch.rand_like(layer.weight) > 0.8
    encoder.to(device)
    x = torch.randn(2, 7, 32, dtype=torch.float64, device=device)
    reference = encoder.train()(x)
    encoder.linear1 = convert(encoder.linear1)
    encoder.linear2 = convert(encoder.linear2)
    for mode in (True, False):
        torch.testing.assert_close(encoder.train(mode)(x), reference)
        with torch.no_grad():
            torch.testing.assert_close(encoder(x), reference)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_transformer_encoder_with_padding_mask_works_in_eval(device):
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(32, 4, 64, batch_first=True), 2).to(device).eval()
    x = torch.randn(2, 7, 32, device=device)
    mask = torch.zeros(2, 7, dtype=torch.bool, device=device)
    mask[1, 4:] = True
    with torch.no_grad():
        reference = encoder(x, src_key_padding_mask=mask)
        for block in encoder.layers:
            block.linear1, block.linear2 = convert(block.linear1), convert(block.linear2)
        y = encoder(x, src_key_padding_mask=mask)
    torch.testing.assert_close(y[~mask], reference[~mask], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("train", [True, False])
def test_torch_compile_takes_the_whole_layer_as_one_graph(device, train):
    model = nn.Sequential(convert(pruned_linear()), nn.ReLU(), convert(pruned_linear(30, 50), activation="silu"))
    model.train(train).to(device)
    x = torch.randn(5, 70, dtype=torch.float64, device=device)
    with torch.set_grad_enabled(train):
        expected = model(x)
        y = torch.compile(model, fullgraph=True, backend="aot_eager")(x)
    torch.testing.assert_close(y, expected)
    if train:
        y.square().sum().backward()
        got = [p.grad.clone() for p in model.parameters()]
        model.zero_grad()
        model(x).square().sum().backward()
        torch.testing.assert_close(got, [p.grad for p in model.parameters()])


def test_torch_compile_takes_a_converted_transformer_layer():
    encoder = nn.TransformerEncoderLayer(32, 4, 64, dropout=0.0, batch_first=True).eval()
    encoder.linear1 = convert(encoder.linear1)
    x = torch.randn(2, 7, 32)
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(encoder, fullgraph=True, backend="aot_eager")(x), encoder(x))


def test_torch_export_takes_the_layer():
    layer = convert(pruned_linear(), activation="relu").eval()
    x = torch.randn(5, 70, dtype=torch.float64)
    exported = torch.export.export(layer, (x,))
    torch.testing.assert_close(exported.module()(x), layer(x))
    lowered = exported.run_decompositions()
    assert [node.target for node in lowered.graph.nodes].count(torch.ops.torch_csb.spmm.default) == 1
