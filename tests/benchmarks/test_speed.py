from __future__ import annotations

import copy
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

import chanopt
from benchmarks import speed
from benchmarks.speed import Spread, Timing


def timing(name: str, to_upscale: float, to_dense: float) -> Timing:
    flat = Spread(1.0, 1.0, 1.0)
    ours, dense = Spread(0.1, to_upscale, 2.0), Spread(0.1, to_dense, 2.0)
    return Timing(name, flat, flat, flat, "runs", ours, dense, 1.0, 0.5, 2.0, 1e-7)


def test_spreads_are_medians_and_quartiles() -> None:
    assert Spread.of([1.0, 2.0, 3.0, 4.0, 5.0]) == Spread(2.0, 3.0, 4.0)
    assert Spread(1.234, 2.345, 3.456).format(2) == "2.35 [1.23, 3.46]"
    assert speed.ratio([1.0, 4.0, 9.0], [1.0, 2.0, 3.0]) == Spread(1.5, 2.0, 2.5)


def test_arms_take_turns() -> None:
    calls: list[str] = []

    def arm(name: str) -> speed.Arm:
        def call(_x: Tensor) -> None:
            calls.append(name)

        return call

    taken = speed.time_arms({name: arm(name) for name in "abc"}, (torch.zeros(1),), rounds=4)
    assert "".join(calls[9:]) == "abc" + "bca" + "cab" + "abc"
    assert {name: len(times) for name, times in taken.items()} == {"a": 4, "b": 4, "c": 4}
    assert min(min(times) for times in taken.values()) > 0


def test_verdicts_are_geometric_means_and_losses() -> None:
    said = speed.verdicts([timing("one", 0.5, 0.25), timing("two", 2.0, 1.01)])
    assert said[0] == "Geometric mean against UPSCALE: 1.000."
    assert said[1] == "Geometric mean against the masked network: 0.502."
    assert said[2] == "Slower than the masked network on: two."


@pytest.mark.parametrize(("change", "code"), [(0.0, 0), (1.0, 1)])
def test_the_command_writes_its_tables_and_fails_on_a_wrong_output(
    change: float,
    code: int,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def optimize(model: nn.Module, _inputs: object) -> nn.Module:
        fast = copy.deepcopy(model)
        for parameter in fast.parameters():
            parameter.data += change
        return fast

    report = SimpleNamespace(seconds={"capture": 1.0, "optimize": 0.25})
    monkeypatch.setattr(chanopt, "optimize", optimize, raising=False)
    monkeypatch.setattr(chanopt, "explain", lambda _module: report, raising=False)
    out = tmp_path / "speed.json"
    words = ["--models", "squeezenet1_1", "--rounds", "3", "--resolution", "64", "--out", str(out)]
    assert speed.main(words) == code
    record = json.loads(out.read_text())
    assert record["timings"][0]["optimize_seconds"] == 0.25
    assert record["machine"]["threads"] == "1"
    page = out.with_suffix(".md").read_text()
    assert page in capsys.readouterr().out
    assert "| squeezenet1_1 |" in page
