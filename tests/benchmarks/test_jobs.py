from __future__ import annotations

import json
import re
import subprocess
import sys
import threading
import time
from concurrent.futures import Future
from pathlib import Path

import pytest
import torch

import chanopt
from benchmarks import jobs, machine
from benchmarks.jobs import Job

# A job is `python -m MODULE WORDS`: here a module beside the test's results, given by its path.


@pytest.fixture
def script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "answering.py").write_text(
        "import json, sys, time\n"
        "what, *rest = sys.argv[1:]\n"
        "print('not a line of the result')\n"
        "print('{a line that is cut')\n"
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


def written(path: Path, *found: dict[str, object], ended: dict[str, int]) -> None:
    """A file as an earlier run leaves it: lines, and how many lines the jobs that ended well have."""
    closing = [{"job": key, "status": "end", "lines": count} for key, count in ended.items()]
    path.write_text("".join(json.dumps(line) + "\n" for line in [*found, *closing]))


def test_resuming_runs_only_what_did_not_end_well(script: str, tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    kept = {"job": "a", "status": "ok", "what": "kept"}
    written(path, kept, {"job": "b", "status": "lost", "exception": "x"}, ended={"a": 1})
    todo = [Job("a", (script, "one")), Job("b", (script, "two"))]
    again = {"job": "b", "status": "ok", "what": "two"}
    assert jobs.run(todo, path, resume=True) == [kept, again]
    assert jobs.read(path) == [kept, again]
    assert jobs.run(todo[:1], path, resume=False)[0]["what"] == "one"


def test_resuming_keeps_what_other_jobs_found(script: str, tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    other = {"job": "other", "status": "ok", "family": "chain", "seed": 0}
    written(path, other, {"job": "cut", "status": "ok"}, ended={"other": 1})
    mine = {"job": "a", "status": "ok", "what": "one"}
    assert jobs.run([Job("a", (script, "one"))], path, resume=True) == [other, mine]
    assert jobs.read(path) == [other, mine]
    assert jobs.run([Job("a", (script, "one"))], path, resume=True, others=False) == [mine]
    assert jobs.read(path) == [other, mine]


def test_what_two_jobs_tell_of_is_told_by_the_one_that_is_asked_for(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    first, asked, last = (
        [{"job": job, "status": "ok", "model": model, "amount": 0.5, "seconds": seconds} for model in models]
        for seconds, (job, models) in enumerate([("first", "xz"), ("asked", "xx"), ("last", "xyz")])
    )
    written(path, *first, *asked, *last, ended={"first": 2, "asked": 2, "last": 3})
    assert jobs.run([Job("asked", ())], path, resume=True) == [*asked, *last[1:]]
    assert jobs.read(path) == [*first, *asked, *last]


def test_a_job_without_its_last_line_or_with_one_missing_is_run_again(script: str, tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    written(path, {"job": "a", "status": "ok"}, {"job": "b", "status": "ok"}, ended={"b": 2})
    assert jobs.read(path) == []
    lines = jobs.run([Job("a", (script, "one")), Job("b", (script, "two"))], path, resume=True)
    assert [line["what"] for line in lines] == ["one", "two"]
    assert not [line for line in lines if line["status"] == jobs.END]


@pytest.mark.parametrize("bad", ['{"job": "b", "sta', "5", '{"status": "ok"}'])
def test_a_line_that_cannot_be_read_is_named_and_its_job_run_again(
    bad: str, script: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "out.jsonl"
    kept = {"job": "a", "status": "ok", "what": "kept"}
    closing = [{"job": key, "status": "end", "lines": 1} for key in "ab"]
    path.write_text("\n".join([json.dumps(kept), bad, *map(json.dumps, closing)]) + "\n")
    todo = [Job("a", (script, "one")), Job("b", (script, "two"))]
    assert [line["what"] for line in jobs.run(todo, path, resume=True)] == ["kept", "two"]
    assert f"{path}, line 2: expected a JSON object with the fields job and status, found " in capsys.readouterr().err


def test_a_job_that_died_is_run_again_as_a_whole(script: str, tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    jobs.run([Job("a", (script, "dies"))], path)
    lines = jobs.run([Job("a", (script, "lives"))], path, resume=True)
    assert lines == [{"job": "a", "status": "ok", "what": "lives"}]


def test_a_job_that_was_cut_short_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "jobs.jsonl"
    whole = {"job": "a", "status": "ok"}
    written(path, whole, {"job": "b", "status": "ok"}, ended={"a": 1})
    with path.open("a") as file:
        file.write('{"job": "b", "case": {"x": 1}')
    assert jobs.read(path) == [whole]
    path.write_text('{"job": "a", "sta')
    assert jobs.read(path) == []


def test_an_interruption_begins_no_further_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begun: list[str] = []

    def interrupted(job: jobs.Job, timeout: float, running: object) -> list[jobs.Line]:
        begun.append(job.key)
        if job.key == "1":
            raise KeyboardInterrupt
        time.sleep(0.02)
        return [{"job": job.key, "status": "ok"}]

    monkeypatch.setattr(jobs, "_run_one", interrupted)
    todo = [jobs.Job(str(number), ()) for number in range(50)]
    path = tmp_path / "jobs.jsonl"
    with pytest.raises(
        jobs.Interrupted, match=r"[1-9]\d? of 50 jobs are finished and kept in .*jobs.jsonl; .*--resume"
    ):
        jobs.run(todo, path)
    assert len(begun) < 50
    assert jobs.read(path)[0] == {"job": "0", "status": "ok"}


def test_an_interruption_ends_what_runs(script: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C comes while `run` waits for a process that has begun; no signal, which could hit the test's own."""
    begun, add = threading.Event(), jobs._Running.add

    def adding(running: jobs._Running, process: jobs.Process) -> None:
        add(running, process)
        begun.set()

    def interrupted(_: Future[None]) -> None:
        assert begun.wait(30)
        raise KeyboardInterrupt

    monkeypatch.setattr(jobs._Running, "add", adding)
    monkeypatch.setattr(Future, "result", interrupted)
    before = time.monotonic()
    with pytest.raises(jobs.Interrupted, match="0 of 1 jobs"):
        jobs.run([Job("a", (script, "hangs"))], tmp_path / "out.jsonl")
    assert time.monotonic() - before < 30
    assert (tmp_path / "out.jsonl").read_text() == ""


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


def test_a_record_says_which_code_made_it(tmp_path: Path) -> None:
    on = machine.machine()
    assert on["chanopt"] == chanopt.__version__
    tree = tmp_path / "tree"
    assert machine.revision(tree) == ""
    git = ("git", "-C", str(tree), "-c", "user.name=n", "-c", "user.email=e", "-c", "commit.gpgsign=false")
    (tree / "benchmarks" / "results").mkdir(parents=True)
    for name in ("code.py", "benchmarks/results/run.json"):
        (tree / name).write_text("1")
    for words in (["init", "-q"], ["add", "."], ["commit", "-q", "-m", "m"]):
        subprocess.run([*git, *words], check=True)
    (tree / "benchmarks" / "results" / "run.json").write_text("2")
    machine.revision.cache_clear()
    clean = machine.revision(tree)
    assert re.fullmatch("[0-9a-f]{7,}", clean)
    (tree / "code.py").write_text("2")
    machine.revision.cache_clear()
    assert machine.revision(tree) == f"{clean}-dirty"
    assert machine.revision(tree / "benchmarks") == ""
