"""Random channel masks, written as zeros into the weights of a model, and the keep sets they leave."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from tests.support.nets.base import BATCH_NORMS, CONVS, AnyModule

Side = Literal["input", "output", "both"]
Scope = Literal["random", "structured"]
Mode = Literal["uniform", "varied", "nested", "identical", "ranges", "groups", "dead_layers", "dead_inputs", "slimming"]

MODES: tuple[Mode, ...] = get_args(Mode)
RANDOM_MODES: tuple[Mode, ...] = ("uniform", "varied")
STRUCTURED_MODES: tuple[Mode, ...] = tuple(mode for mode in MODES if mode not in RANDOM_MODES)


@dataclass(frozen=True, slots=True)
class KeepSet:
    """Channels of one layer that are not all zero, ascending, numbered over all groups.

    For a batch norm (mode "slimming") `outputs` are the channels whose gamma is not zero, `inputs` are all.
    """

    inputs: tuple[int, ...]
    outputs: tuple[int, ...]


def mask_randomly(
    model: nn.Module,
    seed: int,
    *,
    side: Side = "both",
    amount: float = 0.5,
    scope: Scope = "random",
    mode: Mode | None = None,
    keep_bias: bool | None = None,
) -> dict[str, KeepSet]:
    """Zero channels of every convolution and linear layer in place; what is kept, by module name.

    `side` says whether input columns, output rows or both are zeroed. `amount` is the part of each layer's
    channels that goes (its meaning per mode is below). `keep_bias`: whether a zeroed output keeps its bias,
    and so becomes a constant; None draws it for each layer. `scope` draws the mode: "random" means
    independent masks ("uniform" or "varied"), "structured" one of the others.

    uniform      the same part of every layer, channels at random
    varied       a part between 0 and 2 * amount (at most all) for each layer and side
    nested       one random ranking per channel count, a random number of its first: sets are nested
    identical    one set per channel count, the same for all layers of that width
    ranges       one contiguous run per layer
    groups       whole groups of grouped layers, otherwise as uniform
    dead_layers  uniform, and about a quarter of the layers (at least one) lose all their outputs
    dead_inputs  uniform, and about a quarter of the layers (at least one) lose all their inputs
    slimming     gamma = 0 with beta not zero in every batch norm, not in layers; without norms, uniform

    The keep sets are read off the final weights, so layers that share a parameter agree on them, and a
    channel that a grouped layer loses through its outputs is reported as a lost input too.

    Raises:
        ValueError: `amount` is not in [0, 1].
    """
    if not 0 <= amount <= 1:
        raise ValueError(f"amount is the part of the channels to zero: expected 0 to 1, found {amount}")
    rng = random.Random(f"{seed}/{side}/{amount}/{scope}/{mode}")
    chosen: Mode = mode or rng.choice(RANDOM_MODES if scope == "random" else STRUCTURED_MODES)
    layers = {name: module for name, module in model.named_modules() if isinstance(module, (*CONVS, nn.Linear))}
    with torch.no_grad():
        if chosen == "slimming" and (norms := _affine_norms(model)):
            kept = {name: _slim(norm, rng, amount) for name, norm in norms.items()}
            return kept | {name: keep_set(layer) for name, layer in layers.items()}
        drawer = _Drawer(rng, chosen, amount)
        _mask_layers(list(layers.values()), drawer, side, keep_bias)
        return {name: keep_set(layer) for name, layer in layers.items()}


def keep_set(layer: AnyModule) -> KeepSet:
    """The channels of a convolution or linear layer whose weights are not all zero, read off `layer.weight`.

    An input channel is kept if any output of its group reads it, an output channel if any weight of its row
    is not zero.
    """
    weight = _grouped(layer, layer.weight.detach())
    alive = weight.ne(0)
    inputs = alive.any(1).flatten().nonzero().flatten().tolist()
    outputs = alive.any(2).flatten().nonzero().flatten().tolist()
    return KeepSet(tuple(inputs), tuple(outputs))


def _grouped(layer: AnyModule, weight: Tensor) -> Tensor:
    """The largest magnitude of each kernel of a weight, as (groups, outputs per group, inputs per group)."""
    flat = weight.abs().reshape(*weight.shape[:2], -1).amax(-1)
    groups = getattr(layer, "groups", 1)
    flat = flat.unflatten(0, (groups, -1))
    return flat.transpose(1, 2) if getattr(layer, "transposed", False) else flat


def _zero(layer: AnyModule, inputs: Sequence[int], outputs: Sequence[int]) -> None:
    """Zero these channels, numbered over all groups, in the layer's weight."""
    alive = torch.ones_like(_grouped(layer, layer.weight.detach()))
    _, rows, columns = alive.shape
    for channel in inputs:
        alive[channel // columns, :, channel % columns] = 0
    for channel in outputs:
        alive[channel // rows, channel % rows, :] = 0
    if getattr(layer, "transposed", False):
        alive = alive.transpose(1, 2)
    pattern = alive.flatten(0, 1)
    pattern = pattern.reshape(*pattern.shape, *[1] * (layer.weight.ndim - 2))
    if parametrize.is_parametrized(layer, "weight"):
        _zero_weight_norm(layer, pattern)
        return
    layer.weight.mul_(pattern)


def _zero_weight_norm(layer: AnyModule, pattern: Tensor) -> None:
    """Weight norm divides a row by its norm: a dead row gets length 0 and keeps its direction, not 0 / 0."""
    length, direction = layer.parametrizations.weight.original0, layer.parametrizations.weight.original1
    dead = (direction * pattern).flatten(1).abs().amax(1).eq(0).reshape(length.shape)
    length.masked_fill_(dead, 0.0)
    direction.mul_(torch.where(dead, torch.ones_like(pattern), pattern))


def _mask_layers(layers: list[AnyModule], drawer: _Drawer, side: Side, keep_bias: bool | None) -> None:
    """Draw and write the masks of all layers."""
    dead = drawer.dead_layers(len(layers))
    for index, layer in enumerate(layers):
        groups, rows, columns = _grouped(layer, layer.weight.detach()).shape
        drawer.next_layer(groups)
        lost_inputs = drawer.draw(groups, columns) if side != "output" else ()
        lost_outputs = drawer.draw(groups, rows) if side != "input" else ()
        if index in dead and drawer.mode == "dead_inputs":
            lost_inputs = range(groups * columns)
        if index in dead and drawer.mode == "dead_layers":
            lost_outputs = range(groups * rows)
        _zero(layer, lost_inputs, lost_outputs)
        keep = drawer.rng.random() < 0.5 if keep_bias is None else keep_bias
        if lost_outputs and layer.bias is not None and not keep:
            layer.bias[list(lost_outputs)] = 0


@dataclass(slots=True)
class _Drawer:
    """Draws the channels to lose, one call per layer side."""

    rng: random.Random
    mode: Mode
    amount: float
    rankings: dict[int, list[int]] = field(default_factory=dict)
    lost_groups: list[int] = field(default_factory=list)

    def next_layer(self, groups: int) -> None:
        """Draw the whole groups to lose: the same on both sides, or little of a layer would remain."""
        self.lost_groups = self._some(groups, self.amount) if self.mode == "groups" else []

    def draw(self, groups: int, per_group: int) -> Sequence[int]:
        """Channels to lose out of groups * per_group."""
        total = groups * per_group
        special: dict[Mode, Callable[[], Sequence[int]]] = {
            "varied": lambda: self._some(total, self.rng.uniform(0, min(1.0, 2 * self.amount))),
            "nested": lambda: self._ranking(total)[: int(self.rng.uniform(0, min(1.0, 2 * self.amount)) * total)],
            "identical": lambda: self._ranking(total)[: int(self.amount * total)],
            "ranges": lambda: self._run(total),
            "groups": lambda: self._whole_groups(groups, per_group),
        }
        return special.get(self.mode, lambda: self._some(total, self.amount))()

    def dead_layers(self, count: int) -> set[int]:
        """Which layers die in the modes that kill layers: each with probability 1/4, at least one."""
        if not count:
            return set()
        return {index for index in range(count) if self.rng.random() < 0.25} or {self.rng.randrange(count)}

    def _some(self, total: int, part: float) -> list[int]:
        return self.rng.sample(range(total), int(part * total))

    def _ranking(self, total: int) -> list[int]:
        if total not in self.rankings:
            self.rankings[total] = self.rng.sample(range(total), total)
        return self.rankings[total]

    def _run(self, total: int) -> range:
        length = int(self.amount * total)
        start = self.rng.randint(0, total - length)
        return range(start, start + length)

    def _whole_groups(self, groups: int, per_group: int) -> list[int]:
        if groups == 1:
            return self._some(per_group, self.amount)
        return [group * per_group + channel for group in self.lost_groups for channel in range(per_group)]


def _affine_norms(model: nn.Module) -> dict[str, AnyModule]:
    return {n: m for n, m in model.named_modules() if isinstance(m, BATCH_NORMS) and m.affine}


def _slim(norm: AnyModule, rng: random.Random, amount: float) -> KeepSet:
    """Network slimming (Liu et al. 2017, section 3): gamma = 0, while beta stays, and is never left zero."""
    channels = norm.weight.numel()
    lost = rng.sample(range(channels), int(amount * channels))
    norm.weight[lost] = 0
    for channel in lost:
        if norm.bias[channel] == 0:
            norm.bias[channel] = rng.uniform(0.2, 0.8)
    kept = norm.weight.ne(0).nonzero().flatten().tolist()
    return KeepSet(tuple(range(channels)), tuple(kept))
