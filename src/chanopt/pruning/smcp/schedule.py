"""When the pruner prunes, and to which ratio (SMCP, ECCV 2022, section 3.4). Knows no torch."""

from __future__ import annotations

import math
from dataclasses import dataclass
from numbers import Real
from typing import Literal

from chanopt.errors import AllocationError

__all__ = ["Curve", "Schedule"]

Curve = Literal["exp", "exp2", "linear"]


@dataclass(frozen=True, slots=True)
class Schedule:
    """The ratio of every epoch: nothing in the warm-up, then a ramp, then the full ratio; masks rest in the cool-down.

    Attributes:
        ratio: share of the cost that goes in the end, below 1.
        epochs: epochs of the whole training.
        warmup: epochs before the first pruning.
        ramp: epochs in which the ratio grows.
        cooldown: last epochs, in which masks stay as they are.
        every: steps between prunings.
        curve: how the ratio grows: `exp` is R (1 - e^(-t/20)) / (1 - e^(-T/20)), `exp2` is 1 - (1 - R)^(t/T), `linear`
            is R t / T, with T = ramp + 1 and t = 1, 2, ... in the ramp.

    >>> schedule = Schedule(ratio=0.5, epochs=12, warmup=2, ramp=6, cooldown=2)
    >>> [round(schedule.at(epoch), 4) for epoch in range(12)]
    [0.0, 0.0, 0.0826, 0.1611, 0.2358, 0.3069, 0.3745, 0.4388, 0.5, 0.5, 0.5, 0.5]
    """

    ratio: float
    epochs: int = 90
    warmup: int = 10
    ramp: int = 55
    cooldown: int = 25
    every: int = 80
    curve: Curve = "exp"

    def __post_init__(self) -> None:
        if not isinstance(self.ratio, Real) or not 0 <= self.ratio < 1:
            raise AllocationError(f"expected a pruning ratio from 0 up to but not 1, found {self.ratio!r}")
        if self.curve not in ("exp", "exp2", "linear"):
            raise AllocationError(f"expected curve 'exp', 'exp2' or 'linear', found {self.curve!r}")
        if self.every < 1 or min(self.epochs, self.warmup, self.ramp, self.cooldown) < 0:
            raise AllocationError(f"expected numbers of epochs, and at least one step between prunings, found {self}")
        if self.warmup + self.ramp + self.cooldown > self.epochs:
            raise AllocationError(
                f"expected warm-up, ramp and cool-down within {self.epochs} epochs, found "
                f"{self.warmup} + {self.ramp} + {self.cooldown}; lengthen the training or shorten one of them"
            )

    def at(self, epoch: int) -> float:
        """The ratio of an epoch, counted from 0."""
        if epoch < self.warmup:
            return 0.0
        time, whole = epoch - self.warmup + 1, self.ramp + 1
        if time >= whole:
            return self.ratio
        if self.curve == "linear":
            return self.ratio * time / whole
        if self.curve == "exp2":
            return 1 - (1 - self.ratio) ** (time / whole)
        return self.ratio * math.expm1(-time / 20) / math.expm1(-whole / 20)

    def prunes(self, epoch: int, step: int) -> bool:
        """Whether masks are chosen anew at a step, counted from 0 over the whole training."""
        within = self.warmup <= epoch < self.epochs - self.cooldown
        return within and step % self.every == 0 and self.at(epoch) > 0
