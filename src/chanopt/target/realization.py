"""The ways in which a conv can come by its channels."""

from __future__ import annotations

import enum


class Realization(enum.Enum):
    """How a conv reads the channels that it wants of a tensor which holds more."""

    VIEW = "view"
    """ATen's conv on a view of the range (which the device may copy, see :mod:`chanopt.target.analytic`)."""
    GATHER = "gather"
    """The channels are copied, then ATen's conv."""
    GEMM = "gemm"
    """A 1x1 conv as a matrix product: on a strided view of the range, or on gathered channels."""
    RUNS = "runs"
    """A 1x1 conv as a sum of matrix products, one for each of a few ranges: nothing is copied."""
    FUSED = "fused"
    """``chanopt::gather_conv2d`` gathers while it loads, in whole groups; zero weights for what fills groups up."""
    COVER = "cover"
    """ATen's conv on the shortest range that holds all channels, with zero weights for those in between."""
    DENSE = "dense"
    """ATen's conv on all channels of the tensor, with zero weights for those it does not want."""
