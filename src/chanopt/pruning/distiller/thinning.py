"""Thinning: cutting zero filters and channels out of a network that goes on being trained.

What may be cut is read off chanopt's structure of the network, so concats, depthwise convs, flattened features and
modules that are used twice are cut as they should be, and what cannot be cut is left and named. The network stays the
module it is, with the same parameter objects. ``chanopt.optimize`` does the same to a network that is finished, and
more: it needs no agreement between layers, folds constants, and orders channels.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from math import isqrt
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from chanopt.api import verify
from chanopt.compare import copied
from chanopt.errors import ScheduleError, VerifyError
from chanopt.pruning.distiller.dependencies import (
    Conflict,
    DisagreementError,
    Side,
    conflicts_of,
    zero_channels,
)
from chanopt.pruning.distiller.policies import Policy, Step
from chanopt.pruning.distiller.recipes import Directive, Recipe, apply_recipe
from chanopt.pruning.distiller.scheduler import CompressionScheduler, ParameterMasker
from chanopt.pruning.modes import in_eval
from chanopt.pruning.structure import Channels, Segment, Structure, discover

SIDES: dict[str, tuple[Side, ...]] = {
    "remove_filters": ("filters",),
    "remove_channels": ("channels",),
    "contract_model": ("filters", "channels"),
}
"""What a schedule calls thinning, and which side of layers it looks at."""

_SHAPES = {"cifar10": (1, 3, 32, 32), "imagenet": (1, 3, 224, 224), "mnist": (1, 1, 28, 28)}
_CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


@dataclass(frozen=True)
class Thinning:
    """What was cut.

    Attributes:
        recipe: how; false if nothing was.
        removed: by segment, which of its channels.
        left: by segment with something to cut that was not, the reason.
        conflicts: layers that dropped different channels, whose channels were left.
        constants: by segment, the largest value that a channel which was cut had all the same, through a bias or a
            batch norm; the network's function changed by what became of it.
    """

    recipe: Recipe
    removed: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    left: Mapping[str, str] = field(default_factory=dict)
    conflicts: tuple[Conflict, ...] = ()
    constants: Mapping[str, float] = field(default_factory=dict)


def thin(
    model: nn.Module,
    inputs: tuple[Any, ...],
    side: Side | Literal["both"] = "filters",
    *,
    optimizer: Optimizer | None = None,
    masks: Mapping[str, ParameterMasker] | None = None,
    on_conflict: Literal["raise", "unconstrained"] = "raise",
    constants: Literal["drop", "keep"] = "drop",
) -> Thinning:
    """Cut zero filters or channels out of a network, in place, and compare it with what it was.

    Args:
        model: the network, in train or eval mode.
        inputs: example inputs.
        side: ``filters``: convs whose filter is zero lose it, and all that read the channel lose their weights for
            it. ``channels``: layers whose weights for an input channel are all zero lose them, and all that make the
            channel lose the filter. ``both``: one, then the other.
        optimizer: its state is cut along.
        masks: maskers by parameter name, cut along.
        on_conflict: where layers that must drop the same channels do not: ``raise``, before anything is changed, or
            ``unconstrained``, leave the channels on which they disagree.
        constants: a channel whose filter is zero may have a value all the same, from a bias or from the batch norm
            behind. ``drop`` takes that to be part of what was pruned, as Distiller does: biases, means and shifts of
            such channels are set to zero first. ``keep`` leaves the channel.

    Returns:
        What was cut, and what was left and why.

    Raises:
        DisagreementError: see ``on_conflict``.
        ScheduleError: all filters or channels of a layer are zero; or the network's own code does not run when it is
            thinner, in which case it is put back as it was.
        CaptureError: the network cannot be captured.
    """
    steps = SIDES["contract_model"] if side == "both" else (side,)
    done = [_thin(model, inputs, step, optimizer, masks, on_conflict, constants) for step in steps]
    return done[0] if len(done) == 1 else _joined(done)


def _joined(done: list[Thinning]) -> Thinning:
    """Two steps told as one; the recipe is the last one that cut something, as the network keeps them all."""
    return Thinning(
        next((step.recipe for step in reversed(done) if step.recipe), Recipe()),
        {name: channels for step in done for name, channels in step.removed.items()},
        {name: why for step in done for name, why in step.left.items()},
        tuple(conflict for step in done for conflict in step.conflicts),
        {name: value for step in done for name, value in step.constants.items()},
    )


def _thin(
    model: nn.Module,
    inputs: tuple[Any, ...],
    side: Side,
    optimizer: Optimizer | None,
    masks: Mapping[str, ParameterMasker] | None,
    on_conflict: str,
    constants: str,
) -> Thinning:
    with in_eval(model):
        structure = discover(model, inputs)
        plan = _Plan(model, structure, side)
        dead = plan.dead()
        conflicts = conflicts_of(structure, side, dead)
        if conflicts and on_conflict == "raise":
            raise DisagreementError(conflicts)
        removed = {segment.name: plan.removable(segment, dead, constants) for segment in structure.segments}
        removed = {name: channels for name, channels in removed.items() if channels}
        recipe = plan.recipe(removed)
        if not recipe:
            return Thinning(recipe, {}, plan.left, tuple(conflicts))
        _require_same(model, plan, removed, recipe, inputs)
        constants_lost = plan.constants(removed)
        plan.zero_constants(dict(model.named_modules()), removed)
        apply_recipe(model, recipe, optimizer, masks)
    kept = {name: tuple(sorted(channels)) for name, channels in removed.items()}
    return Thinning(recipe, kept, plan.left, tuple(conflicts), constants_lost)


def _require_same(
    model: nn.Module, plan: _Plan, removed: Mapping[str, set[int]], recipe: Recipe, inputs: tuple[Any, ...]
) -> None:
    """Try a recipe on a copy: the thinned network must compute what the masked one does."""
    masked = copied(model)
    plan.zero_constants(dict(masked.named_modules()), removed)
    thinned = copied(masked)
    try:
        apply_recipe(thinned, recipe)
        verify(masked, thinned, inputs, trials=1)
    except (RuntimeError, VerifyError) as error:
        raise ScheduleError(
            f"expected the thinned network to compute what the masked one does, found {type(error).__name__}: "
            f"{str(error).splitlines()[0]}; the network is as it was. If its forward has sizes in its code "
            "(x.view(-1, 512)) or an activation does not map 0 to 0, leave it masked and use chanopt.optimize "
            "afterwards, which needs neither"
        ) from error


# -- the plan -------------------------------------------------------------------------------------------------------


class _Plan:
    """What can be cut out of a network on one side of its layers."""

    def __init__(self, model: nn.Module, structure: Structure, side: Side) -> None:
        self.structure = structure
        self.side: Side = side
        self.modules = dict(model.named_modules())
        self.left: dict[str, str] = {}

    def dead(self) -> dict[str, list[int]]:
        """By layer, the channels on this side whose weights are all zero.

        Raises:
            ScheduleError: all of them are.
        """
        found: dict[str, list[int]] = {}
        for name, layer in self.structure.layers.items():
            if layer.depthwise or (self.side == "filters" and layer.kind == "linear"):
                continue
            channels = _zeros(self.modules[name], self.side)
            count = layer.out_channels if self.side == "filters" else layer.in_channels
            if len(channels) == count:
                raise ScheduleError(
                    f"expected {name} to keep at least one of its {count} {self.side}, found all of them zero: the "
                    "layer would be gone. Lower its sparsity, or use chanopt.optimize, which takes dead layers out"
                )
            if channels:
                found[name] = channels
        return found

    def removable(self, segment: Segment, dead: Mapping[str, Iterable[int]], constants: str) -> set[int]:
        """The channels of a segment that go, if they can."""
        layers = segment.producers if self.side == "filters" else segment.consumers
        gone = {name: zero_channels(mapping, dead.get(name, ())) for name, mapping in layers.items()}
        chosen: set[int] = {
            channel
            for channel in set[int]().union(*gone.values())
            if all(channel in gone[name] for name, mapping in layers.items() if channel in mapping)
        }
        if not chosen:
            return set()
        reason = self._reason(segment)
        if reason:
            self.left[segment.name] = reason
            return set()
        chosen &= self._known(segment)
        if self.side == "filters" and constants == "keep":
            values = self.values(segment)
            constant = {channel for channel in chosen if values.get(channel, 0.0) != 0.0}
            if constant:
                self.left[segment.name] = f"{len(constant)} channels are constants other than zero"
            chosen -= constant
        return chosen

    def _known(self, segment: Segment) -> set[int]:
        """Channels that only layers make, and no operand of a join that is none."""
        made = {channel for mapping in segment.producers.values() for channel in mapping if channel is not None}
        foreign = {
            channel
            for join in segment.joins
            for operand, channels in zip(join.operands, join.channels, strict=True)
            if any(layer.startswith("%") for layer in operand)
            for channel in channels
            if channel is not None
        }
        return made - foreign

    def _reason(self, segment: Segment) -> str:
        """Why nothing of a segment can be cut; empty if it can."""
        if segment.pinned:
            return segment.pins[0]
        for name in (*segment.producers, *segment.consumers):
            if self.structure.layers[name].groups > 1:
                return f"{name} has {self.structure.layers[name].groups} groups"
        for name in segment.through:
            if not self._passes(name):
                return f"{name} is a {type(self.modules[name]).__name__}, whose parameters cannot be cut"
        return ""

    def _passes(self, name: str) -> bool:
        module = self.modules.get(name)
        if isinstance(module, _CONVS):
            return self.structure.layers[name].depthwise
        return isinstance(module, (*_NORMS, nn.PReLU))

    # -- constants --------------------------------------------------------------------------------------------------

    def values(self, segment: Segment) -> dict[int, float]:
        """By channel, the largest value that biases and batch norms of the segment alone would give it."""
        found: dict[int, float] = {}
        for name, mapping in {**segment.producers, **segment.through}.items():
            for channel, value in zip(mapping, _offsets(self.modules[name], len(mapping)), strict=True):
                if channel is not None:
                    found[channel] = max(found.get(channel, 0.0), abs(value))
        return found

    def constants(self, removed: Mapping[str, set[int]]) -> dict[str, float]:
        """By segment, the largest value other than zero of a channel that goes; none where inputs are cut."""
        if self.side == "channels":
            return {}
        told: dict[str, float] = {}
        for segment in self._touched(removed):
            values = self.values(segment)
            told[segment.name] = max(values.get(channel, 0.0) for channel in removed[segment.name])
        return {name: value for name, value in told.items() if value > 0}

    def zero_constants(self, modules: Mapping[str, nn.Module], removed: Mapping[str, set[int]]) -> None:
        """Set biases, means and shifts of channels that go to zero, if filters are cut."""
        for segment in self._touched(removed) if self.side == "filters" else ():
            gone = removed[segment.name]
            for name, mapping in {**segment.producers, **segment.through}.items():
                _zero_offsets(modules[name], [i for i, channel in enumerate(mapping) if channel in gone])

    def _touched(self, removed: Mapping[str, set[int]]) -> list[Segment]:
        return [segment for segment in self.structure.segments if segment.name in removed]

    # -- the recipe -------------------------------------------------------------------------------------------------

    def recipe(self, removed: Mapping[str, set[int]]) -> Recipe:
        """The recipe that cuts channels out of segments."""
        modules: dict[str, dict[str, int | Directive]] = {}
        parameters: dict[str, tuple[Directive, ...]] = {}
        for segment in self._touched(removed):
            gone = removed[segment.name]
            for name, attributes, cuts in self._directives(segment, gone):
                modules.setdefault(name, {}).update(attributes)
                for parameter, directive in cuts.items():
                    key = f"{name}.{parameter}"
                    parameters[key] = (*parameters.get(key, ()), directive)
        return Recipe(modules, _in_turn(parameters))

    def _directives(
        self, segment: Segment, gone: set[int]
    ) -> Iterator[tuple[str, dict[str, int | Directive], dict[str, Directive]]]:
        for name, mapping in segment.producers.items():
            yield name, *_produced(self.modules[name], _left(mapping, gone))
        for name, mapping in segment.through.items():
            yield name, *_passed(self.modules[name], _left(mapping, gone))
        for name, mapping in segment.consumers.items():
            yield name, *_consumed(self.modules[name], mapping, gone)


def _in_turn(parameters: Mapping[str, tuple[Directive, ...]]) -> dict[str, tuple[Directive, ...]]:
    """Cuts of rows before cuts of columns, and the shapes of the latter after the former."""
    done: dict[str, tuple[Directive, ...]] = {}
    for name, directives in parameters.items():
        ordered = sorted(directives, key=lambda directive: directive.view is not None)
        rows = next((len(d.index) for d in ordered if d.view is None and d.dim == 0), None)
        done[name] = tuple(_with_rows(directive, rows) for directive in ordered)
    return done


def _with_rows(directive: Directive, rows: int | None) -> Directive:
    if rows is None or directive.view is None or directive.flat is None:
        return directive
    return Directive(directive.dim, directive.index, (rows, *directive.view[1:]), (rows, *directive.flat[1:]))


def _left(mapping: Channels, gone: set[int]) -> tuple[int, ...]:
    return tuple(number for number, channel in enumerate(mapping) if channel not in gone)


def _produced(module: nn.Module, rows: tuple[int, ...]) -> tuple[dict[str, int | Directive], dict[str, Directive]]:
    attribute = "out_features" if isinstance(module, nn.Linear) else "out_channels"
    cuts = {"weight": Directive(1 if isinstance(module, _TRANSPOSED) else 0, rows)}
    if module.bias is not None:
        cuts["bias"] = Directive(0, rows)
    return {attribute: len(rows)}, cuts


def _passed(module: nn.Module, rows: tuple[int, ...]) -> tuple[dict[str, int | Directive], dict[str, Directive]]:
    keep = Directive(0, rows)
    cuts = {name: keep for name, parameter in module.named_parameters(recurse=False) if parameter.numel() > 1}
    if isinstance(module, _CONVS):
        width = len(rows) * module.in_channels // module.out_channels
        return {"in_channels": width, "out_channels": len(rows), "groups": width}, cuts
    if isinstance(module, nn.PReLU):
        return ({"num_parameters": len(rows)} if cuts else {}), cuts
    buffers = {key: keep for key in ("running_mean", "running_var") if getattr(module, key) is not None}
    return {"num_features": len(rows), **buffers}, cuts


def _consumed(
    module: nn.Module, mapping: Channels, gone: set[int]
) -> tuple[dict[str, int | Directive], dict[str, Directive]]:
    columns = _left(mapping, gone)
    if not isinstance(module, nn.Linear):
        dim = 0 if isinstance(module, _TRANSPOSED) else 1
        return {"in_channels": len(columns)}, {"weight": Directive(dim, columns)}
    return {"in_features": len(columns)}, {"weight": _by_channel(module, mapping, columns)}


def _by_channel(module: nn.Linear, mapping: Channels, columns: tuple[int, ...]) -> Directive:
    """Columns of a linear layer: by channel and pixel if every channel fills neighbouring columns, else one by one."""
    pixels = next((n for n, channel in enumerate(mapping) if channel != mapping[0]), len(mapping))
    heads = mapping[::pixels]
    whole = len(mapping) % pixels == 0 and all(mapping[i] == heads[i // pixels] for i in range(len(mapping)))
    if not whole:
        return Directive(1, columns)
    root = isqrt(pixels)
    sizes = (root, root) if root * root == pixels else (pixels, 1)
    kept = tuple(column // pixels for column in columns[::pixels])
    return Directive(1, kept, (module.out_features, len(heads), *sizes), (module.out_features, len(columns)))


def _zeros(module: nn.Module, side: Side) -> list[int]:
    weight = module.get_parameter("weight").detach()
    rows = 1 if isinstance(module, _TRANSPOSED) else 0
    if getattr(module, "groups", 1) != 1:
        return _zeros_of_groups(module, weight, side)
    alive = weight.movedim(rows if side == "filters" else 1 - rows, 0).flatten(1).any(1)
    return torch.nonzero(~alive).flatten().tolist()


def _zeros_of_groups(module: nn.Module, weight: Tensor, side: Side) -> list[int]:
    """Of a grouped conv, whose weight has the channels of one group."""
    split = weight.unflatten(0, (int(getattr(module, "groups", 1)), -1)).flatten(3)
    plain = not isinstance(module, _TRANSPOSED)
    other = 2 if plain == (side == "filters") else 1
    return torch.nonzero(~split.any(3).any(other).flatten()).flatten().tolist()


def _offsets(module: nn.Module, channels: int) -> list[float]:
    """Per channel, what a module makes of zero."""
    if not isinstance(module, _NORMS):
        bias = getattr(module, "bias", None)
        return [0.0] * channels if bias is None else bias.detach().tolist()
    ones = torch.ones(channels)
    mean = torch.zeros(channels) if module.running_mean is None else module.running_mean
    scale = (ones if module.running_var is None else module.running_var + module.eps).rsqrt()
    if module.affine:
        return (module.bias - mean * scale * module.weight).detach().tolist()
    return (-mean * scale).tolist()


def _zero_offsets(module: nn.Module, channels: list[int]) -> None:
    with torch.no_grad():
        for name in ("bias", "running_mean"):
            tensor = getattr(module, name, None)
            if isinstance(tensor, Tensor):
                tensor[channels] = 0


# -- the policy -----------------------------------------------------------------------------------------------------


def example_of(dataset: str, model: nn.Module) -> tuple[Tensor, ...]:
    """Random example inputs of the shape of a dataset's images.

    Raises:
        ScheduleError: no such dataset is known.
    """
    if dataset not in _SHAPES:
        raise ScheduleError(
            f"expected example inputs, or a remover's dataset among {', '.join(_SHAPES)}; found {dataset!r}"
        )
    parameter = next(model.parameters())
    return (torch.randn(_SHAPES[dataset], device=parameter.device, dtype=parameter.dtype),)


@dataclass(eq=False)
class StructureRemover(Policy):
    """Thins the network when a minibatch of its epoch begins, after pruners declared before it.

    Attributes:
        thinning_func_str: ``remove_filters``, ``remove_channels`` or ``contract_model``.
        arch: Distiller's name of the network; not needed.
        dataset: gives example inputs if the scheduler has none.
        on_conflict: as of :func:`thin`; ``leader`` raises, since the schedule has been mended before.
        constants: as of :func:`thin`.
        thinnings: what was done.
    """

    thinning_func_str: str
    arch: str = ""
    dataset: str = ""
    on_conflict: str = "raise"
    constants: Literal["drop", "keep"] = "drop"
    thinnings: list[Thinning] = field(default_factory=list, init=False)
    _done: bool = field(default=False, init=False, repr=False)

    def __post_init__(self) -> None:
        if self.thinning_func_str not in SIDES:
            raise ScheduleError(
                f"expected thinning_func_str to be one of {', '.join(SIDES)}, found {self.thinning_func_str!r}"
            )

    def on_minibatch_begin(self, scheduler: CompressionScheduler, step: Step, optimizer: Optimizer | None) -> None:
        """Thin, once an epoch."""
        if self._done:
            return
        self._done = True
        fallback = example_of(self.dataset, scheduler.model) if self.dataset in _SHAPES else None
        side, *more = SIDES[self.thinning_func_str]
        done = thin(
            scheduler.model,
            scheduler.inputs(fallback),
            "both" if more else side,
            optimizer=optimizer,
            masks=scheduler.masks,
            on_conflict="unconstrained" if self.on_conflict == "unconstrained" else "raise",
            constants=self.constants,
        )
        self.thinnings.append(done)

    def on_epoch_end(self, scheduler: CompressionScheduler, moment: Any, metrics: Mapping[str, float]) -> None:
        """Be ready for the next epoch."""
        self._done = False
