"""Convs that gather their input channels while they load them: operators, Triton kernels, and what chooses tiles.

Importing this package registers `torch.ops.chanopt.gather_conv2d`, `gather_depthwise_conv2d` and both with `_into`;
triton is imported when the first kernel runs. docs/kernels.md is the guide.
"""

from chanopt.kernels.call import ACTIVATIONS, Call, KernelError
from chanopt.kernels.configs import Config, candidates, heuristic
from chanopt.kernels.op import gather_conv2d
from chanopt.kernels.problem import Covered, Kind, Problem, Reason, coverage
from chanopt.kernels.tables import GROUP, Packed, pack, pack_depthwise, round_out, rounded
from chanopt.kernels.tiles import tune
from chanopt.kernels.tuner import Choice, Tuner

__all__ = [
    "ACTIVATIONS",
    "GROUP",
    "Call",
    "Choice",
    "Config",
    "Covered",
    "KernelError",
    "Kind",
    "Packed",
    "Problem",
    "Reason",
    "Tuner",
    "candidates",
    "coverage",
    "gather_conv2d",
    "heuristic",
    "pack",
    "pack_depthwise",
    "round_out",
    "rounded",
    "tune",
]
