"""`solve_all`: the same answers, whether instances are solved here or in processes of their own."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest

from chanopt.solve import Instance, Solution, parallel, solve, solve_all
from tests.solve.brute import random_instances


@pytest.fixture(scope="module")
def instances() -> list[Instance]:
    return list(random_instances(5, 5, channels=(5, 6), values=2, edges=2, readers=(4, 8), blocks=1))


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The processes that are started from here on."""
    seen: list[Any] = []
    real = subprocess.Popen

    def watched(*args: Any, **options: Any) -> Any:
        seen.append(real(*args, **options))
        return seen[-1]

    monkeypatch.setattr(parallel.subprocess, "Popen", watched)
    return seen


def test_processes_give_the_same_answers(instances: list[Instance], started: list[Any]) -> None:
    found = solve_all(instances, processes=2, patience=0)
    assert found == [solve(instance) for instance in instances]
    assert len(started) == 2
    assert all(process.returncode is not None for process in started)
    for instance, solution in zip(instances, found, strict=True):
        solution.check(instance)


@pytest.mark.parametrize("options", [{"processes": 1, "patience": 0}, {}])
def test_no_process_is_started_for_one_or_for_what_is_quick(
    options: Any, instances: list[Instance], started: list[Any]
) -> None:
    assert solve_all(instances, **options) == [solve(instance) for instance in instances]
    assert solve_all(instances[:2], processes=2, patience=0) == [solve(instance) for instance in instances[:2]]
    assert solve_all([]) == []
    assert not started


@pytest.mark.parametrize("executable", ["/nowhere/python", "/bin/true"])
def test_where_no_process_answers_instances_are_solved_here(
    executable: str, instances: list[Instance], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "executable", executable)
    assert solve_all(instances, processes=2, patience=0) == [solve(instance) for instance in instances]


def test_the_command_answers_line_by_line_and_says_what_is_wrong(instances: list[Instance]) -> None:
    def run(text: str) -> subprocess.CompletedProcess[str]:
        words = [sys.executable, "-m", "chanopt.solve", "--time-limit", "5"]
        return subprocess.run(words, input=text, capture_output=True, text=True, check=False)

    answers = run("\n".join(instance.to_json() for instance in instances[:2])).stdout.splitlines()
    assert [Solution.from_json(answer) for answer in answers] == [solve(instance) for instance in instances[:2]]
    wrong = run("{")
    assert wrong.returncode == 1
    assert "an instance" in wrong.stderr
    assert "Traceback" not in wrong.stderr
