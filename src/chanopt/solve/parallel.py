"""Many instances: one after another while that is quick, then side by side in processes."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial

from chanopt.solve.instance import Instance
from chanopt.solve.solution import Solution
from chanopt.solve.solver import solve

__all__ = ["solve_all"]

_PATIENCE = 2.0
"""Seconds before processes are started, each of which takes half a second to begin."""
_MARGIN = 30.0
"""Seconds past its time limit after which a process is given up."""


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
    solved: list[Solution] = []
    for number, instance in enumerate(instances):
        left = instances[number:]
        if most > 1 and len(left) > 1 and time.monotonic() - started > patience:
            # A thread for each process does nothing but wait for it.
            with ThreadPoolExecutor(min(most, len(left))) as pool:
                return solved + list(pool.map(partial(_elsewhere, time_limit=time_limit), left))
        solved.append(solve(instance, time_limit=time_limit))
    return solved


def _processors() -> int:
    if getattr(sys, "frozen", False):
        return 1  # the executable is an application, not an interpreter
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _elsewhere(instance: Instance, time_limit: float) -> Solution:
    """Solve in a process of its own, or here if none can be started.

    `python -m chanopt.solve` is no fork, and does not import the caller's script again as `multiprocessing` would.
    """
    words = [sys.executable, "-m", "chanopt.solve", "--time-limit", str(time_limit)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    try:
        done = subprocess.run(
            words,
            input=instance.to_json(),
            env=environment,
            capture_output=True,
            text=True,
            check=True,
            timeout=time_limit + _MARGIN,
        )
    except (OSError, subprocess.SubprocessError):
        return solve(instance, time_limit=time_limit)
    return Solution.from_json(done.stdout.splitlines()[-1])
