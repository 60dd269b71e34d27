"""Time and memory of compiling, against depth and width.

    python -m benchmarks scale                      # residual nets to 1000 layers, DenseNet to 264, 16k channels
    python -m benchmarks scale --families residual --sizes 18 50 98

Every network is built thin, masked (half of the input channels of every layer, at random) and compiled at 32 pixels
in a process of its own. The slope is that of log time against log size, by least squares; 1 is linear. Size is what the
ops read: as many operands as ops in a residual net, but many more in a dense one, whose layers each read all before
them. Capture is torch.export's; the solver is told apart, since its time depends on the masks and not on the size, with
segments solved one after another. What optimising takes where they are solved side by side, as is the default, is told
as well.
"""

from __future__ import annotations

import argparse
import contextlib
import resource
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks import cases, jobs
from benchmarks.measure import one_by_one
from chanopt.torchvision_shim import ensure_torchvision

OUT = jobs.MINE / "scale.json"
STAGES = ("capture", "solver", "rest", "memory")
"""What is fitted: seconds of capture, of the solver, of everything else, and bytes of memory."""


class _Block(nn.Module):
    def __init__(self, inside: int, outside: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inside, outside, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outside)
        self.conv2 = nn.Conv2d(outside, outside, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outside)
        self.project = nn.Conv2d(inside, outside, 1, stride, bias=False) if inside != outside else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(self.bn1(self.conv1(x)).relu()))
        return (y + self.project(x)).relu()


def residual(layers: int) -> nn.Module:
    """A residual network of a number of layers (its stem, its classifier, and two a block), 16 to 128 channels."""
    blocks = [(layers - 2) // 8 + (stage < (layers - 2) % 8 // 2) for stage in range(4)]
    parts: list[nn.Module] = [nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU()]
    inside = 16
    for stage, count in enumerate(blocks):
        for number in range(count):
            outside = 16 << stage
            parts.append(_Block(inside, outside, 2 if stage and not number else 1))
            inside = outside
    return nn.Sequential(*parts, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inside, 10))


def dense(layers: int) -> nn.Module:
    """DenseNet-121, -169, -201 or -264 (Huang et al., CVPR 2017, table 1), of growth 8."""
    ensure_torchvision()
    from torchvision.models import DenseNet

    return DenseNet(growth_rate=8, block_config=_DENSE[layers], num_init_features=16)


_DENSE: Mapping[int, tuple[int, int, int, int]] = {
    121: (6, 12, 24, 16),
    169: (6, 12, 32, 32),
    201: (6, 12, 48, 32),
    264: (6, 12, 64, 48),
}


class _Wide(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, channels, 1)
        self.readers = nn.ModuleList(nn.Conv2d(channels, 8, 1) for _ in range(6))

    def forward(self, x: Tensor) -> Tensor:
        y = self.stem(x).relu()
        return torch.cat([reader(y) for reader in self.readers], 1)


FAMILIES: Mapping[str, tuple[Callable[[int], nn.Module], tuple[int, ...]]] = {
    "residual": (residual, (18, 34, 50, 98, 194, 386, 1002)),
    "dense": (dense, tuple(_DENSE)),
    "wide": (_Wide, (256, 1024, 4096, 16384)),
}
"""By name: what builds a network of a size, and the sizes."""


def measure(family: str, size: int) -> dict[str, Any]:
    """Compile one network; seconds by stage, memory, ops, their operands and segments.

    Raises:
        KeyError: there is no such family.
    """
    import chanopt
    from benchmarks.masks import mask

    build, _ = FAMILIES[family]
    torch.manual_seed(0)
    model = build(size).eval()
    mask(model, "input", 0.5, criterion="random")
    inputs = (torch.randn(1, 3, 32, 32),)
    _warm_up()
    started = time.perf_counter()
    captured = chanopt.capture(model, inputs)
    spent = time.perf_counter() - started
    _forget_peak()
    before = _peak()
    program = chanopt.lower(captured)
    report = chanopt.explain(chanopt.optimize(captured, pipeline=one_by_one()))
    solver = sum(segment.seconds for segment in report.segments)
    return {
        "family": family,
        "size": size,
        "ops": len(program.ops),
        "operands": sum(len(op.reads) for op in program.ops),
        "parameters": report.parameters_before,
        "segments": len(report.segments),
        "segments_optimal": sum(bool(segment.optimal) for segment in report.segments),
        "capture": spent,
        "solver": solver,
        "rest": report.seconds["optimize"] - solver,
        "memory": _peak() - before,
        "optimize": chanopt.explain(chanopt.optimize(captured)).seconds["optimize"],
        "passes": {name: spent for name, spent in report.seconds.items() if name not in ("capture", "optimize")},
    }


def _warm_up() -> None:
    """Load what the first compilation of a process loads."""
    import chanopt

    chanopt.optimize(residual(18).eval(), (torch.randn(1, 3, 32, 32),))


def _forget_peak() -> None:
    """Start the peak anew at what is held now, where the system can (Linux); else what came before counts too."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def _peak() -> int:
    """Most memory this process has held since then, in bytes."""
    status = Path("/proc/self/status")
    if status.exists():
        (line,) = (line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024


def slope(sizes: Sequence[float], values: Sequence[float]) -> float | None:
    """The slope of log value against log size; None for fewer than two points or a value of zero.

    >>> round(slope([1, 2, 4], [3, 12, 48]), 6)
    2.0
    """
    if len(set(sizes)) < 2 or min(values, default=0) <= 0:
        return None
    found = float(np.polyfit(np.log(sizes), np.log(values), 1)[0])
    return round(found, 9) + 0.0  # no -0.0


def slopes(
    rows: Iterable[Mapping[str, Any]], against: str = "operands", last: int | None = None
) -> dict[str, dict[str, float | None]]:
    """By family and stage, the slope of log value against log size.

    Args:
        rows: of any families.
        against: the size: "ops" or "operands"; channels for the wide family, whose ops are the same.
        last: of how many of the largest networks; None: of all.
    """
    table: dict[str, dict[str, float | None]] = {}
    by_family: dict[str, list[Mapping[str, Any]]] = {}
    for row in sorted(rows, key=lambda row: row["size"]):
        by_family.setdefault(row["family"], []).append(row)
    for family, rising in by_family.items():
        points = rising[-last:] if last else rising
        sizes = [point["size" if family == "wide" else against] for point in points]
        table[family] = {stage: slope(sizes, [point[stage] for point in points]) for stage in STAGES}
        names = set.intersection(*({*point["passes"]} for point in points))
        table[family] |= {name: slope(sizes, [p["passes"][name] for p in points]) for name in sorted(names)}
    return table


def add_arguments(made: argparse.ArgumentParser) -> None:
    """The command's own arguments."""
    made.add_argument("--families", nargs="+", choices=FAMILIES, default=list(FAMILIES))
    made.add_argument(
        "--sizes",
        nargs="+",
        type=cases.at_least(2),
        metavar="SIZE",
        help="layers, or channels of the wide family, at least 2 (default: by family)",
    )
    made.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)


def job(family: str, size: int) -> jobs.Job:
    """The process of one network."""
    words = ("--families", family, "--sizes", str(size))
    return jobs.Job(f"{family} {size}", ("benchmarks", "scale", "--worker", *words))


def main(args: argparse.Namespace) -> int:
    """Run the command; 1 if a process is lost."""
    if args.worker:
        torch.set_num_threads(1)
        for family in args.families:
            for size in args.sizes:
                jobs.emit(measure(family, size))
        return 0
    if "dense" in args.families and (unknown := sorted({*args.sizes} - {*_DENSE} if args.sizes else ())):
        raise SystemExit(f"expected sizes of dense nets among {', '.join(map(str, _DENSE))}, found {unknown}")
    todo = [job(family, size) for family in args.families for size in args.sizes or FAMILIES[family][1]]
    # One at a time: their seconds are reported.
    lines = jobs.run(todo, args.out.with_suffix(".jsonl"), timeout=args.timeout, resume=args.resume, what="scale")
    return finish(lines, args.out)


def finish(lines: Sequence[jobs.Line], out: Path) -> int:
    """Write the rows, print the slopes and what was lost; returns the exit code."""
    rows = [line for line in lines if "family" in line]
    jobs.write(out, rows)
    for family, stages in slopes(rows).items():
        told = ", ".join(f"{stage} {value:.2f}" for stage, value in stages.items() if value is not None)
        print(f"{family}: slopes {told}")
    lost = [f"{line['job']}: {line['exception']}" for line in lines if "family" not in line]
    print("\n".join([*lost, f"{len(rows)} networks, {len(lost)} lost; {out}"]))
    return 1 if lost else 0
