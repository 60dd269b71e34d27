"""What a masked model will cost once its dead channels are gone, from its structure alone."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TypeAlias

import torch
from torch import Tensor
from torch.nn import functional

from chanopt.api import Mask
from chanopt.errors import ChanoptError
from chanopt.pruning.structure import Channels, Layer, Segment, Structure

__all__ = ["COSTS", "Cost", "Latency", "kept", "macs", "parameters", "total"]

Cost: TypeAlias = Callable[[Layer, int, int], float]
"""The cost of a layer with so many input and output channels left."""


def macs(layer: Layer, inputs: int, outputs: int) -> float:
    """Multiply-accumulates for one sample."""
    return layer.macs(inputs, outputs)


def parameters(layer: Layer, inputs: int, outputs: int) -> float:
    """Entries of weight and bias."""
    return layer.parameters(inputs, outputs) if inputs and outputs else 0


@dataclass
class Latency:
    """Seconds that a conv or linear layer takes on this machine, measured once for each shape and remembered.

    Channels are measured in steps: a count is rounded up to a multiple of ``step``.

    Attributes:
        batch: samples at once.
        repeats: runs of each; the fastest counts.
        step: see above.
        device: where to measure.
    """

    batch: int = 1
    repeats: int = 5
    step: int = 8
    device: str = "cpu"
    _known: dict[tuple[object, ...], float] = field(default_factory=dict, repr=False)

    def __call__(self, layer: Layer, inputs: int, outputs: int) -> float:
        """The time of a layer with so many channels left; none takes none."""
        if not inputs or not outputs:
            return 0.0
        ins, outs = (self._rounded(n, most) for n, most in ((inputs, layer.in_channels), (outputs, layer.out_channels)))
        groups = outs if layer.depthwise else layer.groups
        ins = outs if layer.depthwise else ins
        key = (layer.kind, ins, outs, groups, layer.kernel, layer.stride, layer.padding, layer.dilation)
        key = (*key, layer.input_size, layer.uses)
        if key not in self._known:
            self._known[key] = layer.uses * self._measure(layer, ins, outs, groups)
        return self._known[key]

    def _rounded(self, count: int, most: int) -> int:
        return min(most, -(-count // self.step) * self.step)

    def _measure(self, layer: Layer, inputs: int, outputs: int, groups: int) -> float:
        run = _runner(layer, inputs, outputs, groups, self.batch, self.device)
        best = float("inf")
        with torch.no_grad():
            run()
            for _ in range(self.repeats):
                begun = time.perf_counter()
                run()
                _wait(self.device)
                best = min(best, time.perf_counter() - begun)
        return best


def _wait(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)


def _runner(layer: Layer, inputs: int, outputs: int, groups: int, batch: int, device: str) -> Callable[[], Tensor]:
    """A call that does what the layer does, on random numbers."""
    if layer.kind == "linear":
        x = torch.randn(batch, *layer.input_size, inputs, device=device)
        dense = torch.randn(outputs, inputs, device=device)
        return lambda: functional.linear(x, dense)
    transposed = "transpose" in layer.kind
    x = torch.randn(batch, inputs, *layer.input_size, device=device)
    per_group = (inputs, outputs // groups) if transposed else (outputs, inputs // groups)
    weight = torch.randn(*per_group, *layer.kernel, device=device)
    op = getattr(functional, layer.kind)
    options = {"stride": layer.stride, "padding": layer.padding, "dilation": layer.dilation, "groups": groups}
    return lambda: op(x, weight, **options)


COSTS: Mapping[str, Callable[[], Cost]] = {"macs": lambda: macs, "parameters": lambda: parameters, "latency": Latency}
"""Costs by name; a latency is measured anew for each."""


def total(structure: Structure, masks: Mapping[str, Mask], cost: Cost) -> float:
    """The cost of all layers once what these masks leave dead is gone.

    A producer makes the channels that some reader keeps, a reader reads those that some producer keeps. Within a
    residual segment that is an upper bound: later values may need fewer channels still.
    """
    counts = kept(structure, masks)
    return sum(cost(layer, *counts[name]) for name, layer in structure.layers.items())


def kept(structure: Structure, masks: Mapping[str, Mask]) -> dict[str, tuple[int, int]]:
    """Per layer, how many input and output channels are left once what these masks leave dead is gone.

    Raises:
        ChanoptError: a mask of a layer that the structure does not have.
    """
    unknown = [name for name in masks if name not in structure.layers]
    if unknown:
        raise ChanoptError(f"expected masks of the structure's layers, found {unknown[:5]}")
    gone: set[str] = set()
    while True:  # a layer without outputs needs no inputs, so that what makes these may go too
        counts = _counts(structure, masks, gone)
        dead = {name for name, (_, outputs) in counts.items() if not outputs}
        if dead <= gone:
            return {name: (0, 0) if name in dead else pair for name, pair in counts.items()}
        gone |= dead


def _counts(structure: Structure, masks: Mapping[str, Mask], gone: set[str]) -> dict[str, tuple[int, int]]:
    into = {name: layer.in_channels for name, layer in structure.layers.items()}
    out = {name: layer.out_channels for name, layer in structure.layers.items()}
    for segment in structure.segments:
        live = _needed(segment, masks, gone) & _made(segment, masks)
        for name, index in segment.consumers.items():
            into[name] = _count(index, live, masks[name].inputs if name in masks else None)
        for name, index in segment.producers.items():
            out[name] = _count(index, live, masks[name].outputs if name in masks else None)
        for name, index in segment.through.items():
            if name in structure.layers:
                out[name] = into[name] = _count(index, live, masks[name].outputs if name in masks else None)
    return {name: (into[name], out[name]) for name in structure.layers}


def _count(index: Channels, live: set[int], keep: object) -> int:
    chosen = None if keep is None else set(keep)  # type: ignore[call-overload]
    return sum(
        (chosen is None or channel in chosen) and (unit is None or unit in live) for channel, unit in enumerate(index)
    )


def _needed(segment: Segment, masks: Mapping[str, Mask], gone: set[str]) -> set[int]:
    """Channels that some reader keeps."""
    if segment.pinned:
        return set(range(segment.channels))
    readers = {name: index for name, index in segment.consumers.items() if name not in gone}
    return _union(readers, {name: mask.inputs for name, mask in masks.items()})


def _made(segment: Segment, masks: Mapping[str, Mask]) -> set[int]:
    """Channels that some producer keeps; all of those that no layer makes."""
    outputs = {name: mask.outputs for name, mask in masks.items()}
    made = _union(segment.producers, outputs)
    by_layers = _union(segment.producers, {})
    for name, index in segment.through.items():  # a depthwise conv that drops a channel makes it a constant
        keep = outputs.get(name)
        if keep is not None:
            made -= {unit for channel, unit in enumerate(index) if unit is not None and channel not in set(keep)}
    return made | (set(range(segment.channels)) - by_layers)


def _union(table: Mapping[str, Channels], keeps: Mapping[str, object]) -> set[int]:
    found: set[int] = set()
    for name, index in table.items():
        keep = keeps.get(name)
        chosen = range(len(index)) if keep is None else keep
        found.update(unit for channel in chosen if (unit := index[channel]) is not None)  # type: ignore[attr-defined]
    return found
