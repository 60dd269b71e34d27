"""The benchmark of the torch.compile backend: what it records, and what its page says of it."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import pytest

from benchmarks.__main__ import main
from benchmarks.backend import Right, Speed, finish, right_page, speed_page
from benchmarks.speed import Spread, compared


def test_a_network_that_is_right_is_recorded_and_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "backend.json"
    assert main(["backend", "--models", "squeezenet1_1", "--part", "right", "--small", "--out", str(out)]) == 0
    (row,) = json.loads(out.read_text())["right"]
    assert row["model"] == "squeezenet1_1"
    assert row["error"] < 1e-4
    assert (row["graphs"], row["slim"], row["breaks"], row["exception"]) == (1, 1, 0, "")
    assert 0 < row["macs"] < row["macs_dense"]
    assert "1 of 1 give the masked network's outputs" in out.with_suffix(".md").read_text()
    assert "squeezenet1_1" in capsys.readouterr().out


def test_a_network_that_fails_is_named_with_its_error() -> None:
    page = "\n".join(right_page([Right("resnet18", exception="ValueError: no")]))
    assert "0 of 1 give" in page
    assert "- resnet18: ValueError: no" in page


def test_the_faster_of_upscales_ways_counts_and_the_page_says_which() -> None:
    taken = {"dense": [8.0, 8.0], "index": [5.0, 5.0], "runs": [4.0, 4.0], "chanopt": [2.0, 2.0]}
    row = Speed(
        **compared("resnet18", taken), checked=Spread.of([1.1] * 2), from_python=Spread.of([0.9] * 2), error=1e-7
    )
    assert (row.upscale_mode, row.to_upscale, row.to_dense) == ("runs", Spread.of([0.5] * 2), Spread.of([0.25] * 2))
    page = "\n".join(speed_page([row]))
    assert "4.0 [4.0, 4.0] runs" in page
    assert "1.10 [1.10, 1.10]" in page
    assert "against UPSCALE: 0.500 (bound 0.8)" in page


def test_figures_survive_their_journey_between_processes_and_a_lost_network_is_named(tmp_path: Path) -> None:
    times = {arm: [2.0, 2.0] for arm in ("dense", "index", "runs", "chanopt")}
    row = Speed(
        **compared("resnet18", times), checked=Spread.of([1.0] * 2), from_python=Spread.of([1.0] * 2), error=0.0
    )
    sent = json.loads(json.dumps(asdict(row)))
    assert Speed.read(sent) == row
    lines = [
        {"job": "a", "status": "ok", "part": "speed", "row": sent},
        {"job": "b", "status": "lost", "exception": "no answer within 5 s"},
    ]
    assert finish(lines[:1], tmp_path / "b.json", 0.5) == 0
    assert finish(lines, tmp_path / "b.json", 0.5) == 1
    assert "b: no answer within 5 s" in (tmp_path / "b.md").read_text()
