"""Random gathered convs, run in the interpreter and compared with float64."""

from __future__ import annotations

import random
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from chanopt.kernels import Call, Config, Covered, Problem, coverage, pack, pack_depthwise, round_out
from chanopt.kernels.launch import launch
from chanopt.kernels.problem import VECTOR
from chanopt.kernels.reference import reference

# Relative errors, Frobenius norm, against float64.
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}
TILE = Config(64, 32, 32, 4, 2)
DEPTHWISE_TILE = Config(32, 32, 1, 4, 1)


@dataclass(frozen=True)
class Case:
    """A random call; fields default to a small odd-sized 1x1."""

    dtype: torch.dtype = torch.float32
    nchw: bool = False
    depthwise: bool = False
    batch: int = 2
    channels: int = 48
    height: int = 7
    width: int = 9
    outputs: int = 24
    kernel: tuple[int, int] = (1, 1)
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)
    index: tuple[int, ...] = tuple(range(3, 30))
    group: int = 0
    affine: bool = False
    pre_act: str = "none"
    bias: bool = True
    residual: str = "none"
    act: str = "none"
    x_slice: bool = False
    seed: int = 0

    def with_(self, **changes: Any) -> Case:
        return replace(self, **changes)


@dataclass(frozen=True)
class Made:
    """A case's tensors: what the kernel takes, and the same function of the ungathered weight in float64."""

    call: Call
    plain: Call
    out: Tensor
    buffer: Tensor
    problem: Problem
    expected: Tensor
    places: list[int] = field(default_factory=list)


def memory(case: Case, tensor: Tensor) -> Tensor:
    """A copy in the case's memory format, with its strides even where a shape is contiguous in several."""
    format_ = torch.contiguous_format if case.nchw else torch.channels_last
    return torch.empty(tensor.shape, dtype=case.dtype, memory_format=format_).copy_(tensor)


def make(case: Case) -> Made:
    """Tensors for a case; raises AssertionError if no kernel covers it."""
    torch.manual_seed(case.seed)
    vector = VECTOR[case.dtype]
    group = case.group or (1 if case.nchw else vector)
    wide = torch.randn(case.batch, case.channels + 16 * case.x_slice, case.height, case.width)
    x = memory(case, wide)[:, 8 : 8 + case.channels] if case.x_slice else memory(case, wide)
    count = len(case.index)
    rows = (count, 1) if case.depthwise else (case.outputs, count)
    fan = case.kernel[0] * case.kernel[1] * rows[1]
    weight = (torch.randn(*rows, *case.kernel) / fan**0.5).to(case.dtype)
    scale, shift = (torch.rand(count) + 0.5, torch.randn(count)) if case.affine else (None, None)
    places = list(range(count))
    if case.depthwise:
        packed, places = pack_depthwise(case.index, weight, case.channels, group=group, scale=scale, shift=shift)
    else:
        packed = pack(case.index, weight, case.channels, group=group, scale=scale, shift=shift)
    outputs = packed.weight.shape[0]
    call = Call(
        x, packed.weight, torch.randn(outputs) if case.bias else None, packed.groups, group, case.stride, case.padding,
        case.dilation, packed.scale, packed.shift, case.pre_act, None, case.act, case.depthwise,
    )  # fmt: skip
    out_channels = outputs + 3 * vector
    buffer = memory(case, torch.full((case.batch, out_channels, *call.output_shape[2:]), float("nan")))
    out = buffer[:, vector : vector + outputs]
    before = memory(case, torch.randn(call.output_shape))
    if case.residual == "add":
        call = replace(call, residual=before)
    if case.residual == "accumulate":
        out.copy_(before)
    covered = coverage(call.check(), out, case.residual == "accumulate")
    assert isinstance(covered, Covered), covered
    problem = covered.problem
    if case.dtype == torch.float32:
        problem = replace(problem, precision="ieee")
    plain = _plain(case, call, weight, places, scale, shift, None if case.residual == "none" else before)
    expected = reference(plain)
    return Made(call, plain, out, buffer, problem, expected, places)


def run(case: Case, config: Config | None = None, kernel: Any = None) -> Tensor:
    """Run a case; checks everything, and returns the channels of the result that the case asked for."""
    made = make(case)
    tile = config or (DEPTHWISE_TILE if case.depthwise else TILE)
    launch(made.problem, tile, made.call, made.out, kernel)
    vector = VECTOR[case.dtype]
    rest = torch.cat([made.buffer[:, :vector], made.buffer[:, vector + made.out.shape[1] :]], 1)
    assert bool(rest.isnan().all()), "the neighbours of the slice were written to"
    assert bool(made.out.isfinite().all()), "part of the slice was not written to"
    result = made.out[:, made.places] if case.depthwise else made.out
    error = relative(result, made.expected)
    assert error <= TOLERANCE[case.dtype], f"relative error {error:.1e}"
    return result.clone()


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected).norm() / expected.norm())


def random_index(channels: int, share: float, seed: int, group: int = 1) -> tuple[int, ...]:
    """A random share of the channels, in whole groups, shuffled."""
    chance = random.Random(seed)
    groups = chance.sample(range(channels // group), max(1, round(channels // group * share)))
    return tuple(number * group + i for number in groups for i in range(group))


def _plain(
    case: Case, call: Call, weight: Tensor, places: list[int], scale: Tensor | None, shift: Tensor | None,
    residual: Tensor | None,
) -> Call:  # fmt: skip
    """The same function as ATen would be asked for it: single channels, the weight as it was, float64."""

    def wide(t: Tensor | None) -> Any:
        return None if t is None else t.double()

    def chosen(t: Tensor | None, dim: int) -> Any:
        return t if t is None or not case.depthwise else t.index_select(dim, torch.tensor(places))

    return replace(
        call,
        x=wide(call.x),
        weight=wide(weight),
        bias=wide(chosen(call.bias, 0)),
        groups=torch.tensor(case.index),
        group=1,
        scale=wide(scale),
        shift=wide(shift),
        residual=wide(chosen(residual, 1)),
    )


__all__ = ["TILE", "Case", "make", "random_index", "relative", "round_out", "run"]
