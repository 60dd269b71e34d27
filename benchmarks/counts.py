"""Counts of channels on this CPU: convs at a count as it comes, and rounded up (what AlignChannels decides by).

    python -m benchmarks.counts

One thread; medians of interleaved calls; a ratio below 1 means that more channels take less time. Depthwise convs and
1x1 convs in both memory formats, by what the count is of: *made* channels of a conv's result, or those *read*.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from benchmarks.jobs import KEEPING
from benchmarks.machine import machine, told
from benchmarks.pools import ratio

# Channels, and height and width of the image.
SHAPES = ((28, 56), (45, 56), (67, 56), (101, 28), (134, 28), (197, 14), (237, 56), (502, 28))
FORMATS = {torch.contiguous_format: ("NCHW", 16), torch.channels_last: ("channels last", 8)}
OTHER = 64
"""Channels on the other side of a 1x1 conv."""


def depthwise(count: int, size: int, batch: int, memory_format: torch.memory_format) -> Callable[[], Tensor]:
    """A 3x3 depthwise conv of so many channels."""
    x = torch.randn(batch, count, size, size).contiguous(memory_format=memory_format)
    weight = torch.randn(count, 1, 3, 3)
    return lambda: functional.conv2d(x, weight, padding=1, groups=count)


def pointwise(read: int, made: int, size: int, batch: int, memory_format: torch.memory_format) -> Callable[[], Tensor]:
    """A 1x1 conv."""
    x = torch.randn(batch, read, size, size).contiguous(memory_format=memory_format)
    weight = torch.randn(made, read, 1, 1).contiguous(memory_format=memory_format)
    return lambda: functional.conv2d(x, weight)


def main() -> None:
    """Print one row per memory format, batch and shape."""
    if not KEEPING.items() <= os.environ.items():  # which malloc reads when a process starts
        os.execve(sys.executable, [sys.executable, "-m", "benchmarks.counts"], {**os.environ, **KEEPING})
    torch.set_num_threads(1)
    print(f"{told(machine())}; time at the rounded count / time at the count")
    print(f"{'format':>14} {'batch':>5} {'count':>5} {'size':>4} {'more':>5} {'depthwise':>10} {'made':>6} {'read':>6}")
    with torch.inference_mode():
        for memory_format, (name, multiple) in FORMATS.items():
            for batch in (1, 8):
                for count, size in SHAPES:
                    way, up = (size, batch, memory_format), -(-count // multiple) * multiple
                    found = [
                        ratio(depthwise(count, *way), depthwise(up, *way)),
                        ratio(pointwise(OTHER, count, *way), pointwise(OTHER, up, *way)),
                        ratio(pointwise(count, OTHER, *way), pointwise(up, OTHER, *way)),
                    ]
                    told_by = " ".join(f"{value:>{width}.2f}" for value, width in zip(found, (10, 6, 6), strict=True))
                    print(f"{name:>14} {batch:>5} {count:>5} {size:>4} {up / count - 1:>5.0%} {told_by}")


if __name__ == "__main__":
    main()
