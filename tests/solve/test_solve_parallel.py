"""`solve_all`: the same answers, whether instances are solved here or in processes of their own."""

from __future__ import annotations

import subprocess
import sys

import pytest

from chanopt.solve import Instance, Solution, parallel, solve, solve_all
from tests.solve.brute import random_instances


@pytest.fixture(scope="module")
def instances() -> list[Instance]:
    return list(random_instances(5, 4, channels=(5, 6), values=2, edges=2, readers=(4, 8), blocks=1))


def started(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The instances that processes are started for, from here on."""
    seen: list[str] = []
    real = subprocess.run

    def watched(*args: object, **options: object) -> object:
        seen.append(str(options["input"]))
        return real(*args, **options)  # type: ignore[call-overload]

    monkeypatch.setattr(parallel.subprocess, "run", watched)
    return seen


def test_processes_give_the_same_answers(instances: list[Instance], monkeypatch: pytest.MonkeyPatch) -> None:
    seen = started(monkeypatch)
    found = solve_all(instances, processes=2, patience=0)
    assert found == [solve(instance) for instance in instances]
    assert sorted(seen) == sorted(instance.to_json() for instance in instances)
    for instance, solution in zip(instances, found, strict=True):
        solution.check(instance)


@pytest.mark.parametrize("options", [{"processes": 1, "patience": 0}, {}])
def test_no_process_is_started_for_one_or_for_what_is_quick(
    options: dict[str, int], instances: list[Instance], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = started(monkeypatch)
    assert solve_all(instances, **options) == [solve(instance) for instance in instances]
    assert not seen


def test_where_no_process_can_be_started_instances_are_solved_here(
    instances: list[Instance], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    assert solve_all(instances, processes=2, patience=0) == [solve(instance) for instance in instances]


def test_the_command_reads_and_writes_json_and_says_what_is_wrong(instances: list[Instance]) -> None:
    def run(text: str) -> subprocess.CompletedProcess[str]:
        words = [sys.executable, "-m", "chanopt.solve", "--time-limit", "5"]
        return subprocess.run(words, input=text, capture_output=True, text=True, check=False)

    assert Solution.from_json(run(instances[0].to_json()).stdout) == solve(instances[0])
    wrong = run("{")
    assert wrong.returncode == 1
    assert "an instance" in wrong.stderr
    assert "Traceback" not in wrong.stderr
