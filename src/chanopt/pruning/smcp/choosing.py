"""From scores of channels to the channels that stay: the allocation program of a model, and its answer as masks."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from numbers import Real
from typing import Any

import numpy as np

from chanopt.api import Mask
from chanopt.errors import AllocationError
from chanopt.pruning import costs
from chanopt.pruning.smcp.allocation import Allocation, Group, Instance, Layer, Table, allocate
from chanopt.pruning.smcp.allocation.instance import Term
from chanopt.pruning.smcp.costs import CostModel, ParameterCost, raw_cost
from chanopt.pruning.smcp.groups import Groups, Ports, PruningGroup
from chanopt.pruning.structure import Structure

__all__ = ["Choice", "Options", "choose", "instance_of", "masks_of", "ranking"]

_LOG = logging.getLogger(__name__)

_ROUNDS = 50
"""Solves at most, each with one more cut of the network forbidden."""
_AIMS = 5
"""Capacities at most, each smaller, where the slim model costs more than the program knows."""


@dataclass(frozen=True, slots=True)
class Options:
    """Which numbers of channels a group may keep.

    Attributes:
        multiple: a group whose number of channels is a multiple of this keeps a multiple of it; others any number.
        chunk: so many neighbouring channels are kept or pruned together; divides `multiple`.
        layer_pruning: whether a group may lose all its channels, unless nothing of the input would reach the output.
    """

    multiple: int = 8
    chunk: int = 1
    layer_pruning: bool = False

    def __post_init__(self) -> None:
        if self.multiple < 1 or self.chunk < 1 or self.multiple % self.chunk:
            raise AllocationError(
                f"expected a chunk that divides the multiple, found chunk {self.chunk} of multiple {self.multiple}"
            )

    def of(self, group: PruningGroup) -> tuple[int, ...]:
        """Numbers of channels that a group may keep, ascending."""
        if not group.prunable:
            return (group.channels,)
        step = next(s for s in (self.multiple, self.chunk, 1) if group.channels % s == 0)
        counts = range(step, group.channels + 1, step)
        return (0, *counts) if self.layer_pruning and not group.cut else tuple(counts)


@dataclass(frozen=True)
class Choice:
    """The channels that stay.

    Attributes:
        kept: per group, its kept channels, ascending.
        allocation: the solution, in raw costs.
        cost: of the slim model, as chanopt's own passes cut it, in the cost model's units; of groups without their
            program, what the allocation thinks.
        target: in the same units.
        before: the cost of the whole model.
        masks: what stays of every layer that loses inputs, as :func:`chanopt.optimize` takes it.
        instance: the program that was solved.
    """

    kept: tuple[tuple[int, ...], ...]
    allocation: Allocation
    cost: float
    target: float
    before: float
    masks: Mapping[str, Mask]
    instance: Instance = field(repr=False)


def ranking(scores: Sequence[float], chunk: int = 1) -> list[int]:
    """Channels from the most to the least important, a chunk's together; equals in their order."""
    table = np.asarray(scores, dtype=np.float64).reshape(-1, chunk)
    order = np.argsort(-table.sum(1), kind="stable")
    return (order[:, None] * chunk + np.arange(chunk)).ravel().tolist()


def instance_of(
    groups: Groups,
    scores: Mapping[str, Sequence[float]],
    cost: CostModel,
    ratio: float,
    options: Options | None = None,
) -> Instance:
    """The allocation program: within (1 - ratio) of the present cost, the most summed scores.

    Args:
        groups: of the model.
        scores: by group name, one number a channel, of every group whose channels may go.
        cost: what counts.
        ratio: share of the cost that goes.
        options: numbers of channels that may stay.

    Raises:
        AllocationError: scores are missing, or of another number, or not finite; a ratio out of range.
    """
    if not isinstance(ratio, Real) or not 0 <= ratio < 1:
        raise AllocationError(f"expected a pruning ratio from 0 up to but not 1, found {ratio!r}")
    options = options or Options()
    parts = tuple(_group(group, scores, options) for group in groups.groups)
    layers = tuple(_layers(groups, cost))
    whole = Instance(parts, layers, 0)
    full = [group.channels for group in groups.groups]
    return replace(whole, capacity=(1 - ratio) * whole.cost(full))


def choose(
    groups: Groups,
    scores: Mapping[str, Sequence[float]],
    cost: CostModel | None = None,
    ratio: float = 0.5,
    options: Options | None = None,
    *,
    time_limit: float = 10.0,
    workers: int = 1,
) -> Choice:
    """Choose the channels that stay: within the target cost, the most summed scores, with a bound.

    Args:
        groups: of the model.
        scores: as for :func:`instance_of`.
        cost: what counts; weights by default.
        ratio: share of the cost that goes.
        options: numbers of channels that may stay.
        time_limit: seconds per solve.
        workers: threads of the solver; with 1 the answer is the same every time.

    Raises:
        AllocationError: nothing comes within the target, or scores are wrong.
    """
    cost, options = cost or ParameterCost(), options or Options()
    instance = instance_of(groups, scores, cost, ratio, options)
    target, best = instance.capacity, None
    for _ in range(_AIMS):
        try:
            instance, allocation = _allocated(groups, instance, time_limit, workers)
        except AllocationError:
            if best is None:
                raise
            break
        found = _choice(groups, scores, cost, options, instance, allocation, target)
        best = found if best is None or found.cost < best.cost else best
        if best.cost <= best.target * (1 + 1e-12):
            return best
        instance = replace(instance, capacity=allocation.cost * best.target / found.cost)
    assert best is not None
    warnings.warn(
        f"expected a slim model within {best.target:.6g} of {cost.name}, found {best.cost:.6g}: it keeps more than the "
        "masks say, as of a layer that is called several times and cut differently; ask for less",
        stacklevel=2,
    )
    return best


def _allocated(groups: Groups, instance: Instance, time_limit: float, workers: int) -> tuple[Instance, Allocation]:
    """The solution that does not cut the network, and the program with the cuts that had to be forbidden."""
    for _ in range(_ROUNDS):
        allocation = allocate(instance, time_limit=time_limit, workers=workers)
        gone = [number for number, count in enumerate(allocation.kept) if not count]
        cut = groups.cut_in(gone) if gone else None
        if cut is None:
            return instance, allocation
        # Each of these groups may go, but not all of them together.
        instance = replace(instance, cuts=(*instance.cuts, cut))
    raise AllocationError(
        f"expected layers to go without cutting the network within {_ROUNDS} solves, found another cut each time; "
        "prune without layers (layer_pruning=False)"
    )


def masks_of(groups: Groups, kept: Sequence[Sequence[int]]) -> dict[str, Mask]:
    """What stays of the inputs of every layer that loses some, where the groups keep these channels."""
    dropped: dict[str, set[int]] = {}
    for group, channels in zip(groups.groups, kept, strict=True):
        gone = sorted(set(range(group.channels)) - set(channels))
        for name, ports in group.consumers.items():
            dropped.setdefault(name, set()).update(port for channel in gone for port in ports[channel])
    layers = groups.structure.layers
    return {
        name: Mask(inputs=tuple(port for port in range(layers[name].in_channels) if port not in ports))
        for name, ports in dropped.items()
        if ports
    }


def _choice(
    groups: Groups,
    scores: Mapping[str, Sequence[float]],
    cost: CostModel,
    options: Options,
    instance: Instance,
    allocation: Allocation,
    target: float,
) -> Choice:
    kept = tuple(
        tuple(range(group.channels)) if not group.prunable else _best(scores[group.name], count, group, options)
        for group, count in zip(groups.groups, allocation.kept, strict=True)
    )
    scale = round(1 / cost.unit)
    full = [group.channels for group in groups.groups]
    masks = masks_of(groups, kept)
    real = allocation.cost if groups.structure.origin.program is None else _real(groups.structure, masks, cost)
    return Choice(kept, allocation, real / scale, target / scale, instance.cost(full) / scale, masks, instance)


def _real(structure: Structure, masks: Mapping[str, Mask], cost: CostModel) -> float:
    """The raw cost of the slim model; whole numbers of weights and multiplications stay whole."""

    def raw(layer: Any, inputs: int, outputs: int) -> float:
        return (_of_other if layer.name in structure.others else raw_cost)(cost, layer, inputs, outputs)

    return costs.total(structure, masks or dict.fromkeys(list(structure.layers)[:1], Mask()), raw)


def _best(scores: Sequence[float], count: int, group: PruningGroup, options: Options) -> tuple[int, ...]:
    return tuple(sorted(ranking(scores, _chunk(group, options))[:count]))


def _chunk(group: PruningGroup, options: Options) -> int:
    return options.chunk if group.channels % options.chunk == 0 else 1


def _group(group: PruningGroup, scores: Mapping[str, Sequence[float]], options: Options) -> Group:
    counts = options.of(group)
    if not group.prunable:
        return Group(group.name, counts, (0.0,))
    found = scores.get(group.name)
    if found is None or len(found) != group.channels:
        raise AllocationError(
            f"expected {group.channels} scores of group {group.name!r}, found {'none' if found is None else len(found)}"
        )
    ranked = np.asarray(found, dtype=np.float64)[ranking(found, _chunk(group, options))]
    sums = np.concatenate([[0.0], np.cumsum(ranked)])
    return Group(group.name, counts, tuple(float(sums[count]) for count in counts))


def _layers(groups: Groups, cost: CostModel) -> list[Layer]:
    made: list[Layer] = []
    for name, layer in groups.structure.layers.items():
        if layer.depthwise:
            through = _terms(groups, name, [group.through for group in groups.groups])
            made.append(Layer(name, through, (), cost.of(layer)))
            continue
        inputs = _terms(groups, name, [group.consumers for group in groups.groups])
        outputs = _terms(groups, name, [group.producers for group in groups.groups])
        if inputs and outputs:
            made.append(Layer(name, inputs, outputs, cost.of(layer)))
    return made + _fixed(groups, cost)


def _fixed(groups: Groups, cost: CostModel) -> list[Layer]:
    """What no mask reaches: layers of a constant cost, over a group that keeps all its channels."""
    place = next((number for number, group in enumerate(groups.groups) if not group.prunable), None)
    if place is None:
        return []
    whole, made = groups.groups[place].channels, list[Layer]()
    for name, layer in groups.structure.others.items():
        spent = _of_other(cost, layer, layer.in_channels, layer.out_channels)
        made.append(Layer(name, ((place, 1),), (), Table((whole,), (1,), ((spent,),))))
    return made


def _of_other(cost: CostModel, layer: Any, inputs: int, outputs: int) -> float:
    """The raw cost of what no mask reaches; nothing, with a warning, where a table lacks it."""
    try:
        return raw_cost(cost, layer, inputs, outputs)
    except AllocationError as error:
        _LOG.warning("%s is left out of the budget, for it cannot be pruned: %s", layer.name, error)
        return 0.0


def _terms(groups: Groups, name: str, sides: Sequence[Ports]) -> tuple[Term, ...]:
    return tuple((number, len(side[name][0])) for number, side in enumerate(sides) if name in side)
