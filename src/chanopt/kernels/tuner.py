"""Which tile, and whether a kernel at all: measured once a machine, kept on disk, frozen into plans.

Triton's own autotuner keeps nothing on disk, fails inside a CUDA graph's capture, and knows no candidates but its own.
This one measures few tiles (:func:`chanopt.kernels.candidates`) beside what cuDNN can do without a kernel of ours:
a conv on all channels with zeros in the weight, and a copy of the channels before a dense conv.
"""

from __future__ import annotations

import json
import logging
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from chanopt import disk_cache
from chanopt.kernels.call import Call
from chanopt.kernels.configs import H100_MULTIPROCESSORS, Config, Rival, Tile, candidates, heuristic, tile_of
from chanopt.kernels.emit import chanopt_version
from chanopt.kernels.launch import launch
from chanopt.kernels.problem import DTYPES, Kind, Problem
from chanopt.kernels.rivals import by_rival, offered

_LOG = logging.getLogger(__name__)
_KEY = "choices"
# Working set above which a kernel finds nothing of its last run in the L2 cache of an H100 (50 MB).
_ROTATED_BYTES = 150_000_000
_MOST_BUFFERS = 8
_REPLAYS, _CALLS = 15, 20

Run = Callable[[int], Any]
Measure = Callable[[Run, int], float]


@dataclass(frozen=True, slots=True)
class Choice:
    """How to compute a problem.

    Attributes:
        tile: what the operators take for it.
        microseconds: a call's time by candidate, where measured; a tile's name is ``triton 128x64x64 w4 s3``.
    """

    tile: Tile
    microseconds: Mapping[str, float]

    @property
    def how(self) -> str:
        """Whether by "triton", or the name of a rival."""
        return self.tile.label.split()[0]

    @property
    def measured(self) -> bool:
        """Whether a GPU was asked, or the heuristic."""
        return bool(self.microseconds)

    def to_json(self) -> dict[str, Any]:
        """The fields, as JSON values."""
        return {"tile": self.tile.to_list(), "microseconds": dict(self.microseconds)}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Choice:
        """A choice out of :meth:`to_json`."""
        return cls(tile_of(data["tile"]), dict(data["microseconds"]))


def default_path() -> Path:
    """Where choices are kept."""
    return disk_cache.cache_file("tuner.json")


def key_of(problem: Problem, machine: str) -> str:
    """What a measurement depends on: the problem, the device, and the versions of what compiles and runs it."""
    return f"{machine} | {json.dumps(problem.to_json(), sort_keys=True)}"


def machine_name(device: torch.device | None) -> str:
    """A device with the versions of torch, triton and chanopt; "none" for no GPU."""
    if device is None:
        return "none"
    import triton

    properties = torch.cuda.get_device_properties(device)
    versions = f"torch {torch.__version__} triton {triton.__version__} chanopt {chanopt_version()}"
    return f"{properties.name} sm_{properties.major}{properties.minor} {versions}"


class Tuner:
    """Chooses, and remembers.

    Args:
        path: a JSON file that choices are read from and added to; None for memory only.
        device: the GPU to measure on; None chooses by the heuristic, for an H100.
        measure: microseconds of ``run(i)``, whose i-th buffers of so many are used in turn.
        machine: the name that choices are kept under.
        tensors: where the operands of a measurement lie, if not on `device`.
    """

    def __init__(
        self,
        path: Path | None = None,
        device: torch.device | None = None,
        measure: Measure | None = None,
        machine: str | None = None,
        tensors: torch.device | None = None,
    ) -> None:
        self.path = path
        self.device = device
        self.measure = measure or graph_time
        self.machine = machine or machine_name(device)
        self.tensors = tensors or device
        self._known = disk_cache.read(path, _KEY, Choice.from_json)
        self._used: dict[str, Choice] = {}

    def choose(self, problem: Problem) -> Choice:
        """The fastest candidate, from the file if it is there; the heuristic's without a GPU."""
        key = key_of(problem, self.machine)
        if key not in self._known:
            if self.tensors is None:
                return Choice(self._heuristic(problem), {})
            self._known[key] = self._tuned(problem)
            disk_cache.add(self.path, _KEY, Choice.from_json, {key: self._known[key].to_json()})
        self._used[key] = self._known[key]
        return self._known[key]

    def freeze(self) -> dict[str, Any]:
        """Every choice that was asked for and measured, as JSON values to keep in a plan."""
        return {key: choice.to_json() for key, choice in sorted(self._used.items())}

    def thaw(self, frozen: Mapping[str, Any]) -> None:
        """Take choices out of a plan; they go before what the file says."""
        self._known |= {key: Choice.from_json(data) for key, data in frozen.items()}

    def _heuristic(self, problem: Problem) -> Config:
        return heuristic(problem, self._capability(), self._multiprocessors())

    def _tuned(self, problem: Problem) -> Choice:
        assert self.tensors is not None
        work = Work(problem, self.tensors)
        runs: dict[Tile, Run] = {config: work.triton(config) for config in candidates(problem, self._capability())}
        times = {tile: self._time(work, run, tile.label) for tile, run in (runs | work.rivals()).items()}
        found = {tile: taken for tile, taken in times.items() if taken is not None}
        if not found:
            return Choice(self._heuristic(problem), {})
        best = min(found, key=lambda tile: found[tile])
        return Choice(best, {tile.label: taken for tile, taken in found.items()})

    def _time(self, work: Work, run: Run, name: str) -> float | None:
        try:
            spills = getattr(run(0), "n_spills", 0)
            if spills:
                _LOG.info("%s spills %d registers; left out", name, spills)
                return None
            return self.measure(run, work.buffers)
        # A candidate that does not compile or does not fit a device is none; the others are.
        except Exception as error:  # noqa: BLE001
            _LOG.warning("%s cannot be measured: %s: %s", name, type(error).__name__, error)
            return None

    def _capability(self) -> int:
        if self.device is None:
            return 90
        properties = torch.cuda.get_device_properties(self.device)
        return properties.major * 10 + properties.minor

    def _multiprocessors(self) -> int:
        if self.device is None:
            return H100_MULTIPROCESSORS
        return torch.cuda.get_device_properties(self.device).multi_processor_count


class Work:
    """Random operands of a problem, and its candidates as functions of a buffer's number.

    Attributes:
        buffers: how many inputs and results take turns, so that a GPU's cache does not hold them.
        calls: a call a buffer; all share weight and table.
        outs: a result a buffer.
    """

    def __init__(self, problem: Problem, device: torch.device, seed: int = 0) -> None:
        self.problem = problem
        self.device = device
        generator = torch.Generator(device).manual_seed(seed)
        once = self._call(generator)
        moved = (once.x.numel() + torch.Size(once.output_shape).numel()) * problem.itemsize
        self.buffers = 1 if moved * 2 < _ROTATED_BYTES / _MOST_BUFFERS else max(2, _ROTATED_BYTES // moved)
        self.buffers = min(self.buffers, _MOST_BUFFERS)
        self.calls = [replace(once, x=once.x.clone()) for _ in range(self.buffers)]
        self.outs = [self._empty(once.output_shape) for _ in range(self.buffers)]
        if problem.residual == "add":
            self.calls = [replace(c, residual=o.clone()) for c, o in zip(self.calls, self.outs, strict=True)]

    def triton(self, config: Config) -> Run:
        """Our kernel with a tile."""
        return lambda i: launch(self.problem, config, self.calls[i], self.outs[i])

    def rivals(self) -> dict[Rival, Run]:
        """What needs no kernel of ours."""
        return {rival: lambda i, rival=rival: by_rival(self.calls[i], rival) for rival in offered(self.calls[0])}

    def _format(self) -> torch.memory_format:
        return torch.contiguous_format if self.problem.kind is Kind.POINT else torch.channels_last

    def _empty(self, shape: tuple[int, ...]) -> Tensor:
        dtype = DTYPES[self.problem.dtype]
        return torch.zeros(shape, dtype=dtype, device=self.device).contiguous(memory_format=self._format())

    def _call(self, generator: torch.Generator) -> Call:
        p = self.problem
        dtype = DTYPES[p.dtype]

        def random(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, device=self.device).to(dtype)

        # Every other group or so: what a random half of the channels looks like once packed.
        total = max(p.channels, p.gathered) // p.group
        count = p.gathered // p.group
        groups = torch.arange(count, dtype=torch.int32) * total // count
        x = random(p.batch, total * p.group, p.height, p.width).contiguous(memory_format=self._format())
        fan = p.kernel[0] * p.kernel[1] * (1 if p.kind is Kind.DEPTHWISE else p.gathered)
        if p.kind is Kind.DEPTHWISE:
            weight = (random(*p.kernel, p.gathered, 1) / fan**0.5).permute(2, 3, 0, 1)
        else:
            weight = (random(p.outputs, p.gathered, *p.kernel) / fan**0.5).contiguous(memory_format=torch.channels_last)
        vector = {name: random(p.gathered).float() for name in ("scale", "shift")} if p.affine else {}
        bias = random(p.outputs).float() if p.bias else None
        return Call(
            x, weight, bias, groups.to(self.device), p.group, p.stride, p.padding, p.dilation, pre_act=p.pre_act,
            act=p.act, depthwise=p.kind is Kind.DEPTHWISE, **vector,
        )  # fmt: skip


def graph_time(run: Run, buffers: int, replays: int = _REPLAYS, calls: int = _CALLS) -> float:
    """Microseconds of a call inside a CUDA graph, over buffers that take turns: the median of the replays.

    Outside of a graph the launch of a small kernel takes longer than its work.
    """
    for i in range(buffers):
        run(i)
    torch.cuda.synchronize()
    count = -(-calls // buffers) * buffers
    stream = torch.cuda.Stream()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for i in range(count):
            run(i % buffers)
    graph.replay()
    torch.cuda.synchronize()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    taken: list[float] = []
    for _ in range(replays):
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        taken.append(start.elapsed_time(end) * 1e3 / count)
    return statistics.median(taken)


def wall_time(run: Run, buffers: int, replays: int = 3) -> float:
    """Microseconds of a call by the clock: for a CPU, where there are no graphs."""
    taken: list[float] = []
    for i in range(replays):
        started = time.perf_counter()
        run(i % buffers)
        taken.append((time.perf_counter() - started) * 1e6)
    return statistics.median(taken)
