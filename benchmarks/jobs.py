"""Work in processes of its own: a job prints JSON lines; a crash or a hang becomes a line that says so.

Lines go to a JSON-lines file as jobs end, so that a run can be resumed.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
from tqdm import tqdm

from benchmarks.machine import machine

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
MINE = RESULTS / "mine"
"""Where a part that is run by itself leaves its results, unless told otherwise: not over the committed ones."""

Line = dict[str, Any]
KEEPING = {"MALLOC_MMAP_THRESHOLD_": str(1 << 30), "MALLOC_TRIM_THRESHOLD_": str(1 << 30)}
"""glibc's malloc keeps the memory of large tensors. By default it gives each back to the system and faults its pages in
again at the next call, which takes longer than a small conv does, and begins at a size: a network that falls below it
would seem to have become twice as fast."""

LOST = "lost"
"""The status of a line that stands for a job which did not end well."""


@dataclass(frozen=True, slots=True)
class Job:
    """One process.

    Attributes:
        key: tells it from others in the file.
        words: what follows `python -m` on its command line.
    """

    key: str
    words: tuple[str, ...]


def run(
    jobs: Sequence[Job], path: Path, *, parallel: int = 1, timeout: float = 3600.0, resume: bool = False, what: str = ""
) -> list[Line]:
    """Run jobs with a progress bar on standard error; returns all lines, those of earlier runs first.

    Args:
        jobs: in the order in which they begin.
        path: where lines go; begun anew unless resumed.
        parallel: jobs at a time; more than one disturbs timings.
        timeout: seconds for one job.
        resume: keep the lines of jobs that ended well, and run only the others.
        what: label of the progress bar.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    before = read(path) if resume else []
    done = {job.key for job in jobs if _ended_well(job.key, before)}
    kept = [line for line in before if line["job"] in done]
    path.write_text("".join(json.dumps(line) + "\n" for line in kept))
    left = [job for job in jobs if job.key not in done]
    lock = threading.Lock()
    progress: tqdm[Any] = tqdm(total=len(left), unit="job", desc=what or None, disable=None)

    def work(job: Job) -> None:
        lines = _run_one(job, timeout)
        with lock, path.open("a") as file:
            kept.extend(lines)
            file.writelines(json.dumps(line) + "\n" for line in lines)
            for line in lines:
                if line["status"] == LOST:
                    progress.write(f"{job.key}: {line.get('exception', '')}", file=sys.stderr)
            progress.update()

    with progress, ThreadPoolExecutor(max(1, parallel)) as pool:
        try:
            for finished in [pool.submit(work, job) for job in left]:
                finished.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)  # an interruption ends what runs, and begins nothing more
            raise
    return kept


def _ended_well(key: str, lines: Sequence[Line]) -> bool:
    mine = [line["status"] for line in lines if line["job"] == key]
    return bool(mine) and LOST not in mine


def read(path: Path) -> list[Line]:
    """The lines of a file, none if it does not exist; a job that was cut short is left out as a whole."""
    if not path.exists():
        return []
    lines = path.read_text().splitlines()
    # Lines are only ever added, so that none but the last can be cut short.
    found: list[Line] = [json.loads(line) for line in lines[:-1]]
    try:
        return [*found, *map(json.loads, lines[-1:])]
    except json.JSONDecodeError:
        # A job writes its lines at once: those before the one that was cut short may be its own.
        return [line for line in found if line["job"] != found[-1]["job"]]


def emit(line: Mapping[str, Any]) -> None:
    """Print one line of a job's result; it says on what machine, if it does not already."""
    print(json.dumps({"status": "ok", "machine": machine(), **line}), flush=True)


def write(path: Path, lines: Sequence[Mapping[str, Any]]) -> None:
    """Write lines as one JSON list, a line each, and beside it as a CSV table with a column a field (`a.b` is b of a).

    Small differences between two runs stay small.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("[\n" + ",\n".join(json.dumps(line) for line in lines) + "\n]\n")
    pd.json_normalize([dict(line) for line in lines]).to_csv(path.with_suffix(".csv"), index=False)


def _run_one(job: Job, timeout: float) -> list[Line]:
    command = [sys.executable, "-m", *job.words]
    threads = {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"), "MKL_NUM_THREADS": "1"}
    try:
        done = subprocess.run(
            command,
            cwd=ROOT,
            env=KEEPING | _environment() | threads,
            text=True,
            capture_output=True,
            timeout=timeout,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return [_failed(job, f"no answer within {timeout:g} s")]
    lines = [{"job": job.key, **json.loads(line)} for line in done.stdout.splitlines() if line.startswith("{")]
    if done.returncode:
        last = " ".join(done.stderr.splitlines()[-3:])[-300:]
        lines.append(_failed(job, f"process ended with code {done.returncode}: {last}"))
    return lines


def _failed(job: Job, why: str) -> Line:
    return {"job": job.key, "status": LOST, "exception": why}


def _environment() -> dict[str, str]:
    """The environment of a job: this process's search path, so that it imports the same chanopt."""
    paths: Iterable[str] = (str(ROOT), *(path for path in sys.path if path))
    return os.environ | {"PYTHONPATH": os.pathsep.join(dict.fromkeys(paths))}


__all__ = ["KEEPING", "LOST", "MINE", "RESULTS", "ROOT", "Job", "Line", "emit", "read", "run", "write"]
