"""How convs move over their operands, read off lowered programs."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import chanopt
from chanopt.ir import Window


def window(layer: nn.Module, *sizes: int) -> Window | None:
    program = chanopt.lower(layer.eval(), (torch.randn(2, *sizes),))
    (op,) = (op for op in program.ops if op.layer == "" and op.params)
    assert program.dialect is not None
    return program.dialect.window(op, program)


@pytest.mark.parametrize(
    ("layer", "sizes", "expected"),
    [
        (nn.Conv2d(3, 8, (3, 5), (2, 1), (1, 2), (1, 2)), (3, 19, 19), Window((3, 5), (2, 1), (1, 2), (1, 2))),
        (nn.Conv1d(3, 8, 3, 2, 1), (3, 9), Window((3,), (2,), (1,), (1,))),
        (nn.Conv3d(3, 8, 1), (3, 4, 4, 4), Window((1, 1, 1), (1, 1, 1), (0, 0, 0), (1, 1, 1))),
        (nn.Conv2d(3, 8, 3, padding="same"), (3, 9, 9), Window((3, 3), (1, 1), (1, 1), (1, 1))),
        (nn.Conv2d(3, 8, (2, 3), padding="same"), (3, 9, 9), Window((2, 3), (1, 1), (0, 1), (1, 1), lopsided=True)),
        (nn.Conv2d(3, 8, 3, padding="valid"), (3, 9, 9), Window((3, 3), (1, 1), (0, 0), (1, 1))),
        (
            nn.ConvTranspose2d(3, 8, 3, 2, 1, 1, dilation=2),
            (3, 9, 9),
            Window((3, 3), (2, 2), (1, 1), (2, 2), transposed=True),
        ),
        (nn.Linear(3, 8), (3,), None),
    ],
    ids=lambda item: type(item).__name__ if isinstance(item, nn.Module) else "",
)
def test_windows(layer: nn.Module, sizes: tuple[int, ...], expected: Window | None) -> None:
    assert window(layer, *sizes) == expected


def test_traced_sizes_stand_for_open_ones() -> None:
    program = chanopt.lower(nn.Conv2d(3, 8, 3).eval(), (torch.randn(5, 3, 9, 7),))
    (source,) = (op.result for op in program.ops if not op.reads)
    assert isinstance(program.values[source].shape[0], str)
    assert program.traced(source) == (5, 3, 9, 7)
