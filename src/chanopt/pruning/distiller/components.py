"""What pruners, regularizers and policies have in common: when they run, on what, and how a schedule names weights."""

from __future__ import annotations

import dataclasses
import difflib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

from torch import Tensor, nn

from chanopt.errors import ScheduleError

if TYPE_CHECKING:
    from chanopt.pruning.distiller.statistics import ActivationStatistics, FeatureMapSamples

EVERY = "*"
"""The name that stands for every weight without an entry of its own."""

_PREFIX = "module."  # what torch.nn.DataParallel puts before every name; Distiller's schedules have it

C = TypeVar("C", bound="Component")


@dataclass(frozen=True, slots=True)
class Moment:
    """When something of a schedule runs.

    Attributes:
        epoch: the epoch that begins.
        epochs: all epochs in which it runs, ascending.
        ending_epoch: the epoch before which it ends.
        frequency: every how many epochs; None where the epochs were listed.
    """

    epoch: int
    epochs: tuple[int, ...]
    ending_epoch: int
    frequency: int | None = None

    @property
    def starting_epoch(self) -> int:
        """The first of the epochs."""
        return self.epochs[0]

    @property
    def is_last(self) -> bool:
        """Whether this is the policy's last epoch (also where ``frequency`` steps over the one before the end)."""
        return self.epoch == self.epochs[-1]


@dataclass(slots=True)
class Sight:
    """What a pruner sees of the network.

    Attributes:
        model: the network, for gradients and modules.
        weights: the tensors to judge, by parameter name; the parameters themselves unless a policy folds batch norms
            into them first.
        masks: the masks in force, by parameter name.
        moment: when.
        statistics: of activations, if they were collected.
        samples: of feature maps, if they were collected.
    """

    model: nn.Module
    weights: Mapping[str, Tensor]
    masks: Mapping[str, Tensor | None]
    moment: Moment
    statistics: ActivationStatistics | None = None
    samples: FeatureMapSamples | None = None


@dataclass(kw_only=True)
class Component:
    """Something that a schedule declares: a class and its arguments.

    Attributes:
        name: as declared.
        names: which fields name weights: sequences of names, or mappings by name.
    """

    name: str = ""
    names: ClassVar[tuple[str, ...]] = ()

    def renamed(self: C, change: Callable[[str], str]) -> C:
        """The same component with other names for its weights."""
        return dataclasses.replace(self, **{key: _renamed(getattr(self, key), change) for key in self.names})

    def covers(self, known: Iterable[str]) -> list[str]:
        """The names among ``known`` that this component is about."""
        named = {name for key in self.names for name in getattr(self, key)}
        return [name for name in known if name in named or EVERY in named]

    def fail(self, message: str) -> ScheduleError:
        """An error of this component."""
        return ScheduleError(f"{self.name or type(self).__name__}: {message}")


@dataclass(kw_only=True)
class Pruner(Component, ABC):
    """Chooses which entries of which weights are zero."""

    @abstractmethod
    def masks(self, sight: Sight) -> dict[str, Tensor]:
        """The masks to set now, by parameter name; a name that is left out keeps the mask it has.

        Raises:
            ScheduleError: the pruner cannot judge one of its weights.
        """


def _renamed(named: Any, change: Callable[[str], str]) -> Any:
    if isinstance(named, Mapping):
        return {name if name == EVERY else change(name): item for name, item in named.items()}
    return tuple(name if name == EVERY else change(name) for name in named)


@dataclass(frozen=True)
class Names:
    """The names a model has, and how a schedule may spell them.

    Attributes:
        known: the names.
        what: what they name, for messages.
    """

    known: tuple[str, ...]
    what: str = "parameter"
    _set: frozenset[str] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_set", frozenset(self.known))

    def find(self, name: str) -> str:
        """A name as the model has it; ``module.`` in front may be missing or too many.

        Raises:
            ScheduleError: there is none like it.
        """
        for spelled in (name, name.removeprefix(_PREFIX), _PREFIX + name):
            if spelled in self._set:
                return spelled
        near = difflib.get_close_matches(name.removeprefix(_PREFIX), self.known, n=3, cutoff=0.3) or self.known[:3]
        raise ScheduleError(
            f"expected the name of a {self.what} of the model, found {name!r}; nearest names: {', '.join(near)}"
        )


def layer_of(parameter: str) -> str:
    """The module of a parameter: ``layer1.0.conv1`` of ``layer1.0.conv1.weight``."""
    return parameter.rpartition(".")[0]


def fraction_of(component: Component, key: str) -> float:
    """A field that must be a fraction.

    Raises:
        ScheduleError: it is not between 0 and 1.
    """
    value = getattr(component, key)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
        raise component.fail(f"expected {key} between 0 and 1, found {value!r}")
    return float(value)


def names_of(component: Component, key: str = "weights") -> tuple[str, ...]:
    """A field that must name weights: a list, or one name.

    Raises:
        ScheduleError: it names none.
    """
    value = getattr(component, key)
    names = (value,) if isinstance(value, str) else tuple(value) if isinstance(value, Sequence) else ()
    if not names or not all(isinstance(name, str) for name in names):
        raise component.fail(f"expected {key} to be a list of parameter names, found {value!r}")
    return names
