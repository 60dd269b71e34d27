"""Reports made by hand and by chanopt, which the tests of the text, the page and the JSON form share."""

from __future__ import annotations

import functools
import random
from dataclasses import replace

import torch
from torch import Tensor, nn

import chanopt
from chanopt.ir import Refusal
from chanopt.report import LayerReport, Report, SegmentReport
from chanopt.solve import Edge, Instance, Pin, Reader, Solution, solve
from chanopt.solve.solution import cost, parts_of

EVIL = "<script>alert('&\"')</script>"
"""A layer's name that breaks out of text and of attributes unless it is escaped."""

CUT = Instance(
    5,
    (
        Reader("stem", (0, 1), 4_000),
        Reader("left", (1, 2), 5_000),
        Reader("right", (0, 2), 6_000, value=1),
        Reader("wide", (0, 3, 4), 7_000, value=1),
        Reader("narrow", (2, 3), 1_000, value=1),
    ),
    pins=(Pin(1, (4, 3)),),
    edges=(Edge("relu -> relu_1", 0, 1, 2_000),),
)
"""Known: the edge is cut and "narrow" gathers, 3000 bytes in all."""

CONFLICT = Instance(
    3, tuple(Reader(name, pair, 100) for name, pair in {"ab": (0, 1), "bc": (1, 2), "ca": (0, 2)}.items())
)
"""Known: one of the three gathers."""

FLAT = Instance(8, (Reader("output", (0, 1, 2), 32),))
"""A single reader: no picture."""


def segment(name: str, instance: Instance, solution: Solution | None = None) -> SegmentReport:
    """The report of one segment, solved unless a solution is given."""
    found = solution if solution is not None else solve(instance)
    readers = tuple(reader.name for reader in instance.readers)
    return SegmentReport(
        name, readers, (name,), found.objective, found.bound, found.optimal, 0.0042, 1_000, instance, found
    )


def drawn(channels: int, readers: int, seed: int, values: int = 1) -> SegmentReport:
    """Random sets in random orders that nobody has optimised; half of the edges between values are cut."""
    rng = random.Random(seed)
    sets = [tuple(rng.sample(range(channels), rng.randint(1, channels))) for _ in range(readers)]
    instance = Instance(
        channels,
        tuple(Reader(f"block{seed}.layer{n}", these, len(these) * 100, n % values) for n, these in enumerate(sets)),
        edges=tuple(Edge(f"add_{n} -> add_{n + 1}", n, n + 1, 50) for n in range(values - 1)),
    )
    orders = [tuple(rng.sample(range(channels), channels))]
    while len(orders) < instance.values:
        fresh = tuple(rng.sample(range(channels), channels))
        orders.append(fresh if rng.random() < 0.5 else orders[-1])
    gathered, cut, objective = cost(instance, orders)
    parts = parts_of(instance, orders)
    solution = Solution(orders[0], tuple(orders), parts, gathered, cut, objective, 0, objective == 0, 0.5)
    return segment(f"block{seed}", instance, solution)


def layer(name: str, reads: str = "range", **kept: str) -> LayerReport:
    """A layer that loses half of its channels."""
    return LayerReport(name, (64, 32), (128, 64), reads, kept, (8192, 2048), (25_690_112, 6_422_528))


def by_hand() -> Report:
    """A report with one of everything: a cut, a gap, a single reader, a refusal, a layer that is gone."""
    open_ = replace(segment("open", CONFLICT), bound=40, optimal=False)
    return Report(
        model="Sample",
        consumers=9,
        slices=6,
        gathers=2,
        copies=3,
        gathered_channels=2793,
        copied_bytes=3_100,
        macs_before=4_089_184_256,
        macs_after=647_439_838,
        parameters_before=25_557_032,
        parameters_after=5_770_443,
        segments=(segment("joined", CUT), open_, segment("flat", FLAT)),
        layers=(
            layer("conv1", **{"read by conv2": "0:16,31", "the model's output": "31,40"}),
            layer("conv2", "gather", **{"read by a": "0:8", "read by b": "0:4", "read by c": "0:20"}),
            LayerReport("conv3", (64, 0), (64, 0), "gone", {}, (100, 0), (100, 0)),
        ),
        refusals=(Refusal("aten.argmax.default", "head", "model.py:12", "no channel rule\nfor it"),),
        seconds={"capture": 1.5, "optimize": 0.25},
    )


def hostile() -> Report:
    """The same with a name that must be escaped, wherever a name may stand."""
    report = by_hand()
    instance = replace(
        CUT,
        readers=(replace(CUT.readers[0], name=EVIL), *CUT.readers[1:]),
        edges=(replace(CUT.edges[0], name=f"{EVIL} -> {EVIL}"),),
    )
    return replace(
        report,
        model=EVIL,
        segments=(segment(EVIL, instance),),
        layers=(layer(EVIL, EVIL, **{EVIL: "0:3"}),),
        refusals=(Refusal(EVIL, EVIL, EVIL, EVIL),),
        seconds={EVIL: 1.0},
    )


def empty() -> Report:
    """A model without layers."""
    return Report("Empty", 0, 0, 0, 0, 0, 0, 0, 0, 0, 0)


@functools.cache
def large() -> Report:
    """As many segments, readers and layers as DenseNet-201 has, and one as wide as in ResNet-152."""
    sizes = [readers for block in (6, 12, 48, 32) for readers in range(2, block + 2)]
    segments = [drawn(32, readers, seed) for seed, readers in enumerate(sizes)]
    segments.append(drawn(2048, 37, len(sizes), values=37))
    kept = {f"read by features.denseblock3.denselayer{n}.conv1": "0:3,5,7,9:20" for n in range(48)}
    layers = [layer(f"features.denseblock3.denselayer{n}.conv2", **kept) for n in range(200)]
    return replace(by_hand(), segments=tuple(segments), layers=tuple(layers))


class Residual(nn.Module):
    """A stem, two residual blocks and a head: several readers a segment, and an operator without a rule."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.first = nn.Conv2d(16, 16, 3, padding=1)
        self.second = nn.Conv2d(16, 16, 3, padding=1)
        self.third = nn.Conv2d(16, 8, 1)
        self.head = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x = self.stem(x).relu()
        y = (x + self.first(x)).relu()
        z = (y + self.second(y)).relu()
        return self.head(z.mean((2, 3))), self.third(z), torch.cumsum(self.third(y), 1)


@functools.cache
def by_chanopt() -> Report:
    """The report of a small residual network whose layers read half of their channels each."""
    torch.manual_seed(1)
    model = Residual().eval()
    with torch.no_grad():
        for part in (model.first, model.second, model.third, model.head):
            part.weight[:, torch.randperm(16)[:8]] = 0
    return chanopt.explain(chanopt.optimize(model, (torch.randn(1, 3, 8, 8),)))
