"""FluxPrune's tutorial in PyTorch: prune, propagate, resize and count a small MobileNet.

After FluxPrune.jl (Daruwalla) and the tutorial of the UW-PHARM bitstream hackathon; written from their behaviour. Where
they are wrong the default is right, and an option gives their numbers (docs/pruning.md).
"""

from __future__ import annotations

from chanopt.pruning.flux.counting import compute_dot_prods
from chanopt.pruning.flux.model import MobileNet, SlopeHardtanh, slopehtanh
from chanopt.pruning.flux.power import area_consumption, power_consumption
from chanopt.pruning.flux.propagate import desaturate, merge_conv_bn, prune_propagate, rebn, resize
from chanopt.pruning.flux.strategies import (
    ChannelPrune,
    LevelPrune,
    Strategy,
    ThresholdPrune,
    iterativeprune,
    keepprune,
    prune,
)

__all__ = [
    "ChannelPrune",
    "LevelPrune",
    "MobileNet",
    "SlopeHardtanh",
    "Strategy",
    "ThresholdPrune",
    "area_consumption",
    "compute_dot_prods",
    "desaturate",
    "iterativeprune",
    "keepprune",
    "merge_conv_bn",
    "power_consumption",
    "prune",
    "prune_propagate",
    "rebn",
    "resize",
    "slopehtanh",
]
