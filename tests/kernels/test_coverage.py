"""Which calls have a kernel, and the name of the reason where there is none."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from chanopt.kernels import Call, Covered, Kind, Problem, Reason, coverage, pack, pack_depthwise
from chanopt.kernels.problem import batch_stride, pixel_stride

CL = torch.channels_last


def call(dtype: torch.dtype = torch.float16, **changes: Any) -> Call:
    packed = pack(range(40), torch.randn(16, 40, 3, 3, dtype=dtype), 64)
    x = torch.randn(2, 64, 8, 8, dtype=dtype).contiguous(memory_format=CL)
    return replace(Call(x, packed.weight, torch.randn(16), packed.groups, 8, padding=(1, 1)), **changes)


def nchw(size: int = 8, **changes: Any) -> Call:
    packed = pack(range(40), torch.randn(16, 40, 1, 1).half(), 64, group=1)
    return replace(Call(torch.randn(2, 64, size, size).half(), packed.weight, None, packed.groups), **changes)


def depthwise() -> Call:
    packed, _ = pack_depthwise(range(40), torch.randn(40, 1, 3, 3).half(), 64)
    return replace(call(), weight=packed.weight, groups=packed.groups, bias=None, depthwise=True)


@pytest.mark.parametrize(
    ("made", "kind"),
    [(call(), Kind.CONV), (nchw(), Kind.POINT), (depthwise(), Kind.DEPTHWISE)],
    ids=["conv", "point", "depthwise"],
)
def test_covered(made: Call, kind: Kind) -> None:
    covered = coverage(made.check())
    assert isinstance(covered, Covered)
    assert bool(covered)
    assert covered.problem.kind is kind
    assert Problem.from_json(covered.problem.to_json()) == covered.problem


def test_what_a_problem_holds() -> None:
    made = call(scale=torch.ones(64), shift=torch.ones(64), act="relu", residual=call().x[:, :16])
    covered = coverage(made.check())
    assert covered == Covered(
        Problem(Kind.CONV, "fp16", 2, 8, 8, 64, 16, 64, (3, 3), padding=(1, 1), affine=True, residual="add", act="relu")
    )


@pytest.mark.parametrize(
    ("made", "reason"),
    [
        (call(torch.float64), "torch.float64 has no kernel"),
        (call(weight=call(torch.bfloat16).weight), "x is torch.float16 but the weight torch.bfloat16"),
        (call(residual=torch.zeros(2, 16, 8, 8)), "but the residual torch.float32"),
        (call(group=1, groups=torch.arange(64).int()), "groups of 1 channels; channels last needs 8"),
        (call(group=64, groups=torch.zeros(1).int()), "groups of 64 channels"),
        (call(groups=torch.zeros(5).int(), weight=call().weight[:, :40]), "40 gathered channels, not a multiple of 32"),
        (call(weight=call().weight[:12], bias=None), "12 output channels, not a multiple of 8"),
        (call(weight=call().weight.contiguous()), "a weight whose memory is not channels last"),
        (call(groups=call().groups.long()), "a table of torch.int64"),
        (call(x=torch.randn(2, 72, 8, 8).half().contiguous(memory_format=CL)[:, 4:68]), "x is a slice whose ends"),
        (call(x=torch.randn(2, 68, 8, 8).half().contiguous(memory_format=CL)[:, :64]), "x is a slice whose ends"),
        (call(x=call().x[:, :, ::2]), "x has another memory format"),
        (call(residual=torch.zeros(2, 16, 8, 8).half()), "the residual has another memory format"),
        (call(bias=torch.randn(32)[::2]), "a bias, scale, shift or table that is not contiguous"),
        (call(x=torch.empty(2, 64, 4096, 4096, dtype=torch.half, device="meta", memory_format=CL)), "2^31 elements"),
        (
            call(
                x=torch.empty(8, 64, 2048, 2048, dtype=torch.half, device="meta", memory_format=CL)[:, :, :2000],
                weight=torch.empty(128, 64, 3, 3, dtype=torch.half, device="meta", memory_format=CL),
                bias=None,
            ),
            "x has another memory format",
        ),
        (
            call(
                x=torch.empty(6, 64, 2048, 2048, dtype=torch.half, device="meta", memory_format=CL),
                weight=torch.empty(128, 64, 3, 3, dtype=torch.half, device="meta", memory_format=CL),
                bias=None,
            ),
            "a result or a weight of 2^31 elements",
        ),
        (call(x=call().x.contiguous()), "a kernel that is not 1x1"),
        (nchw(x=torch.empty(70000, 64, 2, 4, dtype=torch.half, device="meta")), "70000 images, more than 65535"),
        (nchw(stride=(2, 2)), "a 1x1 with stride or padding"),
        (nchw(size=7), "49 pixels, not a multiple of 8"),
        (nchw(group=8, groups=torch.zeros(8).int()), "NCHW takes single channels"),
        (replace(depthwise(), weight=depthwise().weight.contiguous()), "memory is not channels last"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_reasons(made: Call, reason: str) -> None:
    found = coverage(made)
    assert isinstance(found, Reason)
    assert not found
    assert reason in str(found)


def test_reasons_of_the_result() -> None:
    wide = torch.zeros(2, 48, 8, 8).half().contiguous(memory_format=CL)
    assert coverage(call(), wide[:, 8:24])
    assert "the result's memory is a slice" in str(coverage(call(), wide[:, 4:20]))
    residual = wide[:, :16]
    assert "at once" in str(coverage(call(residual=residual), wide[:, 8:24], accumulate=True))
    covered = coverage(call(), wide[:, 8:24], accumulate=True)
    assert isinstance(covered, Covered)
    assert covered.problem.residual == "accumulate"


def test_precision_is_what_torch_says() -> None:
    before = torch.backends.cudnn.conv.fp32_precision
    try:
        for setting in ("tf32", "ieee"):
            torch.backends.cudnn.conv.fp32_precision = setting
            covered = coverage(call(torch.float32))
            assert isinstance(covered, Covered)
            assert covered.problem.precision == setting
    finally:
        torch.backends.cudnn.conv.fp32_precision = before


@pytest.mark.parametrize("shape", [(2, 16, 3, 5), (1, 16, 3, 5), (2, 16, 1, 5), (2, 16, 3, 1), (2, 16, 1, 1)], ids=str)
def test_strides_of_slices(shape: tuple[int, int, int, int]) -> None:
    n, c, h, w = shape
    last = torch.empty(n, c + 8, h, w, memory_format=CL)
    first = torch.empty(n, c + 8, h, w)
    assert pixel_stride(last[:, 8:]) == (c + 8 if n * h * w > 1 else c)
    assert batch_stride(first[:, 8:]) == ((c + 8) * h * w if n > 1 else c * h * w)
    if h * w > 1:
        assert pixel_stride(first) is None
        assert batch_stride(last) is None
