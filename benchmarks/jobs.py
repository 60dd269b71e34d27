"""Work in processes of its own: a job prints JSON lines; a crash or a hang becomes a line that says so.

Lines go to a JSON-lines file as jobs end, so that a run can be resumed.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterable, Mapping, Sequence, Set
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from subprocess import PIPE
from typing import Any

import pandas as pd
from tqdm import tqdm

from benchmarks.machine import machine

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
MINE = RESULTS / "mine"
"""Where a part that is run by itself leaves its results, unless told otherwise: not over the committed ones."""

Line = dict[str, Any]
Process = subprocess.Popen[str]
KEEPING = {"MALLOC_MMAP_THRESHOLD_": str(1 << 30), "MALLOC_TRIM_THRESHOLD_": str(1 << 30)}
"""glibc's malloc keeps the memory of large tensors. By default it gives each back to the system and faults its pages in
again at the next call, which takes longer than a small conv does, and begins at a size: a network that falls below it
would seem to have become twice as fast."""

LOST = "lost"
"""The status of a line that stands for a job which did not end well."""
END = "end"
"""The status of the line that closes a job which ended well, in the file alone; it tells how many lines the job has."""

_ABOUT = (
    *("case", "model", "net", "family", "name", "key"),
    *("arm", "part", "side", "amount", "resolution", "size", "channels", "readers", "seed", "epochs"),
)
"""The fields of a line that say what it is about; the others say what was found."""


class Interrupted(KeyboardInterrupt):
    """A run that the user broke off; its words say what is kept and how to go on."""


@dataclass(frozen=True, slots=True)
class Job:
    """One process.

    Attributes:
        key: tells it from others in the file.
        words: what follows `python -m` on its command line.
    """

    key: str
    words: tuple[str, ...]


@dataclass(slots=True)
class _Running:
    """The processes that run now. Once stopped, they are ended, and so is any that comes after."""

    stopped: bool = False
    processes: set[Process] = field(default_factory=set[Process])

    def add(self, process: Process) -> None:
        self.processes.add(process)
        if self.stopped:
            process.kill()

    def stop(self) -> None:
        self.stopped = True
        for process in list(self.processes):
            process.kill()


def run(
    jobs: Sequence[Job],
    path: Path,
    *,
    parallel: int = 1,
    timeout: float = 3600.0,
    resume: bool = False,
    others: bool = True,
    what: str = "",
) -> list[Line]:
    """Run jobs with a progress bar on standard error; returns all lines, those of earlier runs first.

    Args:
        jobs: in the order in which they begin.
        path: where lines go; begun anew unless resumed.
        parallel: jobs at a time; more than one disturbs timings.
        timeout: seconds for one job.
        resume: keep the lines of jobs that ended well, also of those that are not asked for now, and run only the rest.
        others: return the lines of jobs that are not asked for now too, where no later job tells of the same thing.
        what: label of the progress bar.

    Raises:
        Interrupted: the user broke the run off; what runs is ended, and what ended well is in the file.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    finished = _finished(path) if resume else {}
    _rewrite(path, finished)
    lines = [line for mine in finished.values() for line in mine]
    asked = {job.key for job in jobs}
    left = [job for job in jobs if job.key not in finished]
    lock, running = threading.Lock(), _Running()
    progress: tqdm[Any] = tqdm(total=len(left), unit="job", desc=what or None, disable=None)

    def work(job: Job) -> None:
        mine = [] if running.stopped else _run_one(job, timeout, running)
        with lock:
            if running.stopped:  # whatever it says, it was ended before its time
                return
            lines.extend(mine)
            with path.open("a") as file:
                file.write(_text(job.key, mine))
            if lost := [line for line in mine if line["status"] == LOST]:
                progress.write(f"{job.key}: {lost[0].get('exception', '')}", file=sys.stderr)
            else:
                finished[job.key] = mine
            progress.update()

    with progress, ThreadPoolExecutor(max(1, parallel)) as pool:
        try:
            for ended in [pool.submit(work, job) for job in left]:
                ended.result()
        except BaseException as error:
            running.stop()
            pool.shutdown(wait=False, cancel_futures=True)
            if not isinstance(error, KeyboardInterrupt):
                raise
            raise Interrupted(
                f"{len(asked & finished.keys())} of {len(asked)} jobs are finished and kept in {path}; "
                "the same command with --resume goes on"
            ) from None
    return _current(lines, asked) if others else [line for line in lines if line["job"] in asked]


def _current(lines: Sequence[Line], asked: Set[str]) -> list[Line]:
    """Lines without those of jobs not asked for that tell again of what another job tells.

    A job that is asked for goes before one that is not, and a later one before an earlier one.
    """
    by_job: dict[str, list[Line]] = {}
    for line in lines:
        by_job.setdefault(line["job"], []).append(line)
    told: set[str] = set()
    shown: dict[str, list[Line]] = {}
    for key in [*(key for key in by_job if key in asked), *(key for key in reversed(by_job) if key not in asked)]:
        shown[key] = [line for line in by_job[key] if key in asked or _about(line) not in told]
        told.update(map(_about, by_job[key]))
    return [line for key in by_job for line in shown[key]]


def _about(line: Line) -> str:
    """What a line is about, as text; the whole line if it does not say."""
    return json.dumps({name: line[name] for name in _ABOUT if name in line} or line)


def read(path: Path) -> list[Line]:
    """The lines of the jobs in a file that ended well, none if it does not exist.

    A job that was cut short, or a line of which cannot be read, is left out as a whole.
    """
    return [line for lines in _finished(path).values() for line in lines]


def _finished(path: Path) -> dict[str, list[Line]]:
    """The lines of a file by job, of the jobs that are there whole; standard error tells of lines that are none."""
    if not path.exists():
        return {}
    found: dict[str, list[Line]] = {}
    counts: dict[str, int] = {}
    for number, text in enumerate(path.read_text(errors="replace").splitlines(), 1):
        line = _line(text)
        if line is None:
            shown = text if len(text) <= 60 else f"{text[:57]}..."
            print(
                f"{path}, line {number}: expected a JSON object with the fields job and status, found {shown!r}: "
                "its job is left out, and --resume runs it again",
                file=sys.stderr,
            )
        elif line["status"] == END:
            counts[line["job"]] = line.get("lines", 0)
        else:
            found.setdefault(line["job"], []).append(line)
    return {key: found.get(key, []) for key, count in counts.items() if count == len(found.get(key, []))}


def _line(text: str) -> Line | None:
    """A line of a file as its job wrote it; None if it is none."""
    line = _object(text)
    whole = line is not None and isinstance(line.get("job"), str) and "status" in line
    return line if whole else None


def _object(text: str) -> Line | None:
    """A JSON object; None if a text is none: what a library prints, a line that was cut short."""
    try:
        found: Any = json.loads(text)
    except json.JSONDecodeError:
        return None
    return found if isinstance(found, dict) else None


def _text(key: str, lines: Sequence[Line]) -> str:
    """What a job's part of the file is: its lines, and one that closes them if it ended well."""
    ended = all(line["status"] != LOST for line in lines)
    closing = [{"job": key, "status": END, "lines": len(lines)}] if ended else []
    return "".join(json.dumps(line) + "\n" for line in [*lines, *closing])


def _rewrite(path: Path, finished: Mapping[str, Sequence[Line]]) -> None:
    """Write a file anew; an interruption leaves the old one or the new one."""
    made = path.with_name(f"{path.name}.new")
    made.write_text("".join(_text(key, lines) for key, lines in finished.items()))
    made.replace(path)


def emit(line: Mapping[str, Any]) -> None:
    """Print one line of a job's result; it says on what machine, if it does not already."""
    print(json.dumps({"status": "ok", "machine": machine(), **line}), flush=True)


class UnreadableError(ValueError):
    """A file of results that is none; a command line says so."""


def load(path: Path) -> Any:
    """The JSON in a file of results; None if there is no file.

    Raises:
        UnreadableError: it is no JSON.
    """
    try:
        return json.loads(path.read_text()) if path.exists() else None
    except json.JSONDecodeError as error:
        raise UnreadableError(f"expected results as JSON in {path}, found {error}") from None


def write(path: Path, lines: Sequence[Mapping[str, Any]]) -> None:
    """Write lines as one JSON list, a line each, and beside it as a CSV table with a column a field (`a.b` is b of a).

    Small differences between two runs stay small.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("[\n" + ",\n".join(json.dumps(line) for line in lines) + "\n]\n")
    pd.json_normalize([dict(line) for line in lines]).to_csv(path.with_suffix(".csv"), index=False)


def _run_one(job: Job, timeout: float, running: _Running) -> list[Line]:
    """The lines of one job; its process is among those that run while it lasts."""
    command = [sys.executable, "-m", *job.words]
    threads = {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"), "MKL_NUM_THREADS": "1"}
    environment = KEEPING | _environment() | threads
    with subprocess.Popen(command, cwd=ROOT, env=environment, text=True, stdout=PIPE, stderr=PIPE) as process:
        running.add(process)
        try:
            said, complained = process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
            return [_failed(job, f"no answer within {timeout:g} s")]
        finally:
            running.processes.discard(process)
    found = [_object(line) for line in said.splitlines()]
    lines = [{"job": job.key, **line} for line in found if line is not None]
    if process.returncode:
        last = " ".join(complained.splitlines()[-3:])[-300:]
        lines.append(_failed(job, f"process ended with code {process.returncode}: {last}"))
    return lines


def _failed(job: Job, why: str) -> Line:
    return {"job": job.key, "status": LOST, "exception": why}


def _environment() -> dict[str, str]:
    """The environment of a job: this process's search path, so that it imports the same chanopt."""
    paths: Iterable[str] = (str(ROOT), *(path for path in sys.path if path))
    return os.environ | {"PYTHONPATH": os.pathsep.join(dict.fromkeys(paths))}


__all__ = [
    "KEEPING",
    "LOST",
    "MINE",
    "RESULTS",
    "ROOT",
    "Interrupted",
    "Job",
    "Line",
    "UnreadableError",
    "emit",
    "load",
    "read",
    "run",
    "write",
]
