"""Distiller's YAML schedules: read, checked, mended, and turned into a scheduler."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn
from torch.optim import Optimizer, lr_scheduler
from torch.optim.lr_scheduler import LRScheduler

from chanopt.errors import ScheduleError
from chanopt.pruning.distiller import elements, learning_rates, ranked, regularizers
from chanopt.pruning.distiller.components import Component, Moment, Names, Pruner, Sight
from chanopt.pruning.distiller.dependencies import Conflict, DisagreementError, Kept, Side, alike, coupled, join_of
from chanopt.pruning.distiller.policies import LRPolicy, Policy, PruningPolicy, RegularizationPolicy
from chanopt.pruning.distiller.ranked import RankedPruner
from chanopt.pruning.distiller.regularizers import Regularizer
from chanopt.pruning.distiller.scheduler import CompressionScheduler, invoked
from chanopt.pruning.distiller.thinning import SIDES, StructureRemover, example_of
from chanopt.pruning.modes import in_eval
from chanopt.pruning.structure import Segment, Structure, discover

OnConflict = Literal["raise", "leader", "unconstrained"]
"""What to do where layers that must be pruned alike are not: see :meth:`Schedule.build`."""

SECTIONS = {
    "pruners": "pruner",
    "regularizers": "regularizer",
    "quantizers": "quantizer",
    "lr_schedulers": "lr_scheduler",
    "extensions": "extension",
}
"""The sections of a schedule, and what a policy calls an entry of each."""

_KINDS = {kind: section for section, kind in SECTIONS.items()}
_RANGE = ("starting_epoch", "ending_epoch", "frequency")


def _classes(base: type, *homes: Any) -> dict[str, type]:
    found = {
        name: item
        for home in homes
        for name, item in vars(home).items()
        if isinstance(item, type) and issubclass(item, base) and not name.startswith("_") and item is not base
    }
    return {name: item for name, item in found.items() if not inspect.isabstract(item)}


CLASSES: dict[str, dict[str, type]] = {
    "pruners": _classes(Pruner, elements, ranked),
    "regularizers": _classes(Regularizer, regularizers),
    "lr_schedulers": _classes(LRScheduler, lr_scheduler, learning_rates),
    "extensions": dict.fromkeys(("StructureRemover", "FilterRemover", "ChannelRemover"), StructureRemover),
    "quantizers": {},
}
"""The classes that each section may name."""


@dataclass(frozen=True)
class Declaration:
    """An entry of a section: a class and its arguments.

    Attributes:
        section: one of :data:`SECTIONS`.
        name: as declared.
        kind: the class.
        arguments: of the class.
    """

    section: str
    name: str
    kind: str
    arguments: Mapping[str, Any]

    @property
    def where(self) -> str:
        """How messages name it."""
        return f"{self.section}: {self.name}"


@dataclass(frozen=True)
class Invocation:
    """A policy: when which entry runs.

    Attributes:
        section: of the entry.
        name: of the entry.
        arguments: of the policy, e.g. ``mini_batch_pruning_frequency``.
        epochs: listed epochs, or None.
        starting_epoch: of a range.
        ending_epoch: of a range.
        frequency: of a range.
    """

    section: str
    name: str
    arguments: Mapping[str, Any]
    epochs: tuple[int, ...] | None = None
    starting_epoch: int | None = None
    ending_epoch: int | None = None
    frequency: int | None = None

    @property
    def when(self) -> tuple[tuple[int, ...], int, int | None]:
        """(epochs, the epoch before which it ends, frequency or None).

        Raises:
            ScheduleError: they contradict each other.
        """
        return invoked(self.epochs, self.starting_epoch, self.ending_epoch, self.frequency)


@dataclass(frozen=True)
class Schedule:
    """A schedule as data.

    Attributes:
        declarations: in order.
        policies: in order: those of one epoch run in this order.
        version: as written; Distiller's is 1.
    """

    declarations: tuple[Declaration, ...]
    policies: tuple[Invocation, ...]
    version: int = 1

    def find(self, section: str, name: str) -> Declaration:
        """An entry.

        Raises:
            ScheduleError: it was not declared.
        """
        declared = [entry.name for entry in self.declarations if entry.section == section]
        if name not in declared:
            raise ScheduleError(
                f"expected a policy to name one of the {section} {', '.join(declared) or '(none declared)'}, "
                f"found {name!r}"
            )
        return next(entry for entry in self.declarations if entry.section == section and entry.name == name)

    def used(self, section: str) -> list[Declaration]:
        """The entries of a section that some policy runs, in order of declaration."""
        named = {policy.name for policy in self.policies if policy.section == section}
        return [entry for entry in self.declarations if entry.section == section and entry.name in named]

    # -- text -----------------------------------------------------------------------------------------------------

    @classmethod
    def from_dict(cls, data: Any) -> Schedule:
        """Check what a YAML file holds.

        Raises:
            ScheduleError: a section, class, argument or policy that does not exist or contradicts itself.
        """
        if not isinstance(data, Mapping):
            raise ScheduleError(f"expected a schedule with sections and policies, found {type(data).__name__}")
        unknown = [key for key in data if key not in (*SECTIONS, "version", "policies")]
        if unknown:
            raise ScheduleError(f"expected the sections {', '.join(SECTIONS)} and policies, found {unknown[0]!r}")
        declarations = tuple(
            _declaration(section, str(name), entry)
            for section in SECTIONS
            for name, entry in _entries(data, section).items()
        )
        lines = data.get("policies")
        if not isinstance(lines, list) or not lines:
            raise ScheduleError("expected policies: a list of what runs when; found none")
        schedule = cls(declarations, tuple(map(_policy, lines)), data.get("version", 1))
        for policy in schedule.policies:
            schedule.find(policy.section, policy.name)
        if len(_entries(data, "quantizers")) > 1:
            raise ScheduleError("expected at most one quantizer, found several")
        return schedule

    def to_dict(self) -> dict[str, Any]:
        """What :meth:`from_dict` reads."""
        data: dict[str, Any] = {"version": self.version}
        for entry in self.declarations:
            data.setdefault(entry.section, {})[entry.name] = {"class": entry.kind, **_plain(entry.arguments)}
        data["policies"] = [_policy_dict(policy) for policy in self.policies]
        return data

    def to_yaml(self) -> str:
        """The schedule as YAML text."""
        import yaml

        return yaml.safe_dump(self.to_dict(), sort_keys=False, default_flow_style=None, width=110)

    # -- the network ----------------------------------------------------------------------------------------------

    def thins(self) -> list[Side]:
        """The sides of layers that the schedule's removers cut, each once."""
        names = [entry.arguments.get("thinning_func_str", "") for entry in self.used("extensions")]
        return list(dict.fromkeys(side for name in names for side in SIDES.get(name, ())))

    def conflicts(self, model: nn.Module, inputs: tuple[Any, ...] | None = None) -> list[Conflict]:
        """Layers that the schedule would have to prune alike in order to thin them, and does not.

        The model is not changed. The keep sets are those that the pruners would choose for the weights as they are.

        Args:
            model: the network.
            inputs: example inputs; by default those of the dataset that a remover names.

        Raises:
            ScheduleError: an unknown weight, or no inputs.
        """
        if not self.thins():
            return []
        return _Check(self, model, _structure(model, self.example(model, inputs))).run()

    def mended(self, model: nn.Module, inputs: tuple[Any, ...] | None = None) -> Schedule:
        """The schedule in which layers that must be pruned alike follow one leader: the first one it lists.

        Raises:
            ScheduleError: an unknown weight, no inputs, or layers that one mask cannot serve (readers of a concat and
                of one of its operands).
        """
        if not self.thins():
            return self
        return _Check(self, model, _structure(model, self.example(model, inputs))).mended()

    def example(self, model: nn.Module, inputs: tuple[Any, ...] | None) -> tuple[Any, ...]:
        """Example inputs: those given, else some of the dataset that a remover names.

        Raises:
            ScheduleError: neither.
        """
        if inputs is not None:
            return inputs
        named = [entry.arguments.get("dataset", "") for entry in self.used("extensions")]
        return example_of(named[0] if named else "", model)

    def build(
        self,
        model: nn.Module,
        optimizer: Optimizer | None = None,
        inputs: tuple[Any, ...] | None = None,
        *,
        on_conflict: OnConflict = "raise",
        constants: Literal["drop", "keep"] = "drop",
        skip: Collection[str] = (),
        last_epoch: int = -1,
    ) -> CompressionScheduler:
        """The scheduler that runs this on a network.

        Args:
            model: the network. Names may have ``module.`` in front or not.
            optimizer: for learning-rate schedules.
            inputs: example inputs, for removers; by default those of the dataset that a remover names.
            on_conflict: where a remover cuts layers that must be pruned alike and the schedule does not see to it:
                ``raise`` says where and what to write; ``leader`` mends the schedule so (:meth:`mended`);
                ``unconstrained`` leaves the channels on which layers disagree in the network, masked; the result of
                ``chanopt.optimize`` afterwards computes exactly what the masked network does.
            constants: what a remover does with channels that are not zero after their filter was dropped: see
                :func:`chanopt.pruning.distiller.thinning.thin`.
            skip: sections to leave out, with their policies.
            last_epoch: the epoch after which training resumes, for learning-rate schedules.

        Raises:
            ScheduleError: an unknown weight, wrong arguments, or layers that are not pruned alike.
        """
        wrong = [section for section in skip if section not in SECTIONS]
        if wrong or on_conflict not in ("raise", "leader", "unconstrained"):
            raise ScheduleError(
                f"expected skip among {', '.join(SECTIONS)} and on_conflict raise, leader or unconstrained; "
                f"found {wrong or on_conflict!r}"
            )
        schedule = self._without(skip)
        if on_conflict == "leader":
            schedule = schedule.mended(model, inputs)
        if on_conflict == "raise" and (found := schedule.conflicts(model, inputs)):
            raise DisagreementError(found)
        return _Builder(schedule, model, optimizer, inputs, on_conflict, constants, last_epoch).run()

    def _without(self, skip: Collection[str]) -> Schedule:
        return replace(
            self,
            declarations=tuple(entry for entry in self.declarations if entry.section not in skip),
            policies=tuple(policy for policy in self.policies if policy.section not in skip),
        )


def load_schedule(path: str | Path) -> Schedule:
    """Read a schedule from a YAML file. Nothing in the file is executed.

    Raises:
        ScheduleError: the file does not exist, is no YAML, or no schedule.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise ScheduleError(f"expected a schedule in {path}, found {error.strerror}") from error
    try:
        return parse_schedule(text)
    except ScheduleError as error:
        raise ScheduleError(f"{path}: {error}") from error


def parse_schedule(text: str) -> Schedule:
    """Read a schedule from YAML text.

    Raises:
        ScheduleError: it is no YAML, or no schedule; or PyYAML is missing.
    """
    try:
        import yaml
    except ImportError as error:
        raise ScheduleError("expected PyYAML for schedules, found none; pip install 'chanopt[pruning]'") from error
    try:
        return Schedule.from_dict(yaml.safe_load(text))
    except yaml.YAMLError as error:
        raise ScheduleError(f"expected YAML, found an error: {' '.join(str(error).split())}") from error


# -- reading ------------------------------------------------------------------------------------------------------


def _entries(data: Mapping[str, Any], section: str) -> Mapping[str, Any]:
    entries = data.get(section) or {}
    if not isinstance(entries, Mapping):
        raise ScheduleError(f"{section}: expected entries by name, found {type(entries).__name__}")
    return entries


def _declaration(section: str, name: str, entry: Any) -> Declaration:
    if not isinstance(entry, Mapping) or "class" not in entry:
        raise ScheduleError(f"{section}: {name}: expected a class and its arguments, found {entry!r}")
    arguments = {str(key): item for key, item in entry.items() if key != "class"}
    declaration = Declaration(section, name, str(entry["class"]), arguments)
    if section != "quantizers":
        _require_arguments(declaration)
    return declaration


def _require_arguments(entry: Declaration) -> None:
    classes = CLASSES[entry.section]
    if entry.kind not in classes:
        near = difflib.get_close_matches(entry.kind, classes, n=3, cutoff=0.3) or sorted(classes)[:3]
        raise ScheduleError(f"{entry.where}: expected a class such as {', '.join(near)}, found {entry.kind!r}")
    required, known = accepted(classes[entry.kind])
    unknown = [key for key in entry.arguments if key not in known]
    missing = [key for key in required if key not in entry.arguments]
    if unknown or missing:
        found = f"unknown {', '.join(unknown)}" if unknown else f"none for {', '.join(missing)}"
        raise ScheduleError(f"{entry.where}: expected arguments of {entry.kind} ({', '.join(known)}), found {found}")


def accepted(kind: type) -> tuple[list[str], list[str]]:
    """(required, all) arguments that a schedule may give to a class."""
    own = {"self", "name", "optimizer", "last_epoch", "verbose", "on_conflict", "constants"}
    signature = inspect.signature(kind)
    known = [name for name in signature.parameters if name not in own]
    return [name for name in known if signature.parameters[name].default is inspect.Parameter.empty], known


def _policy(line: Any) -> Invocation:
    kinds = [kind for kind in _KINDS if isinstance(line, Mapping) and kind in line]
    if len(kinds) != 1:
        raise ScheduleError(f"policies: expected each to name one of {', '.join(_KINDS)}, found {line!r}")
    kind = kinds[0]
    body = line[kind]
    if not isinstance(body, Mapping) or "instance_name" not in body:
        raise ScheduleError(f"policies: expected instance_name under {kind}, found {body!r}")
    unknown = [key for key in line if key not in (kind, "epochs", *_RANGE)]
    unknown += [key for key in body if key not in ("instance_name", "args")]
    if unknown:
        raise ScheduleError(
            f"policies: {body['instance_name']}: expected epochs or {', '.join(_RANGE)}, found {unknown[0]!r}"
        )
    if not isinstance(body.get("args") or {}, Mapping):
        raise ScheduleError(
            f"policies: {body['instance_name']}: expected args as names and values, found {body['args']!r}"
        )
    epochs = line.get("epochs")
    if epochs is not None and not isinstance(epochs, list):
        raise ScheduleError(f"policies: {body['instance_name']}: expected epochs to be a list, found {epochs!r}")
    found = Invocation(
        _KINDS[kind],
        str(body["instance_name"]),
        dict(body.get("args") or {}),
        None if epochs is None else tuple(epochs),
        *(line.get(key) for key in _RANGE),
    )
    try:
        _ = found.when
    except (ScheduleError, TypeError) as error:
        raise ScheduleError(f"policies: {found.name}: {error}") from error
    return found


def _policy_dict(policy: Invocation) -> dict[str, Any]:
    body: dict[str, Any] = {"instance_name": policy.name}
    if policy.arguments:
        body["args"] = _plain(policy.arguments)
    line: dict[str, Any] = {SECTIONS[policy.section]: body}
    if policy.epochs is not None:
        return {**line, "epochs": list(policy.epochs)}
    return {**line, **{key: getattr(policy, key) for key in _RANGE}}


def _plain(value: Any) -> Any:
    """Dicts and lists where there may be other mappings and sequences."""
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value


# -- checking -----------------------------------------------------------------------------------------------------


def _structure(model: nn.Module, inputs: tuple[Any, ...]) -> Structure:
    with in_eval(model):
        return discover(model, inputs)


_GROUPS: dict[Side, tuple[str, ...]] = {"filters": ("Filters",), "channels": ("Channels",)}


@dataclass(frozen=True)
class _Group:
    """Layers that must be pruned alike and are not sure to be."""

    side: Side
    segment: Segment
    layers: tuple[str, ...]


def _alike(group: _Group) -> bool:
    return alike(group.segment, group.side, group.layers)


class _Check:
    """A schedule against the structure of a network."""

    def __init__(self, schedule: Schedule, model: nn.Module, structure: Structure) -> None:
        self.schedule = schedule
        self.model = model
        self.structure = structure
        self.names = Names(tuple(name for name, _ in model.named_parameters()))
        made = {entry.name: component(entry, self.names) for entry in schedule.used("pruners")}
        self.pruners = {name: pruner for name, pruner in made.items() if isinstance(pruner, RankedPruner)}

    def run(self) -> list[Conflict]:
        with torch.random.fork_rng(devices=[]), torch.no_grad():  # a pruner that draws must not draw otherwise later
            return [self._conflict(group) for group in self._groups()]

    def mended(self) -> Schedule:
        schedule, found = self.schedule, self._groups()
        if not all(map(_alike, found)):
            raise DisagreementError(
                conflict for group, conflict in zip(found, self.run(), strict=True) if not _alike(group)
            )
        for group in found:
            schedule = self._led(schedule, group)
        return schedule

    def _groups(self) -> list[_Group]:
        return [
            _Group(side, segment, layers)
            for side in self.schedule.thins()
            for segment in self.structure.segments
            if not segment.pinned
            for layers in coupled(segment, side)
            if len(layers) > 1 and not self._agree(_Group(side, segment, layers))
        ]

    def _agree(self, group: _Group) -> bool:
        """Whether nobody prunes these layers, or one leader prunes them all, and can."""
        wanted = {f"{layer}.weight" for layer in group.layers}
        pruning = [pruner for pruner in self._pruning(group.side) if wanted & set(pruner.weights)]
        if len(pruning) != 1:
            return not pruning
        return pruning[0].has_leader and wanted <= set(pruning[0].weights) and _alike(group)

    def _pruning(self, side: Side) -> list[RankedPruner]:
        return [pruner for pruner in self.pruners.values() if pruner.group in _GROUPS[side]]

    def _conflict(self, group: _Group) -> Conflict:
        kept = tuple(self._kept(group.side, layer) for layer in group.layers)
        join = join_of(group.segment, group.layers) if group.side == "filters" else None
        return Conflict(group.side, group.segment.name, kept, join, self._remedy(group) if _alike(group) else "")

    def _kept(self, side: Side, layer: str) -> Kept:
        found = self.structure.layers[layer]
        count = found.out_channels if side == "filters" else found.in_channels
        name = f"{layer}.weight"
        pruner = next((pruner for pruner in reversed(self._pruning(side)) if name in pruner.weights), None)
        if pruner is None:
            return Kept(layer, count, tuple(range(count)))
        return Kept(layer, count, self._choice(pruner, name, count), pruner.name)

    def _choice(self, pruner: RankedPruner, name: str, count: int) -> tuple[int, ...] | None:
        moment = Moment(0, (0, 1), 2, 1)
        sight = Sight(self.model, dict(self.model.named_parameters()), {}, moment)
        try:
            keep = pruner.keep(pruner.weights[0] if pruner.has_leader else name, pruner.ends_at, sight)
        except ScheduleError:  # it ranks by statistics that are yet to be collected
            return None
        return tuple(range(count)) if keep is None else tuple(torch.nonzero(keep).flatten().tolist())

    # -- mending --------------------------------------------------------------------------------------------------

    def _remedy(self, group: _Group) -> str:
        before = {entry.name: entry for entry in self.schedule.declarations}
        after = self._led(self.schedule, group)
        changed = [entry for entry in after.declarations if before.get(entry.name) != entry]
        data = replace(after, declarations=tuple(changed), policies=()).to_dict()
        lines = _dump({"pruners": data.get("pruners", {})})
        added = [policy for policy in after.policies if policy.name not in before]
        policies = _dump({"policies": [_policy_dict(policy) for policy in added]}) if added else ""
        return "\n".join(f"  {line}" for line in (lines + policies).splitlines())

    def _led(self, schedule: Schedule, group: _Group) -> Schedule:
        """The schedule in which the first pruner of a group prunes all of it with a leader, and nobody else does."""
        wanted = [f"{layer}.weight" for layer in group.layers]
        pruning = [p.name for p in self._pruning(group.side) if set(wanted) & set(p.weights)]
        first = schedule.find("pruners", pruning[0])
        spelled = {self.names.find(name): name for name in self._listed(schedule, pruning)}
        prefix = "module." if all(name.startswith("module.") for name in spelled.values()) else ""
        mine = [self.names.find(name) for name in _weights(first)]
        order = [name for name in mine if name in wanted] + [name for name in wanted if name not in mine]
        led = {**first.arguments, "group_dependency": "Leader", "weights": [spelled.get(n, prefix + n) for n in order]}
        return _replaced(schedule, pruning, {spelled.get(n, n) for n in wanted}, first, led)

    def _listed(self, schedule: Schedule, pruners: Iterable[str]) -> list[str]:
        return [name for pruner in pruners for name in _weights(schedule.find("pruners", pruner))]


def _dump(data: Any) -> str:
    import yaml

    return yaml.safe_dump(data, sort_keys=False, default_flow_style=None, width=100)


def _weights(entry: Declaration) -> list[str]:
    named = entry.arguments["weights"]
    return [named] if isinstance(named, str) else list(named)


def _replaced(
    schedule: Schedule, pruners: Collection[str], taken: set[str], first: Declaration, led: Mapping[str, Any]
) -> Schedule:
    """Weights taken out of pruners and given to a new one, which runs whenever the first of them does."""
    declarations: list[Declaration] = []
    alone = set(_weights(first)) <= taken
    name = first.name if alone else _fresh(f"{first.name}_leader", schedule)
    gone: set[str] = set()
    for entry in schedule.declarations:
        if entry.section != "pruners" or entry.name not in pruners:
            declarations.append(entry)
            continue
        left = [weight for weight in _weights(entry) if weight not in taken]
        if left:
            declarations.append(replace(entry, arguments={**entry.arguments, "weights": left}))
        elif entry.name != first.name:
            gone.add(entry.name)
        if entry.name == first.name:
            declarations.append(Declaration("pruners", name, first.kind, led))
    policies: list[Invocation] = []
    for policy in schedule.policies:
        mine = policy.section == "pruners"
        if not (mine and policy.name in gone):
            policies.append(policy)
        if mine and policy.name == first.name and not alone:
            policies.append(replace(policy, name=name))
    return replace(schedule, declarations=tuple(declarations), policies=tuple(policies))


def _fresh(name: str, schedule: Schedule) -> str:
    taken = {entry.name for entry in schedule.declarations}
    return next(spelled for spelled in (name, *(f"{name}_{i}" for i in range(2, 1000))) if spelled not in taken)


# -- building -----------------------------------------------------------------------------------------------------


def component(entry: Declaration, names: Names) -> Component:
    """The pruner or regularizer of an entry, its weights named as the model names them.

    Raises:
        ScheduleError: wrong arguments, or an unknown weight.
    """
    made = _made(entry, lambda: CLASSES[entry.section][entry.kind](name=entry.name, **entry.arguments))
    assert isinstance(made, Component)
    return _made(entry, lambda: made.renamed(names.find))


def _made(entry: Declaration, make: Callable[[], Any]) -> Any:
    try:
        return make()
    except ScheduleError as error:
        raise ScheduleError(
            f"{entry.section}: {str(error).removeprefix(entry.name + ': ')} (in {entry.name})"
        ) from error
    except (TypeError, ValueError) as error:
        raise ScheduleError(f"{entry.where}: expected arguments that {entry.kind} accepts, found {error}") from error


@dataclass
class _Builder:
    schedule: Schedule
    model: nn.Module
    optimizer: Optimizer | None
    given: tuple[Any, ...] | None
    on_conflict: OnConflict
    constants: Literal["drop", "keep"]
    last_epoch: int

    def run(self) -> CompressionScheduler:
        self.names = Names(tuple(name for name, _ in self.model.named_parameters()))
        self.made: dict[tuple[str, str], Any] = {}
        scheduler = CompressionScheduler(self.model, self.given)
        for line in self.schedule.policies:
            scheduler.add_policy(
                self._policy(line), line.epochs, line.starting_epoch, line.ending_epoch, line.frequency or 1
            )
        return scheduler

    def _policy(self, line: Invocation) -> Policy:
        entry = self.schedule.find(line.section, line.name)
        key = (line.section, line.name)
        if key not in self.made:
            self.made[key] = self._instance(entry)
        return _made(entry, lambda: self._wrapped(self.made[key], line))

    def _wrapped(self, made: Any, line: Invocation) -> Policy:
        arguments = dict(line.arguments)
        if "levels" in arguments:
            if not isinstance(arguments["levels"], Mapping):
                raise ScheduleError(f"{line.name}: expected levels by weight, found {arguments['levels']!r}")
            arguments["levels"] = {
                name if name == "*" else self.names.find(name): level for name, level in arguments["levels"].items()
            }
        if isinstance(made, Pruner):
            return PruningPolicy(made, **arguments)
        if isinstance(made, Regularizer):
            return RegularizationPolicy(made, **arguments)
        return LRPolicy(made, **arguments) if isinstance(made, LRScheduler) else made

    def _instance(self, entry: Declaration) -> Any:
        if entry.section == "quantizers":
            raise ScheduleError(
                f"{entry.where}: expected pruners, regularizers, lr_schedulers and extensions, found a quantizer; "
                "chanopt does not quantize: build with skip={'quantizers'} and quantize the pruned network"
            )
        if entry.section == "extensions":
            options: dict[str, Any] = {"on_conflict": self.on_conflict, "constants": self.constants}
            return _made(entry, lambda: StructureRemover(**{**entry.arguments, **options}))
        if entry.section != "lr_schedulers":
            return component(entry, self.names)
        if self.optimizer is None:
            raise ScheduleError(
                f"{entry.where}: expected an optimizer for the learning rate, found none; build with an optimizer, or "
                "with skip={'lr_schedulers'}"
            )
        kind = CLASSES["lr_schedulers"][entry.kind]
        resumed = {"last_epoch": self.last_epoch} if "last_epoch" in inspect.signature(kind).parameters else {}
        return _made(entry, lambda: kind(self.optimizer, **entry.arguments, **resumed))
