"""Many instances: one after another while that is quick, then side by side in processes."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from queue import Empty, SimpleQueue

from chanopt.solve.instance import Instance
from chanopt.solve.solution import Solution
from chanopt.solve.solver import solve

__all__ = ["solve_all"]

_PATIENCE = 3.0
"""Seconds before processes are started, which takes them half a second."""

Numbered = tuple[int, Instance]


def solve_all(
    instances: Sequence[Instance],
    *,
    time_limit: float = 10.0,
    processes: int | None = None,
    patience: float = _PATIENCE,
) -> list[Solution]:
    """Solve instances as :func:`chanopt.solve.solve` does each; the answers do not depend on the processes.

    Args:
        instances: to be solved, each for itself.
        time_limit: seconds for each.
        processes: how many may run at once; None: one for each processor that this process may use. With 1, or if
            no more than one instance is left after `patience`, no process is started.
        patience: seconds after which those that are left are solved side by side.

    Returns:
        The solutions, in the order of the instances.
    """
    most = processes or _processors()
    started = time.monotonic()
    solved: dict[int, Solution] = {}
    left = iter(enumerate(instances))
    for number, instance in left:
        solved[number] = solve(instance, time_limit=time_limit)
        if time.monotonic() - started > patience and min(most, len(instances) - number - 1) > 1:
            break
    solved |= _side_by_side(list(left), most, time_limit)
    return [solved[number] for number in range(len(instances))]


def _side_by_side(left: Sequence[Numbered], most: int, time_limit: float) -> dict[int, Solution]:
    """Solve in processes, each of which takes the next one when it has done with one."""
    waiting: SimpleQueue[Numbered] = SimpleQueue()
    for numbered in left:
        waiting.put(numbered)
    if not left:
        return {}
    # A thread for each process does nothing but wait for it.
    with ThreadPoolExecutor(min(most, len(left))) as pool:
        parts = [pool.submit(_elsewhere, waiting, time_limit) for _ in range(min(most, len(left)))]
        return {number: solution for part in parts for number, solution in part.result().items()}


def _processors() -> int:
    if getattr(sys, "frozen", False):
        return 1  # the executable is an application, not an interpreter
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _elsewhere(waiting: SimpleQueue[Numbered], time_limit: float) -> dict[int, Solution]:
    """Solve one after another in one process; here, if that cannot be started or ends."""
    solved: dict[int, Solution] = {}
    with _process(time_limit) as process, suppress(Empty):
        while True:
            number, instance = waiting.get_nowait()
            answer = _asked(process, instance.to_json())
            solved[number] = Solution.from_json(answer) if answer else solve(instance, time_limit=time_limit)
    return solved


@contextmanager
def _process(time_limit: float) -> Generator[subprocess.Popen[str] | None]:
    """A process that answers instances with solutions, a line each; None if it cannot be started.

    `python -m chanopt.solve` is no fork, and does not import the caller's script again as `multiprocessing` would.
    """
    words = [sys.executable, "-m", "chanopt.solve", "--time-limit", str(time_limit)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    try:
        process = subprocess.Popen(
            words,
            env=environment,
            text=True,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
    except OSError:
        yield None
        return
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def _asked(process: subprocess.Popen[str] | None, question: str) -> str:
    """The line that a process answers; "" if it is gone."""
    if process is None or process.stdin is None or process.stdout is None:
        return ""
    try:
        process.stdin.write(question + "\n")
        process.stdin.flush()
    except OSError:
        return ""
    return process.stdout.readline()
