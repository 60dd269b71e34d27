"""What a group's options cost while all other groups stay as they are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from chanopt.pruning.smcp.allocation.instance import Instance, Layer, Product, Table

__all__ = ["Curves", "costs_of"]

Floats = npt.NDArray[np.float64]
Counts = npt.NDArray[np.int64]


def costs_of(cost: Product | Table, inputs: Counts, outputs: Counts) -> Floats:
    """The cost at every pair of counts of two arrays that broadcast."""
    if isinstance(cost, Product):
        return np.asarray(float(cost.rate) * inputs * outputs, dtype=np.float64)
    entries = np.asarray(cost.costs, dtype=np.float64)
    rows, columns = np.searchsorted(cost.inputs, inputs), np.searchsorted(cost.outputs, outputs)
    return np.where((inputs > 0) & (outputs > 0), entries[rows, columns], 0.0)


@dataclass
class Curves:
    """Costs and values of an instance as arrays; counts below 2**53 are exact in them.

    Attributes:
        options, values: per group, shape (options,).
        layers: per group, the layers whose cost it changes.
    """

    instance: Instance
    options: list[Counts] = field(init=False)
    values: list[Floats] = field(init=False)
    layers: list[list[Layer]] = field(init=False)

    def __post_init__(self) -> None:
        groups = self.instance.groups
        self.options = [np.asarray(group.options, dtype=np.int64) for group in groups]
        self.values = [np.asarray(group.values, dtype=np.float64) for group in groups]
        self.layers = [[] for _ in groups]
        for layer in self.instance.layers:
            for group in layer.groups:
                self.layers[group].append(layer)

    def curve(self, group: int, kept: Sequence[int]) -> Floats:
        """Shape (options,): the cost of the layers around a group, by its option; `kept` gives the other groups."""
        options = self.options[group]
        total = np.zeros(len(options))
        for layer in self.layers[group]:
            inputs = _side(layer.inputs, group, options, kept)
            outputs = _side(layer.outputs, group, options, kept) if layer.outputs else np.ones_like(options)
            total += costs_of(layer.cost, inputs, outputs)
        return total


def _side(terms: Sequence[tuple[int, int]], group: int, options: Counts, kept: Sequence[int]) -> Counts:
    fixed = sum(times * kept[other] for other, times in terms if other != group)
    return fixed + sum(times for other, times in terms if other == group) * options
