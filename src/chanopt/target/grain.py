"""Counts of channels that a device is quick at, and for whose results they are worth a few channels more."""

from __future__ import annotations

import enum
import math
from dataclasses import dataclass

from chanopt.kernels import GROUP
from chanopt.target.read import fuses


class Gains(enum.Enum):
    """Which convs are quicker where their result has a count of the grain."""

    ALL = "all"
    DEPTHWISE = "depthwise"
    POINTWISE = "pointwise"


@dataclass(frozen=True, slots=True)
class Grain:
    """A count of channels that a device is quick at.

    Attributes:
        multiple: such counts are multiples of it.
        growth: most that a count may be rounded up by, as a share of it.
        gains: the convs that are quicker for it.
        slices: whether a conv takes the first channels of a tensor as quickly as all of it.
        whole_joins: whether an addition is slower for taking a part of an operand: Inductor has oneDNN add the operand
            while a conv stores its result, and for a part makes a copy of it first.
        whole_concats: whether a concat for convs that gather while they load is slower for gathering from its operands.
    """

    multiple: int
    growth: float
    gains: Gains
    slices: bool
    whole_joins: bool = False
    whole_concats: bool = False


def grain(device: str, compiler: str, *, channels_last: bool, batch: int) -> Grain | None:
    """The grain of a device; None where counts do not matter, or nobody has measured whether they do.

    On a GPU tensor cores and 16-byte loads want groups. On a CPU the figures are oneDNN's, as `python -m
    benchmarks.counts` prints them: a depthwise conv over NCHW takes 0.6 to 0.95 of the time with a multiple of 16, a
    1x1 conv over channels last 0.5 to 0.95 with a multiple of 8; one that reads more channels takes longer for each.
    """
    if fuses(device, channels_last=channels_last):
        return Grain(GROUP, math.inf, Gains.ALL, slices=True, whole_concats=True)
    if device != "cpu":
        return None
    if compiler == "inductor":
        return Grain(8, 1 / 4, Gains.POINTWISE, slices=False, whole_joins=True)
    if channels_last:
        return Grain(8, 1 / 8, Gains.POINTWISE, slices=False)
    return Grain(16, 1 / 4, Gains.DEPTHWISE, slices=batch == 1)
