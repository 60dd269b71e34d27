"""The permutation program as plain data, with a JSON form.

An instance says who reads which channels of which value, what a reader costs that does not find its channels
as one range, which values share one order, and what it costs to let two values differ.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from operator import index
from typing import Any, TypeVar

from chanopt.errors import InstanceError
from chanopt.solve.pqtree import PQTree

__all__ = ["Block", "Edge", "Instance", "Pin", "Preference", "Reader"]


@dataclass(frozen=True, slots=True)
class Reader:
    """A consumer: free if its channels are one range in the order of its value, else it pays `weight`.

    With `ordered` the channels must be one range in exactly the given sequence. With a `grain` above 0 it pays
    otherwise: `weight` for every aligned block of that many positions, `k * grain` up to `(k + 1) * grain`,
    that holds one of its channels.
    """

    name: str
    set: tuple[int, ...]
    weight: float
    value: int = 0
    ordered: bool = False
    grain: int = 0

    def __post_init__(self) -> None:
        channels = _channels(self.set, f"reader {self.name!r}")
        object.__setattr__(self, "set", channels if self.ordered else tuple(sorted(channels)))
        object.__setattr__(self, "value", _value(self.value, f"reader {self.name!r}"))
        object.__setattr__(self, "weight", _weight(self.weight, f"reader {self.name!r}"))
        object.__setattr__(self, "grain", _grain(self.grain, f"reader {self.name!r}"))
        if self.grain and self.ordered:
            raise InstanceError(
                f"reader {self.name!r}: expected either `ordered` or a grain, found ordered and grain {self.grain}: "
                "inside an aligned block the sequence costs nothing, drop one of them"
            )


@dataclass(frozen=True, slots=True)
class Block:
    """Channels that must be one range in the order of `value` (an operand of a concat)."""

    set: tuple[int, ...]
    value: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "set", tuple(sorted(_channels(self.set, "a block"))))
        object.__setattr__(self, "value", _value(self.value, "a block"))


@dataclass(frozen=True, slots=True)
class Pin:
    """Channels that must be one range in exactly this order in `value` (an input of the user)."""

    value: int
    sequence: tuple[int, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "sequence", _channels(self.sequence, "a pin"))
        object.__setattr__(self, "value", _value(self.value, "a pin"))


@dataclass(frozen=True, slots=True)
class Edge:
    """A place between two values where the order may change, for `weight`; uncut, the two share one order."""

    name: str
    source: int
    target: int
    weight: float

    def __post_init__(self) -> None:
        where = f"edge {self.name!r}"
        object.__setattr__(self, "source", _value(self.source, where))
        object.__setattr__(self, "target", _value(self.target, where))
        object.__setattr__(self, "weight", _weight(self.weight, where))
        if self.source == self.target:
            raise InstanceError(
                f"{where}: expected two values, found value {self.source} twice: drop the edge, a value has one order"
            )


@dataclass(frozen=True, slots=True)
class Preference:
    """Channels that are made one range in the order of `value` where that costs nothing, heaviest first."""

    set: tuple[int, ...]
    value: int = 0
    weight: float = 1

    def __post_init__(self) -> None:
        object.__setattr__(self, "set", tuple(sorted(_channels(self.set, "a preference"))))
        object.__setattr__(self, "value", _value(self.value, "a preference"))
        object.__setattr__(self, "weight", _weight(self.weight, "a preference"))


@dataclass(frozen=True, slots=True)
class Instance:
    """One segment: its channels 0 .. channels - 1, who reads them, and what must hold of their orders.

    The program: cut some edges; values still joined by edges are one *part* and share one order of all
    channels. In every part the blocks and pins of its values hold. A reader whose set is not one range in the
    order of its value's part pays its weight, and so does every cut edge; a reader with a grain pays its weight
    for every aligned block that it touches. The total is the objective.

    Raises InstanceError for channels out of range, repeated channels or names, weights that are negative or
    not finite, and blocks and pins of one value that no order satisfies.
    """

    channels: int
    readers: tuple[Reader, ...] = ()
    blocks: tuple[Block, ...] = ()
    pins: tuple[Pin, ...] = ()
    edges: tuple[Edge, ...] = ()
    prefer: tuple[Preference, ...] = ()

    def __post_init__(self) -> None:
        for field in ("readers", "blocks", "pins", "edges", "prefer"):
            object.__setattr__(self, field, tuple(getattr(self, field)))
        _check_count(self.channels)
        self._check_ranges()
        _check_names("reader", [reader.name for reader in self.readers])
        _check_names("edge", [edge.name for edge in self.edges])
        for value in sorted({block.value for block in self.blocks} | {pin.value for pin in self.pins}):
            self._check_hard(value)

    @property
    def values(self) -> int:
        """The number of values: one more than the largest that is mentioned, at least 1."""
        named = [item.value for item in (*self.readers, *self.blocks, *self.pins, *self.prefer)]
        joined = [end for edge in self.edges for end in (edge.source, edge.target)]
        return max([0, *named, *joined]) + 1

    @classmethod
    def from_json(cls, data: str | Mapping[str, Any]) -> Instance:
        """Read an instance from JSON text or from what `json.loads` makes of it.

        The least form is `{"channels": n, "readers": [{"name", "set", "weight"}], "blocks": [[int]]}`. A
        block is a list of channels or `{"set", "value"}`. Raises InstanceError for a key that is missing or
        unknown.
        """
        table = parse_json(data, "an instance")
        check_keys(table, _KEYS, {"channels"}, "an instance")
        return cls(
            channels=table["channels"],
            readers=_read_all(Reader, table, "readers", {"name", "set", "weight"}),
            blocks=tuple(_read_block(block) for block in _list(table.get("blocks", []), "blocks")),
            pins=_read_all(Pin, table, "pins", {"value", "sequence"}),
            edges=_read_all(Edge, table, "edges", {"name", "source", "target", "weight"}),
            prefer=_read_all(Preference, table, "prefer", {"set"}),
        )

    def to_json(self) -> str:
        """Return the JSON text that `from_json` reads; what has its default is left out."""
        table: dict[str, Any] = {"channels": self.channels}
        table["readers"] = [_reader_json(reader) for reader in self.readers]
        table["blocks"] = [
            {"set": list(block.set), "value": block.value} if block.value else list(block.set) for block in self.blocks
        ]
        table["pins"] = [{"value": pin.value, "sequence": list(pin.sequence)} for pin in self.pins]
        table["edges"] = [
            {"name": edge.name, "source": edge.source, "target": edge.target, "weight": edge.weight}
            for edge in self.edges
        ]
        table["prefer"] = [{"set": list(wish.set), "value": wish.value, "weight": wish.weight} for wish in self.prefer]
        optional = ("pins", "edges", "prefer")
        return json.dumps({key: item for key, item in table.items() if item or key not in optional})

    def _check_ranges(self) -> None:
        named = [(reader.set, f"reader {reader.name!r}") for reader in self.readers]
        named += [(block.set, f"block {number}") for number, block in enumerate(self.blocks)]
        named += [(pin.sequence, f"pin {number}") for number, pin in enumerate(self.pins)]
        named += [(wish.set, f"preference {number}") for number, wish in enumerate(self.prefer)]
        for channels, where in named:
            if channels and not (min(channels) >= 0 and max(channels) < self.channels):
                raise InstanceError(
                    f"{where}: expected channels in 0 .. {self.channels - 1}, found {min(channels)} .. "
                    f"{max(channels)}: raise `channels` or drop the channels outside"
                )

    def _check_hard(self, value: int) -> None:
        tree = PQTree(max(self.channels, 1))
        for number, pin in enumerate(self.pins):
            if pin.value == value and not tree.order(pin.sequence):
                raise InstanceError(_no_order(f"pin {number}", value))
        for number, block in enumerate(self.blocks):
            if block.value == value and not tree.reduce(block.set):
                raise InstanceError(_no_order(f"block {number}", value))


_KEYS = {"channels", "readers", "blocks", "pins", "edges", "prefer"}
_Item = TypeVar("_Item")


def _no_order(what: str, value: int) -> str:
    return (
        f"value {value}: expected an order in which its pins and blocks are ranges, found none once {what} "
        "is added: drop one of them, or give it another value behind an edge"
    )


def _channels(channels: Iterable[int], where: str) -> tuple[int, ...]:
    try:
        found = tuple(index(channel) for channel in channels)
    except TypeError:
        raise InstanceError(
            f"{where}: expected channels as integers, found {channels!r}: list the channel numbers"
        ) from None
    if len(set(found)) != len(found):
        twice = sorted(channel for channel, count in Counter(found).items() if count > 1)
        raise InstanceError(f"{where}: expected every channel once, found {twice} repeated: drop the repeats")
    return found


def _value(value: int, where: str) -> int:
    try:
        number = index(value)
    except TypeError:
        number = -1
    if number < 0:
        raise InstanceError(f"{where}: expected a value number from 0 up, found {value!r}: number the values")
    return number


def _grain(grain: int, where: str) -> int:
    try:
        number = index(grain)
    except TypeError:
        number = -1
    if number < 0:
        raise InstanceError(
            f"{where}: expected a grain as a number of positions from 1 up, or 0 for one range, found {grain!r}: "
            "give the channels of an aligned block"
        )
    return number


def _weight(weight: float, where: str) -> float:
    """Return the weight as a plain int or float, whatever number it came as."""
    try:
        found: float = index(weight)  # pyright: ignore[reportArgumentType]
    except TypeError:
        found = float(weight) if isinstance(weight, float) else math.nan  # pyright: ignore[reportUnnecessaryIsInstance]
    if not 0 <= found < math.inf:
        raise InstanceError(
            f"{where}: expected a finite weight of at least 0, found {weight!r}: give the cost of a copy"
        )
    return found


def _check_count(channels: int) -> None:
    if not isinstance(channels, int) or channels < 0:  # pyright: ignore[reportUnnecessaryIsInstance]
        raise InstanceError(
            f"expected the number of channels as an integer of at least 0, found {channels!r}: "
            "give the channels of the segment"
        )


def _check_names(what: str, names: list[str]) -> None:
    twice = sorted(name for name, count in Counter(names).items() if count > 1)
    if twice:
        raise InstanceError(f"expected every {what} name once, found {twice} repeated: rename all but one")


def parse_json(data: str | Mapping[str, Any], what: str) -> Mapping[str, Any]:
    """Return the mapping in JSON text, or the mapping itself; raises InstanceError if it is none."""
    try:
        table = json.loads(data) if isinstance(data, str) else data
    except json.JSONDecodeError as error:
        raise InstanceError(f"{what}: expected JSON text, found an error: {error}: check the file") from None
    if not isinstance(table, Mapping):
        raise InstanceError(f"{what}: expected a JSON object, found {type(table).__name__}: check the file")
    return table


def check_keys(table: Mapping[str, Any], known: set[str], needed: set[str], what: str) -> None:
    """Raise InstanceError unless the table has every needed key and no unknown one."""
    missing, unknown = sorted(needed - set(table)), sorted(set(table) - known)
    if missing or unknown:
        raise InstanceError(
            f"{what}: expected the keys {sorted(known)}, found {unknown or 'none'} unknown and "
            f"{missing or 'none'} missing: check the spelling"
        )


def _list(item: Any, what: str) -> list[Any]:
    if not isinstance(item, list | tuple):
        raise InstanceError(f"{what}: expected a list, found {type(item).__name__}: write [...]")
    return list(item)


def _read_all(kind: type[_Item], table: Mapping[str, Any], key: str, needed: set[str]) -> tuple[_Item, ...]:
    return tuple(_read(kind, entry, f"{key}[{n}]", needed) for n, entry in enumerate(_list(table.get(key, []), key)))


def _read(kind: type[_Item], entry: Any, where: str, needed: set[str]) -> _Item:
    fields = parse_json(entry, where)
    check_keys(fields, set(getattr(kind, "__slots__", ())), needed, where)
    return kind(**fields)


def _read_block(entry: Any) -> Block:
    if isinstance(entry, Mapping):
        return _read(Block, entry, "a block", {"set"})
    return Block(tuple(_list(entry, "a block")))


def _reader_json(reader: Reader) -> dict[str, Any]:
    table: dict[str, Any] = {"name": reader.name, "set": list(reader.set), "weight": reader.weight}
    if reader.value:
        table["value"] = reader.value
    if reader.ordered:
        table["ordered"] = True
    if reader.grain:
        table["grain"] = reader.grain
    return table
