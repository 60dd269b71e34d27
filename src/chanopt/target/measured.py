"""Costs measured on this machine, kept on disk by device and library versions."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from tqdm import tqdm

from chanopt import clock, disk_cache
from chanopt.kernels import GROUP, gather_conv2d, rounded
from chanopt.target.read import ConvRead
from chanopt.target.realization import Realization

_KEY = "costs"
_BESIDE = "beside"
_ROUNDS = 7
_DTYPES = {2: torch.float16, 4: torch.float32, 8: torch.float64}

Call = Callable[[], Tensor]


def default_path() -> Path:
    """Where costs are kept."""
    return disk_cache.cache_file("costs.json")


@dataclass
class Measured:
    """Seconds of a conv by the way it reads, timed once on random tensors and then remembered.

    All ways of one conv are timed in turns, round by round, so that what else the machine does falls on all alike; the
    median counts. Timing happens in the process and with the threads of the caller.

    Attributes:
        device: "cpu" or "cuda"; it has to be there.
        path: the JSON file; None remembers in this object only.
        progress: whether a bar on standard error shows convs being timed.
        rounds: timed calls of each way.
    """

    device: str = "cpu"
    path: Path | None = field(default_factory=default_path)
    progress: bool = True
    rounds: int = _ROUNDS
    _known: dict[str, dict[str, float]] = field(default_factory=dict[str, dict[str, float]], init=False, repr=False)

    def __post_init__(self) -> None:
        self._known = disk_cache.read(self.path, _KEY, _seconds_by_way)

    def __call__(self, read: ConvRead, way: Realization) -> float:
        """The cost of one way.

        Raises:
            KeyError: the conv does not have this way on this device.
        """
        known = self._known.get(self._key(read))
        if known is None or way.value not in known:
            self.prepare([read])
            known = self._known[self._key(read)]
        plain = known[way.value] + (0.0 if way is Realization.FUSED else known.get(_BESIDE, 0.0))
        if read.sharing == 1 or len(read.runs) == 1 or way not in (Realization.GATHER, Realization.GEMM):
            return plain
        # One gather serves all that share it.
        gather = max(0.0, known[Realization.GATHER.value] - known["compact"])
        return plain - (1 - 1 / read.sharing) * gather

    def prepare(self, reads: Sequence[ConvRead]) -> None:
        """Time what is not known yet, with a progress bar, and keep it."""
        missing = {key: read for read in reads if (key := self._key(read)) not in self._known}
        if not missing:
            return
        with torch.inference_mode():
            bar = tqdm(missing.items(), desc="timing convs", unit="conv", disable=None if self.progress else True)
            for key, read in bar:
                self._known[key] = self._timed(read)
        disk_cache.add(self.path, _KEY, _seconds_by_way, {key: self._known[key] for key in missing})

    def _key(self, read: ConvRead) -> str:
        # What is shared is taken off afterwards.
        fields = asdict(replace(read, sharing=1))
        return json.dumps([clock.machine(self.device), fields], sort_keys=True)

    def _timed(self, read: ConvRead) -> dict[str, float]:
        calls = calls_of(read, self.device)
        taken: dict[str, list[float]] = {name: [] for name in calls}
        for call in calls.values():
            call()
        for _ in range(self.rounds):
            for name, call in calls.items():
                taken[name].append(clock.seconds(call, self.device))
        return {name: statistics.median(times) for name, times in taken.items()}


def _seconds_by_way(entry: Mapping[str, float]) -> dict[str, float]:
    return {str(way): float(seconds) for way, seconds in entry.items()}


def calls_of(read: ConvRead, device: str) -> Mapping[str, Call]:
    """Something to call for every way that the conv has, by its name.

    And "compact", with nothing to gather; "beside", what the fused way does besides and the others leave to others.
    """
    generator = torch.Generator().manual_seed(0)
    dtype = _DTYPES[read.itemsize]
    memory_format = torch.channels_last if read.channels_last else torch.contiguous_format

    def random(*shape: int) -> Tensor:
        made = torch.randn(*shape, generator=generator).to(device, dtype)
        return made.contiguous(memory_format=memory_format)

    x = random(read.batch, read.stored, *read.size)
    weight, bias = random(read.made, read.stored, *read.kernel), random(read.made, 1, 1, 1).flatten()
    every = torch.arange(read.stored, device=device)
    index = torch.cat([every[start:stop] for start, stop in read.runs])
    own = weight.index_select(1, index).contiguous(memory_format=memory_format)
    geometry: dict[str, Any] = {"stride": read.stride, "padding": read.padding, "dilation": read.dilation}
    compact = random(read.batch, read.taken, *read.size)
    first, last = read.runs[0][0], read.runs[-1][1]
    span = weight[:, first:last].contiguous(memory_format=memory_format)

    def take() -> Tensor:
        if not read.channels_last:
            return x.index_select(1, index)
        return _image(_rows(x).index_select(1, index), read)

    groups = read.blocks(GROUP)
    columns = rounded(len(groups) * GROUP)
    groups += [groups[-1]] * (columns // GROUP - len(groups))
    table = torch.tensor(groups, dtype=torch.int32, device=device)
    wide, wide_bias = random(read.made, columns, *read.kernel), bias.float()
    scales = random(columns, 2, 1, 1).float() if read.before else None
    result = random(read.batch, read.made, *read.size_out)
    besides: dict[str, Any] = {
        "scale": None if scales is None else scales[:, 0].flatten(),
        "shift": None if scales is None else scales[:, 1].flatten(),
        "pre_act": "relu" if read.before > 1 else "none",
        "residual": result if read.after > 1 else None,
        "act": "relu" if read.after else "none",
    }

    def conv(operand: Tensor, by: Tensor) -> Tensor:
        return functional.conv2d(operand, by, bias, **geometry)

    calls: dict[Realization, Call] = {
        Realization.VIEW: lambda: conv(x[:, first:last], span),
        Realization.GATHER: lambda: conv(take(), own),
        Realization.GEMM: lambda: _product(x[:, first:last] if len(read.runs) == 1 else take(), own, bias, read),
        Realization.RUNS: lambda: _by_runs(x, own, bias, read),
        Realization.FUSED: lambda: gather_conv2d(x, wide, wide_bias, table, GROUP, **geometry, **besides),
        Realization.COVER: lambda: conv(x[:, first:last], span),
        Realization.DENSE: lambda: conv(x, weight),
    }
    ways = {way.value: calls[way] for way in read.ways(device, "eager")}
    passes: dict[str, Call] = {_BESIDE: lambda: _passes(compact, result, read)} if read.before or read.after else {}
    return ways | passes | {"compact": lambda: conv(compact, own)}


def _passes(operand: Tensor, result: Tensor, read: ConvRead) -> Tensor:
    for _ in range(read.before):
        operand = operand.relu()
    for _ in range(read.after):
        result = result.relu_()
    return result


def _product(operand: Tensor, weight: Tensor, bias: Tensor, read: ConvRead) -> Tensor:
    return _image(functional.linear(_rows(operand), weight.flatten(1), bias), read)


def _by_runs(x: Tensor, weight: Tensor, bias: Tensor, read: ConvRead) -> Tensor:
    made, column = bias, 0
    for start, stop in read.runs:
        part = weight[:, column : column + stop - start].flatten(1)
        column += stop - start
        made = torch.addmm(made, _rows(x)[:, start:stop], part.t())
    return _image(made, read)


def _rows(image: Tensor) -> Tensor:
    return image.permute(0, 2, 3, 1).flatten(0, 2)


def _image(rows: Tensor, read: ConvRead) -> Tensor:
    return rows.unflatten(0, (read.batch, *read.size)).permute(0, 3, 1, 2)
