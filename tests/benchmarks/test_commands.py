"""`python -m benchmarks`: which command a line means, and that the whole fits together."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from benchmarks import __main__ as command
from benchmarks import docs, everything, gate, jobs, run, scale, solver, speed, survey


@pytest.fixture
def called(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    seen: list[Any] = []

    def main(module: ModuleType) -> Any:
        return lambda args: seen.append((module.__name__.rpartition(".")[2], args)) or 3

    for module in (everything, gate, run, scale, solver, survey):
        monkeypatch.setattr(module, "main", main(module))
    monkeypatch.setattr(speed, "main", lambda words: seen.append(("speed", words)) or 4)
    return seen


@pytest.mark.parametrize(
    ("words", "name"),
    [
        ([], "everything"),
        (["--smoke"], "everything"),
        (["all", "--smoke"], "everything"),
        (["survey", "--small"], "survey"),
        (["solver", "--sizes", "64x8"], "solver"),
        (["gate", "--all"], "gate"),
    ],
)
def test_a_line_means_a_command(words: list[str], name: str, called: list[Any]) -> None:
    assert command.main(words) == 3
    assert [found for found, _ in called] == [name]


def test_older_commands_keep_their_own_grammar(called: list[Any]) -> None:
    assert command.main(["speed", "--models", "resnet18"]) == 4
    assert called == [("speed", ["--models", "resnet18"])]


@pytest.mark.parametrize("name", [".", "x.csv", "x.jsonl", "/proc/none/x.json"])
def test_where_nothing_can_be_written_is_said_before_anything_is_measured(
    name: str, called: list[Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        command.main(["run", "--out", str(tmp_path / name)])
    assert not called
    assert "argument --out: " in capsys.readouterr().err
    assert command.main(["run", "--out", str(tmp_path / "new" / "x.json")]) == 3
    assert list((tmp_path / "new").iterdir()) == []


def test_an_empty_file_that_was_there_stays(called: list[Any], tmp_path: Path) -> None:
    (tmp_path / "x.json").touch()
    assert command.main(["run", "--out", str(tmp_path / "x.json")]) == 3
    assert (tmp_path / "x.json").exists()


@pytest.mark.parametrize("name", ["x.jsonl", "x.csv"])
def test_a_folder_in_the_place_of_a_file_beside_it_is_told(
    name: str, called: list[Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / name).mkdir()
    with pytest.raises(SystemExit):
        command.main(["run", "--out", str(tmp_path / "x.json")])
    assert not called
    assert f"found a folder: {tmp_path / name}" in capsys.readouterr().err


def test_results_that_cannot_lie_where_they_are_asked_for_are_told(
    called: list[Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit):
        command.main(["--smoke", "--results", str(tmp_path / "file")])
    assert not called
    assert "argument --results: " in capsys.readouterr().err


def test_an_unknown_command_is_told_with_those_that_there_are() -> None:
    with pytest.raises(SystemExit, match="expected a command, found 'nosuch'; there are: all, run, survey, .*accuracy"):
        command.main(["nosuch"])


@pytest.mark.parametrize("name", ["docs", "page"])
def test_pages_are_not_made_of_a_folder_that_is_not_there(name: str, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="expected a folder with results"):
        command.main([name, "--results", str(tmp_path / "typo"), "--out", str(tmp_path / "x.md")])
    assert not (tmp_path / "x.md").exists()


@pytest.mark.parametrize(("folder", "page"), [("other", "other/results.md"), ("own", "docs.md")])
def test_results_elsewhere_do_not_make_the_committed_page(
    folder: str, page: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(jobs, "RESULTS", tmp_path / "own")
    monkeypatch.setattr(docs, "OUT", tmp_path / "docs.md")
    monkeypatch.setattr(everything, "_step", lambda *_: 0)
    (tmp_path / folder).mkdir()
    assert command.main(["--parts", "scale", "--results", str(tmp_path / folder)]) == 0
    assert list(tmp_path.rglob("*.md")) == [tmp_path / page]


@pytest.mark.parametrize(
    "words",
    [
        ["run", "--rounds", "1"],
        ["run", "--amounts", "1.5"],
        ["survey", "--amounts", "x"],
        ["survey", "--jobs", "0"],
        ["solver", "--sizes", "0x0"],
        ["solver", "--seeds", "-1"],
        ["solver", "--time-limit", "-1"],
        ["scale", "--families", "wide", "--sizes", "-4"],
        ["scale", "--families", "residual", "--sizes", "0"],
        ["--timeout", "-1"],
        ["page", "--accuracy", "/nope.csv"],
    ],
)
def test_words_that_mean_nothing_are_refused(
    words: list[str], called: list[Any], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        command.main(words)
    assert ended.value.code == 2
    assert f"error: argument {words[-2]}: " in capsys.readouterr().err
    assert not called


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--batches", "1", "0"], "batch: expected 1 or more, found 0"),
        (["--threads", "0"], "threads: expected 1 or more, found 0"),
        (["--resolution", "-5"], "argument --resolution: expected a whole number, 1 or more, found '-5'"),
    ],
)
def test_a_case_that_nothing_can_be_run_by_is_refused(
    words: list[str], said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(jobs, "run", lambda *_, **__: pytest.fail("started"))
    with pytest.raises(SystemExit) as ended:
        command.main(["run", *words])
    assert ended.value.code == 2
    assert f"error: {said}\n" in capsys.readouterr().err


def test_ctrl_c_ends_with_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def broken_off(args: object) -> int:
        raise jobs.Interrupted("1 of 2 jobs are kept")

    monkeypatch.setattr(solver, "main", broken_off)
    assert command.main(["solver"]) == 130
    assert capsys.readouterr().err == "interrupted: 1 of 2 jobs are kept\n"


def test_help_lists_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["--help"]) == 0
    printed = capsys.readouterr().out
    assert all(f"    {name} " in printed for name in (*command.COMMANDS, "sweep", "speed"))
    with pytest.raises(SystemExit):
        command.main(["survey", "--help"])
    assert "--no-peer" in capsys.readouterr().out


def test_the_whole_and_the_smoke_form_have_every_part() -> None:
    for smoke in (True, False):
        parts = [
            everything.speed_jobs(smoke=smoke),
            everything.survey_jobs(smoke=smoke),
            everything.solver_jobs(smoke=smoke),
            everything.scale_jobs(smoke=smoke),
            everything.gate_jobs(smoke=smoke),
        ]
        assert all(parts)
        keys = [job.key for part in parts for job in part]
        assert len(keys) == len(set(keys))
    assert len(everything.survey_jobs(smoke=False)) == 68


@pytest.mark.parametrize("name", ["run", "survey", "solver", "scale"])
def test_a_part_by_itself_does_not_write_over_the_committed_results(name: str, called: list[Any]) -> None:
    command.main([name])
    ((_, args),) = called
    assert args.out.parent == jobs.RESULTS / "mine"


def test_only_the_parts_that_are_asked_for_are_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    ran: list[str] = []
    monkeypatch.setattr(jobs, "run", lambda todo, path, **options: ran.append(path.stem) or [])
    where = ["--results", str(tmp_path), "--out", str(tmp_path / "results.md")]
    assert command.main(["--smoke", "--parts", "survey", "scale", *where]) == 0
    assert ran == ["scale", "survey"]


def test_jobs_are_command_lines_that_their_commands_read(called: list[Any]) -> None:
    for part in (everything.speed_jobs, everything.survey_jobs, everything.solver_jobs, everything.scale_jobs):
        for job in part(smoke=True):
            assert job.words[0] == "benchmarks"
            command.main(job.words[1:])
    assert all(args.worker for _, args in called)


def test_everything_writes_both_pages_and_reports_the_worst_code(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def answered(todo: Sequence[jobs.Job], path: Path, **options: Any) -> list[jobs.Line]:
        return [{"job": todo[0].key, "status": "lost", "exception": "boom"}] if path.stem == "solver" else []

    monkeypatch.setattr(jobs, "run", answered)
    out, shown = tmp_path / "results.md", tmp_path / "page.html"
    words = ["--smoke", "--results", str(tmp_path), "--out", str(out), "--page", str(shown)]
    assert command.main(words) == 1
    assert out.read_text().startswith("# Results")
    assert shown.read_text().startswith("<!doctype html>")
    assert json.loads((tmp_path / "survey.json").read_text()) == []


@pytest.mark.slow
def test_the_smoke_form_runs_every_part_and_writes_both_pages(tmp_path: Path) -> None:
    assert command.main(["--smoke", "--results", str(tmp_path), "--out", str(tmp_path / "results.md")]) == 0
    text, shown = (tmp_path / "results.md").read_text(), (tmp_path / "page.html").read_text()
    for heading in ("Copies, against UPSCALE", "Speed on a CPU", "Orders of channels", "Compile time and memory"):
        assert f"## {heading}\n\nNot measured" not in text
        assert f"## {heading}\n" in text
    assert "| resnet18 | 19 | 4 | 4 | 3 |" in text
    assert "that cuts anything:\n\nNone." in text
    assert "resnet18" in shown
    assert "<svg" in shown
