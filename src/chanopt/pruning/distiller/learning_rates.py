"""Learning-rate schedules that Distiller adds to those of ``torch.optim.lr_scheduler``."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate
from operator import mul

from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from chanopt.errors import ScheduleError


class PolynomialLR(LRScheduler):
    """``lr = base_lr * (1 - epoch / T_max) ** power``."""

    def __init__(self, optimizer: Optimizer, T_max: int, power: float, last_epoch: int = -1) -> None:
        self.T_max = T_max
        self.power = power
        super().__init__(optimizer, last_epoch)

    def get_lr(self) -> list[float | Tensor]:
        """The rate of each parameter group."""
        return [base * (1 - self.last_epoch / self.T_max) ** self.power for base in self.base_lrs]


class MultiStepMultiGammaLR(LRScheduler):
    """The rate is multiplied by the next of ``gammas`` at each of ``milestones``.

    Raises:
        ScheduleError: the milestones do not ascend, or there are not as many gammas.
    """

    def __init__(
        self, optimizer: Optimizer, milestones: Sequence[int], gammas: Sequence[float], last_epoch: int = -1
    ) -> None:
        if list(milestones) != sorted(milestones) or len(milestones) != len(gammas):
            raise ScheduleError(
                f"expected ascending milestones and as many gammas, found {list(milestones)} and {list(gammas)}"
            )
        self.milestones = list(milestones)
        self.factors = list(accumulate(gammas, mul, initial=1.0))
        super().__init__(optimizer, last_epoch)

    def get_lr(self) -> list[float | Tensor]:
        """The rate of each parameter group."""
        factor = self.factors[bisect_right(self.milestones, self.last_epoch)]
        return [base * factor for base in self.base_lrs]
