"""Choosing channels: masks, importance, scopes, schedules. Writes masks; nothing in the compiler imports it.

>>> import torch, chanopt
>>> from chanopt.pruning import prune
>>> net = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.ReLU(), torch.nn.Conv2d(8, 4, 1)).eval()
>>> x = torch.randn(1, 3, 16, 16)
>>> masks = prune(net, (x,), 0.5)
>>> len(masks["2"].inputs)
4
>>> tuple(chanopt.optimize(net, (x,), masks=masks).get_parameter("0.weight").shape)
(4, 3, 3, 3)
"""

from __future__ import annotations

from chanopt.pruning.masks import apply, bake, read
from chanopt.pruning.scope import Group, Pruner, groups, prune, retained
from chanopt.pruning.structure import Join, Layer, Segment, Structure, discover

__all__ = [
    "Group",
    "Join",
    "Layer",
    "Pruner",
    "Segment",
    "Structure",
    "apply",
    "bake",
    "discover",
    "groups",
    "prune",
    "read",
    "retained",
]
