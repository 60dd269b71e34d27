"""Pruners that rank the structures of a weight and drop the least of them, at once or gradually.

The class names and arguments are those of Distiller's schedules; ``_AGP`` classes follow
:class:`chanopt.pruning.distiller.agp.AgpPruningRate`. What is done otherwise than there, because there it is an error:

* exactly ``floor(fraction * structures)`` go, also where structures are equally large (:func:`.groups.keep_largest`);
* ``group_size`` above 1 works: neighbouring structures stay or go together;
* a leader whose fraction is less than one structure prunes nothing, as without a leader;
* the mean activation drops the channels that are *least* active, as its paper has it;
* nothing needs a GPU.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from chanopt.pruning.distiller.agp import AgpPruningRate
from chanopt.pruning.distiller.components import Pruner, Sight, fraction_of, layer_of, names_of
from chanopt.pruning.distiller.groups import (
    Norm,
    blocks,
    expand,
    expand_blocks,
    keep_largest,
    norms,
    parts,
    prune_count,
    without_zeros,
)
from chanopt.pruning.distiller.statistics import refit

_FILTERS = ("Filters", "3D")
_LEADER = "Leader"


@dataclass(kw_only=True)
class RankedPruner(Pruner):
    """Ranks structures; what is common to all.

    Attributes:
        weights: parameter names; the first one is the leader.
        group_type: which structures.
        group_dependency: ``Leader`` if all the weights drop what the first one drops.
        kwargs: ``block_shape`` of blocks.
        noise: the probability with which a ranking is disturbed by normal noise (epsilon-greedy).
        group_size: how many neighbouring structures stay or go together.
        rounding_fn: ``floor``, ``ceil`` or ``round``, for the number of structures to drop.
        allowed: the structures that a class can rank.
    """

    weights: Sequence[str]
    group_type: str
    group_dependency: str | None = None
    kwargs: Mapping[str, Any] | None = None
    noise: float = 0.0
    group_size: int = 1
    rounding_fn: str = "floor"
    names: ClassVar[tuple[str, ...]] = ("weights",)
    allowed: ClassVar[tuple[str, ...]] = _FILTERS
    _led: tuple[float, Tensor | None] | None = field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        self.weights = names_of(self)
        if self.group_type not in self.allowed:
            raise self.fail(f"expected group_type to be one of {', '.join(self.allowed)}, found {self.group_type!r}")
        if self.group_dependency not in (None, _LEADER):
            raise self.fail(f"expected group_dependency to be {_LEADER} or absent, found {self.group_dependency!r}")
        fraction_of(self, "noise")

    @property
    def group(self) -> str:
        """The structure as :mod:`.groups` names it."""
        return {"Rows": "Channels", "3D": "Filters"}.get(self.group_type, self.group_type)

    @property
    def has_leader(self) -> bool:
        """Whether all the weights drop the same."""
        return self.group_dependency == _LEADER

    @property
    @abstractmethod
    def ends_at(self) -> float:
        """The fraction that is dropped in the end."""

    @abstractmethod
    def fraction(self, sight: Sight) -> float:
        """The fraction to drop now."""

    @abstractmethod
    def scores(self, name: str, sight: Sight) -> Tensor:
        """One number a group of neighbouring structures; the least ones go."""

    def masks(self, sight: Sight) -> dict[str, Tensor]:
        """Masks of the weights of which something is to drop."""
        if self.has_leader:
            return self._following(self.fraction(sight), sight)
        made = {name: self.mask(name, self.fraction(sight), sight) for name in self.weights}
        return {name: mask for name, mask in made.items() if mask is not None}

    def mask(self, name: str, fraction: float, sight: Sight) -> Tensor | None:
        """The mask of one weight by itself; None if nothing is to drop."""
        keep = self.keep(name, fraction, sight)
        return None if keep is None else self.expanded(keep, sight.weights[name])

    def keep(self, name: str, fraction: float, sight: Sight) -> Tensor | None:
        """One number a structure, 0 for those that go; None if nothing is to drop."""
        if fraction == 0:
            return None
        scores = self.scores(name, sight)
        count = prune_count(scores.numel() * self.group_size, fraction, self.group_size, self.rounding_fn)
        if count == 0:
            return None
        if self.noise and float(torch.rand(())) <= self.noise:
            scores = scores * torch.randn_like(scores)
        return self.chosen(scores, count // self.group_size).repeat_interleave(self.group_size)

    def chosen(self, scores: Tensor, dropped: int) -> Tensor:
        """Shape of ``scores``, boolean: all but the least."""
        return keep_largest(scores, dropped)

    def expanded(self, keep: Tensor, weight: Tensor) -> Tensor:
        """The mask of a weight from one number a structure."""
        return expand(keep, weight, self.group)

    def _following(self, fraction: float, sight: Sight) -> dict[str, Tensor]:
        leader = self.weights[0]
        if self._led is None or self._led[0] != fraction or self._is_stale(self._led[1], sight.weights[leader]):
            # As in Distiller, what the leader says holds until the fraction changes.
            self._led = fraction, self.keep(leader, fraction, sight)
        keep = self._led[1]
        if keep is None:
            return {}
        for name in self.weights[1:]:
            self._require_like(keep, name, sight)
        return {name: self.expanded(keep, sight.weights[name]) for name in self.weights}

    def _is_stale(self, keep: Tensor | None, leader: Tensor) -> bool:
        return keep is not None and keep.numel() != parts(leader, self.group).shape[0]

    def _require_like(self, keep: Tensor, name: str, sight: Sight) -> None:
        found = parts(sight.weights[name], self.group).shape[0]
        if found != keep.numel():
            raise self.fail(
                f"expected {name} to have as many {self.group.lower()} as its leader {self.weights[0]}, "
                f"which has {keep.numel()}; found {found}"
            )

    def _groups(self, weight: Tensor) -> Tensor:
        """Shape (groups, entries): neighbouring structures of a group side by side."""
        pieces = parts(weight, self.group)
        if self.group_size < 1 or pieces.shape[0] % self.group_size:
            raise self.fail(f"expected group_size to divide {pieces.shape[0]} structures, found {self.group_size}")
        return pieces.reshape(pieces.shape[0] // self.group_size, -1)


# -- how much -----------------------------------------------------------------------------------------------------


@dataclass(kw_only=True)
class _AtOnce(RankedPruner):
    """Drops a fixed fraction.

    Attributes:
        desired_sparsity: the fraction.
    """

    desired_sparsity: float

    def __post_init__(self) -> None:
        super().__post_init__()
        fraction_of(self, "desired_sparsity")

    @property
    def ends_at(self) -> float:
        return self.desired_sparsity

    def fraction(self, sight: Sight) -> float:
        return self.desired_sparsity


@dataclass(kw_only=True)
class _Gradually(RankedPruner):
    """Drops a fraction that rises by AGP.

    Attributes:
        initial_sparsity: the fraction in the first epoch.
        final_sparsity: the fraction in the last.
    """

    initial_sparsity: float
    final_sparsity: float

    def __post_init__(self) -> None:
        super().__post_init__()
        AgpPruningRate(self.initial_sparsity, self.final_sparsity)

    @property
    def ends_at(self) -> float:
        return self.final_sparsity

    def fraction(self, sight: Sight) -> float:
        return AgpPruningRate(self.initial_sparsity, self.final_sparsity).at(sight.moment)


@dataclass(kw_only=True)
class _AtRandom(RankedPruner):
    """Drops a fraction drawn anew each time.

    Attributes:
        sparsity_range: least and greatest fraction.
    """

    sparsity_range: Sequence[float]

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.sparsity_range) != 2 or not 0 <= self.sparsity_range[0] <= self.sparsity_range[1] <= 1:
            raise self.fail(f"expected sparsity_range as [least, greatest], found {self.sparsity_range!r}")

    @property
    def ends_at(self) -> float:
        return self.sparsity_range[1]

    def fraction(self, sight: Sight) -> float:
        least, greatest = self.sparsity_range
        return least + (greatest - least) * float(torch.rand(()))


# -- by what ------------------------------------------------------------------------------------------------------


@dataclass(kw_only=True)
class _ByNorm(RankedPruner):
    """Ranks by the mean norm of a structure."""

    norm: ClassVar[Norm] = "L1"
    allowed: ClassVar[tuple[str, ...]] = (*_FILTERS, "Channels", "Rows", "Blocks")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.group_type == "Blocks" and "block_shape" not in (self.kwargs or {}):
            raise self.fail("expected kwargs with a block_shape for group_type Blocks, found none")

    @property
    def _block_shape(self) -> Sequence[int]:
        return (self.kwargs or {})["block_shape"]

    def scores(self, name: str, sight: Sight) -> Tensor:
        weight = sight.weights[name].detach()
        if self.group_type != "Blocks":
            return norms(self._groups(weight), self.norm, mean=True)
        return norms(blocks(weight, self._block_shape).flatten(0, 2), self.norm, mean=True)

    def chosen(self, scores: Tensor, dropped: int) -> Tensor:
        return without_zeros(keep_largest(scores, dropped), scores.abs())

    def expanded(self, keep: Tensor, weight: Tensor) -> Tensor:
        if self.group_type != "Blocks":
            return super().expanded(keep, weight)
        return expand_blocks(keep.view(blocks(weight, self._block_shape).shape[:3]), weight, self._block_shape)

    def _is_stale(self, keep: Tensor | None, leader: Tensor) -> bool:
        if self.group_type != "Blocks":
            return super()._is_stale(keep, leader)
        return keep is not None and keep.numel() != blocks(leader, self._block_shape)[..., 0].numel()

    def _require_like(self, keep: Tensor, name: str, sight: Sight) -> None:
        if self.group_type != "Blocks":
            super()._require_like(keep, name, sight)
            return
        if self._is_stale(keep, sight.weights[name]):
            raise self.fail(f"expected {name} to have as many blocks as its leader {self.weights[0]}, found others")


@dataclass(kw_only=True)
class _ByActivationZeros(RankedPruner):
    """Drops filters whose activations are most often zero (Hu et al., "Network Trimming", 2016)."""

    def scores(self, name: str, sight: Sight) -> Tensor:
        return -_channel_statistic(self, name, sight, "apoz")


@dataclass(kw_only=True)
class _ByActivationMean(RankedPruner):
    """Drops filters whose activations are least on average (Molchanov et al., 2017, section 2.2)."""

    def scores(self, name: str, sight: Sight) -> Tensor:
        return _channel_statistic(self, name, sight, "mean")


@dataclass(kw_only=True)
class _ByGradient(RankedPruner):
    """Drops filters whose sum of gradient times weight is least; none before there is a gradient."""

    def keep(self, name: str, fraction: float, sight: Sight) -> Tensor | None:
        return None if sight.model.get_parameter(name).grad is None else super().keep(name, fraction, sight)

    def scores(self, name: str, sight: Sight) -> Tensor:
        gradient = sight.model.get_parameter(name).grad
        assert gradient is not None  # `keep` has looked
        return self._groups(sight.weights[name].detach() * gradient).sum(1)


@dataclass(kw_only=True)
class _ByChance(RankedPruner):
    """Drops filters drawn at random: what other criteria must beat."""

    def scores(self, name: str, sight: Sight) -> Tensor:
        weight = sight.weights[name]
        return torch.rand(self._groups(weight).shape[0], device=weight.device)


@dataclass(kw_only=True)
class _ByBernoulli(RankedPruner):
    """Drops each filter by itself with the given probability and makes up for it in those that stay.

    The mask is ``1 / (fraction kept)`` where a filter stays, so that the layer's output keeps its expectation. One
    filter always stays.
    """

    def keep(self, name: str, fraction: float, sight: Sight) -> Tensor | None:
        if fraction == 0:
            return None
        weight = sight.weights[name]
        drawn = (torch.rand(weight.shape[0]) >= fraction).to(weight)
        if not bool(drawn.any()):
            drawn[int(torch.randint(weight.shape[0], ()))] = 1
        return drawn / drawn.mean()

    def scores(self, name: str, sight: Sight) -> Tensor:
        return torch.rand(sight.weights[name].shape[0])


def _channel_statistic(pruner: RankedPruner, name: str, sight: Sight, what: str) -> Tensor:
    if sight.statistics is None:
        raise pruner.fail(
            f"expected statistics of activations for {name}, found none; run some batches inside "
            "`with chanopt.pruning.distiller.collect_activations(model) as statistics:` and set "
            "scheduler.statistics = statistics"
        )
    return getattr(sight.statistics, what)(layer_of(name)).view(-1, pruner.group_size).mean(1)


# -- the classes of the schedules ---------------------------------------------------------------------------------


@dataclass(kw_only=True)
class L1RankedStructureParameterPruner(_AtOnce, _ByNorm):
    """Drops the structures of least mean absolute value."""


@dataclass(kw_only=True)
class L1RankedStructureParameterPruner_AGP(_Gradually, _ByNorm):
    """Drops the structures of least mean absolute value, gradually."""


@dataclass(kw_only=True)
class L2RankedStructureParameterPruner(_AtOnce, _ByNorm):
    """Drops the structures of least Euclidean norm."""

    norm: ClassVar[Norm] = "L2"


@dataclass(kw_only=True)
class L2RankedStructureParameterPruner_AGP(_Gradually, _ByNorm):
    """Drops the structures of least Euclidean norm, gradually."""

    norm: ClassVar[Norm] = "L2"


@dataclass(kw_only=True)
class RandomLevelStructureParameterPruner(_AtRandom, _ByNorm):
    """Drops the structures of least mean absolute value, as many as chance says."""


@dataclass(kw_only=True)
class ActivationAPoZRankedFilterPruner(_AtOnce, _ByActivationZeros):
    """Drops the filters whose activations are most often zero."""


@dataclass(kw_only=True)
class ActivationAPoZRankedFilterPruner_AGP(_Gradually, _ByActivationZeros):
    """Drops the filters whose activations are most often zero, gradually."""


@dataclass(kw_only=True)
class ActivationMeanRankedFilterPruner(_AtOnce, _ByActivationMean):
    """Drops the filters whose activations are least on average."""


@dataclass(kw_only=True)
class ActivationMeanRankedFilterPruner_AGP(_Gradually, _ByActivationMean):
    """Drops the filters whose activations are least on average, gradually."""


@dataclass(kw_only=True)
class GradientRankedFilterPruner(_AtOnce, _ByGradient):
    """Drops the filters whose sum of gradient times weight is least."""


@dataclass(kw_only=True)
class GradientRankedFilterPruner_AGP(_Gradually, _ByGradient):
    """Drops the filters whose sum of gradient times weight is least, gradually."""


@dataclass(kw_only=True)
class RandomRankedFilterPruner(_AtOnce, _ByChance):
    """Drops filters at random."""


@dataclass(kw_only=True)
class RandomRankedFilterPruner_AGP(_Gradually, _ByChance):
    """Drops filters at random, gradually."""


@dataclass(kw_only=True)
class BernoulliFilterPruner(_AtOnce, _ByBernoulli):
    """Drops each filter with a probability and rescales the others."""


@dataclass(kw_only=True)
class BernoulliFilterPruner_AGP(_Gradually, _ByBernoulli):
    """Drops each filter with a probability that rises, and rescales the others."""


@dataclass(kw_only=True)
class FMReconstructionChannelPruner(_AtOnce, _ByNorm):
    """Drops input channels and fits the weights that stay to the layer's old outputs by least squares.

    The feature maps are sampled beforehand (He et al., "Channel Pruning for Accelerating Very Deep Neural Networks",
    2017, section 3.1).
    """

    allowed: ClassVar[tuple[str, ...]] = ("Channels", "Rows")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.has_leader:
            raise self.fail("expected no group_dependency: each layer is fitted to its own feature maps; found Leader")

    def mask(self, name: str, fraction: float, sight: Sight) -> Tensor | None:
        """The mask of one weight, whose kept channels have been fitted anew."""
        keep = self.keep(name, fraction, sight)
        if keep is None:
            return None
        if sight.samples is None:
            raise self.fail(
                f"expected samples of feature maps for {name}, found none; run some batches inside "
                "`with chanopt.pruning.distiller.collect_feature_maps(model, layers) as samples:` and set "
                "scheduler.samples = samples"
            )
        refit(sight.model.get_submodule(layer_of(name)), keep, *sight.samples.pairs(layer_of(name)))
        return self.expanded(keep, sight.weights[name])
