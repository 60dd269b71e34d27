"""Regularizers: terms of the loss that push whole structures towards zero, and dropped filters."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from chanopt.pruning.distiller.components import Component, layer_of
from chanopt.pruning.distiller.groups import entries_over, expand, over_threshold, parts

_EPSILON = 1e-8  # under the root of a channel's norm, whose gradient at zero would not exist
_COMBINED = {
    "Rows+Cols": ("Rows", "Cols"),
    "Cols+Rows": ("Cols", "Rows"),
    "Channels+4D": ("Channels", "4D"),
    "4D+Channels": ("4D", "Channels"),
}


@dataclass(kw_only=True)
class Regularizer(Component):
    """A term of the loss.

    Attributes:
        reg_regims: by parameter name, the strength, or ``[strength, structure]``.
        threshold_criteria: if given, what is not larger than the strength is dropped after every minibatch, for this
            one minibatch (soft), or for good in the end if the policy says ``keep_mask``.
    """

    reg_regims: Mapping[str, Any]
    threshold_criteria: str | None = None
    names: ClassVar[tuple[str, ...]] = ("reg_regims",)

    @abstractmethod
    def loss(self, weights: Mapping[str, Tensor]) -> Tensor:
        """The term, a scalar with a gradient."""

    def threshold(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Masks of what is not larger than the strength, by parameter name; none without a criterion."""
        return {}

    def start(self, model: nn.Module) -> None:
        """The policy's first epoch begins."""

    def stop(self) -> None:
        """The policy's last epoch has ended."""

    def _total(self, terms: list[Tensor]) -> Tensor:
        return torch.stack(terms).sum() if terms else torch.zeros(())


@dataclass(kw_only=True)
class L1Regularizer(Regularizer):
    """``strength * sum |w|``."""

    def loss(self, weights: Mapping[str, Tensor]) -> Tensor:
        """The sum over the weights named."""
        return self._total([weights[name].abs().sum() * strength for name, strength in self.reg_regims.items()])

    def threshold(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Masks of entries whose absolute value is at most the strength."""
        if self.threshold_criteria is None:
            return {}
        return {name: entries_over(weights[name], strength) for name, strength in self.reg_regims.items()}


@dataclass(kw_only=True)
class GroupLassoRegularizer(Regularizer):
    """``strength * sum over structures of ||structure||_2`` (Yuan and Lin, 2006).

    Structures: ``2D`` kernels, ``3D`` = ``Filters``, ``4D`` the whole tensor, ``Channels``, and of matrices ``Rows``
    and ``Cols``; ``Rows+Cols`` and ``Channels+4D`` add two. A channel's norm has 1e-8 under the root.
    """

    def __post_init__(self) -> None:
        if self.threshold_criteria not in (None, "Max", "Mean_Abs"):
            raise self.fail(f"expected threshold_criteria Max or Mean_Abs or none, found {self.threshold_criteria!r}")
        for name, regime in self.reg_regims.items():
            if not isinstance(regime, Sequence) or isinstance(regime, str) or len(regime) != 2:
                raise self.fail(f"expected [strength, structure] for {name}, found {regime!r}")

    def loss(self, weights: Mapping[str, Tensor]) -> Tensor:
        """The sum over the weights named."""
        return self._total(
            [
                _lasso(weights[name], group) * strength
                for name, (strength, groups) in self.reg_regims.items()
                for group in _COMBINED.get(groups, (groups,))
            ]
        )

    def threshold(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Masks of structures that are not larger than the strength by the criterion."""
        if self.threshold_criteria is None:
            return {}
        return {
            name: expand(over_threshold(weights[name], group, strength, self.threshold_criteria), weights[name], group)
            for name, (strength, group) in self.reg_regims.items()
        }


@dataclass(kw_only=True)
class GroupVarianceRegularizer(Regularizer):
    """``strength / variance of the channels' norms`` (Torfi et al., 2018): channels should differ in size."""

    def __post_init__(self) -> None:
        for name, (_, group) in self.reg_regims.items():
            if group != "Channels":
                raise self.fail(f"expected the structure Channels for {name}, found {group!r}")

    def loss(self, weights: Mapping[str, Tensor]) -> Tensor:
        """The sum over the weights named."""
        return self._total(
            [strength / _channel_norms(weights[name]).var() for name, (strength, _) in self.reg_regims.items()]
        )


@dataclass(kw_only=True)
class DropFilterRegularizer(Regularizer):
    """Every so many training forwards, a conv runs without some of its filters (Pan et al., "DropFilter", 2018).

    Those that stay are divided by the share of the L1 norm that is left, at least ``least_share``. The model's
    parameters are not touched: the layer only sees another weight for that one forward.

    Attributes:
        reg_regims: by parameter name, the probability with which a filter stays.
        frequency: every how many training forwards.
        least_share: see above.
    """

    frequency: int = 16
    least_share: float = 0.2
    _hooks: list[Any] = field(default_factory=list, init=False, repr=False)

    def loss(self, weights: Mapping[str, Tensor]) -> Tensor:
        """Nothing is added to the loss."""
        return self._total([])

    def start(self, model: nn.Module) -> None:
        """Let the layers drop filters."""
        self.stop()
        for name, stays in self.reg_regims.items():
            module = model.get_submodule(layer_of(name))
            left = [self.frequency]
            self._hooks.append(module.register_forward_pre_hook(partial(self._drop, float(stays), left)))
            self._hooks.append(module.register_forward_hook(_restore, always_call=True))

    def stop(self) -> None:
        """Let the layers be as they were."""
        while self._hooks:
            self._hooks.pop().remove()

    def _drop(self, stays: float, left: list[int], module: nn.Module, args: Any) -> None:
        if not module.training:
            return
        left[0] -= 1
        if left[0] > 0:
            return
        left[0] = self.frequency
        # An instance attribute hides the parameter of that name from `forward` and from nobody else.
        vars(module)["weight"] = self.dropped(module.get_parameter("weight"), stays)

    def dropped(self, weight: Tensor, stays: float) -> Tensor:
        """A weight without the filters that chance takes, the others scaled up."""
        keep = torch.bernoulli(torch.full((weight.shape[0],), stays)).to(weight)
        sizes = parts(weight.detach(), "Filters").abs().sum(1)
        share = max(self.least_share, float((sizes * keep).sum() / sizes.sum()))
        return weight * expand(keep, weight, "Filters") / share


def _restore(module: nn.Module, args: Any, output: Any) -> None:
    vars(module).pop("weight", None)


def _lasso(weight: Tensor, group: str) -> Tensor:
    if group == "Channels":
        return _channel_norms(weight).sum()
    pieces = parts(weight, group)
    return torch.linalg.vector_norm(pieces, dim=1).sum()


def _channel_norms(weight: Tensor) -> Tensor:
    return (parts(weight, "Channels").square().sum(1) + _EPSILON).sqrt()
