"""1x1 convolutions with groups and with padding."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from torch_csb import CSBConv2d, CSBMatrix, densify_, load_into, migrate_optimizer_, relayout_, save, sparsify_
from torch_csb.prune import report as prune_report
from torch_csb.testing import compare, expect_spmm

FORMATS = [torch.contiguous_format, torch.channels_last]
GROUPS = [(60, 40, 2), (60, 40, 20), (40, 40, 40), (120, 40, 40), (48, 48, 3)]
PADDINGS = [
    {"padding": 1},
    {"padding": (0, 2)},
    {"padding": (2, 1), "stride": 2},
    {"padding": 1, "padding_mode": "reflect"},
    {"padding": (1, 2), "padding_mode": "replicate", "stride": (1, 3)},
    {"padding": 2, "padding_mode": "circular"},
    {"padding": 1, "groups": 5},
]


def pruned_conv(m=60, k=40, sparsity=0.6, device="cpu", dtype=torch.float64, **options):
    conv = nn.Conv2d(k, m, 1, dtype=dtype, **options)
    conv.weight.data *= torch.rand_like(conv.weight) >= sparsity
    return conv.to(device)


def image(*shape, device="cpu", memory_format=torch.contiguous_format, dtype=torch.float64):
    return torch.randn(shape, dtype=dtype).to(device, memory_format=memory_format)


def convert(conv, **options):
    return CSBConv2d.from_dense(conv, **{"block_size": 16, **options})


@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("m, k, groups", GROUPS)
def test_a_grouped_convolution_is_the_dense_one(device, memory_format, m, k, groups):
    conv = pruned_conv(m, k, groups=groups, device=device)
    layer = convert(conv)
    x = image(2, k, 5, 6, device=device, memory_format=memory_format)
    x_dense, x_csb = x.clone().requires_grad_(), x.clone().requires_grad_()
    expected, y = conv(x_dense), layer(x_csb)
    torch.testing.assert_close(y, expected)
    assert y.is_contiguous(memory_format=memory_format)
    expected.square().sum().backward()
    y.square().sum().backward()
    torch.testing.assert_close(x_csb.grad, x_dense.grad)
    torch.testing.assert_close(layer.bias.grad, conv.bias.grad)
    grad = CSBConv2d(layer.matrix.with_values(layer.values.grad), groups=groups).to_dense().weight
    torch.testing.assert_close(grad, conv.weight.grad * (conv.weight != 0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_grouped_convolution_is_within_bounds(device, dtype):
    layer = convert(pruned_conv(groups=4, device=device, dtype=dtype))
    x = image(2, 40, 4, 5, device=device, dtype=dtype)
    compare(layer(x).contiguous(), expect_spmm(layer.matrix, x, layer.bias, dim=1))


@pytest.mark.parametrize("m, k, groups", GROUPS)
def test_a_grouped_convolution_comes_back(device, m, k, groups):
    conv = pruned_conv(m, k, groups=groups, device=device, bias=False)
    layer = convert(conv)
    layer.matrix.validate()
    assert layer.nnz == conv.weight.count_nonzero() and layer.weight.shape == conv.weight.shape
    assert layer.sparsity == pytest.approx(1 - layer.nnz / conv.weight.numel())
    back = layer.to_dense()
    assert torch.equal(back.weight, conv.weight) and repr(back) == repr(conv)
    assert f"groups={groups}" in repr(layer)


def test_zeros_inside_a_grouped_mask_are_entries():
    conv = pruned_conv(groups=4)
    mask = torch.rand(60, 10) > 0.5
    for shaped in (mask, mask[:, :, None, None]):
        layer = convert(conv, mask=shaped)
        assert layer.nnz == mask.sum()
        assert torch.equal(layer.to_dense().weight[:, :, 0, 0], conv.weight[:, :, 0, 0] * mask)


@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("options", PADDINGS, ids=str)
@pytest.mark.parametrize("batch", [True, False])
def test_a_padded_convolution_is_the_dense_one(device, memory_format, options, batch):
    conv = pruned_conv(device=device, **options)
    layer = convert(conv)
    x = image(2, 40, 5, 6, device=device, memory_format=memory_format)
    x = x if batch else x[0]
    x_dense, x_csb = x.clone().requires_grad_(), x.clone().requires_grad_()
    expected, y = conv(x_dense), layer(x_csb)
    torch.testing.assert_close(y, expected)
    if batch:
        assert y.is_contiguous(memory_format=memory_format)
    expected.square().sum().backward()
    y.square().sum().backward()
    torch.testing.assert_close(x_csb.grad, x_dense.grad)
    torch.testing.assert_close(layer.bias.grad, conv.bias.grad)
    back = layer.to_dense()
    assert repr(back) == repr(conv) and back.padding == conv.padding and vars(back).keys() == vars(conv).keys()


@pytest.mark.parametrize("activation", ["relu", "relu6", "silu", "gelu"])
def test_a_border_of_padding_is_the_activated_bias(activation):
    layer = convert(pruned_conv(padding=1), activation=activation)
    y = layer(image(1, 40, 3, 3))
    torch.testing.assert_close(y[0, :, 0, 0], getattr(F, activation)(layer.bias.detach()))


def net(device="cpu"):
    stem = pruned_conv(64, 32, 0.9, groups=2, padding=1, device=device)
    return nn.Sequential(stem, nn.ReLU(), pruned_conv(48, 64, 0.9, device=device, padding="same"))


def test_a_model_converts_saves_loads_and_comes_back(device, tmp_path):
    model = net(device)
    dense, x = copy.deepcopy(model), image(2, 32, 4, 5, device=device)
    expected = model(x)
    report = sparsify_(model)
    assert [row.name for row in report.converted] == ["0", "2"]
    assert report.rows[0].shape == (64, 16) and report.rows[0].sparsity == model[0].sparsity
    assert report.rows[0].bytes_before == 64 * 16 * 8
    torch.testing.assert_close(model(x), expected)
    save(model, tmp_path / "net.safetensors")
    for loaded in (copy.deepcopy(dense), copy.deepcopy(model), net("meta")):
        load_into(loaded, tmp_path / "net.safetensors", device=device)
        assert type(loaded[0]) is CSBConv2d and loaded[0].groups == 2 and torch.equal(loaded(x), model(x))
    packed = copy.deepcopy(model)
    packed.load_state_dict({key: tensor.flip(0) for key, tensor in dense.state_dict().items()})
    flipped = copy.deepcopy(dense)
    flipped.load_state_dict({key: tensor.flip(0) for key, tensor in dense.state_dict().items()})
    torch.testing.assert_close(packed(x), flipped(x))
    assert packed[0].nnz == model[0].nnz
    assert densify_(model).rows[0].shape == (64, 16)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), dense.state_dict().values(), strict=True))


def test_moments_and_layout_of_a_grouped_convolution(device):
    model = net(device)
    optimizer = torch.optim.AdamW(model.parameters())
    x = image(2, 32, 4, 5, device=device)
    model(x).square().sum().backward()
    optimizer.step()
    moment = optimizer.state[model[0].weight]["exp_avg"].clone()
    with torch.no_grad():
        model[0].weight *= torch.rand_like(model[0].weight) > 0.9
        model[2].weight *= torch.rand_like(model[2].weight) > 0.9
    kept = model[0].weight != 0
    sparsify_(model, target="cuda")
    migrate_optimizer_(optimizer, model)

    def moments():
        layer = model[0]
        stored = layer.matrix.with_values(optimizer.state[layer.values]["exp_avg"])
        return CSBConv2d(stored, groups=2).to_dense().weight

    assert torch.equal(moments(), moment * kept)
    before = model[0].to_dense().weight
    relayout_(model, optimizer, target="cpu")
    assert model[0].block_size == 256 and torch.equal(moments(), moment * kept)
    assert torch.equal(model[0].to_dense().weight, before)


def test_entries_between_groups_are_refused(tmp_path):
    full = CSBMatrix.from_dense(torch.randn(60, 40, dtype=torch.float64), block_size=16)
    with pytest.raises(ValueError, match=r"codes: entry \d+ is at \(\d+, \d+\), outside the 2 groups of 30 x 20"):
        CSBConv2d(full, groups=2)
    layer = convert(pruned_conv(groups=2))
    before = {key: tensor.clone() for key, tensor in layer.state_dict().items()}
    with pytest.raises(RuntimeError, match="codes: .*outside the 2 groups"):
        layer.load_state_dict(CSBConv2d(full, layer.bias).state_dict())
    assert all(torch.equal(tensor, before[key]) for key, tensor in layer.state_dict().items())
    save(nn.Sequential(CSBConv2d(full, layer.bias)), tmp_path / "full.safetensors")
    dense = nn.Sequential(pruned_conv(groups=2))
    with pytest.raises(ValueError, match="0.codes: .*outside the 2 groups"):
        load_into(dense, tmp_path / "full.safetensors")
    assert type(dense[0]) is nn.Conv2d


@pytest.mark.parametrize(
    "options, message",
    [
        ({"groups": 7}, "groups: expected a divisor of 60 and 40 channels, got 7"),
        ({"groups": 0}, "groups: expected a divisor"),
        ({"padding": -1}, "padding: expected one or two numbers from 0 on, got -1"),
        ({"padding": "full"}, "padding: expected numbers, 'same' or 'valid', got 'full'"),
        ({"padding_mode": "mirror"}, "padding_mode: expected one of zeros, reflect, replicate, circular, got 'mirror'"),
        ({"stride": 0}, "stride: expected one or two positive numbers, got 0"),
    ],
)
def test_wrong_hyper_parameters_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        CSBConv2d(convert(pruned_conv()).matrix, **options)


def test_an_empty_convolution_is_filled_by_its_state(device):
    source = convert(pruned_conv(groups=4, padding=1, stride=2, device=device))
    with torch.device("meta"):
        layer = CSBConv2d.empty(40, 60, groups=4, padding=1, stride=2, dtype=torch.float64)
    layer.load_state_dict(source.state_dict(), assign=True)
    x = image(2, 40, 5, 6, device=device)
    assert torch.equal(layer(x), source(x)) and repr(layer) == repr(source)
    with pytest.raises(RuntimeError, match="unfilled"):
        CSBConv2d.empty(40, 60, bias=False)(image(1, 40, 2, 2))


def test_what_is_not_supported_is_named_in_the_report_and_in_the_warning():
    model = nn.ModuleDict(
        {
            "three": nn.Conv2d(64, 64, 3, padding=1),
            "depthwise": nn.Conv2d(64, 64, 3, groups=64),
            "one_d": nn.Conv1d(64, 64, 1),
            "three_d": nn.Conv3d(8, 8, 1),
            "up": nn.ConvTranspose2d(8, 8, 1),
        }
    )
    for module in model.values():
        module.weight.data.zero_()
    with pytest.warns(UserWarning, match=r"none of 5 layers \(3 unsupported layer; 2 not a 1x1 convolution\)"):
        report = sparsify_(model)
    assert {row.name: row.reason for row in report.kept} == {
        "three": "not a 1x1 convolution: kernel_size is (3, 3)",
        "depthwise": "not a 1x1 convolution: kernel_size is (3, 3)",
        "one_d": "unsupported layer: there is no CSB form of Conv1d",
        "three_d": "unsupported layer: there is no CSB form of Conv3d",
        "up": "unsupported layer: there is no CSB form of ConvTranspose2d",
    }
    assert "there is no CSB form of Conv1d" in str(report)


def test_the_prune_report_counts_the_weights_of_the_groups():
    model = net()
    sparsify_(model)
    rows = {row.name: row for row in prune_report(model, image(1, 32, 3, 3), seconds=0.01).rows}
    assert rows["0"].size == 64 * 16 and rows["0"].nonzeros == model[0].nnz


def test_torch_compile_takes_groups_and_padding_as_one_graph(device):
    layer = convert(pruned_conv(groups=4, padding=1, padding_mode="reflect", device=device))
    x = image(2, 40, 5, 6, device=device)
    torch.testing.assert_close(torch.compile(layer, fullgraph=True, backend="aot_eager")(x), layer(x))
