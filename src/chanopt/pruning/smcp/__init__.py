"""Soft masking for cost-constrained channel pruning (SMCP, ECCV 2022), with the true cost in one solve.

`allocation` is the program on plain data, without torch; `costs`, `schedule` and `tracking` know no torch either.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from chanopt.pruning.smcp.callback import SoftMaskCallback
    from chanopt.pruning.smcp.choosing import Choice, Options, choose, instance_of, masks_of
    from chanopt.pruning.smcp.costs import LatencyTable, MacCost, ParameterCost
    from chanopt.pruning.smcp.groups import Groups, PruningGroup, discover_groups, input_groups, output_groups
    from chanopt.pruning.smcp.measure import Machine, measure_latencies
    from chanopt.pruning.smcp.pruner import SoftMaskPruner
    from chanopt.pruning.smcp.schedule import Schedule

__all__ = [
    "Choice",
    "Groups",
    "LatencyTable",
    "MacCost",
    "Machine",
    "Options",
    "ParameterCost",
    "PruningGroup",
    "Schedule",
    "SoftMaskCallback",
    "SoftMaskPruner",
    "choose",
    "discover_groups",
    "input_groups",
    "instance_of",
    "masks_of",
    "measure_latencies",
    "output_groups",
]

_HOMES = {
    "callback": ("SoftMaskCallback",),
    "choosing": ("Choice", "Options", "choose", "instance_of", "masks_of"),
    "costs": ("LatencyTable", "MacCost", "ParameterCost"),
    "groups": ("Groups", "PruningGroup", "discover_groups", "input_groups", "output_groups"),
    "measure": ("Machine", "measure_latencies"),
    "pruner": ("SoftMaskPruner",),
    "schedule": ("Schedule",),
}


def __getattr__(name: str) -> Any:
    """Load the public names on first use, so that the plain parts do not load torch."""
    for home, names in _HOMES.items():
        if name in names:
            return getattr(importlib.import_module(f"chanopt.pruning.smcp.{home}"), name)
    raise AttributeError(f"module 'chanopt.pruning.smcp' has no attribute {name!r}")
