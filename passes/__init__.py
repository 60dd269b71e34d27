"""The passes, one a file, and the default pipeline."""

if __name__ != "chanopt.passes":  # the folder is also reachable as `passes`: a second copy of every class
    raise ImportError("import chanopt.passes, not passes")

from chanopt.pass_infra import Pass, Pipeline
from chanopt.passes.align_channels import AlignChannels
from chanopt.passes.drop_dead import DropDead
from chanopt.passes.fold_affine import FoldAffine
from chanopt.passes.fold_constants import FoldConstants
from chanopt.passes.order_channels import OrderChannels
from chanopt.passes.pool_channels_last import PoolChannelsLast
from chanopt.passes.realize_reads import RealizeReads

DEFAULT: tuple[Pass, ...] = (
    FoldAffine(),  # batch norm into convs
    FoldConstants(),  # constant channels into biases
    FoldAffine(),  # what has become a per-channel constant, too
    DropDead(),  # what nobody needs any more
    OrderChannels(),  # so that what is left is read in ranges
    AlignChannels(),  # to whole groups, where the device reads groups
    RealizeReads(),  # the cheapest way to read the rest
    PoolChannelsLast(),  # the form of a pool that this device is quicker at
)
"""The default pipeline, in order."""

__all__ = [
    "DEFAULT",
    "AlignChannels",
    "DropDead",
    "FoldAffine",
    "FoldConstants",
    "OrderChannels",
    "Pass",
    "Pipeline",
    "PoolChannelsLast",
    "RealizeReads",
]
