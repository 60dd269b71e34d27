"""Automated gradual pruning: how sparse to be in which epoch (Zhu and Gupta, "To prune, or not to prune", 2017)."""

from __future__ import annotations

from dataclasses import dataclass

from chanopt.errors import ScheduleError
from chanopt.pruning.distiller.components import Moment


@dataclass(frozen=True, slots=True)
class AgpPruningRate:
    """Sparsity that rises from ``initial`` to ``final``, fast at first (equation 1 of the paper).

    ``s_t = s_f + (s_i - s_f) (1 - (t - t0) / span)^3``, where ``span`` ends at the last epoch in which the policy
    runs, so that this epoch reaches ``final`` exactly.

    >>> rate = AgpPruningRate(0.1, 0.5)
    >>> [round(rate.step(epoch, 0, 30, 2), 4) for epoch in (0, 2, 14, 28)]
    [0.1, 0.1797, 0.45, 0.5]

    Attributes:
        initial: sparsity in the first epoch.
        final: sparsity in the last one.
    """

    initial: float
    final: float

    def __post_init__(self) -> None:
        if not 0 <= self.initial < self.final <= 1:
            raise ScheduleError(
                "expected 0 <= initial_sparsity < final_sparsity <= 1, "
                f"found initial_sparsity {self.initial} and final_sparsity {self.final}"
            )

    def step(self, epoch: int, starting_epoch: int, ending_epoch: int, frequency: int) -> float:
        """The sparsity of an epoch of a policy that runs every ``frequency`` epochs from start to before end.

        Raises:
            ScheduleError: the policy runs only once.
        """
        last = starting_epoch + (ending_epoch - starting_epoch - 1) // frequency * frequency
        return self._between(epoch, starting_epoch, last)

    def at(self, moment: Moment) -> float:
        """The sparsity at a moment; also of a policy whose epochs are listed, which Distiller cannot run.

        Raises:
            ScheduleError: the policy runs only once.
        """
        return self._between(moment.epoch, moment.epochs[0], moment.epochs[-1])

    def _between(self, epoch: int, first: int, last: int) -> float:
        span = last - first
        if span <= 0:
            raise ScheduleError(
                f"expected a gradual pruner (AGP) to run in at least two epochs, found only epoch {first}; "
                "end its policy later, run it more often, or use the class without _AGP and desired_sparsity"
            )
        return self.final + (self.initial - self.final) * (1.0 - (epoch - first) / span) ** 3
