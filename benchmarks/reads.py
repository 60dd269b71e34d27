"""Reads on this CPU: the forms in which a 1x1 convolution can take some channels of a channels-last tensor.

    python -m benchmarks.reads

One thread; medians of interleaved calls, each by the form that chanopt emits. A range is a slice, which
the convolution copies; a matrix product over the strided slice copies nothing, and gains little. A gather is
`index_select` over rows; over four axes it is many times slower.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from benchmarks.pools import ratio

# Batch, channels, channels read, result channels, height and width.
SHAPES = (
    (1, 256, 128, 64, 56),
    (1, 1024, 512, 256, 14),
    (8, 256, 128, 64, 56),
    (8, 512, 256, 128, 28),
    (8, 1024, 512, 256, 14),
    (8, 2048, 1024, 512, 7),
)


def product(x: Tensor, weight: Tensor, start: int) -> Tensor:
    """The convolution of a range of channels as a matrix product over rows of channels."""
    rows = x.permute(0, 2, 3, 1).flatten(0, 2)[:, start : start + weight.shape[1]]
    return functional.linear(rows, weight.flatten(1)).unflatten(0, (-1, *x.shape[2:])).permute(0, 3, 1, 2)


def by_rows(x: Tensor, index: Tensor) -> Tensor:
    """A gather as chanopt emits it."""
    taken = x.permute(0, 2, 3, 1).flatten(0, 2).index_select(1, index)
    return taken.unflatten(0, (-1, *x.shape[2:])).permute(0, 3, 1, 2)


def by_axes(x: Tensor, index: Tensor) -> Tensor:
    """The same over the four axes."""
    return x.permute(0, 2, 3, 1).index_select(3, index).permute(0, 3, 1, 2)


def main() -> None:
    """Print one row per shape."""
    torch.set_num_threads(1)
    print(f"torch {torch.__version__}; channels last, float32")
    print(f"{'shape':>18} {'read':>5} {'product / slice':>16} {'4 axes / rows':>14} {'index_select / rows':>20}")
    with torch.inference_mode():
        for batch, channels, count, results, size in SHAPES:
            x = torch.randn(batch, channels, size, size).to(memory_format=torch.channels_last)
            weight = torch.randn(results, count, 1, 1)
            start = channels // 8
            index = torch.randperm(channels, generator=torch.Generator().manual_seed(0))[:count].sort().values
            products = ratio(
                lambda x=x, w=weight, s=start: functional.conv2d(x[:, s : s + w.shape[1]], w),
                lambda x=x, w=weight, s=start: product(x, w, s),
            )
            axes = ratio(lambda x=x, i=index: by_rows(x, i), lambda x=x, i=index: by_axes(x, i))
            plain = ratio(lambda x=x, i=index: by_rows(x, i), lambda x=x, i=index: x.index_select(1, i))
            shape = "x".join(map(str, x.shape))
            print(f"{shape:>18} {count:>5} {products:>16.2f} {axes:>14.2f} {plain:>20.2f}")


if __name__ == "__main__":
    main()
