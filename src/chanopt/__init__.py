"""chanopt: a compiler for channel-pruned networks.

>>> import torch, chanopt
>>> net = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.ReLU(), torch.nn.Conv2d(8, 4, 1)).eval()
>>> with torch.no_grad():
...     _ = net[2].weight[:, 4:].zero_()  # a pruner at work
>>> fast = chanopt.optimize(net, (torch.randn(1, 3, 16, 16),))
>>> tuple(fast.get_parameter("0.weight").shape)
(4, 3, 3, 3)
"""

from chanopt import passes
from chanopt.api import Captured, Mask, capture, explain, lower, optimize, verify
from chanopt.ir import Program, parse
from chanopt.report import Report

__version__ = "0.1.0"

__all__ = [
    "Captured",
    "Mask",
    "Program",
    "Report",
    "capture",
    "explain",
    "lower",
    "optimize",
    "parse",
    "passes",
    "verify",
]
