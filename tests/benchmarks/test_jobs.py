from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import jobs
from benchmarks.jobs import Job

# A job is `python -m MODULE WORDS`: here a module beside the test's results, given by its path.


@pytest.fixture
def script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "answering.py").write_text(
        "import json, sys, time\n"
        "what, *rest = sys.argv[1:]\n"
        "print('not a line of the result')\n"
        "print(json.dumps({'status': 'ok', 'what': what}))\n"
        "sys.exit('out of luck') if what == 'dies' else time.sleep(60 if what == 'hangs' else 0)\n"
    )
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    return "answering"


def test_lines_of_jobs_are_kept_with_their_key(script: str, tmp_path: Path) -> None:
    lines = jobs.run([Job("a", (script, "one")), Job("b", (script, "two"))], tmp_path / "out.jsonl", parallel=2)
    assert sorted(lines, key=lambda line: line["job"]) == [
        {"job": "a", "status": "ok", "what": "one"},
        {"job": "b", "status": "ok", "what": "two"},
    ]
    assert jobs.read(tmp_path / "out.jsonl") == lines


def test_every_line_says_on_what_machine(capsys: pytest.CaptureFixture[str]) -> None:
    jobs.emit({"what": 1})
    jobs.emit({"what": 2, "machine": {"gpu": "none"}})
    first, second = (json.loads(line) for line in capsys.readouterr().out.splitlines())
    assert first["machine"]["torch"] == torch.__version__
    assert first["machine"]["threads"] == str(torch.get_num_threads())
    assert second == {"status": "ok", "what": 2, "machine": {"gpu": "none"}}


def test_a_job_that_dies_or_hangs_leaves_a_line_that_says_so(script: str, tmp_path: Path) -> None:
    todo = [Job("a", (script, "dies")), Job("b", (script, "hangs"))]
    said, died, hung = jobs.run(todo, tmp_path / "out.jsonl", timeout=2)
    assert said["what"] == "dies"
    assert died == {"job": "a", "status": "lost", "exception": "process ended with code 1: out of luck"}
    assert hung == {"job": "b", "status": "lost", "exception": "no answer within 2 s"}


def test_resuming_runs_only_what_did_not_end_well(script: str, tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    kept = {"job": "a", "status": "ok", "what": "kept"}
    rows = [kept, {"job": "b", "status": "lost", "exception": "x"}, {"job": "gone", "status": "ok"}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"job": "b", "sta')
    todo = [Job("a", (script, "one")), Job("b", (script, "two"))]
    again = {"job": "b", "status": "ok", "what": "two"}
    assert jobs.run(todo, path, resume=True) == [kept, again]
    assert jobs.read(path) == [kept, again]
    assert jobs.run(todo[:1], path, resume=False)[0]["what"] == "one"


def test_a_job_that_died_is_run_again_as_a_whole(script: str, tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    jobs.run([Job("a", (script, "dies"))], path)
    lines = jobs.run([Job("a", (script, "lives"))], path, resume=True)
    assert lines == [{"job": "a", "status": "ok", "what": "lives"}]


def test_a_job_that_was_cut_short_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "jobs.jsonl"
    whole = [{"job": "a", "status": "ok"}, {"job": "b", "status": "ok"}]
    path.write_text("".join(json.dumps(line) + "\n" for line in whole) + '{"job": "b", "case": {"x": 1}')
    assert jobs.read(path) == whole[:1]
    path.write_text('{"job": "a", "sta')
    assert jobs.read(path) == []


def test_an_interruption_begins_no_further_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begun: list[str] = []

    def interrupted(job: jobs.Job, timeout: float) -> list[jobs.Line]:
        begun.append(job.key)
        raise KeyboardInterrupt

    monkeypatch.setattr(jobs, "_run_one", interrupted)
    todo = [jobs.Job(str(number), ()) for number in range(50)]
    with pytest.raises(KeyboardInterrupt):
        jobs.run(todo, tmp_path / "jobs.jsonl")
    assert len(begun) < 50


def test_lists_are_written_a_line_each_and_as_a_table(tmp_path: Path) -> None:
    jobs.write(tmp_path / "out.json", [{"a": 1}, {"b": 2, "c": {"d": 3}}])
    assert (tmp_path / "out.json").read_text() == '[\n{"a": 1},\n{"b": 2, "c": {"d": 3}}\n]\n'
    assert (tmp_path / "out.csv").read_text() == "a,b,c.d\n1.0,,\n,2.0,3.0\n"


def test_processes_keep_the_memory_of_large_tensors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Or page faults would decide what is fast; what the user has set goes before."""
    (tmp_path / "telling.py").write_text(
        "import json, os\nprint(json.dumps({'status': 'ok', 'kept': os.environ['MALLOC_MMAP_THRESHOLD_']}))\n"
    )
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    for own in (None, "4096"):
        if own:
            monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", own)
        (line,) = jobs.run([Job("a", ("telling",))], tmp_path / "out.jsonl")
        assert line["kept"] == (own or str(1 << 30))
