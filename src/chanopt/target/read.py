"""A conv that reads some channels of a tensor, as plain data for cost models."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod

from chanopt.kernels import GROUP
from chanopt.target.realization import Realization

SECTOR = 16
"""Channels whose memory moves together on a GPU (32 bytes of float16)."""
MOST_RUNS = 4
"""More ranges than this are never multiplied one by one."""


def fuses(device: str, *, channels_last: bool) -> bool:
    """Whether convs can gather while they load (``chanopt::gather_conv2d``): groups and blocks count there."""
    return device == "cuda" and channels_last


@dataclass(frozen=True, slots=True)
class ConvRead:
    """One conv and what it reads.

    Attributes:
        stored: channels of the operand as it lies.
        runs: the ranges of positions that are read, as (start, stop), ascending.
        made: output channels.
        kernel, stride, padding, dilation: of the conv, (height, width).
        size: (height, width) of the operand.
        batch: images.
        itemsize: bytes of an element.
        channels_last: whether the operand lies channels last.
        sharing: convs that read these very positions: one copy serves all of them.
        before, after: passes over the operand, and over the result, that a kernel that gathers saves: what is computed
            channel by channel right before the conv, on the channels it takes, and right after it.
    """

    stored: int
    runs: tuple[tuple[int, int], ...]
    made: int
    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]
    size: tuple[int, int]
    batch: int
    itemsize: int
    channels_last: bool
    sharing: int = 1
    before: int = 0
    after: int = 0

    @property
    def taken(self) -> int:
        """Channels that are read."""
        return sum(stop - start for start, stop in self.runs)

    @property
    def span(self) -> int:
        """Channels from the first to the last that is read."""
        return self.runs[-1][1] - self.runs[0][0]

    @property
    def is_whole(self) -> bool:
        """Whether all of the operand is read."""
        return self.taken == self.stored

    @property
    def is_pointwise(self) -> bool:
        """Whether the conv is a matrix product over channels, pixel by pixel."""
        return self.kernel == (1, 1) and self.stride == (1, 1) and self.padding == (0, 0)

    @property
    def has_kernel(self) -> bool:
        """Whether channels come in whole groups, before and after, in a type that the kernels know."""
        return self.stored % GROUP == 0 and self.made % GROUP == 0 and self.itemsize in (2, 4)

    @property
    def pixels(self) -> int:
        """Pixels of the operand, over the batch."""
        return self.batch * prod(self.size)

    @property
    def size_out(self) -> tuple[int, ...]:
        """(height, width) of the result."""
        ends = zip(self.size, self.kernel, self.stride, self.padding, self.dilation, strict=True)
        return tuple((s + 2 * p - d * (k - 1) - 1) // step + 1 for s, k, step, p, d in ends)

    @property
    def pixels_out(self) -> int:
        """Pixels of the result, over the batch."""
        return self.batch * prod(self.size_out)

    def blocks(self, grain: int) -> list[int]:
        """The aligned blocks of so many positions in which something is read, ascending."""
        return sorted({block for start, stop in self.runs for block in range(start // grain, (stop - 1) // grain + 1)})

    def ways(self, device: str, compiler: str) -> Iterator[Realization]:
        """The realizations that this conv has on a device, the plain one first."""
        single = len(self.runs) == 1
        yield Realization.VIEW if single else Realization.GATHER
        if self.is_pointwise and self.channels_last and not self.is_whole and device == "cpu" and compiler == "eager":
            yield Realization.GEMM
            if 1 < len(self.runs) <= MOST_RUNS:
                yield Realization.RUNS
        if not single and self.span < self.stored and not self.before:
            yield Realization.COVER
        if not self.is_whole and not self.before:
            yield Realization.DENSE
        gains = self.before or not self.is_whole
        if fuses(device, channels_last=self.channels_last) and gains and self.has_kernel:
            yield Realization.FUSED
