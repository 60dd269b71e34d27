"""Latencies of this machine's convs and linear layers, measured once and kept on disk."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from chanopt import clock
from chanopt.errors import AllocationError
from chanopt.pruning.layer_calls import call_of
from chanopt.pruning.smcp.costs import Key, LatencyTable, key_of
from chanopt.pruning.structure import Layer

__all__ = ["Machine", "measure_latencies"]


@dataclass(frozen=True, slots=True)
class Machine:
    """Where and how layers are timed.

    Attributes:
        device: `cpu` or `cuda`.
        dtype: the element type's name.
        channels_last: whether maps are laid out channels last.
    """

    device: str = "cpu"
    dtype: str = "float32"
    channels_last: bool = False

    def name(self) -> str:
        """What the cached figures hold for: the processor, threads, torch, and how layers are run."""
        text = json.dumps([clock.machine(self.device), self.dtype, self.channels_last], sort_keys=True)
        return f"{self.device}-{hashlib.sha256(text.encode()).hexdigest()[:12]}"


def measure_latencies(
    layers: Iterable[Layer],
    *,
    batch: int = 1,
    machine: Machine | None = None,
    points: int = 8,
    multiple: int = 8,
    repeats: int = 5,
    cache: str | Path | None = None,
    progress: bool = False,
) -> LatencyTable:
    """Time layers on this machine at some channel counts, with the counts between them interpolated.

    Args:
        layers: conv and linear layers, e.g. `structure.layers.values()`.
        batch: samples.
        machine: where and how.
        points: channel counts that are timed per side, evenly up to all of them.
        multiple: channel counts of the table are multiples of this, and all.
        repeats: times each shape is run; the median counts.
        cache: folder of the figures; by default `$CHANOPT_CACHE`, else `~/.cache/chanopt`.
        progress: show a bar.

    Returns:
        A table for :func:`chanopt.pruning.smcp.choose`: along either side a layer never gets faster by more channels,
        since what is measured otherwise is noise, or a larger layer could be run instead.

    Raises:
        AllocationError: grouped convs, which no group can prune.
    """
    machine = machine or Machine()
    path = _cache_folder(cache) / f"latency-{machine.name()}.json"
    known = dict(LatencyTable.load(path).entries) if path.exists() else {}
    entries: dict[Key, float] = {}
    distinct = {(key_of(layer, batch), layer.kind): layer for layer in layers}
    for (key, _), layer in tqdm(distinct.items(), disable=not progress, desc="latency"):
        if layer.groups > 1 and not layer.depthwise:
            raise AllocationError(f"expected convs in one group or depthwise, found {layer.name} in {layer.groups}")
        entries.update(_table(layer, key, known, machine, points, multiple, repeats))
    path.parent.mkdir(parents=True, exist_ok=True)
    _write(LatencyTable(known), path)
    return LatencyTable(entries, batch)


def _table(
    layer: Layer, key: Key, known: dict[Key, float], machine: Machine, points: int, multiple: int, repeats: int
) -> dict[Key, float]:
    """Latencies of one layer's shape at all multiples: timed at some, interpolated between."""
    rows = [1] if layer.depthwise else _some(key.inputs, points, multiple)
    columns = _some(key.outputs, points, multiple)

    def shape(inputs: int, outputs: int) -> Key:
        if layer.depthwise:
            return key._replace(inputs=outputs, outputs=outputs, groups=outputs)
        return key._replace(inputs=inputs, outputs=outputs)

    for inputs, outputs in itertools.product(rows, columns):
        if shape(inputs, outputs) not in known:
            known[shape(inputs, outputs)] = _time(layer, shape(inputs, outputs), machine, repeats)
    grid = torch.tensor([[known[shape(i, o)] for o in columns] for i in rows], dtype=torch.float64)
    grid = grid.cummax(0).values.cummax(1).values
    all_rows = rows if layer.depthwise else _multiples(key.inputs, multiple)
    all_columns = _multiples(key.outputs, multiple)
    fine = _interpolated(_interpolated(grid, columns, all_columns).T, rows, all_rows).T
    return {shape(i, o): float(fine[r, c]) for r, i in enumerate(all_rows) for c, o in enumerate(all_columns)}


def _multiples(count: int, multiple: int) -> list[int]:
    return sorted({*range(multiple, count + 1, multiple), count})


def _some(count: int, points: int, multiple: int) -> list[int]:
    """Counts to time: the first multiple, the last count, and evenly between."""
    every = _multiples(count, multiple)
    places = torch.linspace(0, len(every) - 1, min(points, len(every))).round().long().tolist()
    return [every[place] for place in sorted(set(places))]


def _interpolated(grid: Tensor, known: Sequence[int], wanted: Sequence[int]) -> Tensor:
    """Linear between the known columns: shape (rows, known) to (rows, wanted)."""
    if len(known) == 1:
        return grid.expand(grid.shape[0], len(wanted))
    at, to = torch.tensor(known, dtype=torch.float64), torch.tensor(wanted, dtype=torch.float64)
    right = torch.searchsorted(at, to).clamp(1, len(known) - 1)
    share = (to - at[right - 1]) / (at[right] - at[right - 1])
    return grid[:, right - 1] * (1 - share) + grid[:, right] * share


def _time(layer: Layer, key: Key, machine: Machine, repeats: int) -> float:
    """Milliseconds of one layer with the key's channels, the median of some runs."""
    run = call_of(
        layer,
        key.inputs,
        key.outputs,
        key.groups,
        key.batch,
        device=machine.device,
        dtype=getattr(torch, machine.dtype),
        channels_last=machine.channels_last,
    )
    with torch.no_grad():
        run()
        seconds = [clock.seconds(run, machine.device) for _ in range(repeats)]
    return statistics.median(seconds) * 1e3


def _write(table: LatencyTable, path: Path) -> None:
    """In one step, so that two processes that measure at once leave a whole file."""
    part = path.with_name(f"{path.stem}.{os.getpid()}.json")
    table.save(part)
    part.replace(path)


def _cache_folder(cache: str | Path | None) -> Path:
    return Path(cache or os.environ.get("CHANOPT_CACHE") or Path.home() / ".cache" / "chanopt")
