"""Policies: what is done with a pruner, a regularizer or a learning rate at which point of training.

A :class:`~chanopt.pruning.distiller.scheduler.CompressionScheduler` calls them; each does nothing by default.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau
from torch.utils.hooks import RemovableHandle

from chanopt.errors import ScheduleError
from chanopt.pruning.distiller.components import Moment, Pruner, Sight, layer_of
from chanopt.pruning.distiller.elements import SparsityLevelParameterPruner
from chanopt.pruning.distiller.regularizers import Regularizer
from chanopt.pruning.distiller.statistics import norm_behind
from chanopt.pruning.modes import in_eval

if TYPE_CHECKING:
    from chanopt.pruning.distiller.scheduler import CompressionScheduler


class LossComponent(NamedTuple):
    """A term that a policy has added to the loss."""

    name: str
    value: Tensor


class PolicyLoss(NamedTuple):
    """A loss with the terms that policies have added to it."""

    overall_loss: Tensor
    loss_components: list[LossComponent]


@dataclass(frozen=True, slots=True)
class Step:
    """A minibatch.

    Attributes:
        moment: the epoch.
        number: of the minibatch in the epoch, from 0.
        per_epoch: minibatches of an epoch.
    """

    moment: Moment
    number: int
    per_epoch: int

    @property
    def overall(self) -> int:
        """Of the minibatch since the first epoch, from 0."""
        return self.moment.epoch * self.per_epoch + self.number


class Policy:
    """Something that acts at the points of training."""

    def on_epoch_begin(self, scheduler: CompressionScheduler, moment: Moment) -> None:
        """An epoch begins."""

    def on_minibatch_begin(self, scheduler: CompressionScheduler, step: Step, optimizer: Optimizer | None) -> None:
        """The forward pass of a minibatch is about to begin."""

    def before_backward_pass(self, scheduler: CompressionScheduler, step: Step, loss: Tensor) -> PolicyLoss | None:
        """The forward pass is done; may return another loss."""

    def before_parameter_optimization(self, scheduler: CompressionScheduler, step: Step) -> None:
        """The backward pass is done, the optimizer is about to step."""

    def on_minibatch_end(self, scheduler: CompressionScheduler, step: Step, optimizer: Optimizer | None) -> None:
        """The optimizer has stepped."""

    def on_epoch_end(self, scheduler: CompressionScheduler, moment: Moment, metrics: Mapping[str, float]) -> None:
        """An epoch has ended; ``metrics`` are what the user measured."""


@dataclass(eq=False)
class PruningPolicy(Policy):
    """Sets masks when an epoch begins and keeps weights masked.

    Attributes:
        pruner: chooses the masks.
        levels: replaces the pruner's levels.
        keep_mask: when the last epoch ends, masks become permanent whatever else was said.
        mini_batch_pruning_frequency: if not 0, masks are chosen anew every so many minibatches, too.
        mask_on_forward_only: weights are masked for the forward pass and may move in the optimizer's step.
        mask_gradients: gradients are masked, too; needs ``mask_on_forward_only``.
        use_double_copies: the optimizer updates the unmasked weights with the gradients of the masked ones.
        discard_masks_at_minibatch_end: a mask holds for one minibatch.
        skip_first_minibatch: masks are chosen only after the first minibatch (which gives the first gradients).
        fold_batchnorm: weights are judged as they are after folding the batch norm behind a conv into them.
    """

    pruner: Pruner
    levels: Mapping[str, float] | None = None
    keep_mask: bool = False
    mini_batch_pruning_frequency: int = 0
    mask_on_forward_only: bool = False
    mask_gradients: bool = False
    use_double_copies: bool = False
    discard_masks_at_minibatch_end: bool = False
    skip_first_minibatch: bool = False
    fold_batchnorm: bool = False
    _started: bool = field(default=False, init=False, repr=False)
    _waiting: bool = field(default=False, init=False, repr=False)
    _hooks: list[RemovableHandle] = field(default_factory=list, init=False, repr=False)

    def __post_init__(self) -> None:
        if self.mask_gradients and not self.mask_on_forward_only:
            raise ScheduleError(
                f"{self.pruner.name}: expected mask_on_forward_only with mask_gradients: weights that are masked after "
                "every step need no masked gradients; found mask_gradients alone"
            )
        often: Any = self.mini_batch_pruning_frequency  # from YAML it may be anything
        if not isinstance(often, int) or isinstance(often, bool) or often < 0:
            raise ScheduleError(
                f"{self.pruner.name}: expected mini_batch_pruning_frequency as a number of minibatches, or 0 for none, "
                f"found {often!r}"
            )
        if self.levels is not None:
            if not isinstance(self.pruner, SparsityLevelParameterPruner):
                raise ScheduleError(f"{self.pruner.name}: expected a pruner with levels for the policy's args levels")
            self.pruner = dataclasses.replace(self.pruner, levels=self.levels)

    def on_epoch_begin(self, scheduler: CompressionScheduler, moment: Moment) -> None:
        """Choose masks; the first time, also say how they are to be applied."""
        if not self._started:
            self._started = True
            self._prepare(scheduler)
            self._waiting = self.skip_first_minibatch
        if not self._waiting:
            self._choose(scheduler, moment)

    def _mine(self, scheduler: CompressionScheduler) -> list[str]:
        return self.pruner.covers(scheduler.masks)

    def _prepare(self, scheduler: CompressionScheduler) -> None:
        for name in self._mine(scheduler):
            masker = scheduler.masks[name]
            masker.use_double_copies = self.use_double_copies
            masker.mask_on_forward_only = self.mask_on_forward_only
            if self.mask_gradients:
                self._hooks.append(scheduler.parameters[name].register_hook(masker.masked_gradient))

    def _choose(self, scheduler: CompressionScheduler, moment: Moment) -> None:
        weights: dict[str, Tensor] = dict(scheduler.parameters)
        if self.fold_batchnorm:
            weights |= _folded(scheduler.model, self._mine(scheduler), scheduler.inputs())
        current = {name: masker.mask for name, masker in scheduler.masks.items()}
        sight = Sight(scheduler.model, weights, current, moment, scheduler.statistics, scheduler.samples)
        with torch.no_grad():
            chosen = self.pruner.masks(sight)
        for name, mask in chosen.items():
            scheduler.masks[name].mask = mask

    def on_minibatch_begin(self, scheduler: CompressionScheduler, step: Step, optimizer: Optimizer | None) -> None:
        """Choose masks if it is time, and apply them."""
        often = self.mini_batch_pruning_frequency
        due = step.number > 0 and often != 0 and step.overall % often == 0
        if self._waiting and step.number > 0:
            self._waiting, due = False, True
        if due:
            self._choose(scheduler, step.moment)
        for name in self._mine(scheduler):
            scheduler.masks[name].apply(scheduler.parameters[name])

    def before_parameter_optimization(self, scheduler: CompressionScheduler, step: Step) -> None:
        """Bring back the unmasked weights, if they were set aside."""
        for name in self._mine(scheduler):
            scheduler.masks[name].revert(scheduler.parameters[name])

    def on_minibatch_end(self, scheduler: CompressionScheduler, step: Step, optimizer: Optimizer | None) -> None:
        """Forget masks that hold for one minibatch."""
        if self.discard_masks_at_minibatch_end:
            for name in self._mine(scheduler):
                scheduler.masks[name].mask = None

    def on_epoch_end(self, scheduler: CompressionScheduler, moment: Moment, metrics: Mapping[str, float]) -> None:
        """In the end, let go of gradients, and make masks permanent if asked."""
        if not moment.is_last:
            return
        while self._hooks:
            self._hooks.pop().remove()
        if not self.keep_mask:
            return
        for name in self._mine(scheduler):
            masker = scheduler.masks[name]
            masker.use_double_copies = masker.mask_on_forward_only = False
            masker.multiply(scheduler.parameters[name])


def _folded(model: nn.Module, names: list[str], inputs: tuple[Any, ...]) -> dict[str, Tensor]:
    """Weights times ``gamma / sqrt(variance + eps)`` of the batch norm behind (Krishnamoorthi, 2018, equation 20)."""
    with in_eval(model):
        behind = norm_behind(model, inputs)
    made: dict[str, Tensor] = {}
    for name in names:
        norm = model.get_submodule(behind[layer_of(name)]) if layer_of(name) in behind else None
        weight = model.get_parameter(name)
        if norm is not None and name.endswith("weight") and weight.dim() > 2:
            scale = (norm.get_buffer("running_var") + getattr(norm, "eps", 0.0)).rsqrt()
            if getattr(norm, "affine", False):
                scale = scale * norm.get_parameter("weight")
            made[name] = (weight * scale.view(-1, *[1] * (weight.dim() - 1))).detach()
    return made


@dataclass(eq=False)
class RegularizationPolicy(Policy):
    """Adds a regularizer's term to the loss, and drops what it has made small.

    Attributes:
        regularizer: gives term and masks.
        keep_mask: what is dropped in the last minibatch of the last epoch stays dropped.
    """

    regularizer: Regularizer
    keep_mask: bool = False
    _started: bool = field(default=False, init=False, repr=False)

    def on_epoch_begin(self, scheduler: CompressionScheduler, moment: Moment) -> None:
        """Start the regularizer the first time."""
        if not self._started:
            self._started = True
            self.regularizer.start(scheduler.model)

    def before_backward_pass(self, scheduler: CompressionScheduler, step: Step, loss: Tensor) -> PolicyLoss:
        """The loss with the term added."""
        term = self.regularizer.loss(scheduler.parameters).to(loss.device)
        return PolicyLoss(loss + term, [LossComponent(f"{type(self.regularizer).__name__}_loss", term)])

    def on_minibatch_end(self, scheduler: CompressionScheduler, step: Step, optimizer: Optimizer | None) -> None:
        """Drop what is small: once, or for good at the very end."""
        last = step.number == step.per_epoch - 1 and step.moment.is_last
        with torch.no_grad():
            dropped = self.regularizer.threshold(scheduler.parameters)
        for name, mask in dropped.items():
            masker = scheduler.masks[name]
            masker.mask, masker.once = mask, not (last and self.keep_mask)
            masker.apply(scheduler.parameters[name])

    def on_epoch_end(self, scheduler: CompressionScheduler, moment: Moment, metrics: Mapping[str, float]) -> None:
        """Stop the regularizer in the end."""
        if moment.is_last:
            self.regularizer.stop()


@dataclass(eq=False)
class LRPolicy(Policy):
    """Sets the learning rate when an epoch has ended.

    Attributes:
        lr_scheduler: one of torch's, or of :mod:`.learning_rates`. It is told the number of the next epoch, so that
            the rate is a function of the epoch, wherever the policy begins.
    """

    lr_scheduler: LRScheduler

    def on_epoch_end(self, scheduler: CompressionScheduler, moment: Moment, metrics: Mapping[str, float]) -> None:
        """Step.

        Raises:
            ScheduleError: ReduceLROnPlateau without a metric.
        """
        following = moment.epoch + 1
        with warnings.catch_warnings():
            # The epoch is passed on purpose, and an epoch without an optimizer's step is the user's business.
            warnings.filterwarnings("ignore", message=r"[\s\S]*(epoch parameter|before `optimizer\.step\(\)`)")
            if isinstance(self.lr_scheduler, ReduceLROnPlateau):
                self.lr_scheduler.step(_metric(metrics, self.lr_scheduler.mode), following)
            else:
                self.lr_scheduler.step(following)


def _metric(metrics: Mapping[str, float], mode: str) -> float:
    if mode not in metrics:
        raise ScheduleError(
            f"expected on_epoch_end(..., metrics={{'{mode}': value}}) for ReduceLROnPlateau, found {dict(metrics)}"
        )
    return metrics[mode]
