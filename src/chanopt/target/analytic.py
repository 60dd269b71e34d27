"""What a conv costs by the way it reads: a roofline with a handful of constants.

Which copies there are is a fact of ATen (aten/src/ATen/native/ConvUtils.h, ConvolutionMM2d.cpp, mkldnn/Conv.cpp): the
convs of cuDNN and oneDNN want their operand contiguous, so a view of a range is copied unless it is one, as it is in
NCHW for a single image. The constants are of one core and of an H100; only their ratios decide.
"""

from __future__ import annotations

from dataclasses import dataclass

from chanopt.kernels import GROUP
from chanopt.target.read import SECTOR, ConvRead
from chanopt.target.realization import Realization


@dataclass(frozen=True, slots=True)
class Machine:
    """The constants.

    Attributes:
        macs: multiply-accumulates a second, in float32 (on a GPU: in float16 on tensor cores) in the vendor's conv.
        fused_macs: the same in a Triton kernel.
        bandwidth: bytes a second, read or written.
        launch: seconds for one more kernel.
    """

    macs: float
    fused_macs: float
    bandwidth: float
    launch: float


MACHINES = {
    "cpu": Machine(macs=3.5e10, fused_macs=3.5e10, bandwidth=1.6e10, launch=2e-6),
    "cuda": Machine(macs=3.0e14, fused_macs=2.4e14, bandwidth=3.0e12, launch=2.5e-6),
}
"""By device: one core with AVX-512 (benchmarks/reads.py), an H100 (docs/kernels.md has the assumptions)."""

_PRODUCT = 0.95
"""Time of a matrix product over that of the 1x1 conv it replaces, on contiguous operands."""


def seconds(read: ConvRead, way: Realization, device: str) -> float:
    """Predicted seconds of a conv that reads in one of its `ways`."""
    machine = MACHINES.get(device, MACHINES["cuda"])
    if way is Realization.FUSED:
        return _fused(read, machine)
    passes = read.before * _pass(_bytes(read, read.taken), machine) + read.after * _pass(_made(read), machine)
    return passes + _apart(read, way, machine, device)


def _apart(read: ConvRead, way: Realization, machine: Machine, device: str) -> float:
    """A conv that reads in one of the ways but the fused one, without what stands beside it."""
    copied = _pass(_bytes(read, read.taken), machine)
    taken = _conv(read, read.taken, machine, device)
    if way is Realization.VIEW:
        return taken + (copied if _is_copied(read, read.is_whole) else 0.0)
    if way is Realization.GATHER:
        return taken + copied / read.sharing
    if way is Realization.GEMM:
        return taken * _PRODUCT + (copied / read.sharing if len(read.runs) > 1 else 0.0)
    if way is Realization.RUNS:
        return taken * _PRODUCT + _pass(_made(read), machine) * (len(read.runs) - 1)
    channels = read.span if way is Realization.COVER else read.stored
    moved = _pass(_bytes(read, channels), machine)
    return _conv(read, channels, machine, device) + (moved if _is_copied(read, channels == read.stored) else 0.0)


def _pass(count: int, machine: Machine) -> float:
    """Reading so many bytes and writing as many."""
    return 2 * count / machine.bandwidth + machine.launch


def _is_copied(read: ConvRead, whole: bool) -> bool:
    return not whole and not read.before and (read.channels_last or read.batch > 1)


def _bytes(read: ConvRead, channels: int) -> int:
    return read.pixels * channels * read.itemsize


def _made(read: ConvRead) -> int:
    """Bytes of the result."""
    return read.pixels_out * read.made * read.itemsize


def _conv(read: ConvRead, channels: int, machine: Machine, device: str) -> float:
    """A conv of so many contiguous channels."""
    macs = read.pixels_out * read.made * channels * read.kernel[0] * read.kernel[1]
    moved = _bytes(read, channels) + _made(read)
    rate = machine.macs if device == "cpu" or read.itemsize <= 2 else machine.macs / 2
    return max(macs / rate, moved / machine.bandwidth) + machine.launch


def _fused(read: ConvRead, machine: Machine) -> float:
    columns, sectors = len(read.blocks(GROUP)) * GROUP, len(read.blocks(SECTOR)) * SECTOR
    macs = read.pixels_out * read.made * columns * read.kernel[0] * read.kernel[1]
    moved = _bytes(read, min(sectors, read.stored)) + _made(read)
    rate = machine.fused_macs if read.itemsize <= 2 else machine.fused_macs / 2
    return max(macs / rate, moved / machine.bandwidth) + machine.launch
