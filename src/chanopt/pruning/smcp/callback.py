"""The pruner as a callback of a trainer, by the names of Lightning's hooks; Lightning itself is not needed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from chanopt.errors import AllocationError
from chanopt.pruning.smcp.pruner import SoftMaskPruner

__all__ = ["SoftMaskCallback"]


class SoftMaskCallback:
    """Runs a pruner in a trainer that calls these hooks with (trainer, module, ...), as Lightning does.

    Lightning checks the type of its callbacks: there, derive a class from this one and from its `Callback`.

    ```python
    class SoftMasking(SoftMaskCallback, lightning.pytorch.Callback): ...
    ```

    The pruner is built when the training starts, before the model is wrapped for several processes, by
    `build(module)`.
    """

    def __init__(self, build: Callable[[Any], SoftMaskPruner]) -> None:
        self._build = build
        self._pruner: SoftMaskPruner | None = None
        self._loaded: Mapping[str, Any] | None = None

    @property
    def pruner(self) -> SoftMaskPruner:
        """The pruner.

        Raises:
            AllocationError: the training has not started.
        """
        if self._pruner is None:
            raise AllocationError("expected a training that has started, found none; the pruner is built in setup")
        return self._pruner

    def setup(self, trainer: Any, pl_module: Any, stage: str = "fit") -> None:
        """Build the pruner: the masks must be there before the optimiser and the processes' wrapper are."""
        if stage != "fit" or self._pruner is not None:
            return
        self._pruner = self._build(pl_module)
        if self._loaded is not None:
            self._pruner.load_state_dict(self._loaded)

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        """Tell the pruner the epoch."""
        self.pruner.start_epoch(int(trainer.current_epoch))

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        """Give the pruner the gradients; those that are not sound are emptied, so that the step changes nothing."""
        if not self.pruner.step():
            optimizer.zero_grad(set_to_none=True)

    def state_dict(self) -> dict[str, Any]:
        """For the trainer's checkpoint."""
        return self.pruner.state_dict()

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """From the trainer's checkpoint; before `setup` it is kept until then."""
        self._loaded = state_dict
        if self._pruner is not None:
            self._pruner.load_state_dict(state_dict)
