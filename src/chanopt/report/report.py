"""The report: what was done to a model, per segment and per layer, and why."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from chanopt.errors import LoadError
from chanopt.ir import IndexMap, Refusal
from chanopt.solve import Instance, Solution

FORMAT = 1


@dataclass(frozen=True, slots=True)
class SegmentReport:
    """One segment: the values that share an order, and the order that was found.

    Attributes:
        name: the first producer's layer.
        consumers: layers that read the segment.
        producers: layers that make its channels.
        objective: bytes gathered, for one inference of the example inputs.
        bound: proven lower bound of the objective.
        optimal: whether the objective is proven least.
        seconds: time the solver took.
        channel_bytes: bytes of one channel.
        instance: the permutation program.
        solution: its solution.
    """

    name: str
    consumers: tuple[str, ...]
    producers: tuple[str, ...]
    objective: float
    bound: float
    optimal: bool
    seconds: float
    channel_bytes: int
    instance: Instance
    solution: Solution


@dataclass(frozen=True, slots=True)
class LayerReport:
    """One conv or linear layer.

    Attributes:
        name: the user's module.
        channels_in: input channels before and after.
        channels_out: output channels before and after.
        reads: how its input's channels lie: "whole", "range", "gather", or "fused" (several ranges, not copied).
        kept: why output channels were kept, as {reason: channels}, the channels as ranges ("0:16,31").
        parameters: entries of its weight and bias before and after.
        macs: multiply-accumulates before and after.
        way: how a conv that reads a part of a tensor was chosen to (:class:`chanopt.target.Realization`); else "".
        costs: predicted or measured seconds of the ways that it had.
    """

    name: str
    channels_in: tuple[int, int]
    channels_out: tuple[int, int]
    reads: str
    kept: Mapping[str, str]
    parameters: tuple[int, int]
    macs: tuple[int, int]
    way: str = ""
    costs: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Report:
    """What chanopt did to a model. All figures are for one inference of the example inputs.

    Attributes:
        model: class name of the model.
        consumers: ops that read channels through a weight.
        slices: reads of a proper range, which are views.
        gathers: ops with a read that is not one range.
        copies: reads that materialise memory.
        gathered_channels: channels in those.
        copied_bytes: bytes in those.
        macs_before, macs_after: multiply-accumulates of convs and linears.
        parameters_before, parameters_after: parameter entries.
        segments: every permutation program that was solved.
        layers: every conv and linear.
        refusals: operators without a channel rule, whose operands were left whole.
        seconds: time per stage ("capture", "optimize" and the passes in it).
    """

    model: str
    consumers: int
    slices: int
    gathers: int
    copies: int
    gathered_channels: int
    copied_bytes: int
    macs_before: int
    macs_after: int
    parameters_before: int
    parameters_after: int
    segments: tuple[SegmentReport, ...] = ()
    layers: tuple[LayerReport, ...] = ()
    refusals: tuple[Refusal, ...] = ()
    seconds: Mapping[str, float] = field(default_factory=dict)

    def __str__(self) -> str:
        from chanopt.report.text import render

        return render(self)

    def to_json(self) -> str:
        """The report as JSON; :meth:`from_json` reads it back."""
        data: dict[str, Any] = {"format": FORMAT, **asdict(self)}
        for row, segment in zip(data["segments"], self.segments, strict=True):
            row["instance"] = json.loads(segment.instance.to_json())
            row["solution"] = json.loads(segment.solution.to_json())
        return json.dumps(data)

    @classmethod
    def from_json(cls, text: str) -> Report:
        """Read a report from JSON.

        Raises:
            LoadError: the text is not a report, or comes from a newer version.
        """
        try:
            data = json.loads(text)
            written = data.pop("format")
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise LoadError("expected the JSON of a chanopt report, found something else") from error
        if written != FORMAT:
            raise LoadError(f"expected a report of format {FORMAT}, found {written!r}; update chanopt to read it")
        data["segments"] = tuple(_segment(row) for row in data["segments"])
        data["layers"] = tuple(_layer(row) for row in data["layers"])
        data["refusals"] = tuple(Refusal(**row) for row in data["refusals"])
        return cls(**data)

    def to_html(self, path: str | Path) -> Path:
        """Write one self-contained page with a picture of every multi-branch segment; returns the path.

        Needs the extra ``report`` (jinja2).
        """
        from chanopt.report.html import render

        target = Path(path)
        target.write_text(render(self), encoding="utf-8")
        return target

    def why(self, layer: str, channel: int) -> str:
        """Why an output channel of a layer was kept, or that it was not.

        Raises:
            KeyError: no such layer.
        """
        rows = [row for row in self.layers if row.name == layer]  # several for a module that is used twice
        if not rows:
            raise KeyError(f"expected one of the report's layers, found {layer!r}")
        found = [why for row in rows for why, channels in row.kept.items() if channel in IndexMap.parse(channels)]
        return "; ".join(dict.fromkeys(found)) if found else "not kept: nothing reads it"


def _segment(row: dict[str, Any]) -> SegmentReport:
    fields: dict[str, Any] = {
        **row,
        "instance": Instance.from_json(row["instance"]),
        "solution": Solution.from_json(row["solution"]),
        "consumers": tuple(row["consumers"]),
        "producers": tuple(row["producers"]),
    }
    return SegmentReport(**fields)


def _layer(row: dict[str, Any]) -> LayerReport:
    pairs: dict[str, Any] = {key: tuple(row[key]) for key in ("channels_in", "channels_out", "parameters", "macs")}
    fields: dict[str, Any] = {**row, **pairs}
    return LayerReport(**fields)


_TOTALS = (
    "consumers",
    "slices",
    "gathers",
    "copies",
    "gathered_channels",
    "copied_bytes",
    "macs_before",
    "macs_after",
    "parameters_before",
    "parameters_after",
)


def merged(model: str, parts: Mapping[str, Report], refusals: tuple[Refusal, ...]) -> Report:
    """One report of several: of the parts of a model that could be captured, under their names."""
    seconds: dict[str, float] = {}
    for report in parts.values():
        for stage, spent in report.seconds.items():
            seconds[stage] = seconds.get(stage, 0.0) + spent
    return Report(
        model,
        **{name: sum(getattr(report, name) for report in parts.values()) for name in _TOTALS},
        segments=tuple(segment for report in parts.values() for segment in report.segments),
        layers=tuple(layer for report in parts.values() for layer in report.layers),
        refusals=(*refusals, *(refusal for report in parts.values() for refusal in report.refusals)),
        seconds=seconds,
    )
