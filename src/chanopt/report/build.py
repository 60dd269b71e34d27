"""Building a report from the program before and after."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from chanopt.analysis.figures import figures, macs
from chanopt.analysis.weights import used
from chanopt.ir import Access, IndexMap, Kind, Op, Param, Program, flow_back, physical_read
from chanopt.report.report import LayerReport, Report, SegmentReport

Reasons = dict[str, np.ndarray]

OUTPUT = "the model's output"
RANGE = "lets others be read as ranges"
ROUNDED = "makes a count that is quick here"
NEEDED = "its layer or a reader cannot do without"
FURTHER = "read by further layers"

NAMED = 32
"""Reasons that an operator passes on by name. In a chain of residual blocks a layer is kept for each later one; without
a limit the report of a thousand layers would take the square of their number."""


def build(
    model: str, before: Program, after: Program, notes: Mapping[str, Any], seconds: Mapping[str, float]
) -> Report:
    """The report of a run of the pipeline.

    Args:
        model: class name of the model.
        before: the program as lowered.
        after: the program after the pipeline.
        notes: the pipeline's notes: ``segments`` as OrderChannels leaves them, ``reads`` RealizeReads, ``rounded``
            AlignChannels.
        seconds: time per stage.
    """
    old, new = figures(before), figures(after)
    return Report(
        model=model,
        consumers=sum(op.linear and op.kind is not Kind.MAP for op in after.ops),
        slices=new.slices,
        gathers=new.gathers,
        copies=new.copies,
        gathered_channels=new.gathered_channels,
        copied_bytes=new.copied_bytes,
        macs_before=old.macs,
        macs_after=new.macs,
        parameters_before=old.parameters,
        parameters_after=new.parameters,
        segments=tuple(_segment(ordered) for ordered in notes.get("segments", ())),
        layers=_layers(before, after, notes.get("reads", ()), notes.get("rounded", {})),
        refusals=after.refusals,
        seconds=dict(seconds),
    )


def _segment(ordered: Any) -> SegmentReport:
    segment, solution = ordered.segment, ordered.solution
    return SegmentReport(
        segment.name,
        segment.consumers,
        segment.producers,
        solution.objective,
        solution.bound,
        solution.optimal,
        solution.seconds,
        segment.channel_bytes,
        segment.instance,
        solution,
    )


def _layers(
    before: Program, after: Program, realized: Sequence[Any], rounded: Mapping[str, np.ndarray]
) -> tuple[LayerReport, ...]:
    reasons = why_kept(after, rounded)
    ways = {choice.result: choice for choice in realized}
    left: dict[str, list[Op]] = {}
    for op in after.ops:
        if op.linear:
            left.setdefault(op.layer, []).append(op)
    rows: list[LayerReport] = []
    for op in before.ops:
        if not op.linear:
            continue
        same = left.get(op.layer, [])
        now = same.pop(0) if same else None
        row = _layer(op, before, now, after, reasons)
        choice = ways.get(now.result) if now is not None else None
        rows.append(row if choice is None else replace(row, way=choice.way.value, costs=_named(choice.seconds)))
    return tuple(rows)


def _named(seconds: Mapping[Any, float]) -> dict[str, float]:
    return {way.value: spent for way, spent in seconds.items()}


def _layer(op: Op, before: Program, now: Op | None, after: Program, reasons: Mapping[str, Reasons]) -> LayerReport:
    wide = before.values[op.result].live.channels
    read = before.values[op.reads[0].value].live.channels
    if now is None:
        return LayerReport(op.label(), (read, 0), (wide, 0), "gone", {}, (_size(op, before), 0), (macs(op, before), 0))
    physical = physical_read(now, now.reads[0], after)
    live = after.values[now.result].live.live.array
    kept = {why: mask & np.isin(np.arange(len(mask)), live) for why, mask in reasons[now.result].items()}
    return LayerReport(
        op.label(),
        (read, len(physical.channels)),
        (wide, len(live)),
        physical.form.value,
        {why: str(IndexMap(np.flatnonzero(mask))) for why, mask in kept.items() if mask.any()},
        (_size(op, before), _size(now, after)),
        (macs(op, before), macs(now, after)),
    )


def _size(op: Op, program: Program) -> int:
    """Entries of an op's weight and bias after cutting."""
    rows = len(program.values[op.result].live)
    total = 0
    for param in op.args[1:3]:
        if not isinstance(param, Param):
            continue
        shape = list(program.weights[param.name].shape)
        if param.out is not None:
            shape[param.out] = rows
        if param.inn is not None and op.kind is not Kind.GROUPED:
            shape[param.inn] = len(op.reads[0].index)
        total += int(np.prod(shape))
    return total


def why_kept(program: Program, rounded: Mapping[str, np.ndarray]) -> dict[str, Reasons]:
    """Per value, per reason, shape (channels,): which live channels are kept for it.

    A reason is a layer that has weights for the channel, an operator that takes everything, or the model's output; if
    there is none, that it was added for the sake of the count (`rounded`, by value), or of another's range. Through
    operators that pass channels on, the `NAMED` reasons of most channels keep their names; the others are one.
    """
    reasons: dict[str, Reasons] = {name: {} for name, value in program.values.items() if value.layout is not None}
    for op in reversed(program.ops):
        passed = _foremost(reasons.get(op.result, {}))
        for read in op.reads:
            operand = program.values[read.value]
            if operand.layout is not None:
                _explain(op, read, program, passed, reasons[read.value])
    for name, found in reasons.items():
        live = program.values[name].live.mask()
        for mask in found.values():
            live &= ~mask
        added = np.zeros_like(live)
        added[rounded.get(name, [])] = True
        for why, mask in ((ROUNDED, live & added), (RANGE, live & ~added)):
            if mask.any():
                found[why] = mask
    return reasons


def _foremost(reasons: Reasons) -> Reasons:
    """At most `NAMED` of them, those of most channels; the others as one."""
    if len(reasons) <= NAMED:
        return reasons
    ranked = sorted(reasons, key=lambda why: (why == FURTHER, -np.count_nonzero(reasons[why])))
    named = {why: reasons[why] for why in ranked[:NAMED]}
    return {**named, FURTHER: np.logical_or.reduce([reasons[why] for why in ranked[NAMED:]])}


def _explain(op: Op, read: Any, program: Program, passed: Reasons, found: Reasons) -> None:
    """Add to `found`, of the value read, why `op` needs it; `passed`: why the op's result is needed."""
    channels = program.values[read.value].live.channels
    if read.access is Access.FLOW:
        for why, mask in passed.items():
            taken = flow_back(read, IndexMap(np.flatnonzero(mask)))
            _mark(found, why, taken.array, channels)
        return
    if read.access is Access.ALL:
        why = (
            OUTPUT
            if op.kind is Kind.SINK
            else f"{op.target} takes all channels" + (f" in {op.layer}" if op.layer else "")
        )
        _mark(found, why, np.arange(channels), channels)
        return
    if not op.linear:
        _mark(found, f"{op.target} takes all channels", read.index.array, channels)
        return
    weighted = _weighted(op, program, channels)
    taken = np.zeros(channels, np.bool_)
    taken[read.index.array] = True
    _mark(found, f"read by {op.label()}", np.flatnonzero(taken & weighted), channels)
    _mark(found, NEEDED, np.flatnonzero(taken & ~weighted), channels)


def _weighted(op: Op, program: Program, channels: int) -> np.ndarray:
    rows = program.values[op.result].live.mask()
    table = used(op, program) & rows[:, None]
    if op.kind is Kind.GROUPED:
        return table.reshape(op.groups, -1, table.shape[1]).any(1).reshape(-1)
    return np.any(table, axis=0)


def _mark(found: Reasons, why: str, channels: np.ndarray, total: int) -> None:
    if not len(channels):
        return
    mask = found.setdefault(why, np.zeros(total, np.bool_))
    mask[channels] = True
