from __future__ import annotations

import copy
import json
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import chanopt
from benchmarks import measure, sweep, tables
from benchmarks.masks import Setting
from benchmarks.measure import Row
from benchmarks.sweep import Task

GOOD = Row(
    "resnet18",
    "input",
    0.5,
    64,
    capture_seconds=1.0,
    optimize_seconds=0.5,
    error64=1e-15,
    error64_batch=2e-15,
    error32=1e-6,
    sensitivity=0.2,
    parameters_dense=1000,
    parameters=400,
    copies=1,
    gathered_channels=10,
    copied_bytes=4096,
    segments=3,
    segments_optimal=3,
    refusals=0,
    upscale_status="ok",
    upscale_seconds=2.0,
    upscale_parameters=500,
    upscale_copies=2,
    upscale_channels=20,
    upscale_bytes=8192,
)


def test_a_row_within_all_bounds_has_no_violations() -> None:
    assert measure.violations(GOOD) == []


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"error64": 1e-9}, "error64 1.0e-09 over 1e-10"),
        ({"error64_batch": float("inf")}, "error64_batch inf over 1e-10"),
        ({"error32": float("nan")}, "error32 nan over 1e-04"),
        ({"segments_optimal": 2}, "only 2 of 3 segments proven optimal"),
        (
            {"parameters": 1000, "upscale_status": "KeyError"},
            "not slimmed, and neither a refusal nor who reads the channels says why",
        ),
        ({"copied_bytes": 8193}, "copies 8,193 bytes, UPSCALE 8,192"),
        ({"copied_bytes": 8192, "gathered_channels": 21}, "gathers 21 channels at equal bytes, UPSCALE 20"),
        ({"parameters": 501}, "keeps 501 parameters, UPSCALE 500"),
        ({"status": "error", "exception": "KeyError: 'x'"}, "KeyError: 'x'"),
    ],
)
def test_each_bound_is_checked(changes: dict[str, Any], said: str) -> None:
    assert measure.violations(replace(GOOD, **changes)) == [said]


def test_a_refusal_excuses_a_network_that_was_not_slimmed_and_a_peer_that_raised_binds_nothing() -> None:
    row = replace(GOOD, parameters=1000, refusals=2, upscale_status="KeyError", copied_bytes=10**9)
    assert measure.violations(row) == []


def scaled(factor: float) -> Callable[[Tensor], object]:
    return lambda x: {"a": x, "b": (factor * x, torch.arange(3))}


def test_relative_error_is_relative_to_the_greatest_magnitude_of_each_output() -> None:
    x = torch.tensor([1.0, -4.0], dtype=torch.float64)
    assert measure.relative_error(scaled(1.0), scaled(1.0), (x,)) == 0
    assert measure.relative_error(scaled(1.0), scaled(1.5), (x,)) == pytest.approx(0.5)
    assert measure.relative_error(lambda t: t, lambda t: t[:1], (x,)) == float("inf")
    assert measure.relative_error(lambda t: t, lambda t: t * float("nan"), (x,)) == float("inf")
    assert measure.relative_error(lambda t: t.long(), lambda t: t.long() + 1, (x,)) == float("inf")


def report() -> SimpleNamespace:
    return SimpleNamespace(
        seconds={"capture": 0.1, "optimize": 0.2},
        parameters_after=400,
        macs_before=20,
        macs_after=10,
        copies=1,
        gathered_channels=10,
        copied_bytes=8192,
        segments=[SimpleNamespace(optimal=True), SimpleNamespace(optimal=False)],
        layers=[SimpleNamespace(kept={"read by b": "0:4"}), SimpleNamespace(kept={})],
        refusals=["aten.foo\n  at line 3", "b", "c", "d"],
    )


def test_figures_restate_bytes_for_float32_and_show_the_first_refusals() -> None:
    figures = measure.figures(report(), itemsize=8)
    assert figures["copied_bytes"] == 4096
    assert (figures["segments"], figures["segments_optimal"]) == (2, 1)
    assert (figures["refusals"], figures["first_refusals"]) == (4, "aten.foo at line 3 | b | c")
    assert figures["unexplained"] == 1


def test_a_network_is_measured_in_both_precisions_and_beside_upscale(monkeypatch: pytest.MonkeyPatch) -> None:
    def optimized(_name: str, model: nn.Module, _inputs: object) -> nn.Module:
        return copy.deepcopy(model)

    monkeypatch.setattr(measure, "_optimized", optimized)
    monkeypatch.setattr(chanopt, "explain", lambda _module: report(), raising=False)
    row = measure.measure("squeezenet1_1", Setting("input", 0.5), 64)
    assert row.status == "ok", row.exception
    assert (row.error64, row.error64_batch, row.error32) == (0, 0, 0)
    assert row.own_error32 is not None
    assert 0 < row.own_error32 < 1e-4
    assert row.upscale_status == "ok"
    assert row.upscale_bytes == 0
    assert row.sensitivity is not None
    assert row.sensitivity > 0.03
    assert row.violations == ["only 1 of 2 segments proven optimal", "copies 4,096 bytes, UPSCALE 0"]


def test_an_exception_becomes_a_row_that_keeps_what_was_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    def optimized(_name: str, _model: nn.Module, _inputs: object) -> nn.Module:
        raise KeyError("some\nop")

    monkeypatch.setattr(measure, "_optimized", optimized)
    row = measure.measure("squeezenet1_1", Setting("input", 0.5), 64)
    assert row.status == "error"
    assert row.violations == ["KeyError: 'some\\nop'"]
    assert row.parameters_dense == 1235496


def answering(code: str) -> Callable[[Task], list[str]]:
    return lambda _task: [sys.executable, "-c", code]


TWO = (Setting("input", 0.5), Setting("both", 0.5))


def run(monkeypatch: pytest.MonkeyPatch, folder: Path, code: str, **options: Any) -> list[Row]:
    monkeypatch.setattr(sweep, "command", answering(code))
    defaults: dict[str, Any] = {"small": True, "jobs": 2, "timeout": 60, "resume": False}
    return sweep.sweep(["resnet18"], TWO, folder / "out.csv", **{**defaults, **options})


def test_a_process_that_dies_leaves_rows_that_say_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    code = f"import sys; print({json.dumps(asdict(GOOD))!r}, flush=True); sys.exit('out of luck')"
    first, second = run(monkeypatch, tmp_path, code)
    assert first == GOOD
    assert (second.side, second.status) == ("both", "error")
    assert second.violations == ["process ended with code 1: out of luck"]
    page = (tmp_path / "out.md").read_text()
    assert "- resnet18, both 50%: process ended with code 1: out of luck" in page


def test_a_process_that_hangs_is_ended(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    rows = run(monkeypatch, tmp_path, "import time; time.sleep(60)", timeout=0.5)
    assert [row.exception for row in rows] == ["no answer within 0.5 s"] * 2


def test_resuming_measures_only_what_is_missing_or_failed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    rows = [GOOD, replace(GOOD, side="both", status="error", exception="x", violations=["x"])]
    lines = "".join(json.dumps(asdict(row)) + "\n" for row in rows)
    (tmp_path / "out.jsonl").write_text(lines + '{"model": "resnet18", "si')
    code = f"print({json.dumps(asdict(replace(GOOD, side='both', copies=7)))!r})"
    measured = run(monkeypatch, tmp_path, code, resume=True)
    assert [(row.side, row.copies) for row in measured] == [("input", 1), ("both", 7)]
    assert tables.read_rows(tmp_path / "out.jsonl") == measured


def test_the_plan_tells_resolutions_apart() -> None:
    (whole,) = sweep.plan(["resnet18"], TWO, [GOOD], small=False)
    (rest,) = sweep.plan(["resnet18"], TWO, [GOOD], small=True)
    assert whole == Task("resnet18", TWO, small=False)
    assert rest == Task("resnet18", TWO[1:], small=True)
    assert (whole.resolution, rest.resolution) == (224, 64)


def test_a_task_is_the_command_line_of_its_process() -> None:
    made = sweep.command(Task("resnet18", TWO, small=True))
    args = sweep.parser().parse_args(made[3:])
    assert (args.worker, args.small, args.models, tuple(args.settings)) == (True, True, ["resnet18"], TWO)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("inputs:0.5", "expected input, output or both before the colon, found 'inputs:0.5'"),
        ("input", "expected SIDE:AMOUNT, as in input:0.5, found 'input'"),
        ("input:half", "expected SIDE:AMOUNT, as in input:0.5, found 'input:half'"),
    ],
)
def test_a_setting_that_cannot_be_read_is_refused(text: str, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        sweep.parser().parse_args(["--settings", text])
    assert said in " ".join(capsys.readouterr().err.split())


def test_tables_have_totals_and_mark_what_was_not_measured(tmp_path: Path) -> None:
    raised = replace(GOOD, model="vit_b_16", upscale_status="KeyError", upscale_bytes=None, upscale_channels=None)
    failed = Row("swin_t", "input", 0.5, 64, status="error", exception="boom", violations=["boom"])
    tables.write([raised, failed, GOOD], tmp_path / "t.csv", "A heading")
    page = (tmp_path / "t.md").read_text()
    assert page.startswith("# A heading\n")
    assert "| input 50% | 3 | 2 | 2 | 2.0e-15 | 1.0e-06 | 6 / 6 | 1 | 4 | 8 | 10 | 20 |" in page
    assert "- swin_t, input 50%: boom" in page
    assert "| swin_t | - | - |" in page
    lines = (tmp_path / "t.csv").read_text().splitlines()
    assert [line.split(",")[0] for line in lines] == ["model", "resnet18", "vit_b_16", "swin_t"]


def test_counts_are_written_to_the_last_digit_beside_rows_without_them(tmp_path: Path) -> None:
    exact = replace(GOOD, upscale_parameters=61_100_840, upscale_bytes=123_456_789)
    raised = replace(GOOD, upscale_status="PeerError: x", upscale_parameters=None, upscale_bytes=None)
    tables.write([exact, raised], tmp_path / "t.csv", "A heading")
    text = (tmp_path / "t.csv").read_text()
    assert ",61100840,2,20,123456789," in text
    assert ",,2,20,," in text


def test_the_smoke_cut_is_part_of_the_sweep() -> None:
    assert set(sweep.SMOKE_MODELS) <= set(sweep.zoo.ALL)
    assert set(sweep.SMOKE_SETTINGS) <= set(sweep.SETTINGS)
    assert len(sweep.SETTINGS) == 5
