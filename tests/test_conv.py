from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from torch_csb import CSBConv2d
from torch_csb.testing import compare, expect_spmm


def pruned_conv(m=50, k=70, device="cpu", dtype=torch.float64, **options):
    conv = nn.Conv2d(k, m, 1, dtype=dtype, **options)
    conv.weight.data *= torch.rand(m, k, 1, 1) > 0.85
    return conv.to(device)


def convert(conv, **options):
    return CSBConv2d.from_dense(conv, **{"block_size": 16, **options})


def image(*shape, device, memory_format=torch.contiguous_format, dtype=torch.float64):
    return torch.randn(shape, dtype=dtype).to(device, memory_format=memory_format)


FORMATS = [torch.contiguous_format, torch.channels_last]


@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("stride", [1, 2, (2, 1), (1, 3)])
@pytest.mark.parametrize("batch", [1, 3])
def test_forward_and_memory_format_are_those_of_nn_conv2d(device, memory_format, stride, batch):
    conv = pruned_conv(stride=stride, device=device)
    x = image(batch, 70, 7, 9, device=device, memory_format=memory_format)
    expected, y = conv(x), convert(conv)(x)
    torch.testing.assert_close(y, expected)
    # The format of x, where nn.Conv2d on a GPU chooses one by its algorithm.
    assert y.stride() == torch.empty_like(expected, memory_format=memory_format).stride()


@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_dtype_is_within_bounds(device, memory_format, dtype):
    layer = convert(pruned_conv(device=device, dtype=dtype))
    x = image(2, 70, 4, 5, device=device, memory_format=memory_format, dtype=dtype)
    compare(layer(x).contiguous(), expect_spmm(layer.matrix, x, layer.bias, dim=1))


@pytest.mark.parametrize("shape", [(70, 7, 9), (0, 70, 7, 9), (2, 70, 1, 1), (2, 70, 1, 9), (2, 70, 9, 1)])
@pytest.mark.parametrize("bias", [True, False])
def test_unbatched_empty_batch_and_one_pixel_images(device, shape, bias):
    conv = pruned_conv(bias=bias, device=device)
    x = image(*shape, device=device)
    torch.testing.assert_close(convert(conv)(x), conv(x))


def test_an_unbatched_view_of_a_channels_last_image_stays_so(device):
    x = image(1, 70, 7, 9, device=device, memory_format=torch.channels_last)[0]
    conv = pruned_conv(device=device)
    y = convert(conv)(x)
    torch.testing.assert_close(y, conv(x))
    assert y.stride(0) == 1


@pytest.mark.parametrize("memory_format", FORMATS)
def test_a_crop_keeps_the_memory_format(device, memory_format):
    x = image(2, 70, 9, 9, device=device, memory_format=memory_format)[:, :, 1:6, 2:8]
    conv = pruned_conv(device=device)
    y = convert(conv)(x)
    torch.testing.assert_close(y, conv(x))
    assert y.is_contiguous(memory_format=memory_format)


@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("stride", [1, 2])
def test_gradients_are_the_dense_ones(device, memory_format, stride):
    conv = pruned_conv(stride=stride, device=device)
    layer = convert(conv)
    x = image(2, 70, 5, 6, device=device, memory_format=memory_format)
    x_dense, x_csb = x.clone().requires_grad_(), x.clone().requires_grad_()
    conv(x_dense).square().sum().backward()
    layer(x_csb).square().sum().backward()
    torch.testing.assert_close(x_csb.grad, x_dense.grad)
    torch.testing.assert_close(layer.bias.grad, conv.bias.grad)
    sampled = layer.matrix.with_values(layer.values.grad).to_dense()
    torch.testing.assert_close(sampled, (conv.weight.grad * (conv.weight != 0))[:, :, 0, 0])


@pytest.mark.parametrize("activation", ["relu", "relu6", "silu", "gelu"])
@pytest.mark.parametrize("memory_format", FORMATS)
def test_activation_is_applied_to_the_output(device, activation, memory_format):
    conv = pruned_conv(device=device)
    x = 4 * image(2, 70, 3, 4, device=device, memory_format=memory_format)
    torch.testing.assert_close(convert(conv, activation=activation)(x), getattr(F, activation)(conv(x)))


def test_to_dense_keeps_every_hyper_parameter():
    for options in (
        {"stride": (2, 3), "dilation": (4, 5), "bias": False},
        {"padding": "same", "dilation": 2},
        {"padding": "valid", "padding_mode": "circular", "stride": 2},
        {"padding_mode": "reflect"},
    ):
        conv = pruned_conv(**options).eval()
        conv.weight.requires_grad_(False)
        back = convert(conv).to_dense()
        assert type(back) is nn.Conv2d and repr(back) == repr(conv)
        assert vars(back).keys() == vars(conv).keys()
        for name in (*nn.Conv2d.__constants__, "training", "output_padding", "transposed"):
            assert getattr(back, name) == getattr(conv, name), name
        assert torch.equal(back.weight, conv.weight) and not back.weight.requires_grad
        x = torch.randn(2, 70, 6, 7, dtype=torch.float64)
        torch.testing.assert_close(convert(conv)(x), conv(x))


def test_a_channels_last_weight_converts():
    conv = pruned_conv().to(memory_format=torch.channels_last)
    assert torch.equal(convert(conv).to_dense().weight, conv.weight)


def test_a_mask_may_have_the_kernels_or_the_matrix_shape():
    conv = pruned_conv()
    mask = torch.rand(50, 70, 1, 1) > 0.5
    layer = convert(conv, mask=mask)
    assert layer.nnz == mask.sum()
    assert torch.equal(layer.codes, convert(conv, mask=mask[:, :, 0, 0]).codes)


@pytest.mark.parametrize(
    "options, reason",
    [
        ({"kernel_size": 3}, r"not a 1x1 convolution: kernel_size is \(3, 3\)"),
        ({"kernel_size": (1, 2)}, r"not a 1x1 convolution: kernel_size is \(1, 2\)"),
        ({"kernel_size": 3, "groups": 2, "padding": 1}, r"not a 1x1 convolution: kernel_size is \(3, 3\)"),
    ],
)
def test_other_convolutions_are_refused_with_a_reason(options, reason):
    with pytest.raises(ValueError, match=f"can't convert this Conv2d: {reason}"):
        convert(nn.Conv2d(4, 4, **options))


def test_weight_has_the_kernels_shape_and_no_data():
    weight = convert(pruned_conv()).weight
    assert weight.shape == (50, 70, 1, 1) and weight.ndim == 4
    with pytest.raises(TypeError, match=r"weight of a CSBConv2d .* call to_dense\(\)"):
        weight.flatten(1)


def test_an_input_that_is_no_image_is_refused():
    layer = convert(pruned_conv())
    with pytest.raises(ValueError, match=r"x: expected \[N, 70, H, W\] or \[70, H, W\], got 2 dimensions"):
        layer(torch.randn(2, 70, dtype=torch.float64))
    with pytest.raises(RuntimeError, match="70"):
        layer(torch.randn(2, 71, 3, 3, dtype=torch.float64))


def test_repr_tells_stride_and_sparsity():
    layer = convert(pruned_conv(stride=2))
    start = "CSBConv2d(70, 50, kernel_size=(1, 1), stride=(2, 2), bias=True, nnz="
    assert repr(layer).startswith(start)


@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("train", [True, False])
def test_torch_compile_takes_the_whole_layer_as_one_graph(device, memory_format, train):
    layer = convert(pruned_conv(stride=2, device=device)).train(train)
    x = image(2, 70, 5, 6, device=device, memory_format=memory_format)
    with torch.set_grad_enabled(train):
        expected = layer(x)
        y = torch.compile(layer, fullgraph=True, backend="aot_eager")(x)
    torch.testing.assert_close(y, expected)
    assert y.stride() == expected.stride()
