"""The Triton kernels on a GPU, in one command of less than eight minutes on an H100.

    python -m benchmarks.gpu                 # verify, time; writes benchmarks/results/gpu.json and gpu.md
    python -m benchmarks.gpu --dry-run       # every code path but the timing, on a CPU, kernels interpreted

It needs torch 2.11 and Triton 3.6 or newer, and no network, solver or peer: the networks come from benchmarks/plans/
(`python -m benchmarks.gpu_plans` makes them). In order, each part as far as time allows:

1. what the machine can do (copy, matmul, a node of a CUDA graph);
2. all kernels compiled in parallel;
3. every tile against float64 on fresh data, in poisoned memory, with the shape on which Inductor's conv template was
   silently wrong, at four and at eight warps;
4. bitwise equality of two runs, and of an image alone and in a batch;
5. each residual reader of three networks at half of its channels, batch 1 and 64: our kernel, cuDNN on a compact input
   (the floor), cuDNN after index_select, after a channels-last gather, after a slice, and on all channels with zeros;
6. whole networks, dense, with naive gathers, in UPSCALE's order, and by chanopt: eager, in a CUDA graph, and compiled
   by Inductor in a CUDA graph; chanopt's in a CUDA graph once more after `chanopt.kernels.tune`.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

_DRY = "--dry-run" in sys.argv
if _DRY:
    # Triton reads it when a kernel is defined.
    os.environ["TRITON_INTERPRET"] = "1"

import torch  # noqa: E402
from torch import Tensor, fx  # noqa: E402

from benchmarks.gpu_plans import MODELS, PLANS, VARIANTS, load, plan_path  # noqa: E402
from chanopt.kernels import Call, Config, Kind, Problem, candidates, coverage, pack, pack_depthwise, tune  # noqa: E402
from chanopt.kernels.configs import fits, listed  # noqa: E402
from chanopt.kernels.launch import constants, launch  # noqa: E402
from chanopt.kernels.problem import DTYPES, VECTOR, Covered  # noqa: E402
from chanopt.kernels.reference import reference  # noqa: E402
from chanopt.kernels.rivals import fused_conv  # noqa: E402
from chanopt.kernels.tuner import Choice, Measure, Tuner, Work, graph_time, wall_time  # noqa: E402

RESULTS = Path(__file__).parent / "results"
TOLERANCE = {"fp32 ieee": 1e-5, "fp32 tf32": 1.5e-3, "fp16": 2e-3, "bf16": 1e-2}

# Residual readers: (channels, height and width, outputs, kernel, stride, how many of them).
LAYERS: dict[str, tuple[tuple[int, int, int, int, int, int], ...]] = {
    "resnet50": (
        (64, 56, 64, 1, 1, 1),
        (256, 56, 64, 1, 1, 2),
        (256, 56, 128, 1, 1, 1),
        (256, 56, 512, 1, 2, 1),
        (512, 28, 128, 1, 1, 3),
        (512, 28, 256, 1, 1, 1),
        (512, 28, 1024, 1, 2, 1),
        (1024, 14, 256, 1, 1, 5),
        (1024, 14, 512, 1, 1, 1),
        (1024, 14, 2048, 1, 2, 1),
        (2048, 7, 512, 1, 1, 2),
    ),
    "densenet121": (
        (128, 56, 128, 1, 1, 2),
        (256, 56, 128, 1, 1, 2),
        (256, 28, 128, 1, 1, 6),
        (512, 28, 256, 1, 1, 1),
        (512, 14, 128, 1, 1, 12),
        (1024, 14, 512, 1, 1, 1),
        (768, 7, 128, 1, 1, 8),
        (1008, 7, 128, 1, 1, 8),
    ),
    "efficientnet_v2_s": (
        (24, 192, 24, 3, 1, 2),
        (48, 96, 192, 3, 1, 3),
        (48, 96, 192, 3, 2, 1),
        (64, 48, 256, 3, 1, 3),
        (128, 24, 512, 1, 1, 5),
        (160, 24, 960, 1, 1, 9),
        (256, 12, 1536, 1, 1, 14),
    ),
}
GEOMETRIES: dict[str, dict[str, Any]] = {
    "1x1": {},
    "1x1 stride 2": {"stride": (2, 2)},
    "3x3": {"kernel": (3, 3), "padding": (1, 1)},
    "3x3 uneven": {"kernel": (3, 3), "stride": (2, 1), "padding": (1, 0), "dilation": (1, 2)},
    "5x3 uneven": {"kernel": (5, 3), "stride": (1, 2), "padding": (2, 3), "dilation": (2, 1)},
    "7x7": {"kernel": (7, 7), "stride": (2, 2), "padding": (3, 3)},
}
# pytorch#173068: with eight warps, most of the result of this shape was wrong.
FAILING: dict[str, Any] = {
    "batch": 2, "channels": 40, "gathered": 64, "height": 34, "width": 41, "kernel": (3, 3), "stride": (2, 3),
    "padding": (4, 5),
}  # fmt: skip
# What is run twice.
TWICE = Problem(Kind.CONV, "fp16", 64, 28, 28, 128, 128, 256, (3, 3), padding=(1, 1))
EPILOGUES: tuple[dict[str, Any], ...] = (
    {"act": "relu"},
    {"act": "silu", "residual": "add"},
    {"residual": "accumulate", "bias": False},
    {"act": "hardswish", "affine": True, "pre_act": "relu"},
    {"act": "sigmoid", "affine": True, "pre_act": "sigmoid"},
)


@dataclass
class Bench:
    """One run: where, how it is timed, and what it has found.

    Attributes:
        device: where tensors lie.
        measure: microseconds of a call.
        deadline: when to stop, by `time.monotonic`.
        found: the JSON that is written.
    """

    device: torch.device
    measure: Measure
    deadline: float
    dry: bool
    found: dict[str, Any] = field(default_factory=dict)

    def left(self) -> float:
        """Seconds until the deadline."""
        return self.deadline - time.monotonic()

    def skip(self, what: str) -> None:
        """Note what there was no time for."""
        self.found.setdefault("left_out", []).append(what)

    @property
    def capability(self) -> int:
        """80 for sm_80."""
        if self.dry:
            return 90
        major, minor = torch.cuda.get_device_capability(self.device)
        return major * 10 + minor


def machine(bench: Bench) -> dict[str, Any]:
    """The device and the versions, and what the device can do at best."""
    import triton

    about: dict[str, Any] = {"torch": torch.__version__, "triton": triton.__version__, "python": sys.version.split()[0]}
    size, side, device = (1 << 14, 64, bench.device) if bench.dry else (1 << 30, 8192, bench.device)
    source = torch.empty(size, dtype=torch.int8, device=device)
    goal = torch.empty_like(source)
    square = torch.randn(side, side, device=device, dtype=torch.half)
    small = torch.zeros(32, device=device)
    about["device"] = "CPU, dry run" if bench.dry else torch.cuda.get_device_name(device)
    about["copy_tb_per_s"] = 2 * size / bench.measure(lambda i: goal.copy_(source), 1) / 1e6
    about["matmul_tflops"] = 2 * side**3 / bench.measure(lambda i: square @ square, 1) / 1e6
    about["graph_node_us"] = bench.measure(lambda i: small.add_(1), 1)
    return about


@dataclass(frozen=True)
class Check:
    """One kernel to verify."""

    name: str
    problem: Problem
    config: Config


def checks(dry: bool) -> list[Check]:
    """Every tile on every geometry, epilogues in turn; the shape that failed elsewhere, at four and eight warps."""
    base = Problem(Kind.CONV, "fp16", batch=3, height=13, width=17, gathered=64, outputs=72, channels=96)
    if dry:
        base = replace(base, batch=1, height=5, width=7, outputs=24, channels=64)
    made: list[Check] = []
    for dtype, precision in (("fp16", "tf32"), ("bf16", "tf32"), ("fp32", "tf32"), ("fp32", "ieee")):
        typed = replace(base, dtype=dtype, precision=precision, group=VECTOR[DTYPES[dtype]])
        made += _geometry_checks(typed)
        made += _failing_checks(typed)
        made += _other_checks(typed)
    # In the interpreter a tile is as slow as it is large.
    small = [check for check in made if check.config.block_m * check.config.block_n <= 64 * 64]
    return small[::5] if dry else made


def _geometry_checks(base: Problem) -> Iterator[Check]:
    for place, (name, geometry) in enumerate(GEOMETRIES.items()):
        for number, config in enumerate(listed(base)):
            problem = replace(base, **geometry, **EPILOGUES[(place + number) % len(EPILOGUES)])
            # A tile that spills is not picked, so it needs no check beside others.
            if fits(problem, config) or config.warps > 4:
                yield Check(name, problem, config)


def _failing_checks(base: Problem) -> Iterator[Check]:
    for config in listed(base):
        yield Check("inductor's failing shape", replace(base, **FAILING, outputs=40), config)


def _other_checks(base: Problem) -> Iterator[Check]:
    depthwise = replace(base, kind=Kind.DEPTHWISE, kernel=(3, 3), padding=(1, 1), outputs=64)
    point = replace(base, kind=Kind.POINT, group=1, height=8, width=8)
    for problem in (depthwise, point):
        for number, config in enumerate(listed(problem)):
            flags = EPILOGUES[number % len(EPILOGUES)]
            if fits(replace(problem, **flags), config):
                yield Check(problem.kind.value, replace(problem, **flags), config)


def compile_all(bench: Bench, jobs: Sequence[tuple[Problem, Config]]) -> int:
    """Fill Triton's cache from several processes; returns how many kernels there are."""
    unique = list({repr((constants(p, c), p.dtype, p.kind, c)): (p, c) for p, c in jobs}.values())
    if bench.dry:
        return len(unique)
    import multiprocessing

    workers = max(1, min(14, (os.cpu_count() or 2) - 2))
    with multiprocessing.get_context("spawn").Pool(workers) as pool:
        pool.map(_compile_one, unique, chunksize=2)
    return len(unique)


def _compile_one(job: tuple[Problem, Config]) -> None:
    from chanopt.kernels import triton_conv

    problem, config = job
    kind, dtype = problem.kind.value, DTYPES[problem.dtype]
    values: dict[str, Any] = dict.fromkeys(triton_conv.SIZES[kind], 1024)
    values |= dict.fromkeys(("x_ptr", "w_ptr", "y_ptr"), dtype) | {"groups_ptr": torch.int32}
    values["r_ptr"] = dtype if problem.residual == "add" else None
    values["bias_ptr"] = torch.float32 if problem.bias else None
    values |= dict.fromkeys(("scale_ptr", "shift_ptr"), torch.float32 if problem.affine else None)
    kernel: Any = triton_conv.KERNELS[kind]
    # By position: what is given by name is not taken for a stand-in of a tensor.
    given = [values[name] for name in kernel.arg_names if name in values]
    options = {"num_warps": config.warps, "num_stages": config.stages}
    kernel.warmup(*given, grid=(1,), **constants(problem, config), **options)


def verify(bench: Bench, every: Sequence[Check]) -> dict[str, Any]:
    """Errors against float64; a kernel is wrong past its tolerance, or if it misses or leaves its memory."""
    worst: dict[str, float] = {}
    wrong: list[dict[str, Any]] = []
    eight: list[bool] = []
    for number, check in enumerate(every):
        if bench.left() < 0.5 * bench.found["seconds"]:
            bench.skip(f"{len(every) - number} checks")
            break
        problem = check.problem
        kind = f"fp32 {problem.precision}" if problem.dtype == "fp32" else problem.dtype
        error = _error(bench, check, seed=number)
        worst[kind] = max(worst.get(kind, 0.0), error)
        right = error <= TOLERANCE[kind]
        if not right:
            wrong.append({"check": check.name, "config": check.config.to_list(), "error": error, **problem.to_json()})
        if check.config.warps == 8 and problem.kernel != (1, 1):
            eight.append(right)
    return {
        "checks": len(every),
        "wrong": wrong,
        "worst": worst,
        "eight_warps_right_on_kxk": all(eight) if eight else None,
    }


def _error(bench: Bench, check: Check, seed: int) -> float:
    """Relative error of one kernel, infinite if it touches its neighbours or leaves a hole."""
    problem = check.problem
    call, plain = _operands(problem, seed, bench.device)
    vector = problem.vector
    outputs = call.weight.shape[0]
    shape = (call.x.shape[0], outputs + 2 * vector, *call.output_shape[2:])
    buffer = torch.full(shape, float("nan"), dtype=call.x.dtype, device=bench.device)
    buffer = torch.empty(shape, dtype=call.x.dtype, device=bench.device, memory_format=call.memory_format).copy_(buffer)
    out = buffer[:, vector:-vector]
    if plain.residual is not None and problem.residual == "accumulate":
        out.copy_(plain.residual)
    covered = coverage(call, out, problem.residual == "accumulate")
    assert isinstance(covered, Covered), covered
    assert covered.problem.gathered == problem.gathered
    launch(replace(covered.problem, precision=problem.precision), check.config, call, out)
    rest = torch.cat([buffer[:, :vector], buffer[:, -vector:]], 1)
    if not bool(rest.isnan().all()) or not bool(out.isfinite().all()):
        return math.inf
    expected = reference(plain)
    return float((out.double() - expected).norm() / expected.norm())


def _operands(problem: Problem, seed: int, device: torch.device) -> tuple[Call, Call]:
    """(what the kernel takes, the same function in float64 without packing)."""
    generator = torch.Generator().manual_seed(seed)
    dtype = DTYPES[problem.dtype]
    memory = torch.contiguous_format if problem.kind is Kind.POINT else torch.channels_last

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    x = random(problem.batch, problem.channels, problem.height, problem.width)
    depthwise = problem.kind is Kind.DEPTHWISE
    chosen = _channels(problem, generator)
    columns = (len(chosen), 1) if depthwise else (problem.outputs, len(chosen))
    weight = random(*columns, *problem.kernel) / (columns[1] * problem.kernel[0] * problem.kernel[1]) ** 0.5
    scale, shift = (
        (torch.rand(len(chosen), generator=generator) + 0.5, random(len(chosen)).float())
        if problem.affine
        else (None, None)
    )
    if depthwise:
        packed, _ = pack_depthwise(chosen, weight, problem.channels, group=problem.group, scale=scale, shift=shift)
    else:
        packed = pack(chosen, weight, problem.channels, group=problem.group, scale=scale, shift=shift)
    bias = random(columns[0]).float() if problem.bias else None
    plain = Call(
        x, weight, bias, torch.tensor(chosen), 1, problem.stride, problem.padding, problem.dilation, scale, shift,
        problem.pre_act, None, problem.act, depthwise,
    )  # fmt: skip
    residual = None
    if problem.residual != "none":
        residual = random(*plain.output_shape)
    call = replace(
        plain,
        x=torch.empty(x.shape, dtype=dtype, memory_format=memory).copy_(x),
        weight=packed.weight,
        groups=packed.groups,
        group=packed.group,
        scale=packed.scale,
        shift=packed.shift,
        residual=residual if problem.residual == "add" else None,
    )
    plain = replace(plain, residual=residual)
    return _moved(call, device, memory), _moved(plain, device, None)


def _channels(problem: Problem, generator: torch.Generator) -> list[int]:
    """Channels to gather: of all groups but one some are left out, so that rounding out is part of the check."""
    total, group = problem.channels // problem.group, problem.group
    if problem.kind is Kind.DEPTHWISE:
        # Ascending, as they lie in the result.
        numbers = sorted(torch.randperm(total, generator=generator)[: problem.outputs // group].tolist())
        return [number * group + i for number in numbers for i in range(group)]
    numbers = torch.randperm(total, generator=generator)[: problem.gathered // group - 1].tolist()
    left = torch.rand(len(numbers), group, generator=generator) < 0.7
    left[:, 0] = True
    return [number * group + i for slot, number in enumerate(numbers) for i in range(group) if left[slot, i]]


def _moved(call: Call, device: torch.device, memory: torch.memory_format | None) -> Call:
    """The call on a device; in float64 if no memory format is given."""

    def move(t: Tensor | None) -> Any:
        if t is None or not t.is_floating_point():
            return None if t is None else t.to(device)
        return t.to(device) if memory is not None else t.to(device, torch.float64)

    residual = call.residual
    if residual is not None and memory is not None:
        residual = torch.empty(residual.shape, dtype=residual.dtype, memory_format=memory).copy_(residual)
    return replace(
        call, x=move(call.x), weight=move(call.weight), bias=move(call.bias), groups=move(call.groups),
        scale=move(call.scale), shift=move(call.shift), residual=move(residual),
    )  # fmt: skip


def determinism(bench: Bench) -> dict[str, bool]:
    """Whether two runs, and an image alone and in its batch, are equal bit for bit, with every tile."""
    same, alone = True, True
    problem = TWICE
    if bench.dry:
        problem = replace(problem, batch=2, height=4, width=4, gathered=32, outputs=16, channels=64)
    work = Work(problem, bench.device)
    call = work.calls[0]
    single = replace(call, x=call.x[:1])
    for config in [c for c in listed(problem) if fits(problem, c, bench.capability)][-1 if bench.dry else 0 :]:
        outs = [torch.full_like(work.outs[0], float("nan")) for _ in range(3)]
        for out in outs[:2]:
            launch(problem, config, call, out)
        launch(replace(problem, batch=1), config, single, outs[2][:1])
        same = same and torch.equal(outs[0], outs[1])
        alone = alone and torch.equal(outs[0][:1], outs[2][:1])
    return {"run_to_run": same, "batch_invariant": alone}


def layer_problems(dry: bool) -> Iterator[tuple[str, int, Problem]]:
    """(network, how many, problem) of every residual reader at half of its channels."""
    for batch in (1,) if dry else (1, 64):
        for network, layers in LAYERS.items():
            for channels, side, outputs, kernel, stride, count in layers[:1] if dry else layers:
                if dry:
                    channels, side, outputs = min(channels, 64), min(side, 6), min(outputs, 16)
                gathered = max(32, channels // 2 // 32 * 32)
                pad = kernel // 2
                yield network, count, Problem(
                    Kind.CONV, "fp16", batch, side, side, gathered, outputs, -(-max(channels, gathered) // 8) * 8,
                    (kernel, kernel), (stride, stride), (pad, pad), act="relu",
                )  # fmt: skip


def time_layers(bench: Bench, tuner: Tuner) -> list[dict[str, Any]]:
    """Microseconds of every realization of every residual reader."""
    rows: list[dict[str, Any]] = []
    for network, count, problem in layer_problems(bench.dry):
        if bench.left() < 0.35 * bench.found["seconds"]:
            bench.skip(f"layer {network} {problem.channels}->{problem.outputs} batch {problem.batch}")
            continue
        row = _layer(bench, tuner, problem)
        rows.append({"network": network, "count": count, **problem.to_json(), "us": row})
        shown = ", ".join(f"{name} {value:.1f}" for name, value in row.items() if isinstance(value, float))
        print(f"{network} {problem.channels}->{problem.outputs} batch {problem.batch}: {shown}", flush=True)
    return rows


def _layer(bench: Bench, tuner: Tuner, problem: Problem) -> dict[str, Any]:
    choice: Choice = tuner.choose(problem)
    ours = {name: value for name, value in choice.microseconds.items() if name.startswith("triton")}
    work = Work(problem, bench.device)
    call = work.calls[0]
    index = (call.groups.long()[:, None] * call.group + torch.arange(call.group, device=bench.device)).flatten()
    compact = [c.x[:, index].contiguous(memory_format=torch.channels_last) for c in work.calls]
    first = (problem.channels - problem.gathered) // 16 * 8
    row: dict[str, Any] = {
        "floor (cuDNN, compact input)": bench.measure(lambda i: fused_conv(call, compact[i]), work.buffers),
        "index_select + cuDNN": bench.measure(
            lambda i: fused_conv(call, work.calls[i].x.index_select(1, index)), work.buffers
        ),
        "slice + cuDNN": bench.measure(
            lambda i: fused_conv(call, work.calls[i].x[:, first : first + problem.gathered]), work.buffers
        ),
        "channels-last gather + cuDNN": choice.microseconds.get("gather"),
        "zeros + cuDNN": choice.microseconds.get("zeros"),
    }
    if ours:
        best = min(ours, key=lambda name: ours[name])
        row |= {"chanopt": ours[best], "tile": best.removeprefix("triton ")}
    return row


def totals(rows: Sequence[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Microseconds over all readers of a network and batch, by realization; only readers that have all of them."""
    made: dict[str, dict[str, float]] = {}
    for row in rows:
        key = f"{row['network']}, batch {row['batch']}"
        for name, value in row["us"].items():
            if isinstance(value, float):
                made.setdefault(key, {}).setdefault(name, 0.0)
                made[key][name] += value * row["count"]
    return made


def predictions(sums: dict[str, dict[str, float]]) -> list[dict[str, Any]]:
    """The paper model's ratios to our kernel at batch 64 (docs/kernels.md) beside what was measured."""
    paper = {
        "resnet50": {"index_select + cuDNN": 3.1, "channels-last gather + cuDNN": 2.2, "zeros + cuDNN": 1.4},
        "densenet121": {"index_select + cuDNN": 3.1, "channels-last gather + cuDNN": 2.2, "zeros + cuDNN": 1.35},
        "efficientnet_v2_s": {"index_select + cuDNN": 1.6, "channels-last gather + cuDNN": 1.3, "zeros + cuDNN": 1.36},
    }
    made: list[dict[str, Any]] = []
    for network, ratios in paper.items():
        measured = sums.get(f"{network}, batch 64", {})
        for name, expected in ratios.items():
            if "chanopt" in measured and name in measured:
                found = measured[name] / measured["chanopt"]
                near = 0.8 <= found / expected <= 1.25
                made.append({
                    "network": network, "over chanopt": name, "predicted": expected, "measured": found,
                    "verdict": "confirmed" if near else "corrected",
                })  # fmt: skip
    return made


def time_networks(
    bench: Bench, names: Sequence[str], folder: Path, modes: Sequence[str], tuner: Tuner
) -> list[dict[str, Any]]:
    """Milliseconds of whole networks, and that chanopt's graphs compute in half precision what they do in float64."""
    rows: list[dict[str, Any]] = []
    for mode in modes:
        for name in names:
            for variant in VARIANTS if mode != "tuned" else ("chanopt",):
                for batch in (1,) if bench.dry else (64, 1) if mode != "inductor" else (64,):
                    rows += _network(bench, name, variant, batch, mode, folder, tuner)
    return rows


_SECONDS = {"inductor": 100, "tuned": 60}
"""What a network takes at most, by mode; elsewhere ten."""


class _InTime(Tuner):
    """Measures while there is time, and keeps the heuristic's tiles from then on."""

    def __init__(self, bench: Bench) -> None:
        device, machine = (None, "dry run") if bench.dry else (bench.device, None)
        super().__init__(None, device, bench.measure, machine, bench.device)
        self._bench = bench

    def choose(self, problem: Problem) -> Choice:
        """What was fastest, or the heuristic's tile."""
        late = self._bench.left() < _SECONDS["tuned"] / 2
        return Choice(self._heuristic(problem), {}) if late else super().choose(problem)


def _network(
    bench: Bench, name: str, variant: str, batch: int, mode: str, folder: Path, tuner: Tuner
) -> list[dict[str, Any]]:
    path = plan_path(name, variant, folder)
    what = f"{name} {variant} batch {batch} {mode}"
    if not path.exists() or bench.left() < _SECONDS.get(mode, 10):
        bench.skip(what if path.exists() else f"{what}: no plan")
        return []
    half = torch.float32 if bench.dry else torch.half
    side = 32 if bench.dry else MODELS.get(name, 32)
    x = torch.randn(batch, 3, side, side, device=bench.device)
    module = load(path).to(bench.device)
    row: dict[str, Any] = {"network": name, "variant": variant, "batch": batch, "mode": mode}
    if batch == 1 and mode == "eager":
        row["error"] = _network_error(module, x, half)
    module = _half(module, half)
    given = x.to(half).contiguous(memory_format=torch.channels_last)
    if mode == "tuned":
        chosen = tune(module, (given,), tuner=tuner)
        ways = Counter(choice.how for choice in chosen.values() if choice.measured)
        row |= {"tuned": dict(ways), "not tuned": len(chosen) - ways.total()}
    run: Callable[[Tensor], Any] = torch.compile(module) if mode == "inductor" else module
    with torch.no_grad():
        if mode == "eager":
            row["ms"] = _eager_time(bench, run, given)
        elif bench.dry:
            row["ms"] = bench.measure(lambda i: run(given), 1) / 1e3
        else:
            row["ms"] = graph_time(lambda i: run(given), 1, replays=7, calls=4) / 1e3
    print(f"{what}: {row['ms']:.3f} ms", flush=True)
    return [row]


@torch.no_grad()
def _network_error(module: fx.GraphModule, x: Tensor, half: torch.dtype) -> float:
    """Relative error of the kernels' network against ATen in float64, on one image."""
    expected = _first(module.double()(x.double()))
    module = _half(module.float(), half)
    found = _first(module(x.to(half).contiguous(memory_format=torch.channels_last)))
    module.float()
    return float((found.double() - expected).norm() / expected.norm())


def _half(module: fx.GraphModule, dtype: torch.dtype) -> fx.GraphModule:
    """The network in half precision and channels last; biases and prologues of the kernels stay in float32."""
    wide = set()
    for node in module.graph.nodes:
        if node.target is torch.ops.chanopt.gather_conv2d.default:
            given = [arg for position in (2, 8, 9) for arg in node.args[position : position + 1]]
            wide |= {str(arg.target) for arg in given if isinstance(arg, fx.Node)}
    for name, buffer in list(module.named_buffers()):
        if not buffer.is_floating_point() or name in wide:
            continue
        memory = torch.channels_last if buffer.dim() == 4 else torch.contiguous_format
        parent, _, own = name.rpartition(".")
        setattr(module.get_submodule(parent), own, buffer.to(dtype).contiguous(memory_format=memory))
    return module


def _eager_time(bench: Bench, run: Callable[[Tensor], Any], x: Tensor) -> float:
    """Milliseconds by the clock, launches from Python included."""
    for _ in range(1 if bench.dry else 3):
        run(x)
    _wait(bench)
    calls = 1 if bench.dry else 10
    started = time.perf_counter()
    for _ in range(calls):
        run(x)
    _wait(bench)
    return (time.perf_counter() - started) * 1e3 / calls


def _wait(bench: Bench) -> None:
    if not bench.dry:
        torch.cuda.synchronize()


def _first(value: Any) -> Tensor:
    while not isinstance(value, Tensor):
        value = value[0]
    return value


def markdown(found: dict[str, Any]) -> str:
    """The page."""
    about = found["machine"]
    lines = [
        "# The kernels on a GPU",
        "",
        f"{about['device']}, torch {about['torch']}, Triton {about['triton']}, Python {about['python']}; "
        f"copies {about['copy_tb_per_s']:.2f} TB/s, multiplies {about['matmul_tflops']:.0f} TFLOP/s, "
        f"{about['graph_node_us']:.1f} us a node of a CUDA graph. `python -m benchmarks.gpu` made this page.",
        "",
        "## Right",
        "",
        f"{found['verify']['checks']} kernels checked against float64, {len(found['verify']['wrong'])} wrong. "
        + "Greatest relative errors: "
        + ", ".join(f"{kind} {error:.1e}" for kind, error in found["verify"]["worst"].items())
        + f". Eight warps on k x k right: {found['verify']['eight_warps_right_on_kxk']}. "
        + f"Two runs equal bit for bit: {found['determinism']['run_to_run']}; "
        + f"an image alone and in its batch: {found['determinism']['batch_invariant']}.",
        "",
        "## Residual readers at half of their channels",
        "",
        "Microseconds over all readers of a network, fp16, channels last, ReLU in all, in CUDA graphs.",
        "",
    ]
    lines += _table(list(found["totals"].items()), "network")
    if found["predictions"]:
        lines += ["", "Against the paper model (times slower than the kernel):", ""]
        lines += _table([(f"{p['network']}, {p['over chanopt']}", p) for p in found["predictions"]], "ratio")
    lines += ["", "## Whole networks", "", "Milliseconds, fp16, channels last.", ""]
    lines += _table(list(_networks_table(found["networks"]).items()), "network")
    if found.get("left_out"):
        lines += ["", "Left out for want of time or a plan: " + "; ".join(found["left_out"]) + "."]
    return "\n".join(lines) + "\n"


def _networks_table(rows: Sequence[dict[str, Any]]) -> dict[str, dict[str, float]]:
    made: dict[str, dict[str, float]] = {}
    for row in rows:
        made.setdefault(f"{row['network']}, batch {row['batch']}, {row['mode']}", {})[row["variant"]] = row["ms"]
    return made


def _table(rows: Sequence[tuple[str, dict[str, Any]]], corner: str) -> list[str]:
    columns = list(dict.fromkeys(name for _, row in rows for name in row if name not in ("network", "over chanopt")))
    lines = [f"| {corner} | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
    for name, row in rows:
        cells = [row.get(column, "") for column in columns]
        shown = [f"{cell:.3g}" if isinstance(cell, float) else str(cell) for cell in cells]
        lines.append(f"| {name} | {' | '.join(shown)} |")
    return lines


def run(bench: Bench, options: argparse.Namespace) -> dict[str, Any]:
    """All parts in order."""
    found = bench.found
    found["seconds"] = bench.left()
    found["machine"] = machine(bench)
    every = checks(bench.dry)
    tuner = _InTime(bench)
    jobs = [(check.problem, check.config) for check in every]
    jobs += [(p, c) for _, _, p in layer_problems(bench.dry) for c in candidates(p, bench.capability)]
    jobs += [(TWICE, c) for c in listed(TWICE) if fits(TWICE, c, bench.capability)]
    found["kernels"] = compile_all(bench, jobs)
    print(f"{found['kernels']} kernels compiled, {bench.left():.0f} s left", flush=True)
    found["verify"] = verify(bench, every)
    print(f"{len(every)} kernels checked, {len(found['verify']['wrong'])} wrong, {bench.left():.0f} s left", flush=True)
    found["determinism"] = determinism(bench)
    found["layers"] = time_layers(bench, tuner)
    found["totals"] = totals(found["layers"])
    found["predictions"] = predictions(found["totals"])
    found["networks"] = time_networks(bench, options.models, options.plans, options.modes, tuner)
    found["choices"] = tuner.freeze()
    found["seconds"] -= bench.left()
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Run and write; the exit code says whether every kernel is right."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument("--dry-run", action="store_true", help="on a CPU, kernels interpreted, sizes tiny")
    parser.add_argument("--minutes", type=float, default=7.0, help="nothing is begun after so many")
    parser.add_argument("--models", nargs="*", default=list(MODELS))
    parser.add_argument("--modes", nargs="*", default=["eager", "graph", "inductor", "tuned"])
    parser.add_argument("--plans", type=Path, default=PLANS)
    parser.add_argument("--out", type=Path, help="stem of the files; benchmarks/results/gpu unless it is a dry run")
    options = parser.parse_args(argv)
    if not options.dry_run and not torch.cuda.is_available():
        print("expected a CUDA device, found none; --dry-run checks everything but the timing", file=sys.stderr)
        return 2
    if options.dry_run:
        from chanopt.kernels.interpreter import repair

        repair()
    else:
        torch.backends.cudnn.benchmark = True
    bench = Bench(
        device=torch.device("cpu" if options.dry_run else "cuda"),
        measure=(lambda call, buffers: wall_time(call, buffers, 1)) if options.dry_run else graph_time,
        deadline=time.monotonic() + 60 * options.minutes,
        dry=options.dry_run,
    )
    found = run(bench, options)
    out = options.out or (None if options.dry_run else RESULTS / "gpu")
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.with_suffix(".json").write_text(json.dumps(found, indent=1, default=str) + "\n", encoding="utf-8")
        out.with_suffix(".md").write_text(markdown(found), encoding="utf-8")
    print(markdown(found))
    return 1 if found["verify"]["wrong"] else 0


if __name__ == "__main__":
    sys.exit(main())
