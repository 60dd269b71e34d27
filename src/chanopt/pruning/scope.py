"""Choosing keep sets: which layers decide together, how scores become keep sets, how far to go.

Three scopes:

* ``constrained``: all readers (or producers) of a segment keep the same channels;
* ``unconstrained``: every layer keeps its own; chanopt.optimize makes that exact, with gathers where it must;
* ``consecutive``: every reader keeps its own window of one shared order: its own channels, and no gathers.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from numbers import Integral, Real
from typing import Any, Literal, TypeAlias, cast

import numpy as np
import torch
from torch import Tensor, nn

from chanopt.api import Mask
from chanopt.errors import ChanoptError, MaskError
from chanopt.pruning import costs
from chanopt.pruning.importance import Importance, Member, by_name
from chanopt.pruning.slices import SIDES, Side, weighted
from chanopt.pruning.structure import Channels, Segment, Structure, discover
from chanopt.pruning.windows import Reader, choose

__all__ = ["Group", "Pruner", "Scope", "below_threshold", "groups", "prune", "retained"]

Scope: TypeAlias = Literal["constrained", "unconstrained", "consecutive"]
Keep: TypeAlias = "dict[str, Tensor]"
"""By group name, which of its channels are kept: bool, shape (channels,)."""

Choosing: TypeAlias = "Callable[[float], dict[str, Mask]]"
"""From an amount to masks."""

_STEPS = 24  # halvings of the amount when a cost is aimed at
_ROUNDS = 4  # new aims where the slim model costs more than was foreseen


@dataclass(frozen=True)
class Group:
    """Layers that keep the same channels.

    Attributes:
        name: the segment's name, or the layer's where it decides alone.
        segment: the segment whose channels they are.
        members: the layers with the group's channel of each of theirs.
        count: channels of the group.
        units: the segment's channel of each of the group's.
    """

    name: str
    segment: Segment
    members: tuple[Member, ...]
    count: int
    units: tuple[int, ...]

    def masks(self, kept: Tensor) -> dict[str, Mask]:
        """The masks by layer if these channels are kept; layers that keep everything are left out."""
        found: dict[str, Mask] = {}
        for member in self.members:
            flags = torch.cat([kept, torch.ones(1, dtype=torch.bool)])[member.index]  # -1 comes from nowhere: kept
            if bool(flags.all()):
                continue
            channels = tuple(flags.nonzero().flatten().tolist())
            found[member.name] = Mask(inputs=channels) if member.side == "input" else Mask(outputs=channels)
        return found


def groups(
    model: nn.Module,
    structure: Structure,
    *,
    side: Side = "input",
    scope: Scope = "unconstrained",
    ignore: Collection[str] = (),
) -> tuple[Group, ...]:
    """The groups that a scope makes of a model's segments, in order of execution.

    Layers that read the network's input are no group of the input side, and no layer of a pinned segment is one of the
    output side or of the constrained scope: nothing could go. A constrained segment with an ignored layer keeps all.

    Args:
        model: the model.
        structure: its structure.
        side: which channels of each layer are chosen.
        scope: ``consecutive`` has the groups of ``constrained``.
        ignore: names or patterns (``layer1.*``) of layers that keep all channels on this side.
    """
    modules = {name: weighted(model, name) for name in structure.layers}
    found: list[Group] = []
    for segment in structure.segments:
        table = dict(segment.consumers if side == "input" else segment.producers)
        ignored = [name for name in table if any(fnmatchcase(name, pattern) for pattern in ignore)]
        if not table or not segment.producers:
            continue
        if scope == "unconstrained":
            alone = [name for name in table if name not in ignored and (side == "input" or not segment.pinned)]
            found += [_group(name, segment, {name: table[name]}, modules, side) for name in alone]
        elif not segment.pinned and not ignored:
            found.append(_group(segment.name, segment, table, modules, side))
    return tuple(found)


def _group(name: str, segment: Segment, table: Mapping[str, Channels], modules: Any, side: Side) -> Group:
    """A group of layers; its channels are those of the segment that any of the layers has, ascending."""
    units = sorted({unit for index in table.values() for unit in index if unit is not None})
    number = {unit: position for position, unit in enumerate(units)}
    members = tuple(
        Member(layer, modules[layer], side, torch.tensor([-1 if unit is None else number[unit] for unit in index]))
        for layer, index in table.items()
    )
    return Group(name, segment, members, len(units), tuple(units))


# -- from scores to keep sets -----------------------------------------------------------------------------------------


def below_threshold(scores: Tensor, amount: float) -> Tensor:
    """Which scores are kept: the threshold is the k-th smallest, k = min(n, int(amount * n) + 1); ties are kept.

    So int(amount * n) are dropped where no two are equal, never more, and never all.
    """
    count = scores.numel()
    if not count:
        return torch.ones(0, dtype=torch.bool)
    rank = min(count, int(amount * count) + 1)
    return scores >= torch.kthvalue(scores, rank).values


@dataclass(frozen=True)
class Pruner:
    """How to choose channels. Called with a model and example inputs, it returns masks; the model is not modified.

    Attributes:
        amount: the share of channels to drop (``target="ratio"``), or of the cost to save. Or a mapping: by names of
            layers, of groups that have no layer of that name (a segment's), or by patterns (``layer1.*``); what it does
            not name keeps all. A name counts more than a pattern, a pattern more than those after it, and a group with
            a named layer drops what the mapping says of that layer.
        importance: a name (l1, l2, lamp, fpgm, random, taylor, taylor2, gradient) or an :class:`Importance`.
        side: choose input channels of readers, or output channels of producers.
        scope: see the module.
        locality: ``local`` prunes every group by the amount, ``global`` one threshold over all of them.
        target: ``ratio`` of channels, or a cost of the slim model: ``macs``, ``parameters``, ``latency`` (measured on
            this machine), or any :data:`chanopt.pruning.costs.Cost`.
        floor: the least number of channels of a group that is kept, or their share if below 1.
        multiple: kept channels are rounded up to a multiple of this, e.g. 8 or 16.
        ignore: names or patterns of layers that keep all channels.
        live: ``consecutive``: at most this share of a segment's channels is read by anyone at all.
        effort: ``consecutive``: how many places of the windows are tried in each segment.
    """

    amount: float | Mapping[str, float] = 0.5
    importance: str | Importance = "l2"
    side: Side = "input"
    scope: Scope = "unconstrained"
    locality: Literal["local", "global"] = "local"
    target: str | costs.Cost = "ratio"
    floor: float = 1
    multiple: int = 1
    ignore: Collection[str] = ()
    live: float = 1.0
    effort: int = 250

    def __post_init__(self) -> None:
        if self.side not in SIDES:
            raise ChanoptError(f"expected side 'input' or 'output', found {self.side!r}")
        if self.scope not in ("constrained", "unconstrained", "consecutive"):
            raise ChanoptError(f"expected scope 'constrained', 'unconstrained' or 'consecutive', found {self.scope!r}")
        if self.locality not in ("local", "global"):
            raise ChanoptError(f"expected locality 'local' or 'global', found {self.locality!r}")
        if self.scope == "consecutive" and self.side == "output":
            raise ChanoptError("expected side 'input' for scope 'consecutive' (readers have windows), found 'output'")
        for amount in self.amount.values() if isinstance(self.amount, Mapping) else (self.amount,):
            if not _number(amount) or not 0 <= amount < 1:
                raise ChanoptError(f"expected an amount of at least 0 and below 1, found {amount!r}")
        for name, fits, what in (
            ("multiple", _whole(self.multiple) and self.multiple >= 1, "a whole number from 1 up"),
            ("floor", _number(self.floor) and self.floor >= 0, "a number of channels, or a share of them below 1"),
            ("live", _number(self.live) and 0 < self.live <= 1, "a share above 0 and at most 1"),
            ("effort", _whole(self.effort) and self.effort >= 0, "a whole number from 0 up"),
        ):
            if not fits:
                raise ChanoptError(f"expected {name} as {what}, found {getattr(self, name)!r}")
        if isinstance(self.ignore, str) or not all(isinstance(cast(Any, name), str) for name in self.ignore):
            raise ChanoptError(f"expected names of layers in a list to ignore, found {self.ignore!r}")
        if self.locality == "local" and by_name(self.importance).compares:
            raise ChanoptError("expected locality 'global': this importance compares layers, within one it only ranks")
        if isinstance(self.amount, Mapping) and (self.locality == "global" or self.target != "ratio"):
            raise ChanoptError("expected one amount where layers are compared or a cost is aimed at, found a mapping")
        if not callable(self.target) and self.target not in ("ratio", *costs.COSTS):
            raise ChanoptError(f"expected target ratio, {', '.join(costs.COSTS)} or a cost, found {self.target!r}")

    def __call__(
        self,
        model: nn.Module,
        example_inputs: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
        *,
        structure: Structure | None = None,
    ) -> dict[str, Mask]:
        """Choose channels.

        Args:
            model: in eval mode; live masks count as what they compute.
            example_inputs: as for :func:`chanopt.optimize`.
            kwargs: keyword inputs.
            structure: what :func:`discover` found, if it is known.

        Returns:
            Masks by layer, for :func:`chanopt.pruning.apply` and :func:`chanopt.optimize`.

        Raises:
            CaptureError, ChanoptError: as :func:`chanopt.lower`.
            MaskError: an ignored name that no layer matches; a cost that cannot be reached.
        """
        found = discover(model, example_inputs, kwargs) if structure is None else structure
        self._check_names(found)
        parts = groups(model, found, side=self.side, scope=self.scope, ignore=self.ignore)
        chosen = _Chosen(self, found, parts)
        if self.target == "ratio":
            return chosen.masks(None)
        cost = costs.COSTS[self.target]() if isinstance(self.target, str) else self.target
        return self._reached(chosen.masks, found, cost)

    def _check_names(self, structure: Structure) -> None:
        wanted = [*self.ignore, *(self.amount if isinstance(self.amount, Mapping) else ())]
        names = [*structure.layers, *(segment.name for segment in structure.segments)]
        for pattern in wanted:
            if not any(fnmatchcase(name, pattern) for name in names):
                raise MaskError(f"expected {pattern!r} to name a layer, found none; there are {', '.join(names[:6])}")

    def _reached(self, masks: Choosing, structure: Structure, cost: costs.Cost) -> dict[str, Mask]:
        """The masks of the least amount whose slim model is within the target; a warning where none was found."""
        assert not isinstance(self.amount, Mapping)
        target = aim = (1 - self.amount) * costs.total(structure, {}, cost)
        best = self._within(aim, masks, structure, cost)
        if structure.origin.program is None:
            return best
        for _ in range(_ROUNDS):
            real = costs.emitted(structure, best, cost)
            if real <= target:
                return best
            # Reads that were widened to save copies multiply by more channels than are kept.
            aim = costs.total(structure, best, cost) * target / real
            try:
                best = self._within(aim, masks, structure, cost)
            except MaskError:
                break
        real = costs.emitted(structure, best, cost)
        if real > target:
            warnings.warn(
                f"expected a slim model with a cost of at most {target:.6g}, found {real:.6g}: chanopt.optimize reads "
                "more channels than are kept where that saves copies; scope='consecutive' needs none, or ask for less",
                stacklevel=4,
            )
        return best

    def _within(self, aim: float, masks: Choosing, structure: Structure, cost: costs.Cost) -> dict[str, Mask]:
        """The masks of the least amount that leaves no more than the aim."""
        known: dict[object, float] = {}

        def left(trial: dict[str, Mask]) -> float:
            key = tuple((name, mask.inputs, mask.outputs) for name, mask in trial.items())
            if key not in known:
                known[key] = costs.total(structure, trial, cost)
            return known[key]

        low, high = 0.0, 1.0 - 1e-9
        best = masks(high)
        if left(best) > aim:
            raise MaskError(
                f"expected a cost of at most {aim:.6g}, found {left(best):.6g} with as few channels as "
                f"floor={self.floor}, multiple={self.multiple} and the layers that cannot be pruned allow; lower the "
                "amount or the floor"
            )
        for _ in range(_STEPS):
            middle = (low + high) / 2
            trial = masks(middle)
            if left(trial) <= aim:
                best, high = trial, middle
            else:
                low = middle
        return best


def prune(
    model: nn.Module,
    example_inputs: tuple[Any, ...],
    amount: float | Mapping[str, float] = 0.5,
    *,
    kwargs: Mapping[str, Any] | None = None,
    structure: Structure | None = None,
    **options: Any,
) -> dict[str, Mask]:
    """Choose channels of a model: ``Pruner(amount, **options)(model, example_inputs)``.

    Raises:
        ChanoptError, MaskError: as :class:`Pruner`.
    """
    return Pruner(amount, **options)(model, example_inputs, kwargs, structure=structure)


class _Chosen:
    """Keep sets of one model; scores are computed once, whatever amounts are tried."""

    def __init__(self, pruner: Pruner, structure: Structure, parts: tuple[Group, ...]) -> None:
        self.pruner, self.structure, self.parts = pruner, structure, parts
        importance = by_name(pruner.importance)
        self.scores = {part.name: importance.score(part.members, part.count).double().cpu() for part in parts}
        self.own: dict[str, Tensor] = {}
        if pruner.scope == "consecutive":
            self.own = {m.name: importance.score([m], p.count).double().cpu() for p in parts for m in p.members}
        self.amounts = _amounts(pruner.amount, parts) if isinstance(pruner.amount, Mapping) else {}
        self.windows: dict[tuple[str, tuple[bool, ...]], dict[str, Mask]] = {}

    def masks(self, amount: float | None) -> dict[str, Mask]:
        """The masks for an amount (None: the pruner's own)."""
        kept = self._kept(amount)
        found: dict[str, Mask] = {}
        for part in self.parts:
            make = self._windowed if self.pruner.scope == "consecutive" else Group.masks
            found |= make(part, self._rounded(part, kept[part.name]))
        return found

    def _kept(self, amount: float | None) -> Keep:
        if self.pruner.locality == "global":
            return self._over_all(self._amount("", amount))
        return {
            part.name: below_threshold(self.scores[part.name], self._amount(part.name, amount)) for part in self.parts
        }

    def _amount(self, name: str, amount: float | None) -> float:
        if amount is not None:
            return amount
        given = self.pruner.amount
        return self.amounts.get(name, 0.0) if isinstance(given, Mapping) else given

    def _over_all(self, amount: float) -> Keep:
        if not self.parts:
            return {}
        flags = below_threshold(torch.cat([self.scores[part.name] for part in self.parts]), amount)
        pieces = torch.split(flags, [part.count for part in self.parts])
        return {part.name: piece for part, piece in zip(self.parts, pieces, strict=True)}

    def _rounded(self, part: Group, kept: Tensor) -> Tensor:
        """With the best of the dropped ones, up to the floor and to a multiple."""
        floor = self.pruner.floor
        least = max(1, int(floor) if floor >= 1 else int(np.ceil(floor * part.count)))
        count = max(int(kept.sum()), least)
        count = min(part.count, -(-count // self.pruner.multiple) * self.pruner.multiple)
        order = torch.argsort(torch.where(kept, torch.inf, self.scores[part.name]), descending=True, stable=True)
        flags = kept.clone()
        flags[order[:count]] = True
        return flags

    def _windowed(self, part: Group, kept: Tensor) -> dict[str, Mask]:
        """Windows for the readers of a segment, each as long as what it would read of the common set."""
        if part.segment.ordered:
            return {}
        if not all(_once(member) for member in part.members):
            return part.masks(kept)
        key = (part.name, tuple(kept.tolist()))
        if key not in self.windows:
            self.windows[key] = self._chosen_windows(part, kept)
        return self.windows[key]

    def _chosen_windows(self, part: Group, kept: Tensor) -> dict[str, Mask]:
        common = set(kept.nonzero().flatten().tolist())
        readers = [_reader(member, self.own[member.name], common) for member in part.members]
        number = {unit: position for position, unit in enumerate(part.units)}
        spans = [[number[unit] for unit in span if unit in number] for span in part.segment.spans]
        live = max(1, int(self.pruner.live * part.count))
        chosen = choose(part.count, readers, common, spans=spans, live=live, effort=self.pruner.effort)
        found: dict[str, Mask] = {}
        for member, window in zip(part.members, chosen.kept, strict=True):
            flags = torch.zeros(part.count, dtype=torch.bool)
            flags[list(window)] = True
            found |= replace(part, members=(member,)).masks(flags)
        return found


def _amounts(given: Mapping[str, float], parts: Sequence[Group]) -> dict[str, float]:
    """By group name, the amount that a mapping by names and patterns gives it.

    Raises:
        MaskError: a name that no group has, or two amounts for layers that keep the same channels.
    """
    layers = {member.name for part in parts for member in part.members}
    found: dict[str, float] = {}
    used: set[str] = set()
    for part in parts:
        names = [member.name for member in part.members]
        names += [part.name] if part.name not in layers else []
        said = {name: given[name] for name in names if name in given}
        if len(set(said.values())) > 1:
            raise MaskError(f"expected one amount for layers that keep the same channels, found {said}")
        used.update(said)
        patterns = [key for key in given if any(fnmatchcase(name, key) for name in names)]
        used.update(patterns)
        if said or patterns:
            found[part.name] = next(iter(said.values())) if said else given[patterns[0]]
    idle = [key for key in given if key not in used]
    if idle:
        raise MaskError(
            f"expected {idle[0]!r} to name a layer whose channels may go here, found none; "
            f"there are {', '.join(sorted(layers)[:6]) or 'none'}"
        )
    return found


def _number(value: Any) -> bool:
    return isinstance(value, Real) and value is not True and value is not False


def _whole(value: Any) -> bool:
    return isinstance(value, Integral) and value is not True and value is not False


def _once(member: Member) -> bool:
    """Whether a layer finds every channel of the group at one place, and all equally often.

    A layer that reads a value and what else became of it, ``cat([y, -y])``, has a window in each: the two lie side by
    side only if nothing lies behind the first window or before the second.
    """
    units, counts = torch.unique_consecutive(member.index, return_counts=True)
    found = units[units >= 0]
    return len(found.unique()) == len(found) and len(counts[units >= 0].unique()) <= 1


def _reader(member: Member, scores: Tensor, common: set[int]) -> Reader:
    region = sorted(set(member.index.tolist()) - {-1})
    worth = (scores - scores.min()).clamp(min=0) if bool((scores < 0).any()) else scores
    return Reader(member.name, tuple(region), len(common.intersection(region)), tuple(worth[region].tolist()))


def retained(
    model: nn.Module,
    structure: Structure,
    masks: Mapping[str, Mask],
    *,
    importance: str | Importance = "l2",
    side: Side = "input",
    ignore: Collection[str] = (),
) -> float:
    """The share of importance that masks keep: what every layer keeps by its own scores, summed over layers.

    Args:
        model: the model before masking.
        structure: its structure.
        masks: by layer.
        importance: as for :class:`Pruner`.
        side: whose channels the masks choose.
        ignore: layers that do not count.
    """
    scorer = by_name(importance)
    kept = whole = 0.0
    for part in groups(model, structure, side=side, scope="unconstrained", ignore=ignore):
        scores = scorer.score(part.members, part.count)
        mask = masks.get(part.name, Mask())
        chosen = mask.inputs if side == "input" else mask.outputs
        flags = torch.ones(part.count, dtype=torch.bool)
        if chosen is not None:
            flags = torch.zeros(part.count, dtype=torch.bool)
            index = part.members[0].index[sorted(int(channel) for channel in chosen)]
            flags[index[index >= 0]] = True
        kept, whole = kept + float(scores[flags].sum()), whole + float(scores.sum())
    return kept / whole if whole else 1.0
