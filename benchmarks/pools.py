"""Pools on this CPU: as they come, and over a channels-last copy (what the pass PoolChannelsLast decides by).

    python -m benchmarks.pools

One thread; medians of interleaved calls; a ratio below 1 means that the copies pay.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

SHAPES = (
    ((1, 4, 14, 14), 3, 1, 1),
    ((1, 16, 28, 28), 3, 1, 1),
    ((1, 64, 112, 112), 3, 2, 1),
    ((1, 128, 28, 28), 2, 2, 0),
    ((1, 256, 28, 28), 3, 1, 1),
    ((1, 832, 7, 7), 3, 1, 1),
    ((8, 64, 56, 56), 3, 2, 1),
)


def channels_last(pool: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """The pool between two changes of memory format."""
    return lambda x: pool(x.clone(memory_format=torch.channels_last)).clone(memory_format=torch.contiguous_format)


def ratio(one: Callable[[], object], other: Callable[[], object], rounds: int = 30) -> float:
    """Median over rounds of the time of the other by the time of the one."""
    ratios: list[float] = []
    for _ in range(rounds):
        spent: list[float] = []
        for form in (one, other):
            start = time.perf_counter()
            form()
            spent.append(time.perf_counter() - start)
        ratios.append(spent[1] / spent[0])
    return statistics.median(ratios)


def copies(pool: Callable[[Tensor], Tensor], x: Tensor) -> float:
    """The time over channels-last copies by the time as it comes."""
    return ratio(lambda: pool(x), lambda: channels_last(pool)(x))


def main() -> None:
    """Print one row per shape and element type."""
    torch.set_num_threads(1)
    print(f"torch {torch.__version__}; time over a channels-last copy / time as it comes")
    print(f"{'shape':>18} {'window':>6} {'type':>8} {'max':>6} {'average':>8}")
    with torch.inference_mode():
        for shape, window, stride, padding in SHAPES:
            for dtype in (torch.float32, torch.float64):
                x = torch.randn(shape, dtype=dtype)
                maximum = copies(lambda x, w=window, s=stride, p=padding: functional.max_pool2d(x, w, s, p), x)
                average = copies(lambda x, w=window, s=stride, p=padding: functional.avg_pool2d(x, w, s, p), x)
                size = "x".join(map(str, shape))
                print(f"{size:>18} {window:>6} {str(dtype)[6:]:>8} {maximum:>6.2f} {average:>8.2f}")


if __name__ == "__main__":
    main()
