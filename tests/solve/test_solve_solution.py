"""Solutions: their check catches whatever is changed, and their JSON form."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import fields, replace

import pytest

from chanopt.errors import InstanceError
from chanopt.solve import Block, Edge, Instance, Pin, Reader, Solution, solve
from tests.solve.brute import random_instances

INSTANCE = Instance(
    5,
    (
        Reader("a", (0, 1), 4),
        Reader("b", (1, 2), 5),
        Reader("c", (0, 2), 6, value=1),
        Reader("d", (0, 3, 4), 7, value=1),
        Reader("e", (2, 3), 1, value=1),
    ),
    (Block((3, 4)),),
    (Pin(1, (4, 3)),),
    (Edge("join", 0, 1, 2),),
)


def test_known_solution() -> None:
    solution = solve(INSTANCE)
    assert (solution.objective, solution.bound, solution.optimal) == (3, 3, True)
    assert (solution.gathered, solution.cut, solution.parts) == (("e",), ("join",), (0, 1))
    solution.check(INSTANCE)


TAMPERED = {
    "order": ({"order": (4, 3, 2, 1, 0)}, "order: expected"),
    "a channel twice": ({"orders": ((0, 0, 1, 2, 3),) * 2}, r"value 0: expected a permutation of 0 \.\. 4"),
    "a channel missing": ({"orders": ((0, 1, 2, 3),) * 2}, "value 0: expected a permutation"),
    "a value missing": ({"orders": ((0, 1, 2, 3, 4),)}, "orders: expected 2, one per value, found 1"),
    "block apart": (
        {"order": (3, 0, 1, 2, 4), "orders": ((3, 0, 1, 2, 4),) * 2},
        "block 0: expected one range",
    ),
    "pin turned": (
        {"order": (0, 1, 2, 3, 4), "orders": ((0, 1, 2, 3, 4),) * 2},
        "pin 0: expected its sequence",
    ),
    "gathered": ({"gathered": ()}, r"gathered: expected \('e',\) from the orders, found \(\)"),
    "cut": ({"cut": ()}, r"cut: expected \('join',\)"),
    "parts": ({"parts": (0, 0)}, r"parts: expected \(0, 1\)"),
    "objective": ({"objective": 2}, "objective: expected 3 from the orders, found 2"),
    "bound above": ({"bound": 4}, "expected a bound below the objective"),
    "bound below, optimal": ({"bound": 2}, "found bound 2, objective 3, optimal True"),
    "not optimal, bound equal": ({"optimal": False}, "found bound 3, objective 3, optimal False"),
}


@pytest.mark.parametrize("case", TAMPERED)
def test_check_catches(case: str) -> None:
    changes, message = TAMPERED[case]
    with pytest.raises(InstanceError, match=message):
        replace(solve(INSTANCE), **changes).check(INSTANCE)


def test_check_knows_another_instance() -> None:
    with pytest.raises(InstanceError, match="gathered: expected"):
        solve(INSTANCE).check(replace(INSTANCE, readers=INSTANCE.readers[:4]))


def test_json_round_trip() -> None:
    options = {"values": 3, "edges": 3, "channels": (1, 5), "ordered": 0.3}
    for instance in random_instances(2, 60, **options):
        solution = solve(instance)
        again = Solution.from_json(solution.to_json())
        assert again == solution
        assert again.seconds == solution.seconds
        again.check(instance)
        for first, second in ((0, 1), (1, 2), (0, 2)):
            if max(first, second) < instance.values and solution.parts[first] == solution.parts[second]:
                assert again.orders[first] is again.orders[second]


def test_json_names_every_field() -> None:
    table = json.loads(solve(INSTANCE).to_json())
    assert set(table) == {item.name for item in fields(Solution)}
    assert sorted(table["order"]) == [0, 1, 2, 3, 4]


def test_json_refuses_what_is_no_solution() -> None:
    with pytest.raises(InstanceError, match=r"a solution: .*\['orde'\] unknown"):
        Solution.from_json({"orde": []})
    with pytest.raises(InstanceError, match="a solution: expected JSON text"):
        Solution.from_json("no")


def test_a_cut_that_changes_nothing_is_not_paid() -> None:
    """Where the two sides of an edge end up with one order, they are one part and the edge is free."""
    readers = tuple(Reader(f"r{i}", (i, i + 1), 1, value=i % 2) for i in range(4))
    solution = solve(Instance(5, readers, edges=(Edge("join", 0, 1, 0),)))
    assert (solution.cut, solution.parts, solution.objective) == ((), (0, 0), 0)


def test_import_needs_neither_torch_nor_ortools() -> None:
    code = "import sys, chanopt.solve; print([m for m in ('torch', 'ortools') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
