"""chanopt: a compiler for channel-pruned networks.

>>> import torch, chanopt
>>> net = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.ReLU(), torch.nn.Conv2d(8, 4, 1)).eval()
>>> with torch.no_grad():
...     _ = net[2].weight[:, 4:].zero_()  # a pruner at work
>>> fast = chanopt.optimize(net, (torch.randn(1, 3, 16, 16),))
>>> tuple(fast.get_parameter("0.weight").shape)
(4, 3, 3, 3)
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from chanopt import passes
    from chanopt.api import Captured, Mask, Target, capture, explain, lower, optimize, verify
    from chanopt.ir import Program, parse
    from chanopt.report import Report
    from chanopt.saving import Plan, apply_plan, load, save

__version__ = "0.1.0"

__all__ = [
    "Captured",
    "Mask",
    "Plan",
    "Program",
    "Report",
    "Target",
    "apply_plan",
    "capture",
    "explain",
    "load",
    "lower",
    "optimize",
    "parse",
    "passes",
    "save",
    "verify",
]

_HOMES = {
    "chanopt.api": ("Captured", "Mask", "Target", "capture", "explain", "lower", "optimize", "verify"),
    "chanopt.ir": ("Program", "parse"),
    "chanopt.report": ("Report",),
    "chanopt.saving": ("Plan", "apply_plan", "load", "save"),
}


def __getattr__(name: str) -> Any:
    """Load the public names on first use, so that ``import chanopt.solve`` does not load torch."""
    if name == "passes":
        return importlib.import_module("chanopt.passes")
    for home, names in _HOMES.items():
        if name in names:
            return getattr(importlib.import_module(home), name)
    raise AttributeError(f"module 'chanopt' has no attribute {name!r}")


def __dir__() -> list[str]:
    """The public names."""
    return sorted([*globals(), *__all__])
