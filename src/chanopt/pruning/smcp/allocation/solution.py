"""What the allocation program answers."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal

from chanopt.errors import AllocationError
from chanopt.pruning.smcp.allocation.instance import Instance

__all__ = ["Allocation", "Status"]

Status = Literal["optimal", "feasible"]


@dataclass(frozen=True, slots=True)
class Allocation:
    """How many channels every group keeps, what that is worth and costs, and how far it is proven.

    Attributes:
        kept: channels kept, per group.
        value: what they are worth.
        cost: what the layers cost together, in the units of the instance.
        capacity: what they may cost.
        bound: no choice within the capacity is worth more.
        optimal: whether nothing worth more exists, to the resolution of the program (`program.py`).
        seconds: wall time.
        method: what found and proved it: "relaxation" alone, or "program".
    """

    kept: tuple[int, ...]
    value: float
    cost: float
    capacity: float
    bound: float
    optimal: bool
    seconds: float = field(default=0.0, compare=False)
    method: str = field(default="program", compare=False)

    @property
    def status(self) -> Status:
        """`optimal`, or `feasible` where the time ran out before a proof. Infeasible instances raise instead."""
        return "optimal" if self.optimal else "feasible"

    @property
    def gap(self) -> float:
        """How much more than this the best choice may be worth, relative to the bound."""
        return 0.0 if self.optimal or not self.bound else (self.bound - self.value) / abs(self.bound)

    def check(self, instance: Instance) -> None:
        """Recompute everything from the counts.

        Raises:
            AllocationError: the allocation says otherwise, exceeds the capacity or cuts the network.
        """
        value, cost = instance.value(self.kept), instance.cost(self.kept)
        for what, expected, found in (("value", value, self.value), ("cost", cost, self.cost)):
            if not math.isclose(expected, found, rel_tol=1e-9, abs_tol=1e-12):
                raise AllocationError(f"expected a {what} of {expected} from the counts, found {found}: solve again")
        if cost > instance.capacity or self.capacity != instance.capacity:
            raise AllocationError(
                f"expected a cost within the capacity of {instance.capacity}, found {cost} for {self.capacity}"
            )
        if not instance.connects(self.kept):
            raise AllocationError("expected every cut of the instance to keep a channel, found one that keeps none")
        if self.bound < self.value and not math.isclose(self.bound, self.value, rel_tol=1e-9):
            raise AllocationError(f"expected a bound of at least {self.value}, found {self.bound}: solve again")

    @classmethod
    def from_json(cls, text: str) -> Allocation:
        """Read what `to_json` wrote."""
        table: dict[str, Any] = json.loads(text)
        table["kept"] = tuple(table["kept"])
        return cls(**{item.name: table[item.name] for item in fields(cls)})

    def to_json(self) -> str:
        """Return the JSON text that `from_json` reads."""
        return json.dumps(asdict(self))
