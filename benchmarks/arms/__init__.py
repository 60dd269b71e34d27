"""Arms: what a user could run instead, each made from the same masked network.

| arm | what it is |
|---|---|
| dense | the masked network itself, zeros multiplied |
| naive | every masked layer gathers its channels (UPSCALE's baseline export) |
| greedy | our own implementation of UPSCALE's greedy order, on the channel-flow IR |
| upscale | UPSCALE itself (`apple-upscale`), if it is installed |
| upscale_runs | the same, copying by concatenation of runs (its default) instead of by index |
| constrained | layers that share channels keep the same ones, at the multiplications of chanopt's result |
| torch_pruning | the same by Torch-Pruning, if it is installed |
| chanopt | `chanopt.optimize` |

The constrained arms compute other functions: they stand for what a user gives up masks for, at equal cost.
"""

from __future__ import annotations

from benchmarks.arms.base import Arm, ArmError, Copies, Subject
from benchmarks.arms.build import ARMS, SAME_MASKS, build

__all__ = ["ARMS", "SAME_MASKS", "Arm", "ArmError", "Copies", "Subject", "build"]
