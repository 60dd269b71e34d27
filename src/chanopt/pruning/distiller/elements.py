"""Pruners of single entries, and of structures by a fixed threshold.

The class names and arguments are those of Distiller's schedules.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from chanopt.pruning.distiller.agp import AgpPruningRate
from chanopt.pruning.distiller.components import EVERY, Pruner, Sight, names_of
from chanopt.pruning.distiller.groups import entries_at_level, entries_over, expand, over_threshold


@dataclass(kw_only=True)
class MagnitudeParameterPruner(Pruner):
    """Drops entries whose absolute value is at most a threshold.

    Attributes:
        thresholds: by parameter name; ``*`` is the default and must be there.
    """

    thresholds: Mapping[str, float]
    names: ClassVar[tuple[str, ...]] = ("thresholds",)

    def __post_init__(self) -> None:
        if EVERY not in self.thresholds:
            raise self.fail(f"expected a default threshold '{EVERY}', found only {sorted(self.thresholds)}")

    def masks(self, sight: Sight) -> dict[str, Tensor]:
        """Masks of all weights."""
        default = self.thresholds[EVERY]
        return {name: entries_over(w, self.thresholds.get(name, default)) for name, w in sight.weights.items()}


@dataclass(kw_only=True)
class SparsityLevelParameterPruner(Pruner):
    """Drops the smallest entries up to a fraction of the tensor.

    Attributes:
        levels: fractions by parameter name; ``*`` is the default.
    """

    levels: Mapping[str, float]
    names: ClassVar[tuple[str, ...]] = ("levels",)

    def __post_init__(self) -> None:
        if not self.levels:
            raise self.fail("expected levels, found none")

    def masks(self, sight: Sight) -> dict[str, Tensor]:
        """Masks of the weights that have a level."""
        default = self.levels.get(EVERY, 0)
        made = {name: entries_at_level(w, self.levels.get(name, default)) for name, w in sight.weights.items()}
        return {name: mask for name, mask in made.items() if mask is not None}


@dataclass(kw_only=True)
class AutomatedGradualPruner(Pruner):
    """Drops the smallest entries up to a fraction that rises by AGP.

    Attributes:
        initial_sparsity: the fraction in the first epoch.
        final_sparsity: the fraction in the last.
        weights: parameter names.
    """

    initial_sparsity: float
    final_sparsity: float
    weights: Sequence[str]
    names: ClassVar[tuple[str, ...]] = ("weights",)

    def __post_init__(self) -> None:
        self.weights = names_of(self)
        AgpPruningRate(self.initial_sparsity, self.final_sparsity)

    def masks(self, sight: Sight) -> dict[str, Tensor]:
        """Masks at this epoch's sparsity."""
        fraction = AgpPruningRate(self.initial_sparsity, self.final_sparsity).at(sight.moment)
        made = {name: entries_at_level(sight.weights[name], fraction) for name in self.weights}
        return {name: mask for name, mask in made.items() if mask is not None}


@dataclass(kw_only=True)
class SensitivityPruner(Pruner):
    """Drops entries smaller than a multiple of the weight's standard deviation (Han et al., 2015).

    The standard deviation is taken once, the first time: as pruning goes on, more weights fall below it.

    Attributes:
        sensitivities: the multiples by parameter name; ``*`` is the default.
    """

    sensitivities: Mapping[str, float]
    names: ClassVar[tuple[str, ...]] = ("sensitivities",)
    _deviations: dict[str, float] = field(default_factory=dict, init=False, repr=False)

    def masks(self, sight: Sight) -> dict[str, Tensor]:
        """Masks of the weights that have a sensitivity."""
        return {
            name: entries_over(
                sight.weights[name], self._deviation(name, sight.weights[name]) * _entry(self.sensitivities, name)
            )
            for name in self.covers(sight.weights)
        }

    def _deviation(self, name: str, weight: Tensor) -> float:
        if name not in self._deviations:
            self._deviations[name] = float(weight.detach().std())
        return self._deviations[name]


@dataclass(kw_only=True)
class SplicingPruner(Pruner):
    """Drops small entries and brings back those that have grown (Guo et al., "Dynamic Network Surgery", 2016).

    With ``m`` and ``s`` the mean and standard deviation of the absolute weights, taken once, entries below
    ``low_thresh_mult * (m + s * sensitivity)`` go, those at or above ``hi_thresh_mult * (...)`` return, and those in
    between stay as they are (equation 3 of the paper).

    Attributes:
        sensitivities: by parameter name; ``*`` is the default.
        low_thresh_mult: of the lower threshold.
        hi_thresh_mult: of the upper threshold.
        sensitivity_multiplier: by how much of itself the sensitivity grows an epoch.
    """

    sensitivities: Mapping[str, float]
    low_thresh_mult: float
    hi_thresh_mult: float
    sensitivity_multiplier: float = 0.0
    names: ClassVar[tuple[str, ...]] = ("sensitivities",)
    _moments: dict[str, tuple[float, float]] = field(default_factory=dict, init=False, repr=False)

    def masks(self, sight: Sight) -> dict[str, Tensor]:
        """Masks of the weights that have a sensitivity."""
        return {name: self._mask(name, sight) for name in self.covers(sight.weights)}

    def _mask(self, name: str, sight: Sight) -> Tensor:
        sizes = sight.weights[name].detach().abs()
        if name not in self._moments:
            self._moments[name] = float(sizes.mean()), float(sizes.std())
        sensitivity = _entry(self.sensitivities, name)
        if self.sensitivity_multiplier > 0:
            sensitivity *= (sight.moment.epoch - sight.moment.starting_epoch) * self.sensitivity_multiplier + 1
        mean, deviation = self._moments[name]
        level = mean + deviation * sensitivity
        current = sight.masks.get(name)
        mask = torch.ones_like(sizes) if current is None else current.to(sizes)
        mask = torch.where(sizes < level * self.low_thresh_mult, torch.zeros_like(sizes), mask)
        return torch.where(sizes >= level * self.hi_thresh_mult, torch.ones_like(sizes), mask)


@dataclass(kw_only=True)
class BaiduRNNPruner(Pruner):
    """Drops entries below a threshold that ramps up (Narang et al., "Exploring Sparsity in RNNs", 2017, algorithm 1).

    Attributes:
        q: the threshold to aim for (equation 1 of the paper).
        ramp_epoch_offset: epochs after the first in which the slope is the starting one.
        ramp_slope_mult: how much steeper it is afterwards.
        weights: parameter names.
    """

    q: float
    ramp_epoch_offset: int
    ramp_slope_mult: float
    weights: Sequence[str]
    names: ClassVar[tuple[str, ...]] = ("weights",)

    def __post_init__(self) -> None:
        self.weights = names_of(self)

    def masks(self, sight: Sight) -> dict[str, Tensor]:
        """Masks at this epoch's threshold."""
        threshold = self.threshold(sight)
        return {name: entries_over(sight.weights[name], threshold) for name in self.weights}

    def threshold(self, sight: Sight) -> float:
        """The threshold of an epoch.

        Raises:
            ScheduleError: the policy lists its epochs, so that no frequency is known.
        """
        moment = sight.moment
        if moment.frequency is None:
            raise self.fail("expected starting_epoch, ending_epoch and frequency, found a list of epochs")
        start, every = moment.starting_epoch, moment.frequency
        ramp = start + self.ramp_epoch_offset
        slope = 2 * self.q * every / (2 * (ramp - start) + 3 * (moment.ending_epoch - ramp))
        if moment.epoch < ramp:
            return slope * (moment.epoch - start + 1) / every
        steeper = slope * self.ramp_slope_mult
        return (slope * (ramp - start + 1) + steeper * (moment.epoch - ramp + 1)) / every


@dataclass(kw_only=True)
class StructureParameterPruner(Pruner):
    """Drops structures that are not larger than a threshold.

    Attributes:
        reg_regims: ``[threshold, structure]`` by parameter name.
        threshold_criteria: ``Max`` or ``Mean_Abs``.
    """

    reg_regims: Mapping[str, Sequence[float | str]]
    threshold_criteria: str
    names: ClassVar[tuple[str, ...]] = ("reg_regims",)

    def __post_init__(self) -> None:
        if self.threshold_criteria not in ("Max", "Mean_Abs"):
            raise self.fail(f"expected threshold_criteria Max or Mean_Abs, found {self.threshold_criteria!r}")

    def masks(self, sight: Sight) -> dict[str, Tensor]:
        """Masks of the weights that have a threshold."""
        made: dict[str, Tensor] = {}
        for name, (threshold, group) in self.reg_regims.items():
            weight = sight.weights[name]
            keep = over_threshold(weight, str(group), float(threshold), self.threshold_criteria)
            made[name] = expand(keep, weight, str(group))
        return made


def _entry(table: Mapping[str, float], name: str) -> float:
    return table[name] if name in table else table[EVERY]
