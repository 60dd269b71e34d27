"""How much a channel matters: scores from weights, from feature maps, from gradients.

A score is asked for a *group*: the layers that keep or drop a channel together. One layer alone is a group of one.
Scores of weights see the weights of all members side by side, as one long row a channel (UPSCALE's constrained
heuristics); scores of data are summed over the members.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias
from zlib import crc32

import torch
from torch import Tensor, nn, optim

from chanopt.errors import ChanoptError, MaskError
from chanopt.pruning.masks import current
from chanopt.pruning.slices import Side, Weighted, by_channel, effective, original, pairs

__all__ = [
    "FPGM",
    "LAMP",
    "Accumulator",
    "Average",
    "Collected",
    "Gradient",
    "Importance",
    "Latest",
    "Magnitude",
    "Member",
    "Momentum",
    "Random",
    "Taylor",
    "by_name",
    "fpgm",
    "lamp",
    "norms",
    "taylor",
]


@dataclass(frozen=True)
class Member:
    """One layer of a group.

    Attributes:
        name: the layer's name.
        module: the layer.
        side: which of its channels are scored.
        index: int64, shape (channels of that side,): the group's channel of each, -1 for none.
    """

    name: str
    module: Weighted
    side: Side
    index: Tensor

    def gather(self, rows: Tensor, count: int) -> Tensor:
        """Rows of the layer's channels as rows of the group's; several of one channel side by side, others zero.

        Args:
            rows: shape (channels, entries).
            count: channels of the group.

        Returns:
            Shape (count, entries * the most channels of the layer that are one of the group's).
        """
        valid = (self.index >= 0).nonzero().flatten()
        wanted = self.index[valid]
        order = torch.argsort(wanted, stable=True)
        sizes = torch.bincount(wanted, minlength=count)
        starts = torch.repeat_interleave(torch.cumsum(sizes, 0) - sizes, sizes)
        slot = torch.arange(len(wanted)) - starts
        table = rows.new_zeros(count, max(1, int(sizes.max())), rows.shape[1])
        table[wanted[order].to(rows.device), slot.to(rows.device)] = rows[valid[order].to(rows.device)]
        return table.reshape(count, -1)

    def add(self, scores: Tensor, count: int) -> Tensor:
        """Scores of the layer's channels, shape (channels,), summed by the group's channel: shape (count,)."""
        valid = (self.index >= 0).nonzero().flatten().to(scores.device)
        return scores.new_zeros(count).index_add_(0, self.index.to(scores.device)[valid], scores[valid])


class Importance(ABC):
    """A way to score channels.

    Attributes:
        compares: scores are only meaningful between groups, so that pruning each by its own amount makes no sense.
    """

    compares: bool = False

    @abstractmethod
    def score(self, members: Sequence[Member], count: int) -> Tensor:
        """The score of every channel of a group: shape (count,), on the CPU, float64; more is kept first.

        Args:
            members: the layers of the group.
            count: channels of the group.
        """


class _OfRows(Importance):
    """A score of what each channel multiplies."""

    @abstractmethod
    def of(self, rows: Tensor) -> Tensor:
        """The score of each row: shape (channels, entries) to (channels,)."""

    def score(self, members: Sequence[Member], count: int) -> Tensor:
        """As :meth:`Importance.score`: the members' weights side by side."""
        rows = [m.gather(by_channel(effective(m.module), m.module, m.side).double(), count).cpu() for m in members]
        return self.of(torch.cat(rows, 1))


def norms(rows: Tensor, p: float = 2) -> Tensor:
    """The p-norm of each row: shape (channels, entries) to (channels,)."""
    return torch.linalg.vector_norm(rows, p, dim=1)


def lamp(rows: Tensor) -> Tensor:
    """UPSCALE's form of LAMP: each norm over the sum of those that are not smaller, itself among them.

    The norms are not squared (Lee et al., ICLR 2021, square them); among equals the first counts as the largest.

    >>> lamp(torch.tensor([[1.0], [2.0], [3.0], [4.0]]))
    tensor([0.1000, 0.2222, 0.4286, 1.0000])
    """
    sizes = norms(rows)
    order = torch.argsort(sizes, descending=True, stable=True)
    total = torch.cumsum(sizes[order], 0)
    scores = torch.empty_like(sizes)
    scores[order] = torch.where(total > 0, sizes[order] / total, torch.zeros_like(total))
    return scores


def fpgm(rows: Tensor) -> Tensor:
    """The sum of the distances to all other rows (He et al., CVPR 2019): near the geometric median it is small."""
    return torch.cdist(rows, rows, compute_mode="donot_use_mm_for_euclid_dist").sum(0)


@dataclass(frozen=True)
class Magnitude(_OfRows):
    """The norm of a channel's weights: ``p=2`` as in UPSCALE, ``p=1`` as in Li et al. (ICLR 2017)."""

    p: float = 2

    def of(self, rows: Tensor) -> Tensor:
        """As :func:`norms`."""
        return norms(rows, self.p)


@dataclass(frozen=True)
class LAMP(_OfRows):
    """As :func:`lamp`."""

    compares = True

    def of(self, rows: Tensor) -> Tensor:
        """As :func:`lamp`."""
        return lamp(rows)


@dataclass(frozen=True)
class FPGM(_OfRows):
    """As :func:`fpgm`."""

    def of(self, rows: Tensor) -> Tensor:
        """As :func:`fpgm`."""
        return fpgm(rows)


@dataclass(frozen=True)
class Random(Importance):
    """Random scores, the same for the same seed and layers, whenever they are asked for."""

    seed: int = 0

    def score(self, members: Sequence[Member], count: int) -> Tensor:
        """As :meth:`Importance.score`."""
        named = ",".join(f"{member.side} of {member.name}" for member in members)
        generator = torch.Generator().manual_seed(crc32(f"{self.seed}: {named}".encode()))
        return torch.rand(count, generator=generator, dtype=torch.float64)


@dataclass(frozen=True)
class Collected(Importance):
    """Scores per layer that were collected beforehand, e.g. by :mod:`chanopt.pruning.statistics`.

    Attributes:
        table: by layer name, shape (channels of the side that is pruned,).
    """

    table: Mapping[str, Tensor]

    def score(self, members: Sequence[Member], count: int) -> Tensor:
        """As :meth:`Importance.score`: the sum over the members.

        Raises:
            MaskError: nothing was collected for a layer, or for another number of channels.
        """
        total = torch.zeros(count, dtype=torch.float64)
        for member in members:
            found = self.table.get(member.name)
            if found is None or len(found) != len(member.index):
                what = "nothing" if found is None else f"{len(found)} scores"
                raise MaskError(
                    f"expected collected scores of the {len(member.index)} {member.side} channels of {member.name}, "
                    f"found {what}; collect them with side={member.side!r}"
                )
            total += member.add(found.double().cpu(), count)
        return total


# -- gradients --------------------------------------------------------------------------------------------------------

Curvature: TypeAlias = Literal["squared", "optimizer"]


def taylor(weight: Tensor, grad: Tensor, curvature: Tensor | None = None) -> Tensor:
    """The change of the loss when a weight becomes zero, per weight: -w g, or -w g + w² h / 2 with a curvature h."""
    first = -weight * grad
    return first if curvature is None else first + 0.5 * weight.square() * curvature


@dataclass(frozen=True)
class Taylor(Importance):
    """The Taylor expansion of the loss, summed with its sign over members, outputs and kernel; then the absolute value.

    Only outputs that are not masked count, and weights are those behind a live mask, so that a masked channel has a
    score and may come back (SMCP, section 3.2).

    Attributes:
        order: 1 or 2.
        optimizer: where given, gradients are its running means (Adam's ``exp_avg``, SGD's ``momentum_buffer``) instead
            of ``.grad``.
        curvature: of order 2: ``squared`` gradients, or the ``optimizer``'s own (Adam's ``exp_avg_sq``).
    """

    order: Literal[1, 2] = 1
    optimizer: optim.Optimizer | None = None
    curvature: Curvature = "squared"

    def score(self, members: Sequence[Member], count: int) -> Tensor:
        """As :meth:`Importance.score`.

        Raises:
            ChanoptError: a weight has no gradient, or the optimiser has no such state.
        """
        total = torch.zeros(count, dtype=torch.float64)
        for member in members:
            total += member.add(self.signed(member), count)
        return total.abs()

    def signed(self, member: Member) -> Tensor:
        """The signed sum per channel of one layer: float64, shape (channels,), on the CPU."""
        stored = original(member.module)
        each = taylor(stored.detach(), self._gradient(member, stored), self._second(member, stored))
        counted = each.double() * _other_side_kept(member)
        return by_channel(counted, member.module, member.side).sum(1).cpu()

    def _gradient(self, member: Member, stored: nn.Parameter) -> Tensor:
        if self.optimizer is not None:
            return _state(self.optimizer, stored, ("exp_avg", "momentum_buffer"), member.name)
        if stored.grad is None:
            raise ChanoptError(
                f"expected a gradient of {member.name}.weight, found none; run a backward pass before scoring"
            )
        return stored.grad.detach()

    def _second(self, member: Member, stored: nn.Parameter) -> Tensor | None:
        if self.order == 1:
            return None
        if self.curvature == "squared":
            return self._gradient(member, stored).square()
        if self.optimizer is None:
            raise ChanoptError("expected an optimizer whose state has the curvature, found none; give optimizer=")
        return _state(self.optimizer, stored, ("exp_avg_sq",), member.name)


def _other_side_kept(member: Member) -> Tensor:
    """Shape that broadcasts to the weight's: whether the channel on the other side of each weight is kept."""
    mask = current(member.module)
    kept = pairs(mask, member.module).any(3)  # (groups, outputs, inputs)
    alive = kept.any(2, keepdim=True) if member.side == "input" else kept.any(1, keepdim=True)
    flags = alive.expand_as(kept)
    module = member.module
    if isinstance(module, nn.Linear):
        return flags.reshape(mask.shape)
    turned = flags.transpose(1, 2) if module.transposed else flags
    return turned.reshape(mask.shape[0], mask.shape[1], *[1] * (mask.ndim - 2))


def _state(optimizer: optim.Optimizer, stored: nn.Parameter, names: Sequence[str], layer: str) -> Tensor:
    state = optimizer.state.get(stored, {})
    for name in names:
        found = state.get(name)
        if isinstance(found, Tensor):
            return found.detach()
    raise ChanoptError(
        f"expected the optimizer to keep {' or '.join(names)} for {layer}.weight, found {sorted(state) or 'nothing'}; "
        "take a step first, or use the gradients themselves"
    )


@dataclass(frozen=True)
class Gradient(Importance):
    """The sum of gradient times weight over a channel, with its sign (Distiller's gradient ranking)."""

    def score(self, members: Sequence[Member], count: int) -> Tensor:
        """As :meth:`Importance.score`.

        Raises:
            ChanoptError: a weight has no gradient.
        """
        total = torch.zeros(count, dtype=torch.float64)
        for member in members:
            stored = original(member.module)
            if stored.grad is None:
                raise ChanoptError(f"expected a gradient of {member.name}.weight, found none; run a backward pass")
            product = (stored.grad * stored).detach().double()
            total += member.add(by_channel(product, member.module, member.side).sum(1).cpu(), count)
        return total


def by_name(name: str | Importance) -> Importance:
    """The importance that a name stands for: l1, l2, lamp, fpgm, random, taylor, taylor2, gradient.

    Raises:
        ChanoptError: no such name.
    """
    if isinstance(name, Importance):
        return name
    if name not in _NAMES:
        raise ChanoptError(f"expected one of {', '.join(_NAMES)} as importance, found {name!r}")
    return _NAMES[name]()


_NAMES = {
    "l1": lambda: Magnitude(1),
    "l2": lambda: Magnitude(2),
    "lamp": LAMP,
    "fpgm": FPGM,
    "random": Random,
    "taylor": lambda: Taylor(1),
    "taylor2": lambda: Taylor(2),
    "gradient": Gradient,
}


# -- accumulation between prunings ------------------------------------------------------------------------------------


class Accumulator(ABC):
    """Scores that are taken at several steps and used once, at the next pruning."""

    every_step = True
    """Whether the scores of every step are needed; if not, only those just before pruning."""

    def __init__(self) -> None:
        self._values: dict[str, Tensor] = {}
        self._counts: dict[str, int] = {}

    def update(self, key: str, value: Tensor) -> None:
        """Take the scores of one step of one group."""
        count = self._counts.get(key, 0)
        self._values[key] = self._merge(self._values.get(key), value.detach().clone(), count)
        self._counts[key] = count + 1

    def value(self, key: str) -> Tensor:
        """The accumulated scores.

        Raises:
            ChanoptError: nothing was taken since the last pruning.
        """
        if key not in self._values:
            raise ChanoptError(f"expected scores of {key}, found none since the last pruning; call update first")
        return self._values[key]

    def clear(self) -> None:
        """Forget everything: called after each pruning."""
        self._values.clear()
        self._counts.clear()

    def state(self) -> dict[str, dict[str, Any]]:
        """What :meth:`restore` takes, as plain data."""
        return {"values": {key: value.tolist() for key, value in self._values.items()}, "counts": dict(self._counts)}

    def restore(self, state: Mapping[str, Mapping[str, Any]]) -> None:
        """Go on from a state."""
        self._values = {key: torch.tensor(value, dtype=torch.float64) for key, value in state["values"].items()}
        self._counts = {key: int(count) for key, count in state["counts"].items()}

    @abstractmethod
    def _merge(self, old: Tensor | None, new: Tensor, count: int) -> Tensor:
        """The accumulated scores after one more; ``count`` came before."""


class Latest(Accumulator):
    """The last scores."""

    every_step = False

    def _merge(self, old: Tensor | None, new: Tensor, count: int) -> Tensor:
        return new


class Average(Accumulator):
    """The mean of all scores."""

    def _merge(self, old: Tensor | None, new: Tensor, count: int) -> Tensor:
        return new if old is None else old + (new - old) / (count + 1)


class Momentum(Accumulator):
    """A running mean, ``rate * old + (1 - rate) * new`` from zero on, without correction of its start."""

    def __init__(self, rate: float = 0.9) -> None:
        super().__init__()
        self.rate = rate

    def _merge(self, old: Tensor | None, new: Tensor, count: int) -> Tensor:
        fresh = (1 - self.rate) * new
        return fresh if old is None else self.rate * old + fresh
