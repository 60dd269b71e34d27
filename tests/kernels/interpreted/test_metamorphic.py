"""What must not change a result, or must change it in a known way; no reference is needed."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from chanopt.kernels import Call, Config, Covered, coverage, pack
from chanopt.kernels.emit import emit, load, name_of
from chanopt.kernels.launch import launch
from chanopt.kernels.reference import reference
from tests.kernels.interpreted.cases import TILE, Case, make, random_index, relative, run

KERNELS = {"1x1": {"kernel": (1, 1)}, "3x3": {"kernel": (3, 3), "padding": (1, 1)}}


def compute(call: Call, config: Config = TILE, out: Tensor | None = None) -> Tensor:
    covered = coverage(call.check(), out)
    assert isinstance(covered, Covered), covered
    if out is None:
        out = torch.full(call.output_shape, float("nan"), dtype=call.x.dtype)
        out = out.contiguous(memory_format=call.memory_format)
    launch(replace(covered.problem, precision="ieee"), config, call, out)
    return out


def conv(index: tuple[int, ...], weight: Tensor, x: Tensor, kernel: str) -> Call:
    packed = pack(index, weight, x.shape[1], group=8)
    padding = KERNELS[kernel].get("padding", (0, 0))
    return Call(x, packed.weight, None, packed.groups, 8, padding=padding, act="relu")


def data(kernel: str, count: int, outputs: int = 32) -> tuple[Tensor, Tensor]:
    x = torch.randn(2, 64, 6, 7).half().contiguous(memory_format=torch.channels_last)
    return x, (torch.randn(outputs, count, *KERNELS[kernel]["kernel"]) / 8).half()


@pytest.mark.parametrize("kernel", KERNELS)
def test_order_of_the_columns_does_not_matter(kernel: str) -> None:
    index = random_index(64, 0.5, seed=1)
    x, weight = data(kernel, len(index))
    turn = random.Random(2).sample(range(len(index)), len(index))
    first = compute(conv(index, weight, x, kernel))
    second = compute(conv(tuple(index[i] for i in turn), weight[:, turn], x, kernel))
    assert torch.equal(first, second)


@pytest.mark.parametrize("kernel", KERNELS)
def test_permuting_channels_and_table_together_does_not_matter(kernel: str) -> None:
    """Whole groups of x move; the sum's order stays, so results are equal bit for bit."""
    index = random_index(64, 0.5, seed=3, group=8)
    x, weight = data(kernel, len(index))
    call = conv(index, weight, x, kernel)
    turn = torch.randperm(8)
    moved = x.unflatten(1, (8, 8))[:, turn].flatten(1, 2).contiguous(memory_format=torch.channels_last)
    where = torch.argsort(turn).int()
    again = replace(call, x=moved, groups=where[call.groups.long()])
    assert torch.equal(compute(call), compute(again))


@pytest.mark.parametrize("kernel", KERNELS)
def test_gathering_equals_zeros_in_the_whole_weight(kernel: str) -> None:
    index = random_index(64, 0.4, seed=4)
    x, weight = data(kernel, len(index))
    whole = torch.zeros(weight.shape[0], 64, *weight.shape[2:], dtype=torch.half)
    whole[:, list(index)] = weight
    dense = compute(conv(tuple(range(64)), whole, x, kernel))
    assert relative(compute(conv(index, weight, x, kernel)), dense.double()) < 1e-3


def whole_numbers(kernel: str, count: int) -> tuple[Tensor, Tensor]:
    """Data whose sums are exact: where in a tile a pixel lies may change how numpy's BLAS, on some processors, rounds."""
    x = torch.randint(-3, 4, (2, 64, 6, 7)).half().contiguous(memory_format=torch.channels_last)
    return x, torch.randint(-2, 3, (32, count, *KERNELS[kernel]["kernel"])).half()


@pytest.mark.parametrize("kernel", KERNELS)
def test_two_slices_equal_one(kernel: str) -> None:
    """Output channels computed in two launches, each into its slice of one buffer."""
    index = random_index(64, 0.5, seed=5)
    x, weight = whole_numbers(kernel, len(index))
    whole = compute(conv(index, weight, x, kernel))
    buffer = torch.full(whole.shape, float("nan")).half().contiguous(memory_format=torch.channels_last)
    for part in (slice(0, 24), slice(24, 32)):
        compute(conv(index, weight[part], x, kernel), out=buffer[:, part])
    assert torch.equal(buffer, whole)


@pytest.mark.parametrize("kernel", KERNELS)
def test_an_image_does_not_depend_on_its_batch(kernel: str) -> None:
    index = random_index(64, 0.5, seed=6)
    x, weight = whole_numbers(kernel, len(index))
    whole = compute(conv(index, weight, x, kernel))
    for image in range(2):
        alone = compute(conv(index, weight, x[image : image + 1], kernel))
        assert torch.equal(alone[0], whole[image])


def test_two_runs_are_equal_bit_for_bit() -> None:
    made = make(Case(torch.float16, kernel=(3, 3), padding=(1, 1), act="silu"))
    assert torch.equal(compute(made.call), compute(made.call))


def test_channels_that_are_not_gathered_may_hold_anything() -> None:
    """Groups that no column touches are never read, whatever is in them."""
    index = tuple(range(16, 32))
    x, weight = data("3x3", len(index))
    expected = compute(conv(index, weight, x, "3x3"))
    x[:, :16] = float("nan")
    x[:, 32:] = float("inf")
    assert torch.equal(compute(conv(index, weight, x, "3x3")), expected)


def test_a_wrong_table_is_seen_by_these_tests() -> None:
    """The comparison can fail: one group off by one gives another result."""
    index = random_index(64, 0.5, seed=7)
    x, weight = data("1x1", len(index))
    call = conv(index, weight, x, "1x1")
    wrong = replace(call, groups=(call.groups + 1) % 8)
    assert relative(compute(wrong), reference(call).double()) > 0.1


EMITTED = {
    "1x1 relu": Case(torch.float16, act="relu"),
    "1x1 stride residual": Case(torch.float32, stride=(2, 2), residual="add", act="sigmoid"),
    "3x3 prologue": Case(torch.float16, kernel=(3, 3), padding=(1, 1), affine=True, pre_act="relu", act="silu"),
    "depthwise": Case(depthwise=True, kernel=(3, 3), padding=(1, 1), index=tuple(range(8, 24)), act="hardswish"),
    "nchw accumulate": Case(nchw=True, height=4, width=6, residual="accumulate", bias=False, act="relu6"),
}


@pytest.mark.parametrize("name", EMITTED)
def test_emitted_source_computes_the_same_bits(name: str, tmp_path: Path) -> None:
    case = EMITTED[name]
    tile = Config(32, 32, 1, 4, 1) if case.depthwise else TILE
    made = make(case)
    kernel = load(emit(made.problem, tile, tmp_path), name_of(made.problem, tile))
    assert torch.equal(run(case, tile, kernel), run(case, tile))
