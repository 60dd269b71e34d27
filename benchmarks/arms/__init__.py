"""Arms: what a user could run instead, each made from the same masked network.

| arm | what it is |
|---|---|
| dense | the masked network itself, zeros multiplied |
| naive | every masked layer gathers its channels (UPSCALE's baseline export); blind to masked outputs |
| greedy | our own implementation of UPSCALE's greedy order, on the channel-flow IR; blind to masked outputs |
| upscale | UPSCALE itself (`apple-upscale`), if it is installed |
| upscale_runs | the same, copying by concatenation of runs (its default) instead of by index |
| unmasked | `chanopt.optimize` of the network before masking: what it gains without any mask |
| constrained | layers that share channels keep the same ones, at the multiplications of chanopt's result |
| torch_pruning | the same by Torch-Pruning, if it is installed |
| chanopt | `chanopt.optimize` |

The naive and the greedy arm cut by what layers read: output channels that are masked stay in. Where outputs are masked
they do less than chanopt, and are no yardstick for it.

The unmasked and constrained arms and Torch-Pruning compute other functions. The constrained ones stand for what a user
gives up masks for, at equal cost; beside the unmasked one stands what masks bring, of what folding and layout alone
would bring to any network.
"""

from __future__ import annotations

from benchmarks.arms.base import Arm, ArmError, Copies, Subject
from benchmarks.arms.build import ARMS, SAME_MASKS, build

__all__ = ["ARMS", "SAME_MASKS", "Arm", "ArmError", "Copies", "Subject", "build"]
