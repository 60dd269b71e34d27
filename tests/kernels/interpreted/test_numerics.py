"""Every cell of the matrix of dtypes, geometries, indices, prologues and epilogues, against float64."""

from __future__ import annotations

import pytest
import torch

from chanopt.kernels import ACTIVATIONS, Config
from tests.kernels.interpreted.cases import Case, make, random_index, relative, run

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
GEOMETRIES = {
    "1x1": {},
    "1x1 stride 2": {"stride": (2, 2)},
    "1x1 padded": {"padding": (1, 2)},
    "3x3": {"kernel": (3, 3), "padding": (1, 1)},
    "3x3 uneven": {"kernel": (3, 3), "stride": (2, 1), "padding": (1, 0), "dilation": (1, 2)},
    "5x3 uneven": {"kernel": (5, 3), "stride": (1, 2), "padding": (2, 3), "dilation": (2, 1), "height": 11},
    "7x7 stride 2": {"kernel": (7, 7), "stride": (2, 2), "padding": (3, 3)},
    "1x7": {"kernel": (1, 7), "padding": (0, 3)},
    # The shape on which a conv template of another compiler was silently wrong (pytorch#173068), its width 41 kept.
    "3x3 wide border": {"kernel": (3, 3), "stride": (2, 3), "padding": (4, 5), "height": 34, "width": 41, "batch": 1},
}
INDICES = {
    "range": tuple(range(3, 30)),
    "first group": tuple(range(8)),
    "last group": tuple(range(40, 48)),
    "one channel": (17,),
    "all": tuple(range(48)),
    "single channels": random_index(48, 0.5, seed=1),
    "groups of 8": random_index(48, 0.5, seed=2, group=8),
    "groups of 16": random_index(48, 0.67, seed=3, group=16),
}


@pytest.mark.parametrize("geometry", GEOMETRIES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_conv_of_every_geometry(dtype: torch.dtype, geometry: str) -> None:
    run(Case(dtype, **GEOMETRIES[geometry], act="relu"))


@pytest.mark.parametrize("index", INDICES)
@pytest.mark.parametrize("kernel", [(1, 1), (3, 3)], ids=["1x1", "3x3"])
def test_conv_of_every_index(index: str, kernel: tuple[int, int]) -> None:
    padding = (kernel[0] // 2, kernel[1] // 2)
    run(Case(torch.float16, kernel=kernel, padding=padding, index=INDICES[index]))


@pytest.mark.parametrize("act", ACTIVATIONS)
@pytest.mark.parametrize("residual", ["none", "add", "accumulate"])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
def test_conv_of_every_epilogue(bias: bool, residual: str, act: str) -> None:
    run(Case(torch.float16, act=act, residual=residual, bias=bias))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("residual", ["add", "accumulate"])
def test_epilogues_of_every_dtype(dtype: torch.dtype, residual: str) -> None:
    run(Case(dtype, residual=residual, act="silu", kernel=(3, 3), padding=(1, 1)))


@pytest.mark.parametrize("pre_act", ACTIVATIONS)
@pytest.mark.parametrize("affine", [True, False], ids=["affine", "plain"])
@pytest.mark.parametrize("geometry", ["1x1", "3x3 uneven"])
def test_prologue_comes_before_the_padding(geometry: str, affine: bool, pre_act: str) -> None:
    # sigmoid(shift) is far from zero: padding before the prologue would show.
    run(Case(torch.float32, **GEOMETRIES[geometry], affine=affine, pre_act=pre_act, act="relu"))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_prologue_of_every_dtype(dtype: torch.dtype) -> None:
    run(Case(dtype, affine=True, pre_act="relu", kernel=(3, 3), padding=(1, 1)))
    run(Case(dtype, affine=True, pre_act="silu"))


@pytest.mark.parametrize("group", [8, 16, 32])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_groups_larger_than_a_vector(dtype: torch.dtype, group: int) -> None:
    run(Case(dtype, channels=96, index=random_index(96, 0.5, seed=4), group=group, kernel=(3, 3), padding=(1, 1)))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kernel", [(1, 1), (3, 3)], ids=["1x1", "3x3"])
def test_x_may_be_a_slice(dtype: torch.dtype, kernel: tuple[int, int]) -> None:
    run(Case(dtype, kernel=kernel, padding=(kernel[0] // 2,) * 2, x_slice=True))


@pytest.mark.parametrize("config", [(64, 32, 64), (32, 64, 32), (128, 32, 32), (32, 128, 64)], ids=str)
@pytest.mark.parametrize("kernel", [(1, 1), (3, 3)], ids=["1x1", "3x3"])
def test_tiles_that_do_not_divide_the_sizes(kernel: tuple[int, int], config: tuple[int, int, int]) -> None:
    padding = (kernel[0] // 2,) * 2
    case = Case(torch.float16, kernel=kernel, padding=padding, channels=128, outputs=40, index=tuple(range(5, 120)))
    run(case, Config(*config, 4, 2))


@pytest.mark.parametrize("size", [(1, 1, 1), (1, 1, 5), (3, 1, 1), (1, 6, 1)], ids=str)
def test_images_of_one_pixel_row_or_column(size: tuple[int, int, int]) -> None:
    batch, height, width = size
    run(Case(torch.float32, batch=batch, height=height, width=width))
    run(Case(torch.float32, batch=batch, height=height, width=width, kernel=(3, 3), padding=(1, 1)))


@pytest.mark.parametrize("geometry", ["1x1", "3x3", "3x3 uneven", "5x3 uneven"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_depthwise(dtype: torch.dtype, geometry: str) -> None:
    index = random_index(48, 0.67, seed=5, group=4)
    run(Case(dtype, depthwise=True, **GEOMETRIES[geometry], index=index, act="hardswish"))


@pytest.mark.parametrize("residual", ["none", "add", "accumulate"])
@pytest.mark.parametrize("pre_act", ["none", "relu", "sigmoid"])
@pytest.mark.parametrize("affine", [True, False], ids=["affine", "plain"])
def test_depthwise_of_every_prologue_and_residual(affine: bool, pre_act: str, residual: str) -> None:
    case = Case(depthwise=True, kernel=(3, 3), padding=(1, 1), index=tuple(range(8, 40)), act="silu")
    run(case.with_(affine=affine, pre_act=pre_act, residual=residual, bias=affine))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [(4, 6), (8, 8), (5, 8), (16, 1)], ids=str)
def test_nchw(dtype: torch.dtype, size: tuple[int, int]) -> None:
    run(Case(dtype, nchw=True, height=size[0], width=size[1], index=random_index(48, 0.4, seed=6), act="relu"))


@pytest.mark.parametrize("act", ["none", "silu"])
@pytest.mark.parametrize("residual", ["none", "add", "accumulate"])
@pytest.mark.parametrize("affine", [True, False], ids=["affine", "plain"])
def test_nchw_of_every_prologue_and_residual(affine: bool, residual: str, act: str) -> None:
    case = Case(nchw=True, height=4, width=6, index=random_index(48, 0.8, seed=7), affine=affine, residual=residual)
    run(case.with_(act=act, pre_act="relu" if affine else "none", bias=not affine, x_slice=affine))


@pytest.mark.parametrize("seed", range(12))
def test_random_cases(seed: int) -> None:
    """Cells that no table lists: everything drawn at once."""
    torch.manual_seed(1000 + seed)

    def draw(*options: object) -> object:
        return options[int(torch.randint(len(options), ()))]

    kernel = draw((1, 1), (3, 3), (2, 3))
    case = Case(
        dtype=draw(*DTYPES),
        channels=96,
        height=draw(5, 8, 9),
        width=draw(6, 7, 11),
        outputs=draw(8, 40, 72),
        kernel=kernel,
        stride=(draw(1, 2), draw(1, 2, 3)),
        padding=(draw(0, 1), draw(0, 1, 2)),
        dilation=(draw(1, 2), draw(1, 2)),
        index=random_index(96, draw(0.1, 0.5, 0.9), seed),
        affine=draw(True, False),
        pre_act=draw(*ACTIVATIONS),
        bias=draw(True, False),
        residual=draw("none", "add", "accumulate"),
        act=draw(*ACTIVATIONS),
        x_slice=draw(True, False),
        seed=seed,
    )  # type: ignore[arg-type]
    run(case)


def test_tf32_rounds_products_and_nothing_else() -> None:
    """Precision is an argument of the kernel: "tf32" gives an error between the two."""
    from dataclasses import replace

    from chanopt.kernels.launch import launch
    from tests.kernels.interpreted.cases import TILE

    made = make(Case(torch.float32, kernel=(3, 3), padding=(1, 1)))
    launch(replace(made.problem, precision="tf32"), TILE, made.call, made.out)
    assert 1e-5 < relative(made.out, made.expected) < 1.5e-3
