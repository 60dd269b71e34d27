"""Soft masking with a budget: masks that are chosen anew every few steps while all weights go on learning.

Source: Humble, Shen, Latorre, Darve, Alvarez, "Soft Masking for Cost-Constrained Channel Pruning" (ECCV 2022). What
differs: costs are bilinear in one solve, and the solver proves or bounds its answer (`allocation`).
"""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, distributed, nn

from chanopt.api import Mask
from chanopt.errors import AllocationError
from chanopt.pruning.importance import Accumulator, Average, Importance, Latest, Member, Momentum, Taylor, by_name
from chanopt.pruning.masks import (
    DECAY,
    Permanent,
    Rescale,
    Soft,
    WeightMask,
    attach,
    bake,
    decay,
    masked,
    rescale,
    set_mask,
)
from chanopt.pruning.modes import in_eval
from chanopt.pruning.slices import element_mask, original, weighted
from chanopt.pruning.smcp.choosing import Choice, Options, choose, masks_of
from chanopt.pruning.smcp.costs import CostModel, ParameterCost
from chanopt.pruning.smcp.groups import Groups, PruningGroup, discover_groups
from chanopt.pruning.smcp.schedule import Schedule
from chanopt.pruning.smcp.tracking import Tracker

__all__ = ["SoftMaskPruner"]

_ACCUMULATORS: Mapping[str, type[Accumulator]] = {"latest": Latest, "average": Average, "momentum": Momentum}


class SoftMaskPruner:
    """Prunes a model while it is trained. Call :meth:`start_epoch` in every epoch and :meth:`step` in every step.

    Attributes:
        groups: the groups of the model.
        schedule: when, and to which ratio.
        kept: per group, the channels that are kept now.
        choice: the last answer of the allocation, or None before the first pruning.
        tracker: which channels went and came back.
        events: what happened, as (step, "pruned" | "skipped").
    """

    def __init__(
        self,
        model: nn.Module,
        example_inputs: tuple[Any, ...],
        schedule: Schedule,
        *,
        cost: CostModel | None = None,
        importance: str | Importance = "taylor",
        accumulate: str | Accumulator = "latest",
        mask: type[WeightMask] = Soft,
        options: Options | None = None,
        rescaling: Rescale = Rescale.SKIP,
        decay_rate: float = DECAY,
        protect: Sequence[str] = (),
        time_limit: float = 5.0,
        groups: Groups | None = None,
    ) -> None:
        """Find the groups and put masks that keep everything on the layers that may lose inputs.

        Args:
            model: the bare model, before DistributedDataParallel; it is changed in place.
            example_inputs: for capture, as for :func:`chanopt.lower`.
            schedule: when, and to which ratio.
            cost: what the ratio counts; weights by default.
            importance: a name for :func:`chanopt.pruning.importance.by_name`, or an importance.
            accumulate: `latest`, `average` or `momentum`: what becomes of the scores between prunings.
            mask: the kind of mask; only soft ones can come back.
            options: numbers of channels that may stay.
            rescaling: how batch norms follow the masks of the layer before them.
            decay_rate: decay of masked weights (SR-STE).
            protect: layers whose inputs and outputs stay, by name or regular expression.
            time_limit: seconds of each solve.
            groups: as found beforehand, for models that must be captured otherwise.

        Raises:
            CaptureError, ChanoptError: as :func:`chanopt.lower`.
            AllocationError: a protected layer that does not exist.
        """
        self.model = model
        self.schedule = schedule
        if groups is None:
            with in_eval(model):
                groups = discover_groups(model, example_inputs)
        self.groups = groups.protect(protect)
        self.kept = tuple(tuple(range(group.channels)) for group in self.groups.groups)
        self.choice: Choice | None = None
        self.events: list[tuple[int, str]] = []
        self._cost = cost or ParameterCost()
        self._importance = by_name(importance)
        self._accumulator = _accumulator(accumulate)
        self._options = options or Options()
        self._rescaling = rescaling
        self._decay = decay_rate
        self._time_limit = time_limit
        self._mask = mask
        self._epoch = 0
        self._step = 0
        self._scored = False
        prunable = [group for group in self.groups.groups if group.prunable]
        self._members = {group.name: _members(model, group, self.groups) for group in prunable}
        for name in {name for group in prunable for name in group.consumers}:
            attach(weighted(model, name), mask)
        self.tracker = Tracker({g.name: g.channels for g in prunable}, {g.name: self._weights(g) for g in prunable})

    def start_epoch(self, epoch: int) -> None:
        """Say which epoch it is, counted from 0."""
        self._epoch = epoch

    def step(self) -> bool:
        """Take the gradients of a step, after the backward pass and before the optimiser's step.

        Scores the channels, chooses masks anew if it is time, and adds the decay of masked weights to the gradients.
        A step whose gradients are missing, NaN or infinite is skipped: it neither scores nor prunes, and it is better
        not to let the optimiser take it.

        Returns:
            Whether the gradients were sound.

        Raises:
            AllocationError: nothing comes within the target.
        """
        sound = self._sound()
        if not sound:
            self.events.append((self._step, "skipped"))
        now = self.schedule.prunes(self._epoch, self._step)
        if sound and (now or (self._accumulator.every_step and self._scores_count())):
            self._score()
        if now and _all_agree(sound, self._device()):
            self.prune(self.schedule.at(self._epoch))
        if sound:
            decay(self.model, self._decay)
        self._step += 1
        return sound

    def prune(self, ratio: float) -> Choice:
        """Choose masks now, for any ratio; scores must have been taken (by :meth:`step`, or of weights alone).

        Under torch.distributed all processes call this together: scores are averaged over them, the first decides,
        and all take its decision.

        Raises:
            AllocationError: nothing comes within the target; in every process.
        """
        scores = self._shared_scores()
        kept = self._decide(scores, ratio)
        self._apply(kept, scores)
        self._accumulator.clear()
        self._scored = False
        self.events.append((self._step, "pruned"))
        assert self.choice is not None
        return self.choice

    def masks(self) -> dict[str, Mask]:
        """The present masks, as :func:`chanopt.optimize` takes them."""
        return masks_of(self.groups, self.kept)

    def bake(self) -> nn.Module:
        """Write the masks into the weights and remove them; returns the model, ready for :func:`chanopt.optimize`."""
        return bake(self.model)

    def state_dict(self) -> dict[str, Any]:
        """Epoch, step, kept channels, counts, and the scores since the last pruning; masks are in the model's state."""
        return {
            "epoch": self._epoch,
            "step": self._step,
            "kept": self.kept,
            "tracker": self.tracker.state(),
            "scored": self._scored,
            "scores": self._accumulator.state(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a state; puts its masks on the model.

        Raises:
            AllocationError: the state is of another model.
        """
        kept = tuple(tuple(channels) for channels in state["kept"])
        fits = len(kept) == len(self.groups.groups) and all(
            set(channels) <= set(range(group.channels))
            for channels, group in zip(kept, self.groups.groups, strict=True)
        )
        if not fits:
            raise AllocationError(
                f"expected the state of a pruner of {len(self.groups.groups)} groups, found one of {len(kept)} or of "
                "other sizes; build the pruner with the model and protected layers of the state"
            )
        self._epoch, self._step, self.kept = int(state["epoch"]), int(state["step"]), kept
        self._set_masks()
        self.tracker.restore(state["tracker"])
        if "scores" in state:  # of version 0.1.0 there are none
            self._scored = bool(state["scored"])
            self._accumulator.restore(state["scores"])

    # -- scores ---------------------------------------------------------------------------------------------------

    def _scores_count(self) -> bool:
        """Whether scores taken in this epoch can be of use."""
        return self._epoch < self.schedule.epochs - self.schedule.cooldown

    def _score(self) -> None:
        # The Taylor expansion sees the weights behind masks itself; others would score what is masked as zero.
        with nullcontext() if isinstance(self._importance, Taylor) else self._unmasked():
            for group in self.groups.groups:
                if group.prunable:
                    score = self._importance.score(self._members[group.name], group.channels)
                    self._accumulator.update(group.name, score)
        self._scored = True

    @contextmanager
    def _unmasked(self) -> Generator[None, None, None]:
        """The model with all that masks hide."""
        names = {member.name for members in self._members.values() for member in members}
        live = [mask for name in names if (mask := masked(weighted(self.model, name))) is not None]
        before = [mask.mask.clone() for mask in live]
        for mask in live:
            mask.mask.fill_(True)
        try:
            yield
        finally:
            for mask, old in zip(live, before, strict=True):
                mask.mask.copy_(old)

    def _sound(self) -> bool:
        """Whether every layer that may be pruned has a finite gradient."""
        names = {member.name for members in self._members.values() for member in members}
        grads = [original(weighted(self.model, name)).grad for name in sorted(names)]
        return all(grad is not None and bool(torch.isfinite(grad).all()) for grad in grads)

    def _shared_scores(self) -> dict[str, Tensor]:
        """The accumulated scores, averaged over the processes."""
        names = list(self._members)
        if not names:
            return {}
        if not self._scored:
            self._score()
        parts = [self._accumulator.value(name) for name in names]
        flat = torch.cat([part.double() for part in parts]).to(self._device())
        if _distributed():
            distributed.all_reduce(flat)
            flat /= distributed.get_world_size()
        return dict(zip(names, flat.cpu().split([len(part) for part in parts]), strict=True))

    def _device(self) -> torch.device:
        return next(self.model.parameters()).device

    # -- decisions ------------------------------------------------------------------------------------------------

    def _decide(self, scores: Mapping[str, Tensor], ratio: float) -> tuple[tuple[int, ...], ...]:
        """The channels that stay: decided by the first process, whose clock may cut the solver off."""
        answer: list[Choice | AllocationError | None] = [None]
        if not _distributed() or distributed.get_rank() == 0:
            answer[0] = self._solve(scores, ratio)
        if _distributed():
            distributed.broadcast_object_list(answer, src=0, device=self._device())
        if isinstance(answer[0], AllocationError):
            raise answer[0]
        self.choice = answer[0]
        assert self.choice is not None
        return self.choice.kept

    def _solve(self, scores: Mapping[str, Tensor], ratio: float) -> Choice | AllocationError:
        try:
            plain = {name: score.tolist() for name, score in scores.items()}
            return choose(self.groups, plain, self._cost, ratio, self._options, time_limit=self._time_limit)
        except AllocationError as error:
            return error

    def _apply(self, kept: tuple[tuple[int, ...], ...], scores: Mapping[str, Tensor]) -> None:
        before = self.kept
        if issubclass(self._mask, Permanent):
            # What was pruned is gone, whatever count the allocation gives its group.
            kept = tuple(tuple(sorted({*was} & {*now})) for was, now in zip(before, kept, strict=True))
        self.kept = kept
        self._set_masks()
        changed = [group for group, was, now in zip(self.groups.groups, before, kept, strict=True) if was != now]
        self._rescale({name for group in changed for name in group.consumers}, scores)
        flags = {
            group.name: _flags(channels, group.channels)
            for group, channels in zip(self.groups.groups, kept, strict=True)
            if group.prunable
        }
        self.tracker.record(self._step, flags)

    def _set_masks(self) -> None:
        masks = self.masks()
        for name in {member.name for members in self._members.values() for member in members}:
            module = weighted(self.model, name)
            set_mask(module, element_mask(module, masks[name].inputs if name in masks else None))

    def _rescale(self, layers: set[str], scores: Mapping[str, Tensor]) -> None:
        if self._rescaling is Rescale.SKIP:
            return
        modules, masks = dict(self.model.named_modules()), self.masks()
        for name in sorted(layers):
            module = weighted(self.model, name)
            count = element_mask(module).shape[1]
            kept = torch.tensor(_flags(masks[name].inputs, count) if name in masks else [True] * count)
            importance = self._by_input(name, count, scores)
            for norm in self.groups.norms.get(name, ()):
                rescale(modules[norm], self._rescaling, kept, importance)

    def _by_input(self, name: str, count: int, scores: Mapping[str, Tensor]) -> Tensor:
        """The score of every input channel of a layer; shape (count,)."""
        found = torch.zeros(count, dtype=torch.float64)
        for group, members in self._members.items():
            for member in members:
                if member.name == name:
                    valid = member.index >= 0
                    found[valid] = scores[group][member.index[valid]]
        return found

    def _weights(self, group: PruningGroup) -> int:
        """Weights that one channel of a group holds in the layers that read it."""
        layers = self.groups.structure.layers
        return sum(
            len(ports[0]) * layers[name].out_channels * layers[name].weights_per_pair
            for name, ports in group.consumers.items()
        )


def _members(model: nn.Module, group: PruningGroup, groups: Groups) -> list[Member]:
    return [
        Member(name, weighted(model, name), "input", _index(ports, groups.structure.layers[name].in_channels))
        for name, ports in group.consumers.items()
    ]


def _index(ports: Sequence[Sequence[int]], count: int) -> Tensor:
    index = torch.full((count,), -1, dtype=torch.int64)
    for channel, places in enumerate(ports):
        index[list(places)] = channel
    return index


def _flags(channels: Any, count: int) -> list[bool]:
    kept = set(channels)
    return [channel in kept for channel in range(count)]


def _accumulator(given: str | Accumulator) -> Accumulator:
    if isinstance(given, Accumulator):
        return given
    if given not in _ACCUMULATORS:
        raise AllocationError(f"expected one of {', '.join(_ACCUMULATORS)} to accumulate scores, found {given!r}")
    return _ACCUMULATORS[given]()


def _distributed() -> bool:
    return distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1


def _all_agree(flag: bool, device: torch.device) -> bool:
    """Whether the flag is set in all processes."""
    if not _distributed():
        return flag
    shared = torch.tensor(int(flag), device=device)
    distributed.all_reduce(shared, op=distributed.ReduceOp.MIN)
    return bool(shared)
