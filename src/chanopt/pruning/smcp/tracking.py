"""What happens to the channels over a training: which go, which come back, and when they last changed.

Knows no torch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

__all__ = ["Change", "Tracker"]


@dataclass(frozen=True, slots=True)
class Change:
    """One rewiring, as fractions of all channels that may go, and of the weights that they hold.

    Attributes:
        step: when.
        pruned: masked now.
        newly: masked now and not before.
        returned: masked before and not now.
        weights, newly_weights, returned_weights: the same of weights.
    """

    step: int
    pruned: float
    newly: float
    returned: float
    weights: float
    newly_weights: float
    returned_weights: float


class Tracker:
    """Counts of channels over a training.

    Attributes:
        last_change: per group, the step at which each channel was last masked or unmasked; -1 for never.
        changes: one entry per rewiring.
    """

    def __init__(self, channels: Mapping[str, int], weights: Mapping[str, int]) -> None:
        """Begin with all channels kept.

        Args:
            channels: number of channels per group.
            weights: weights that one channel of the group holds.
        """
        self.last_change = {name: [-1] * count for name, count in channels.items()}
        self.changes: list[Change] = []
        self._kept = {name: [True] * count for name, count in channels.items()}
        self._weights = dict(weights)

    def record(self, step: int, kept: Mapping[str, Sequence[bool]]) -> Change:
        """Take the masks of a rewiring: per group, whether each channel is kept."""
        counts = {"pruned": 0, "newly": 0, "returned": 0}
        weights = dict.fromkeys(counts, 0)
        for name, flags in kept.items():
            before = self._kept[name]
            for channel, (was, now) in enumerate(zip(before, flags, strict=True)):
                happened = {"pruned": not now, "newly": was and not now, "returned": now and not was}
                for what, true in happened.items():
                    counts[what] += true
                    weights[what] += true * self._weights[name]
                if was != now:
                    self.last_change[name][channel] = step
            self._kept[name] = list(flags)
        total = max(1, sum(map(len, self._kept.values())))
        entries = max(1, sum(len(flags) * self._weights[name] for name, flags in self._kept.items()))
        change = Change(
            step,
            *(counts[what] / total for what in ("pruned", "newly", "returned")),
            *(weights[what] / entries for what in ("pruned", "newly", "returned")),
        )
        self.changes.append(change)
        return change

    def settled(self, since: int) -> float:
        """The fraction of channels that have not changed at or after a step."""
        steps = [step for changes in self.last_change.values() for step in changes]
        return sum(step < since for step in steps) / max(1, len(steps))

    def state(self) -> dict[str, dict[str, list[int]]]:
        """What :meth:`restore` takes, as plain data."""
        return {
            "last_change": {name: list(steps) for name, steps in self.last_change.items()},
            "kept": {name: [int(flag) for flag in flags] for name, flags in self._kept.items()},
        }

    def restore(self, state: Mapping[str, Mapping[str, Sequence[int]]]) -> None:
        """Go on from a state."""
        self.last_change = {name: list(steps) for name, steps in state["last_change"].items()}
        self._kept = {name: [bool(flag) for flag in flags] for name, flags in state["kept"].items()}
