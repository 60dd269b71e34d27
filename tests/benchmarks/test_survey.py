from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import survey, zoo
from benchmarks.arms import Copies


def test_the_committed_survey_is_that_of_58_networks_of_which_the_exporter_runs_38() -> None:
    known = survey.published()
    assert {name for name, _, _ in known} == set(zoo.WORKING38 + zoo.RAISING20)
    runs = {name for (name, side, _), row in known.items() if side == "input" and row.greedy is not None}
    assert runs == set(zoo.WORKING38)
    assert not [row for (_, side, _), row in known.items() if side == "output" and row.greedy is not None]
    half = [row for (_, side, amount), row in known.items() if (side, amount) == ("input", 0.5) and row.greedy]
    assert sum((row.greedy or Copies() for row in half), Copies()) == Copies(697, 236704, 263712784)
    assert sum((row.naive or Copies() for row in half), Copies()).channels == 609733


def test_a_network_is_surveyed_under_every_mask() -> None:
    rows = list(survey.survey("squeezenet1_1", survey.SIDES, [0.5, 0.7], small=True, peer=True))
    places = [(row["side"], row["amount"]) for row in rows]
    assert places == [("input", 0.5), ("input", 0.7), ("output", 0.5), ("output", 0.7)]
    first, more, second, again = rows
    assert more["naive"]["copies"] == 25
    assert more["naive"]["channels"] < first["naive"]["channels"]
    assert more["upscale"] is not None
    assert again["upscale_exception"].startswith("not tried again after PeerError")
    assert first["naive"]["copies"] == 25
    assert first["greedy"] == first["upscale"] == first["chanopt"] == {"copies": 0, "channels": 0, "bytes": 0}
    assert first["segments_optimal"] == first["segments"]
    assert 0 < first["parameters"] < first["parameters_dense"]
    assert second["upscale"] is None
    assert "Invalid layer for output pruning" in second["upscale_exception"]
    assert [survey.differences(row) for row in rows] == [[], [], [], []]


def row(**changes: Any) -> dict[str, Any]:
    known = survey.published()["resnet18", "input", 0.5]
    assert known.naive is not None
    assert known.greedy is not None
    naive = {"copies": known.naive.copies, "channels": known.naive.channels, "bytes": known.naive.bytes}
    greedy = {"copies": known.greedy.copies, "channels": known.greedy.channels, "bytes": known.greedy.bytes}
    made = {
        "model": "resnet18",
        "side": "input",
        "amount": 0.5,
        "resolution": 224,
        "segments": 5,
        "segments_optimal": 5,
        "plans_cut": True,
    }
    return {**made, "naive": naive, "greedy": greedy, "upscale": greedy, "chanopt": greedy, **changes}


NOTHING = {"copies": 0, "channels": 0, "bytes": 0}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({}, []),
        (
            {"greedy": {"copies": 5, "channels": 300, "bytes": 2_000_000}},
            ["greedy: 5 copies, 300 channels, in the survey"],
        ),
        ({"upscale": None}, ["upscale: none, in the survey 4 copies, 256 channels"]),
        ({"resolution": 64, "upscale": None}, []),
        (
            {"chanopt": {"copies": 9, "channels": 9, "bytes": 1_200_000}},
            ["chanopt copies 1,200,000 bytes, greedy 1,103,872"],
        ),
        ({"naive": NOTHING, "greedy": NOTHING, "resolution": 64}, ["greedy 0"]),
        ({"naive": NOTHING, "greedy": NOTHING, "resolution": 64, "plans_cut": False}, []),
        ({"segments_optimal": 4}, ["only 4 of 5 segments proven optimal"]),
        ({"chanopt": None, "exception": "KeyError: 'x'"}, ["chanopt: KeyError: 'x'"]),
    ],
)
def test_a_row_that_is_not_right_is_told(changes: dict[str, Any], said: list[str]) -> None:
    found = survey.differences(row(**changes))
    assert bool(found) == bool(said)
    assert all(any(text in line for line in found) for text in said)


def test_finishing_sorts_rows_and_fails_on_what_is_wrong_or_lost(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good = row()
    out = tmp_path / "survey.json"
    later = row(model="vgg11", resolution=64)
    assert survey.finish([{"job": "b", **later}, {"job": "a", **good}], out) == 0
    assert [line["model"] for line in json.loads(out.read_text())] == ["vgg11", "resnet18"]
    assert survey.finish([{"job": "a", **row(segments_optimal=1)}], out) == 1
    assert survey.finish([{"job": "a", "status": "lost", "exception": "boom"}], out) == 1
    printed = capsys.readouterr().out
    assert "resnet18, input 50%: only 1 of 5 segments proven optimal" in printed
    assert "a: boom" in printed
