"""FluxPrune's strategies and what applies them. All return new models; masks stay live until they are kept."""

from __future__ import annotations

import copy
import math
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from types import FunctionType
from typing import Any, TypeAlias, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm  # pyright: ignore[reportPrivateUsage]
from torch.nn.modules.conv import _ConvNd  # pyright: ignore[reportPrivateUsage]
from torch.nn.utils import parametrize

from chanopt.errors import ChanoptError
from chanopt.pruning import masks
from chanopt.pruning.slices import Weighted, by_channel, effective, element_mask
from chanopt.pruning.structure import discover

__all__ = [
    "ChannelPrune",
    "LevelPrune",
    "Plan",
    "Strategy",
    "ThresholdPrune",
    "iterativeprune",
    "keepprune",
    "prune",
]


class Strategy(ABC):
    """Which entries of a layer's weight to keep."""

    @abstractmethod
    def keep(self, layer: Weighted) -> Tensor | None:
        """A bool mask of the shape of the weight; None where the strategy does not apply."""

    def keep_norm(self, layer: Weighted) -> Tensor | None:
        """A bool mask of the channels of the batch norm right behind the layer; None to leave it alone."""
        return None


def _most(scores: Tensor, level: float) -> Tensor:
    """Flags of the ceil((1 - level) * n) largest scores, the first ones among equals."""
    flat = scores.flatten()
    count = math.ceil((1 - level) * len(flat))
    flags = torch.zeros(len(flat), dtype=torch.bool)
    flags[torch.argsort(flat.cpu(), descending=True, stable=True)[:count]] = True
    return flags.reshape(scores.shape)


def _check_level(level: float) -> None:
    if not 0 <= level <= 1:
        raise ChanoptError(f"expected a level between 0 and 1, found {level}")


@dataclass(frozen=True)
class LevelPrune(Strategy):
    """Drop a share of the weights of every layer, the smallest magnitudes first.

    Attributes:
        level: the share.
        signed: drop the most negative weights instead, which is what FluxPrune does.
    """

    level: float
    signed: bool = False

    def __post_init__(self) -> None:
        _check_level(self.level)

    def keep(self, layer: Weighted) -> Tensor:
        """As :meth:`Strategy.keep`."""
        weight = effective(layer)
        return _most(weight if self.signed else weight.abs(), self.level)


@dataclass(frozen=True)
class ThresholdPrune(Strategy):
    """Drop weights of a magnitude below a threshold."""

    threshold: float

    def keep(self, layer: Weighted) -> Tensor:
        """As :meth:`Strategy.keep`."""
        return effective(layer).abs() >= self.threshold


@dataclass(frozen=True)
class ChannelPrune(Strategy):
    """Drop a share of the filters of every conv, those of the smallest norm first, and their batch norm's channels.

    Attributes:
        level: the share.
        p: the norm.
    """

    level: float
    p: float = 1

    def __post_init__(self) -> None:
        _check_level(self.level)

    def _filters(self, layer: Weighted) -> Tensor:
        rows = by_channel(effective(layer), layer, "output")
        return _most(torch.linalg.vector_norm(rows.double(), self.p, dim=1), self.level)

    def keep(self, layer: Weighted) -> Tensor | None:
        """As :meth:`Strategy.keep`; linear layers are left alone."""
        if isinstance(layer, nn.Linear):
            return None
        return element_mask(layer, outputs=self._filters(layer).nonzero().flatten().tolist())

    def keep_norm(self, layer: Weighted) -> Tensor | None:
        """As :meth:`Strategy.keep_norm`."""
        return None if isinstance(layer, nn.Linear) else self._filters(layer)


Plan: TypeAlias = "Strategy | Sequence[Plan] | Mapping[str, Plan] | None"
"""One strategy for all layers, None for none, or one plan for each child: in order, or by name."""


def prune(plan: Plan, model: nn.Module, example_inputs: tuple[Any, ...] | None = None) -> nn.Module:
    """A copy of a model with live masks; masks that it has already stay, the new ones are put on top.

    Only weights of convs and linear layers are masked, and of batch norms right behind a conv that loses filters. What
    stands behind a conv is read off ``nn.Sequential``; with example inputs, off the model's data flow.

    Raises:
        ChanoptError: a plan that does not fit the model's children.
    """
    pruned = copy.deepcopy(model)
    norms = dict(_norms_of_sequentials(pruned)) if example_inputs is None else _norms_of_flow(pruned, example_inputs)
    chosen: list[tuple[nn.Module, str, Tensor]] = []
    for layer, strategy in _planned(plan, pruned, type(model).__name__):
        keep, keep_norm = strategy.keep(layer), strategy.keep_norm(layer)
        if keep is not None:
            chosen.append((layer, "weight", keep))
        norm = norms.get(layer)
        if keep_norm is not None and norm is not None and norm.affine:
            chosen += [(norm, "weight", keep_norm), (norm, "bias", keep_norm)]
    for module, name, keep in chosen:
        _mask(module, name, keep)
    return pruned


def _mask(module: nn.Module, name: str, keep: Tensor) -> None:
    live = masks.masked(module, name)
    before = live.mask if live is not None else torch.ones_like(keep)
    masks.attach(module, masks.Hard if live is None else type(live), name)
    masks.set_mask(module, keep.to(before.device) & before, name)


def _planned(plan: Plan, module: nn.Module, where: str) -> Iterator[tuple[Weighted, Strategy]]:
    """Every prunable layer with its strategy."""
    if plan is None or isinstance(plan, nn.Identity) or _is_identity(plan, module):
        return
    if isinstance(plan, Strategy):
        layers = (part for part in module.modules() if isinstance(part, nn.Linear | _ConvNd))
        yield from ((layer, plan) for layer in layers)
        return
    children = dict(module.named_children())
    children.pop("parametrizations", None)
    if isinstance(cast(Any, plan), str) or not isinstance(cast(Any, plan), Mapping | Sequence):
        raise ChanoptError(
            f"expected a strategy for {where}, strategies for its children, or the identity or None to skip it; "
            f"found {plan!r}"
        )
    if not isinstance(plan, Mapping):
        if len(plan) != len(children):
            raise ChanoptError(
                f"expected {len(children)} strategies for {where}, one for each child, found {len(plan)}"
            )
        plan = dict(zip(children, plan, strict=True))
    for name, part in plan.items():
        if name not in children:
            raise ChanoptError(f"expected a child of {where} ({', '.join(children)}), found {name!r}")
        yield from _planned(part, children[name], f"{where}.{name}")


def _is_identity(plan: Any, module: nn.Module) -> bool:
    """Whether a plan is the tutorial's ``identity``: a function that gives back what it is given."""
    return isinstance(plan, FunctionType) and plan(module) is module


def _norms_of_sequentials(model: nn.Module) -> Iterator[tuple[nn.Module, _BatchNorm]]:
    for module in model.modules():
        if isinstance(module, nn.Sequential):
            for layer, norm in pairwise(module):
                if isinstance(layer, _ConvNd) and isinstance(norm, _BatchNorm):
                    yield layer, norm


def _norms_of_flow(model: nn.Module, inputs: tuple[Any, ...]) -> dict[nn.Module, _BatchNorm]:
    modules = dict(model.named_modules())
    pairs = ((modules[name], modules.get(layer.norm)) for name, layer in discover(model, inputs).layers.items())
    return {layer: norm for layer, norm in pairs if isinstance(norm, _BatchNorm)}


def keepprune(model: nn.Module, *, protect: bool = False) -> nn.Module:
    """A copy of a model whose masks are written into the parameters as zeros.

    Args:
        model: a pruned model.
        protect: as in FluxPrune, nothing keeps the zeros from changing in training; with this they stay, by permanent
            masks.
    """
    kept = copy.deepcopy(model)
    found = [
        (module, name, live.mask.clone())
        for module in kept.modules()
        for name in (list(module.parametrizations) if parametrize.is_parametrized(module) else ())  # type: ignore[arg-type]
        if (live := masks.masked(module, name)) is not None
    ]
    masks.bake(kept)
    for module, name, mask in found if protect else ():
        masks.attach(module, masks.Permanent, name)
        masks.set_mask(module, mask, name)
    return kept


def iterativeprune(
    finetune: Callable[[nn.Module], bool], stages: Iterable[Plan], model: nn.Module, *, maxtries: int = 5
) -> nn.Module:
    """Prune stage by stage; after each, call ``finetune`` on the pruned model until it says that it is good.

    Args:
        finetune: trains the model in place; returns whether it is good enough.
        stages: plans for :func:`prune`.
        model: where to start.
        maxtries: after so many calls without success, give up with a warning.

    Returns:
        The model after the last stage that succeeded, with live masks; ``model`` itself if none did.
    """
    for number, stage in enumerate(stages, 1):
        pruned = prune(stage, model)
        if not any(finetune(pruned) for _ in range(maxtries)):
            warnings.warn(
                f"stage {number} ({stage}) did not reach its aim in {maxtries} tries: the model of the stage before "
                "is returned",
                stacklevel=2,
            )
            return model
        model = pruned
    return model
