"""Greedy filter pruning: the layer that suffers least loses some filters, again and again (NetAdapt-like).

After Abbasi-Asl and Yu, "Structural Compression of Convolutional Neural Networks Based on Greedy Filter Pruning",
2017, and Yang et al., "NetAdapt", 2018, with multiply-accumulates as the measure of cost.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from chanopt.compare import copied
from chanopt.errors import ScheduleError
from chanopt.pruning.distiller.components import Moment, Names, Sight, layer_of
from chanopt.pruning.distiller.dependencies import coupled
from chanopt.pruning.distiller.ranked import L1RankedStructureParameterPruner
from chanopt.pruning.distiller.summaries import total_macs
from chanopt.pruning.distiller.thinning import thin
from chanopt.pruning.modes import in_eval
from chanopt.pruning.structure import Structure, discover


@dataclass(frozen=True, slots=True)
class GreedyStep:
    """One round.

    Attributes:
        weights: the parameters whose filters were cut: one, or those that must be pruned alike.
        score: what ``evaluate`` said of the network that was chosen.
        macs: its multiply-accumulates.
        density: these over those of the dense network.
    """

    weights: tuple[str, ...]
    score: float
    macs: int
    density: float


@dataclass(frozen=True)
class Greedy:
    """What came out.

    Attributes:
        model: the thinned network.
        steps: what was cut, in order.
    """

    model: nn.Module
    steps: tuple[GreedyStep, ...]


def greedy_prune(
    model: nn.Module,
    inputs: tuple[Any, ...],
    evaluate: Callable[[nn.Module], float],
    target_density: float,
    step: float = 0.1,
    tune: Callable[[nn.Module], None] | None = None,
    weights: Iterable[str] | None = None,
) -> Greedy:
    """Cut filters until the network needs at most a fraction of its multiply-accumulates.

    Every round tries each layer (or set of layers that must be pruned alike, which follow their first): a fraction of
    its filters goes, the network is thinned and tuned, and the one that scores best is kept.

    Args:
        model: the network; not changed.
        inputs: example inputs.
        evaluate: scores a network; more is better.
        target_density: the fraction of the multiply-accumulates to end at, or below.
        step: the fraction of a layer's filters that goes in a round.
        tune: trains a network a little.
        weights: parameters to prune; those of all convs by default.

    Raises:
        ScheduleError: a fraction out of range, an unknown parameter, or nothing is left to cut before the target.
    """
    if not 0 < target_density <= 1 or not 0 < step < 1:
        raise ScheduleError(f"expected fractions for target_density and step, found {target_density} and {step}")
    best, steps, dense = copied(model), [], total_macs(model, inputs)
    names = Names(tuple(name for name, _ in model.named_parameters()))
    wanted = None if weights is None else {layer_of(names.find(name)) for name in weights}
    macs = dense
    while macs > target_density * dense:
        trials = [_trial(best, inputs, layers, step, tune) for layers in _choices(best, inputs, wanted)]
        scored = [(evaluate(trial), trial, layers) for trial, layers in trials if trial is not None]
        if not scored:
            raise ScheduleError(
                f"expected to reach {target_density:.0%} of {dense} multiply-accumulates, found nothing to cut at "
                f"{macs / dense:.0%}; take a larger step, or more weights"
            )
        score, best, layers = max(scored, key=lambda entry: entry[0])
        macs = total_macs(best, inputs)
        steps.append(GreedyStep(tuple(f"{layer}.weight" for layer in layers), score, macs, macs / dense))
    return Greedy(best, tuple(steps))


def _choices(model: nn.Module, inputs: tuple[Any, ...], wanted: set[str] | None) -> list[tuple[str, ...]]:
    with in_eval(model):
        structure = discover(model, inputs)
    groups = [g for s in structure.segments if not s.pinned for g in coupled(s, "filters")]
    return [group for group in groups if _is_conv(structure, group) and (wanted is None or wanted & set(group))]


def _is_conv(structure: Structure, group: tuple[str, ...]) -> bool:
    return all(structure.layers[name].kind != "linear" for name in group)


def _trial(
    model: nn.Module,
    inputs: tuple[Any, ...],
    layers: tuple[str, ...],
    step: float,
    tune: Callable[[nn.Module], None] | None,
) -> tuple[nn.Module | None, tuple[str, ...]]:
    """A copy with fewer filters in some layers; None if it would be as it was."""
    trial = copied(model)
    weights = dict(trial.named_parameters())
    pruner = L1RankedStructureParameterPruner(
        weights=[f"{layer}.weight" for layer in layers],
        group_type="Filters",
        desired_sparsity=step,
        group_dependency="Leader",
    )
    masks = pruner.masks(Sight(trial, weights, {}, Moment(0, (0,), 1)))
    with torch.no_grad():
        for name, mask in masks.items():
            weights[name].mul_(mask)
    if not masks or not thin(trial, inputs).removed:
        return None, layers
    if tune is not None:
        tune(trial)
    return trial, layers
