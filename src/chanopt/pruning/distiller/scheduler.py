"""The compression scheduler: masks, and the callbacks of a training loop that let policies act.

for epoch in range(epochs):
    scheduler.on_epoch_begin(epoch)
    for number, (x, y) in enumerate(loader):
        scheduler.on_minibatch_begin(epoch, number, len(loader), optimizer)
        loss = scheduler.before_backward_pass(epoch, number, len(loader), criterion(model(x), y))
        optimizer.zero_grad()
        loss.backward()
        scheduler.before_parameter_optimization(epoch, number, len(loader), optimizer)
        optimizer.step()
        scheduler.on_minibatch_end(epoch, number, len(loader), optimizer)
    scheduler.on_epoch_end(epoch, optimizer, metrics={"min": validation_loss})
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from chanopt.errors import LoadError, ScheduleError
from chanopt.pruning.distiller.components import Moment, Names
from chanopt.pruning.distiller.policies import LossComponent, Policy, PolicyLoss, Step
from chanopt.pruning.distiller.statistics import ActivationStatistics, FeatureMapSamples


@dataclass
class ParameterMasker:
    """The mask of one parameter, and how it is applied.

    Attributes:
        mask: of the parameter's shape and dtype; None where nothing is masked.
        once: the mask is forgotten when it has been applied.
        use_double_copies: the unmasked weights are set aside for the optimizer's step.
        mask_on_forward_only: the mask is not applied after the optimizer's step.
    """

    mask: Tensor | None = None
    once: bool = False
    use_double_copies: bool = False
    mask_on_forward_only: bool = False
    _unmasked: Tensor | None = field(default=None, init=False, repr=False)

    def apply(self, parameter: Tensor) -> None:
        """Mask a parameter for the forward pass."""
        if self.mask is None:
            return
        if self.use_double_copies:
            self._unmasked = parameter.detach().clone()
        self.multiply(parameter)
        if self.once:
            self.mask, self.once = None, False

    def multiply(self, parameter: Tensor) -> None:
        """Multiply a parameter by the mask, outside of autograd."""
        if self.mask is not None:
            with torch.no_grad():
                parameter.mul_(self.mask)

    def masked_gradient(self, gradient: Tensor) -> Tensor:
        """A gradient times the mask."""
        return gradient if self.mask is None else gradient * self.mask

    def revert(self, parameter: Tensor) -> None:
        """Bring back the unmasked weights that :meth:`apply` set aside."""
        if self._unmasked is not None:
            with torch.no_grad():
                parameter.copy_(self._unmasked)
            self._unmasked = None


class CompressionScheduler:
    """Calls policies at their epochs and keeps parameters masked.

    Args:
        model: the network. Its parameters are changed in place, and its layers when a policy thins them.
        inputs: example inputs, for policies that must run the network.

    Attributes:
        model: the network.
        masks: a masker per parameter.
        statistics: of activations, for pruners that rank by them.
        samples: of feature maps, for the pruner that refits to them.
    """

    def __init__(self, model: nn.Module, inputs: tuple[Any, ...] | None = None) -> None:
        self.model = model
        self.masks = {name: ParameterMasker() for name, _ in model.named_parameters()}
        self.statistics: ActivationStatistics | None = None
        self.samples: FeatureMapSamples | None = None
        self._inputs = inputs
        self._policies: dict[int, list[tuple[Policy, Moment]]] = {}

    # -- set up ---------------------------------------------------------------------------------------------------

    def add_policy(
        self,
        policy: Policy,
        epochs: Iterable[int] | None = None,
        starting_epoch: int | None = None,
        ending_epoch: int | None = None,
        frequency: int = 1,
    ) -> None:
        """Let a policy run in the epochs listed, or every ``frequency`` epochs from start to before end.

        Policies of one epoch run in the order in which they were added.

        Raises:
            ScheduleError: neither or both were given, or they name no epoch.
        """
        when, end, every = invoked(epochs, starting_epoch, ending_epoch, frequency)
        for epoch in when:
            self._policies.setdefault(epoch, []).append((policy, Moment(epoch, when, end, every)))

    @property
    def epochs(self) -> int:
        """How many epochs there are with something to do: one more than the last."""
        return max(self._policies, default=-1) + 1

    @property
    def policies(self) -> list[Policy]:
        """Every policy once, in the order of its first epoch."""
        return list(dict.fromkeys(policy for epoch in sorted(self._policies) for policy in self.at(epoch)))

    def at(self, epoch: int) -> list[Policy]:
        """The policies of an epoch, in order."""
        return [policy for policy, _ in self._policies.get(epoch, [])]

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        """The network's parameters by name."""
        return dict(self.model.named_parameters())

    def inputs(self, fallback: tuple[Any, ...] | None = None) -> tuple[Any, ...]:
        """The example inputs.

        Raises:
            ScheduleError: none were given.
        """
        found = self._inputs if self._inputs is not None else fallback
        if found is None:
            raise ScheduleError("expected example inputs to run the network, found none; build with inputs=(x,)")
        return found

    # -- the callbacks --------------------------------------------------------------------------------------------

    def on_epoch_begin(self, epoch: int, optimizer: Optimizer | None = None) -> None:
        """An epoch begins."""
        for policy, moment in self._policies.get(epoch, []):
            policy.on_epoch_begin(self, moment)

    def on_minibatch_begin(
        self, epoch: int, minibatch_id: int, minibatches_per_epoch: int, optimizer: Optimizer | None = None
    ) -> None:
        """The forward pass of a minibatch is about to begin."""
        for policy, moment in self._policies.get(epoch, []):
            policy.on_minibatch_begin(self, Step(moment, minibatch_id, minibatches_per_epoch), optimizer)

    def before_backward_pass(
        self,
        epoch: int,
        minibatch_id: int,
        minibatches_per_epoch: int,
        loss: Tensor,
        optimizer: Optimizer | None = None,
    ) -> Tensor:
        """The forward pass is done: the loss with what policies add to it."""
        return self.losses(epoch, minibatch_id, minibatches_per_epoch, loss).overall_loss

    def losses(self, epoch: int, minibatch_id: int, minibatches_per_epoch: int, loss: Tensor) -> PolicyLoss:
        """As :meth:`before_backward_pass`, with the terms by name."""
        components: list[LossComponent] = []
        for policy, moment in self._policies.get(epoch, []):
            found = policy.before_backward_pass(self, Step(moment, minibatch_id, minibatches_per_epoch), loss)
            if found is not None:
                loss = found.overall_loss
                components += found.loss_components
        return PolicyLoss(loss, components)

    def before_parameter_optimization(
        self, epoch: int, minibatch_id: int, minibatches_per_epoch: int, optimizer: Optimizer | None = None
    ) -> None:
        """The backward pass is done, the optimizer is about to step."""
        for policy, moment in self._policies.get(epoch, []):
            policy.before_parameter_optimization(self, Step(moment, minibatch_id, minibatches_per_epoch))

    def on_minibatch_end(
        self, epoch: int, minibatch_id: int, minibatches_per_epoch: int, optimizer: Optimizer | None = None
    ) -> None:
        """The optimizer has stepped: momentum may have moved masked weights, so they are masked again."""
        self.mask_all_weights(is_forward=False)
        for policy, moment in self._policies.get(epoch, []):
            policy.on_minibatch_end(self, Step(moment, minibatch_id, minibatches_per_epoch), optimizer)

    def on_epoch_end(
        self, epoch: int, optimizer: Optimizer | None = None, metrics: Mapping[str, float] | None = None
    ) -> None:
        """An epoch has ended; ``metrics`` has ``min`` (a loss) and ``max`` (an accuracy) where a policy needs them."""
        for policy, moment in self._policies.get(epoch, []):
            policy.on_epoch_end(self, moment, metrics or {})

    def mask_all_weights(self, is_forward: bool = True) -> None:
        """Multiply every parameter by its mask, outside of autograd."""
        for name, parameter in self.model.named_parameters():
            masker = self.masks[name]
            if is_forward or not masker.mask_on_forward_only:
                masker.multiply(parameter)

    # -- state ----------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, dict[str, Tensor | None]]:
        """The masks by parameter name, under ``masks_dict``."""
        return {"masks_dict": {name: masker.mask for name, masker in self.masks.items()}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over masks; ``module.`` in front of names may be missing or too many.

        Raises:
            LoadError: the state has no masks, or one of another shape.
            ScheduleError: a mask for a parameter that the model does not have.
        """
        if "masks_dict" not in state:
            raise LoadError(f"expected a scheduler's state with masks_dict, found {sorted(state)}")
        names, parameters = Names(tuple(self.masks)), self.parameters
        loaded = {names.find(name): mask for name, mask in state["masks_dict"].items()}
        for name, mask in loaded.items():
            if mask is not None and mask.shape != parameters[name].shape:
                raise LoadError(
                    f"expected a mask of shape {tuple(parameters[name].shape)} for {name}, found {tuple(mask.shape)}; "
                    "a thinned model is loaded with load_checkpoint, which thins first"
                )
        for name, mask in loaded.items():
            self.masks[name].mask = None if mask is None else mask.to(parameters[name])


def invoked(
    epochs: Iterable[int] | None, starting_epoch: int | None, ending_epoch: int | None, frequency: int | None
) -> tuple[tuple[int, ...], int, int | None]:
    """(epochs, the epoch before which it ends, frequency or None) of what a policy says.

    Raises:
        ScheduleError: it lists epochs and gives a range, or neither, or names no epoch.
    """
    if epochs is not None:
        listed = tuple(epochs)
        if not listed or list(listed) != sorted(set(listed)) or listed[0] < 0:
            raise ScheduleError(f"expected epochs to be a list of ascending epochs, found {list(listed)}")
        if starting_epoch is not None or ending_epoch is not None:
            raise ScheduleError("expected either epochs, or starting_epoch and ending_epoch; found both")
        return listed, listed[-1] + 1, None
    if starting_epoch is None or ending_epoch is None or frequency is None:
        raise ScheduleError(
            "expected either epochs, or starting_epoch, ending_epoch and frequency; "
            f"found {starting_epoch}, {ending_epoch} and {frequency}"
        )
    if not 0 <= starting_epoch < ending_epoch or not 0 < frequency <= ending_epoch - starting_epoch:
        raise ScheduleError(
            "expected 0 <= starting_epoch < ending_epoch and a frequency of 1 to their difference, "
            f"found {starting_epoch}, {ending_epoch} and {frequency}"
        )
    return tuple(range(starting_epoch, ending_epoch, frequency)), ending_epoch, frequency
