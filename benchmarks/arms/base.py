"""What every arm is made from, and what it gives."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

import chanopt
from chanopt.ir import Program


class ArmError(Exception):
    """An arm cannot be made of a network; the message says why."""


@dataclass(frozen=True, slots=True)
class Copies:
    """Copies that select channels, in one inference of the example inputs, as the plan of an arm has them.

    Attributes:
        copies: selections that materialise memory.
        channels: channels in those.
        bytes: bytes in those, over the batch of the example inputs, in the arm's element type.
    """

    copies: int = 0
    channels: int = 0
    bytes: int = 0

    def __add__(self, other: Copies) -> Copies:
        return Copies(self.copies + other.copies, self.channels + other.channels, self.bytes + other.bytes)


@dataclass(frozen=True, slots=True)
class Arm:
    """One way to run a masked network.

    Attributes:
        name: which.
        module: takes the network's inputs.
        planned: the copies it makes, by its plan.
        seconds: time to make it, capture of the graph apart; None for the network itself.
        same_function: whether it computes the masked network's outputs.
        figures: what else its maker tells: objective, bound, segments, refusals.
    """

    name: str
    module: nn.Module
    planned: Copies
    seconds: float | None = None
    same_function: bool = True
    figures: Mapping[str, Any] = field(default_factory=dict[str, Any])


class Subject:
    """A masked network with its example inputs; captured and lowered once for all arms.

    Attributes:
        model: masked, in eval mode; no arm changes it.
        inputs: its positional arguments.
        original: the network before masking, for arms that choose channels themselves.
        capture_seconds: time of the capture, None until it was needed.
    """

    def __init__(self, model: nn.Module, inputs: tuple[Any, ...], original: nn.Module | None = None) -> None:
        self.model = model
        self.inputs = inputs
        self.original = original
        self.capture_seconds: float | None = None
        self._captured: chanopt.Captured | None = None
        self._program: Program | None = None
        self._fast: nn.Module | None = None

    @property
    def captured(self) -> chanopt.Captured:
        """The captured graph.

        Raises:
            chanopt.errors.CaptureError: torch.export cannot capture the network as a whole.
        """
        if self._captured is None:
            started = time.perf_counter()
            self._captured = chanopt.capture(self.model, self.inputs)
            self.capture_seconds = time.perf_counter() - started
        return self._captured

    @property
    def program(self) -> Program:
        """The network in the channel-flow IR, nothing cut.

        Raises:
            chanopt.errors.ChanoptError: it cannot be captured or lowered.
        """
        if self._program is None:
            self._program = chanopt.lower(self.captured)
        return self._program

    @property
    def fast(self) -> nn.Module:
        """What chanopt makes of it; of a network that cannot be captured as a whole, its parts optimised.

        Raises:
            chanopt.errors.ChanoptError: it cannot be optimised.
        """
        if self._fast is None:
            try:
                self._fast = chanopt.optimize(self.captured)
            except chanopt.errors.CaptureError:
                self._fast = chanopt.optimize(self.model, self.inputs)
        return self._fast
