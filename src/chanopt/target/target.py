"""A target: the machine and the way of running that choices are made for."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from chanopt.errors import ChanoptError
from chanopt.target import analytic
from chanopt.target import grain as grains
from chanopt.target.read import ConvRead, fuses
from chanopt.target.realization import Realization

Cost = Callable[[ConvRead, Realization], float]
"""Seconds that a conv takes if it reads in a given way."""

DEVICES = ("auto", "cpu", "cuda", "other")
COMPILERS = ("eager", "inductor")


@dataclass(frozen=True, slots=True)
class Target:
    """What is free, and what costs how much, where the result will run.

    Memory format, batch and element type are those of the example inputs: they come with every
    :class:`~chanopt.target.ConvRead`.

    Attributes:
        device: "cpu" or "cuda", which need not be there to be planned for, or "auto": where the model's parameters are
            (on a device that is neither, "other", reads are views and gathers).
        compiler: "eager", or "inductor" where the result goes through torch.compile, which lays convs out itself.
        cost: seconds of a conv by the way it reads; None for the analytic model
            (:func:`chanopt.target.analytic.seconds`), :class:`chanopt.target.Measured` for this machine's own times.
            If it has a method ``prepare``, that is called with all convs of a model before the first is asked for.

    Raises:
        ChanoptError: there is no such device or compiler.
    """

    device: str = "auto"
    compiler: str = "eager"
    cost: Cost | None = field(default=None, compare=False)

    def __post_init__(self) -> None:
        if self.device not in DEVICES:
            raise ChanoptError(f"expected target {_listed(DEVICES)}, found {self.device!r}")
        if self.compiler not in COMPILERS:
            raise ChanoptError(f"expected the compiler of a target to be {_listed(COMPILERS)}, found {self.compiler!r}")

    def __str__(self) -> str:
        return self.device if self.compiler == "eager" else f"{self.device}:{self.compiler}"

    def on(self, device: str) -> Target:
        """The same target with "auto" made up for."""
        known = device if device in DEVICES else "other"
        return replace(self, device=known) if self.device == "auto" else self

    def fuses(self, *, channels_last: bool) -> bool:
        """Whether convs can gather while they load: the blocks of channels that they touch count then."""
        return fuses(self.device, channels_last=channels_last)

    def grain(self, *, channels_last: bool, batch: int) -> grains.Grain | None:
        """Counts of channels that the device is quick at; None where they do not matter."""
        return grains.grain(self.device, self.compiler, channels_last=channels_last, batch=batch)

    def ways(self, read: ConvRead) -> list[Realization]:
        """The realizations to choose from, the plain one first.

        Multiplying with zeros takes its full time on a CPU, and the zeros their memory: only a measurement can say
        that a copy takes longer.
        """
        wide = self.device != "cpu" or self.cost is not None
        found = read.ways(self.device, self.compiler)
        return [way for way in found if wide or way not in (Realization.COVER, Realization.DENSE)]

    def prepare(self, reads: Sequence[ConvRead]) -> None:
        """Tell the cost which convs will be asked for, so that it can measure them together."""
        getattr(self.cost, "prepare", lambda _: None)(reads)

    def seconds(self, read: ConvRead, way: Realization) -> float:
        """What a conv costs if it reads in one of its ways."""
        return analytic.seconds(read, way, self.device) if self.cost is None else self.cost(read, way)

    @classmethod
    def parse(cls, text: str) -> Target:
        """The target that ``str`` wrote: "cpu", "cuda", "cpu:inductor".

        Raises:
            ChanoptError: it is not one.
        """
        found = re.fullmatch(r"(\w+)(?::(\w+))?", text)
        if found is None:
            raise ChanoptError(f"expected a target such as 'cpu' or 'cuda:inductor', found {text!r}")
        return cls(found[1], found[2] or "eager")


def _listed(names: Sequence[str]) -> str:
    return f"{', '.join(map(repr, names[:-1]))} or {names[-1]!r}"
