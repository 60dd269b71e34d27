"""What a masked model will cost once its dead channels are gone, as chanopt's own passes cut it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, TypeAlias

import numpy as np
import torch

from chanopt import clock
from chanopt.analysis.figures import figures
from chanopt.api import Mask
from chanopt.errors import ChanoptError
from chanopt.frontend.masks import apply_masks
from chanopt.ir import IndexMap, Kind, Op, Program, physical_read
from chanopt.passes import DEFAULT, DropDead, Pass
from chanopt.pruning.layer_calls import call_of
from chanopt.pruning.structure import Channels, Layer, Segment, Structure, layer_of, multiplies

__all__ = ["COSTS", "Cost", "Latency", "Left", "emitted", "kept", "lefts", "macs", "of_program", "parameters", "total"]

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
        call = call_of(layer, inputs, outputs, groups, self.batch, device=self.device)
        with torch.no_grad():
            call()
            return min(clock.seconds(call, self.device) for _ in range(self.repeats))


COSTS: Mapping[str, Callable[[], Cost]] = {"macs": lambda: macs, "parameters": lambda: parameters, "latency": Latency}
"""Costs by name; a latency is measured anew for each."""


@dataclass(frozen=True, slots=True)
class Left:
    """What is left of one layer; of one that is used several times and cut differently, each part by itself.

    Attributes:
        layer: the layer, with the positions and the bias that the slim one has.
        inputs: channels that it reads.
        outputs: channels that it makes.
    """

    layer: Layer
    inputs: int
    outputs: int


def total(structure: Structure, masks: Mapping[str, Mask], cost: Cost) -> float:
    """The cost of the model once what these masks leave dead is gone; without masks, of the model as it is.

    The structure of a model that :func:`~chanopt.pruning.discover` has seen knows its program, and chanopt's own passes
    say what is left: what an addition keeps for one operand it keeps for both, groups are filled up to the fullest, a
    constant may need a channel to carry it, a layer that is used twice and cut differently becomes two. What no mask
    reaches (``structure.others``; for :func:`parameters` also norms and embeddings) counts as it is. Only channels that
    are added to save copies are not seen, see :func:`emitted`. Of a structure read from JSON the result is an
    estimate, see :func:`kept`.

    Raises:
        ChanoptError: a mask of a layer that the structure does not have.
    """
    _check(structure, masks)
    program = structure.origin.program
    if program is not None:
        return of_program(program if not masks else _cut(program, masks), structure, cost)
    fixed = sum(cost(layer, layer.in_channels, layer.out_channels) for layer in structure.others.values())
    counts = _estimated(structure, masks)
    return fixed + sum(cost(layer, *counts[name]) for name, layer in structure.layers.items())


def emitted(structure: Structure, masks: Mapping[str, Mask], cost: Cost) -> float:
    """As :func:`total`, but of what :func:`chanopt.optimize` makes, with the channels added to save copies.

    Args:
        structure: of :func:`~chanopt.pruning.discover`, in this process.
        masks: by layer.
        cost: as for :func:`total`.

    Raises:
        ChanoptError: a mask of a layer that the structure does not have; a structure without its program.
    """
    _check(structure, masks)
    program = structure.origin.program
    if program is None:
        raise ChanoptError("expected a structure that discover has made here, found one from JSON or a copy")
    return of_program(_passed(program, masks, DEFAULT), structure, cost)


def kept(structure: Structure, masks: Mapping[str, Mask]) -> dict[str, tuple[int, int]]:
    """Per layer, how many input and output channels are left once what these masks leave dead is gone.

    As for :func:`total`; of a layer that is cut differently at several uses the most. Of a structure from JSON an
    estimate: without the channels that carry constants and those that are made to fill up somebody's groups, and with
    all that an addition's operands share, though later values may need fewer.

    Raises:
        ChanoptError: a mask of a layer that the structure does not have.
    """
    _check(structure, masks)
    program = structure.origin.program
    if program is None:
        return _estimated(structure, masks)
    counts: dict[str, tuple[int, int]] = dict.fromkeys(structure.layers, (0, 0))
    for left in lefts(program if not masks else _cut(program, masks), structure):
        if left.layer.name in counts:
            before = counts[left.layer.name]
            counts[left.layer.name] = (max(before[0], left.inputs), max(before[1], left.outputs))
    return counts


def _check(structure: Structure, masks: Mapping[str, Mask]) -> None:
    unknown = [name for name in masks if name not in structure.layers]
    if unknown:
        raise ChanoptError(f"expected masks of the structure's layers, found {unknown[:5]}")


# -- from the program -------------------------------------------------------------------------------------------------


def _cut(program: Program, masks: Mapping[str, Mask]) -> Program:
    """The program of the masked model without what is dead, channels in their old order."""
    dropped = next(place for place, step in enumerate(DEFAULT) if isinstance(step, DropDead))
    return _passed(program, masks, DEFAULT[: dropped + 1])


def _passed(program: Program, masks: Mapping[str, Mask], steps: Iterable[Pass]) -> Program:
    fresh = {name: tensor.detach() for name, tensor in program.weights.items()}  # what is known of old values is not
    program = apply_masks(program.evolve(weights=fresh), masks, ())
    for step in steps:
        done = step.apply(program)
        program = done if isinstance(done, Program) else done.program
    return program


def of_program(program: Program, structure: Structure, cost: Cost) -> float:
    """The cost of a program that was made of the structure's.

    Args:
        program: before or after passes.
        structure: for the names of layers.
        cost: as for :func:`total`.
    """
    if cost is parameters:
        return figures(program).parameters  # with norms and embeddings, which are no layers
    return sum(cost(left.layer, left.inputs, left.outputs) for left in lefts(program, structure))


def lefts(program: Program, structure: Structure) -> list[Left]:
    """What multiplies by weights in a program, in order of execution; uses of one weight that are cut alike are one."""
    uses: dict[tuple[object, ...], list[Op]] = {}
    for op in program.ops:
        if multiplies(op):
            weight = op.args[1]
            rows = program.values[op.result].live.live if op.linear else None
            columns = _columns(op, program)
            uses.setdefault((weight.name, weight.out, weight.inn, rows, columns), []).append(op)
    return [_left(ops, columns, program, structure) for (*_, columns), ops in uses.items()]


def _columns(op: Op, program: Program) -> IndexMap | None:
    """The channels that a linear op reads; None where it does not choose."""
    chooses = op.linear and op.args[1].inn is not None
    return physical_read(op, op.reads[0], program).channels if chooses else None


def _left(ops: list[Op], columns: Any, program: Program, structure: Structure) -> Left:
    op = ops[0]
    known = structure.layers.get(op.layer) if op.linear else None
    layer = layer_of(op.args[1].name, ops, program) if known is None else layer_of(op.layer, ops, program, known.norm)
    outputs = len(program.values[op.result].live) if op.linear else layer.out_channels
    if op.kind is Kind.GROUPED:
        live = program.values[op.result].live
        layer = replace(layer, groups=len(np.unique(live.live.array * op.groups // live.channels)) or 1)
    if columns is not None:
        return Left(layer, len(columns), outputs)
    return Left(layer, outputs if layer.depthwise else layer.in_channels, outputs)


# -- from the structure alone -----------------------------------------------------------------------------------------


def _estimated(structure: Structure, masks: Mapping[str, Mask]) -> dict[str, tuple[int, int]]:
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
    groups = {name: 1 if layer.depthwise else layer.groups for name, layer in structure.layers.items()}
    for segment in structure.segments:
        live = _needed(segment, masks, gone) & _made(segment, masks)
        for name, index in segment.consumers.items():
            into[name] = _count(index, live, masks[name].inputs if name in masks else None, groups[name])
        for name, index in segment.producers.items():  # an addition keeps what any of its operands makes
            out[name] = _count(index, live, None, groups[name])
        for name, index in segment.through.items():
            if name in structure.layers:
                out[name] = into[name] = _count(index, live, masks[name].outputs if name in masks else None)
    return {name: (into[name], out[name]) for name in structure.layers}


def _count(index: Channels, live: set[int], keep: object, groups: int = 1) -> int:
    """How many of a layer's channels are live and kept; in groups, as many in each as in the fullest."""
    chosen = None if keep is None else set(keep)  # type: ignore[call-overload]
    flags = [
        (chosen is None or channel in chosen) and (unit is None or unit in live) for channel, unit in enumerate(index)
    ]
    size = len(flags) // groups
    most = [sum(flags[start : start + size]) for start in range(0, len(flags), size)] if size else []
    return max(most, default=0) * sum(map(bool, most))


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
