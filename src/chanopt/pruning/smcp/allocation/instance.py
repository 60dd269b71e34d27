"""The allocation program as plain data, with a JSON form.

An instance says how many channels every group may keep and what that is worth, which layers read and make the
channels of which groups and what a layer costs by its kept inputs and kept outputs, and what all layers together
may cost.
"""

from __future__ import annotations

import bisect
import itertools
import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from operator import index
from typing import Any

from chanopt.errors import AllocationError

__all__ = ["Group", "Instance", "Layer", "Product", "Table", "Term"]

Term = tuple[int, int]
"""(group, multiplier): how many channels of a layer's side every channel of a group stands for."""


@dataclass(frozen=True, slots=True)
class Group:
    """Channels that are kept or pruned together in every layer, ranked, so that only their number is chosen.

    Attributes:
        name: for messages.
        options: numbers of channels that may be kept, ascending.
        values: what each option is worth, of the same length.
    """

    name: str
    options: tuple[int, ...]
    values: tuple[float, ...]

    def __post_init__(self) -> None:
        where = f"group {self.name!r}"
        object.__setattr__(self, "options", _counts(self.options, where))
        object.__setattr__(self, "values", tuple(self.values))
        if not self.options:
            raise AllocationError(f"{where}: expected at least one option, found none; give the full count")
        if len(self.values) != len(self.options):
            raise AllocationError(
                f"{where}: expected {len(self.options)} values, one per option, found {len(self.values)}"
            )
        if not all(math.isfinite(value) for value in self.values):
            raise AllocationError(f"{where}: expected finite values, found {self.values}; check the importance")


@dataclass(frozen=True, slots=True)
class Product:
    """A cost of `rate` for every pair of a kept input and a kept output: parameters, multiplications.

    A whole number, so that every sum is exact.
    """

    rate: int

    def __post_init__(self) -> None:
        object.__setattr__(self, "rate", _natural(self.rate, "a cost's rate"))

    def at(self, inputs: int, outputs: int) -> int:
        """The cost of so many inputs and outputs."""
        return self.rate * inputs * outputs


@dataclass(frozen=True, slots=True)
class Table:
    """A cost that is looked up: the entry of the nearest breakpoints that are not below the two counts.

    A layer without inputs or without outputs costs nothing.

    Attributes:
        inputs, outputs: breakpoints, ascending, from 1 up.
        costs: one row per input breakpoint, one entry per output breakpoint.
    """

    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    costs: tuple[tuple[float, ...], ...]

    def __post_init__(self) -> None:
        for side in ("inputs", "outputs"):
            points = _counts(getattr(self, side), f"breakpoints of a cost table's {side}")
            object.__setattr__(self, side, points)
            if not points or points[0] < 1:
                raise AllocationError(f"expected breakpoints from 1 up in a cost table's {side}, found {points[:3]}")
        object.__setattr__(self, "costs", tuple(tuple(row) for row in self.costs))
        if len(self.costs) != len(self.inputs) or any(len(row) != len(self.outputs) for row in self.costs):
            raise AllocationError(
                f"expected a cost table of {len(self.inputs)} x {len(self.outputs)} entries, found rows of "
                f"{sorted({len(row) for row in self.costs})} x {len(self.costs)}"
            )
        if not all(math.isfinite(cost) and cost >= 0 for row in self.costs for cost in row):
            raise AllocationError("expected costs that are finite and not negative in a cost table")

    def at(self, inputs: int, outputs: int) -> float:
        """The cost of so many inputs and outputs."""
        if not inputs or not outputs:
            return 0
        return self.costs[bisect.bisect_left(self.inputs, inputs)][bisect.bisect_left(self.outputs, outputs)]


@dataclass(frozen=True, slots=True)
class Layer:
    """What one layer costs, by how many channels the groups on its two sides keep.

    Attributes:
        name: for messages.
        inputs: the groups that it reads; its kept inputs are the sum of multiplier times kept channels.
        outputs: the groups that it makes. Empty for a layer whose channels pass through (a depthwise conv): its
            cost is that of its inputs and one output.
        cost: the cost.
    """

    name: str
    inputs: tuple[Term, ...]
    outputs: tuple[Term, ...]
    cost: Product | Table

    def __post_init__(self) -> None:
        for side in ("inputs", "outputs"):
            terms = tuple((index(group), index(times)) for group, times in getattr(self, side))
            object.__setattr__(self, side, terms)
            if any(group < 0 or times < 1 for group, times in terms):
                raise AllocationError(f"layer {self.name!r}: expected (group, multiplier) pairs, found {terms}")
            if len({group for group, _ in terms}) < len(terms):
                raise AllocationError(f"layer {self.name!r}: expected every group once in its {side}, found {terms}")

    @property
    def groups(self) -> tuple[int, ...]:
        """The groups that the cost depends on, ascending."""
        return tuple(sorted({group for group, _ in (*self.inputs, *self.outputs)}))

    def counts(self, kept: Mapping[int, int] | Sequence[int]) -> tuple[int, int]:
        """The layer's kept inputs and outputs where group g keeps `kept[g]` channels."""
        inputs = sum(times * kept[group] for group, times in self.inputs)
        return inputs, sum(times * kept[group] for group, times in self.outputs) if self.outputs else 1

    def at(self, kept: Mapping[int, int] | Sequence[int]) -> float:
        """The layer's cost where group g keeps `kept[g]` channels."""
        return self.cost.at(*self.counts(kept))


@dataclass(frozen=True, slots=True)
class Instance:
    """Choose one option per group: the most value for a total cost of at most `capacity`.

    Attributes:
        groups: the groups.
        layers: the layers.
        capacity: what the layers may cost together.
        cuts: sets of groups of which at least one must keep a channel (without them no path from input to output
            would be left).

    Raises AllocationError for groups that do not exist, names that are repeated, and tables too small for the counts
    that may occur.
    """

    groups: tuple[Group, ...]
    layers: tuple[Layer, ...]
    capacity: float
    cuts: tuple[tuple[int, ...], ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "groups", tuple(self.groups))
        object.__setattr__(self, "layers", tuple(self.layers))
        object.__setattr__(self, "cuts", tuple(tuple(sorted(map(index, cut))) for cut in self.cuts))
        if not math.isfinite(self.capacity):
            raise AllocationError(f"expected a finite capacity, found {self.capacity}")
        _check_names("group", [group.name for group in self.groups])
        _check_names("layer", [layer.name for layer in self.layers])
        named = itertools.chain((group for layer in self.layers for group in layer.groups), *self.cuts)
        wrong = sorted({group for group in named if not 0 <= group < len(self.groups)})
        if wrong:
            raise AllocationError(f"expected groups within 0..{len(self.groups) - 1}, found {wrong}")
        most = [group.options[-1] for group in self.groups]
        for layer in self.layers:
            _check_table(layer, most)

    def cost(self, kept: Sequence[int]) -> float:
        """What the layers cost together where group g keeps `kept[g]` channels."""
        return _total(layer.at(kept) for layer in self.layers)

    def value(self, kept: Sequence[int]) -> float:
        """What the choice is worth.

        Raises:
            AllocationError: a count that is not among its group's options.
        """
        if len(kept) != len(self.groups):
            raise AllocationError(f"expected {len(self.groups)} counts, one per group, found {len(kept)}")
        return _total(group.values[self._option(group, count)] for group, count in zip(self.groups, kept, strict=True))

    def allows(self, kept: Sequence[int]) -> bool:
        """Whether the choice is within the capacity and leaves a path from input to output."""
        return self.cost(kept) <= self.capacity and self.connects(kept)

    def connects(self, kept: Sequence[int]) -> bool:
        """Whether some group of every cut keeps a channel."""
        return all(any(kept[group] for group in cut) for cut in self.cuts)

    @classmethod
    def from_json(cls, data: str | Mapping[str, Any]) -> Instance:
        """Read an instance from JSON text or from what `json.loads` makes of it.

        Raises:
            AllocationError: a text that is not an instance.
        """
        try:
            table = json.loads(data) if isinstance(data, str) else data
            return cls(
                tuple(Group(g["name"], tuple(g["options"]), tuple(g["values"])) for g in table["groups"]),
                tuple(_layer_of(layer) for layer in table["layers"]),
                table["capacity"],
                tuple(tuple(cut) for cut in table.get("cuts", ())),
            )
        except (KeyError, TypeError, ValueError) as error:
            if isinstance(error, AllocationError):
                raise
            raise AllocationError(
                f"expected the JSON of an allocation instance, found {type(error).__name__}: {error}"
            ) from error

    def to_json(self) -> str:
        """Return the JSON text that `from_json` reads."""
        return json.dumps(
            {
                "groups": [{"name": g.name, "options": g.options, "values": g.values} for g in self.groups],
                "layers": [
                    {"name": n.name, "inputs": n.inputs, "outputs": n.outputs, **_cost_json(n.cost)}
                    for n in self.layers
                ],
                "capacity": self.capacity,
                "cuts": self.cuts,
            }
        )

    def _option(self, group: Group, count: int) -> int:
        if count not in group.options:
            raise AllocationError(f"group {group.name!r}: expected one of {group.options}, found {count}")
        return group.options.index(count)


def _total(items: Iterable[float]) -> float:
    """An exact sum of integers, else the correctly rounded one."""
    numbers = list(items)
    return sum(numbers) if all(isinstance(number, int) for number in numbers) else math.fsum(numbers)


def _cost_json(cost: Product | Table) -> dict[str, Any]:
    if isinstance(cost, Product):
        return {"rate": cost.rate}
    return {"table": {"inputs": cost.inputs, "outputs": cost.outputs, "costs": cost.costs}}


def _layer_of(data: Mapping[str, Any]) -> Layer:
    if ("rate" in data) == ("table" in data):
        raise AllocationError(f"layer {data['name']!r}: expected either 'rate' or 'table', found {sorted(data)}")
    table = data.get("table")
    cost = Product(data["rate"]) if table is None else Table(table["inputs"], table["outputs"], table["costs"])
    inputs, outputs = (tuple((group, times) for group, times in data[side]) for side in ("inputs", "outputs"))
    return Layer(data["name"], inputs, outputs, cost)


def _check_table(layer: Layer, most: Sequence[int]) -> None:
    if isinstance(layer.cost, Product):
        return
    counts = layer.counts(most)
    ends = layer.cost.inputs[-1], layer.cost.outputs[-1]
    if counts[0] > ends[0] or counts[1] > ends[1]:
        raise AllocationError(
            f"layer {layer.name!r}: expected a cost table up to {counts[0]} inputs and {counts[1]} outputs, "
            f"found one up to {ends[0]} and {ends[1]}; extend the table"
        )


def _check_names(what: str, names: Sequence[str]) -> None:
    twice = sorted(name for name, count in Counter(names).items() if count > 1)
    if twice:
        raise AllocationError(f"expected {what}s of different names, found {twice[0]!r} more than once")


def _natural(number: Any, what: str) -> int:
    try:
        whole = index(number)
    except TypeError:
        whole = -1
    if whole < 0:
        raise AllocationError(f"expected {what} to be a whole number that is not negative, found {number!r}")
    return whole


def _counts(numbers: Iterable[Any], where: str) -> tuple[int, ...]:
    counts = tuple(_natural(number, f"every count in {where}") for number in numbers)
    if list(counts) != sorted(set(counts)):
        raise AllocationError(f"{where}: expected ascending counts, found {counts}")
    return counts
