"""The committed counts, and that they still hold: on one network here, on three in the smoke form of all benchmarks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import gate, sweep
from benchmarks.masks import Setting


@pytest.mark.parametrize("setting", gate.SETTINGS, ids=str)
def test_counts_are_those_that_are_committed(setting: Setting) -> None:
    found = gate.counts("resnet18", setting)
    assert gate.differences(found, gate.goldens().get(gate.key("resnet18", setting))) == []


def test_the_smoke_cut_is_committed_and_every_segment_of_it_proven() -> None:
    committed = gate.goldens()
    for name in sweep.SMOKE_MODELS:
        for setting in gate.SETTINGS:
            golden = committed[gate.key(name, setting)]
            assert tuple(golden) == gate.COUNTS
            assert golden["segments_optimal"] == golden["segments"]
            assert golden["parameters"] < golden["parameters_dense"]


GOLDEN = dict.fromkeys(gate.COUNTS, 7)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({}, []),
        ({"copies": 6}, ["copies 7 -> 6 (better)"]),
        ({"macs": 8, "segments": 6}, ["macs 7 -> 8 (worse)", "segments 7 -> 6"]),
        ({"exception": "KeyError: 'x'"}, ["KeyError: 'x'"]),
    ],
)
def test_any_difference_is_told(changes: dict[str, Any], said: list[str]) -> None:
    assert gate.differences({**GOLDEN, **changes}, GOLDEN) == said


def test_a_row_without_committed_counts_is_a_difference() -> None:
    assert gate.differences(GOLDEN, None) == ["no committed counts; add them with --update"]


def line(key: str, **changes: Any) -> dict[str, Any]:
    return {"job": key, "status": "ok", "key": key, "counts": {**GOLDEN, **changes}}


def test_comparing_fails_and_updating_writes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "goldens.json"
    lines = [line("vgg11, input 50%"), line("resnet18, input 50%"), line("alexnet, input 50%")]
    assert gate.finish(lines, path, update=False) == 1
    assert not path.exists()
    assert gate.finish(lines, path, update=True) == 0
    assert list(json.loads(path.read_text())) == ["alexnet, input 50%", "vgg11, input 50%", "resnet18, input 50%"]
    assert gate.finish(lines, path, update=False) == 0
    changed = [line("vgg11, input 50%", copies=9)]
    assert gate.finish(changed, path, update=False) == 1
    assert gate.goldens(path)["vgg11, input 50%"]["copies"] == 7
    assert gate.finish(changed, path, update=True) == 0
    assert {row["copies"] for row in gate.goldens(path).values()} == {7, 9}
    assert "vgg11, input 50%: copies 7 -> 9 (worse)" in capsys.readouterr().out


def test_what_raised_is_not_written(tmp_path: Path) -> None:
    path = tmp_path / "goldens.json"
    raised = {"job": "a", "status": "ok", "key": "vgg11, both 50%", "counts": {"exception": "KeyError"}}
    assert gate.finish([line("alexnet, input 50%"), raised], path, update=True) == 1
    assert list(gate.goldens(path)) == ["alexnet, input 50%"]
    assert gate.finish([{"job": "a", "status": "lost", "exception": "boom"}], path, update=False) == 1
