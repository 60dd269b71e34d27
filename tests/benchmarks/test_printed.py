"""The three commands that print what the target's rules go by: their forms compute the same, and a row is printed."""

from __future__ import annotations

import re
from collections.abc import Callable
from types import ModuleType

import pytest
import torch
from torch import Tensor

from benchmarks import counts, pools, reads
from benchmarks.jobs import KEEPING

Form = Callable[[], Tensor]
FIGURE = re.compile(r"\d+\.\d\d")


@pytest.fixture
def timed(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Tensor, Tensor]]:
    """The results of every pair of forms that is timed."""
    found: list[tuple[Tensor, Tensor]] = []
    measure = pools.ratio

    def ratio(one: Form, other: Form) -> float:
        found.append((one(), other()))
        return measure(one, other, rounds=1)

    for module in (pools, reads, counts):
        monkeypatch.setattr(module, "ratio", ratio)
    for name, value in KEEPING.items():
        monkeypatch.setenv(name, value)
    return found


def rows(capsys: pytest.CaptureFixture[str]) -> list[str]:
    """What was printed below the two lines of the heading."""
    return capsys.readouterr().out.splitlines()[2:]


@pytest.mark.parametrize(("module", "shape"), [(pools, ((2, 8, 9, 7), 3, 2, 1)), (reads, (2, 24, 12, 5, 9))])
def test_forms_that_compute_the_same(
    module: ModuleType,
    shape: tuple[object, ...],
    timed: list[tuple[Tensor, Tensor]],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(module, "SHAPES", (shape,))
    module.main()
    for one, other in timed:
        torch.testing.assert_close(one, other)
    assert sum(len(FIGURE.findall(row)) for row in rows(capsys)) == len(timed) > 2


def test_counts_are_rounded_up(
    timed: list[tuple[Tensor, Tensor]], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(counts, "SHAPES", ((13, 7),))
    counts.main()
    # By depthwise conv, conv by what it makes, conv by what it reads; batches of 1 and 8; NCHW, then channels last.
    assert [(one.shape[1], other.shape[1]) for one, other in timed] == [(13, 16), (13, 16), (64, 64)] * 4
    assert [one.shape[0] for one, _ in timed] == [1] * 3 + [8] * 3 + [1] * 3 + [8] * 3
    last = [one.is_contiguous(memory_format=torch.channels_last) for one, _ in timed]
    assert last == [False] * 6 + [True] * 6
    assert [row.split()[-4] for row in rows(capsys)] == ["23%"] * 4
