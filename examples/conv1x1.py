"""A pruned 1x1 convolution: NCHW and channels_last, stride, and the fused activation of the functional form."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import prune

from torch_csb import CSBConv2d, CSBMatrix, ops


def main() -> None:
    torch.manual_seed(0)
    conv = nn.Conv2d(256, 512, kernel_size=1, stride=2)
    prune.random_unstructured(conv, "weight", amount=0.9)
    prune.remove(conv, "weight")
    sparse = CSBConv2d.from_dense(conv)
    print(sparse)

    x = torch.randn(8, 256, 14, 14)
    with torch.no_grad():
        expected = conv(x)
        for layout in (torch.contiguous_format, torch.channels_last):
            y = sparse(x.contiguous(memory_format=layout))
            torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-5)
            assert y.is_contiguous(memory_format=layout)
            print(f"{layout}: output {tuple(y.shape)}, strides {y.stride()}")

        # A [512, 256, 1, 1] filter is a 512 x 256 matrix; the functional form adds the activation in the epilogue.
        w = CSBMatrix.from_dense(conv.weight.flatten(1))
        fused = ops.conv2d(x, w, conv.bias, stride=2, activation="silu")
        torch.testing.assert_close(fused, F.silu(expected), rtol=1e-4, atol=1e-5)
    print("fused silu agrees with silu after the convolution")


if __name__ == "__main__":
    main()
