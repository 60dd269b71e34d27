"""What a layer costs by its kept inputs and outputs: parameters, multiplications, latency from a table.

Knows no torch. Costs are given raw, as the allocation program takes them (whole numbers of weights or
multiply-accumulates, milliseconds); `unit` turns them into what is reported: millions of parameters, billions of
multiply-accumulates (SMCP, ECCV 2022, section 3.3).
"""

from __future__ import annotations

import bisect
import csv
import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple, Protocol

from chanopt.errors import AllocationError
from chanopt.pruning.smcp.allocation import Product, Table

if TYPE_CHECKING:
    from chanopt.pruning.structure import Layer

__all__ = ["CostModel", "Key", "LatencyTable", "MacCost", "ParameterCost", "key_of", "layer_cost", "raw_cost"]

_LOG = logging.getLogger(__name__)
_STEP = 8
"""Channel counts that a table lacks are rounded up to a multiple of this."""


class CostModel(Protocol):
    """How layers cost.

    Attributes:
        name: what is counted, for messages.
        unit: raw costs times this are what is reported.
    """

    @property
    def name(self) -> str: ...  # noqa: D102

    @property
    def unit(self) -> float: ...  # noqa: D102

    def of(self, layer: Layer) -> Product | Table:
        """The raw cost of a layer by kept inputs and outputs; of a depthwise conv, by its outputs and one input."""
        ...


def layer_cost(model: CostModel, layer: Layer, inputs: int, outputs: int) -> float:
    """What a layer costs with so many kept inputs and outputs, in the model's units; 0 if a side is empty.

    >>> from chanopt.pruning.structure import Layer
    >>> layer_cost(ParameterCost(), Layer("conv", "conv2d", 64, 128, kernel=(3, 3)), 64, 128)
    0.073728
    """
    return raw_cost(model, layer, inputs, outputs) / round(1 / model.unit)


def raw_cost(model: CostModel, layer: Layer, inputs: int, outputs: int) -> float:
    """As :func:`layer_cost`, but as the allocation program counts."""
    if not inputs or not outputs:
        return 0.0
    return model.of(layer).at(*((outputs, 1) if layer.depthwise else (inputs, outputs)))


def _pairs(layer: Layer, rate: int) -> Product | Table:
    """So much for every kept input that a kept output is made of; a layer in groups keeps all its channels."""
    if layer.groups == 1 or layer.depthwise:
        return Product(rate)
    return Table((layer.in_channels,), (layer.out_channels,), ((rate * layer.pairs(),),))


@dataclass(frozen=True, slots=True)
class ParameterCost:
    """Weights of convs and linear layers, in millions; biases and batch norms are left out, as SMCP does."""

    name: str = "parameters"
    unit: float = 1e-6

    def of(self, layer: Layer) -> Product | Table:
        """Weights of one kept input times one kept output; in groups, of the whole layer."""
        return _pairs(layer, layer.weights_per_pair)


@dataclass(frozen=True, slots=True)
class MacCost:
    """Multiply-accumulates for one sample, in billions."""

    name: str = "macs"
    unit: float = 1e-9

    def of(self, layer: Layer) -> Product | Table:
        """Multiply-accumulates of one kept input times one kept output; in groups, of the whole layer."""
        return _pairs(layer, layer.macs_per_pair)


class Key(NamedTuple):
    """What identifies a measured layer.

    Attributes:
        batch: samples.
        inputs, outputs: channels.
        size: sizes of the input feature map; "1" for a linear layer.
        kernel: kernel sizes.
        stride: strides.
        groups: 1, or as many as outputs for a depthwise conv.
    """

    batch: int
    inputs: int
    outputs: int
    size: str = "1"
    kernel: str = "1"
    stride: str = "1"
    groups: int = 1

    def __str__(self) -> str:
        """`batch_inputs_outputs_size_kernel_stride`, and `_groups` if there is more than one."""
        return "_".join(map(str, self if self.groups > 1 else self[:-1]))

    @classmethod
    def parse(cls, text: str) -> Key:
        """Read what `str` writes.

        Raises:
            AllocationError: another text.
        """
        parts = text.split("_")
        try:
            groups = int(parts[6]) if len(parts) == 7 else 1
            batch, inputs, outputs = (int(part) for part in parts[:3])
            size, kernel, stride = parts[3:6]
        except ValueError as error:
            raise AllocationError(
                f"expected a key batch_inputs_outputs_size_kernel_stride[_groups], found {text!r}"
            ) from error
        return cls(batch, inputs, outputs, size, kernel, stride, groups)


def key_of(layer: Layer, batch: int) -> Key:
    """The key of a layer with all its channels."""
    return Key(
        batch,
        layer.in_channels,
        layer.out_channels,
        _sizes(layer.input_size if layer.kernel else ()),
        _sizes(layer.kernel),
        _sizes(layer.stride),
        layer.out_channels if layer.depthwise else layer.groups,
    )


def _sizes(numbers: tuple[int, ...]) -> str:
    """Equal sizes are written once: 56 for 56 x 56."""
    if not numbers:
        return "1"
    return str(numbers[0]) if len(set(numbers)) == 1 else "x".join(map(str, numbers))


Missing = Literal["error", "zero"]


@dataclass(frozen=True, slots=True)
class LatencyTable:
    """Latencies by layer shape, in milliseconds, as measured somewhere.

    Counts between measured ones cost what the next larger measured layer costs.

    Attributes:
        entries: milliseconds by key.
        batch: the batch that keys are looked up with.
        missing: what a layer without an entry costs: `error` raises, `zero` warns and makes it free, as SMCP does.
    """

    entries: Mapping[Key, float]
    batch: int = 1
    missing: Missing = "error"
    name: str = "latency"
    unit: float = 1.0
    _warned: set[str] = field(default_factory=set[str], compare=False, repr=False)

    @classmethod
    def load(cls, path: str | Path, batch: int = 1, missing: Missing = "error") -> LatencyTable:
        """Read a table: JSON as `{key: milliseconds}`, or CSV with a column for each part of a key and `ms`.

        Raises:
            AllocationError: a file of another form, naming the first entry that is wrong.
        """
        path = Path(path)
        text = path.read_text(encoding="utf-8")
        try:
            if path.suffix == ".csv":
                entries = {_row_key(row): float(row["ms"]) for row in csv.DictReader(text.splitlines())}
            else:
                entries = {Key.parse(key): float(value) for key, value in json.loads(text).items()}
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            if isinstance(error, AllocationError):
                raise
            raise AllocationError(
                f"expected a latency table in {path.name}, as JSON of keys or CSV with columns "
                f"{', '.join(Key._fields)}, ms; found {type(error).__name__}: {error}"
            ) from error
        return cls(entries, batch, missing)

    def save(self, path: str | Path) -> None:
        """Write what `load` reads, by the name's ending."""
        path = Path(path)
        if path.suffix != ".csv":
            text = json.dumps({str(key): value for key, value in self.entries.items()}, indent=1)
            path.write_text(text, encoding="utf-8")
            return
        with path.open("w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file)
            writer.writerow([*Key._fields, "ms"])
            writer.writerows([*key, value] for key, value in self.entries.items())

    def lookup(self, key: Key) -> float:
        """The latency of one shape: as it is, or with inputs, outputs or both rounded up to a multiple of 8.

        Raises:
            AllocationError: there is no such entry, and `missing` is `error`.
        """
        if not key.inputs or not key.outputs:
            return 0.0
        up = [-(-count // _STEP) * _STEP for count in (key.inputs, key.outputs)]
        for inputs, outputs in ((key.inputs, key.outputs), (up[0], key.outputs), (key.inputs, up[1]), tuple(up)):
            found = self.entries.get(key._replace(inputs=inputs, outputs=outputs))
            if found is not None:
                return found
        return self._nothing(key)

    def of(self, layer: Layer) -> Product | Table:
        """A table over the measured counts of a layer of this shape.

        Raises:
            AllocationError: there are none, or none as large as the layer, and `missing` is `error`.
        """
        key = key_of(layer, self.batch)
        known = self._like(layer, key)
        if not known:
            self._nothing(key)
            return Product(0)
        most = (key.outputs, 1) if layer.depthwise else (key.inputs, key.outputs)
        rows = _up_to(most[0], {inputs for inputs, _ in known})
        columns = _up_to(most[1], {outputs for _, outputs in known})
        # A pair that was not measured costs what the cheapest measured one that holds it costs.
        entries = [
            [min((known[k] for k in known if k[0] >= i and k[1] >= o), default=None) for o in columns] for i in rows
        ]
        if rows[-1] < most[0] or columns[-1] < most[1] or entries[-1][-1] is None:
            self._nothing(key)
            return Product(0)
        return Table(tuple(rows), tuple(columns), tuple(tuple(e or 0.0 for e in row) for row in entries))

    def _like(self, layer: Layer, key: Key) -> dict[tuple[int, int], float]:
        """Measured (inputs, outputs) of the layer's shape; of a depthwise conv (outputs, 1)."""
        if not layer.depthwise:
            return {
                (k.inputs, k.outputs): cost
                for k, cost in self.entries.items()
                if k._replace(inputs=key.inputs, outputs=key.outputs) == key
            }
        wide = key._replace(inputs=0, outputs=0, groups=0)
        return {
            (k.outputs, 1): cost
            for k, cost in self.entries.items()
            if k.groups == k.inputs > 1 and k._replace(inputs=0, outputs=0, groups=0) == wide
        }

    def _nothing(self, key: Key) -> float:
        near = ", ".join(str(k) for k in self.entries if k[3:] == key[3:]) or "none of this size, kernel and stride"
        told = f"expected a latency of {key} (or more channels) in the table, found {near[:160]}"
        if self.missing == "error":
            raise AllocationError(f"{told}; measure it, or use missing='zero' to make such layers free")
        if str(key) not in self._warned:
            self._warned.add(str(key))
            _LOG.warning("%s: it counts as free", told)
        return 0.0


def _up_to(most: int, counts: set[int]) -> list[int]:
    """Ascending counts up to the first that is not below `most`."""
    ascending = sorted(counts)
    return ascending[: bisect.bisect_left(ascending, most) + 1]


def _row_key(row: Mapping[str, str]) -> Key:
    batch, inputs, outputs = (int(row[name]) for name in ("batch", "inputs", "outputs"))
    return Key(batch, inputs, outputs, row["size"], row["kernel"], row["stride"], int(row.get("groups") or 1))
