"""Instances: what they accept and refuse, and their JSON form."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chanopt.errors import ChanoptError, InstanceError
from chanopt.solve import Block, Edge, Instance, Pin, Preference, Reader
from tests.solve.brute import random_instances

LEAST: dict[str, Any] = {
    "channels": 4,
    "readers": [{"name": "a", "set": [2, 0], "weight": 3}],
    "blocks": [[1, 2]],
}


def test_least_form() -> None:
    expected = Instance(4, (Reader("a", (0, 2), 3),), (Block((1, 2)),))
    assert Instance.from_json(LEAST) == expected
    assert Instance.from_json(json.dumps(LEAST)) == expected
    assert json.loads(expected.to_json()) == {**LEAST, "readers": [{"name": "a", "set": [0, 2], "weight": 3}]}


def test_full_form() -> None:
    instance = Instance(
        5,
        (Reader("a", (2, 0), 1.5, value=1, ordered=True),),
        (Block((1, 2), value=2), Block((0, 1))),
        (Pin(3, (4, 1)),),
        (Edge("e", 0, 4, 2),),
        (Preference((3, 1), 5, 7),),
    )
    assert instance.values == 6
    assert instance.readers[0].set == (2, 0)
    assert json.loads(instance.to_json()) == {
        "channels": 5,
        "readers": [{"name": "a", "set": [2, 0], "weight": 1.5, "value": 1, "ordered": True}],
        "blocks": [{"set": [1, 2], "value": 2}, [0, 1]],
        "pins": [{"value": 3, "sequence": [4, 1]}],
        "edges": [{"name": "e", "source": 0, "target": 4, "weight": 2}],
        "prefer": [{"set": [1, 3], "value": 5, "weight": 7}],
    }
    assert Instance.from_json(instance.to_json()) == instance


def test_random_round_trip() -> None:
    options = {"values": 3, "edges": 2, "blocks": 2, "pins": 2, "ordered": 0.5, "prefer": 2}
    for instance in random_instances(1, 200, **options):
        assert Instance.from_json(instance.to_json()) == instance


@settings(max_examples=60)
@given(st.sets(st.integers(0, 30)), st.floats(0, 1e300) | st.integers(0, 2**60), st.text())
def test_weights_and_names_survive(members: set[int], weight: float, name: str) -> None:
    instance = Instance(31, (Reader(name, tuple(members), weight),))
    again = Instance.from_json(instance.to_json())
    assert again == instance
    assert type(again.readers[0].weight) is type(weight)


def test_channels_from_numpy_become_integers() -> None:
    reader = Reader("a", tuple(np.array([3, 1])), 1)
    assert reader.set == (1, 3)
    assert all(type(channel) is int for channel in reader.set)
    assert json.loads(Instance(4, (Reader("a", (1,), np.int64(3)),)).to_json())["readers"][0]["weight"] == 3
    assert type(Reader("a", (1,), np.float64(0.5)).weight) is float


REFUSED = {
    "channel out of range": (
        lambda: Instance(3, (Reader("conv1", (1, 3), 1),)),
        r"reader 'conv1': expected channels in 0 \.\. 2, found 1 \.\. 3: raise `channels`",
    ),
    "negative channel": (
        lambda: Instance(3, blocks=(Block((-1, 2)),)),
        r"block 0: expected channels in 0 \.\. 2",
    ),
    "pin out of range": (lambda: Instance(3, pins=(Pin(0, (1, 9)),)), r"pin 0: .* found 1 \.\. 9"),
    "wish out of range": (lambda: Instance(3, prefer=(Preference((7,)),)), "preference 0: expected channels"),
    "repeated channel": (lambda: Reader("conv1", (1, 2, 1), 1), r"every channel once, found \[1\] repeated"),
    "channel no integer": (lambda: Reader("conv1", (1.5,), 1), "expected channels as integers"),  # type: ignore[arg-type]
    "no channels at all": (lambda: Pin(0, 3), "expected channels as integers, found 3"),  # type: ignore[arg-type]
    "negative weight": (lambda: Reader("conv1", (1,), -2), "finite weight of at least 0, found -2"),
    "infinite weight": (lambda: Edge("e", 0, 1, float("inf")), "edge 'e': expected a finite weight"),
    "weight not a number": (
        lambda: Preference((1,), 0, float("nan")),
        "a preference: expected a finite weight",
    ),
    "weight a text": (lambda: Reader("conv1", (1,), "2"), "finite weight of at least 0, found '2'"),  # type: ignore[arg-type]
    "same reader twice": (
        lambda: Instance(3, (Reader("a", (1,), 1), Reader("a", (2,), 1))),
        r"every reader name once, found \['a'\] repeated",
    ),
    "same edge twice": (
        lambda: Instance(3, edges=(Edge("e", 0, 1, 1), Edge("e", 0, 1, 1))),
        r"every edge name once, found \['e'\]",
    ),
    "edge to itself": (lambda: Edge("e", 2, 2, 1), "expected two values, found value 2 twice"),
    "negative value": (lambda: Reader("a", (1,), 1, value=-1), "a value number from 0 up, found -1"),
    "value no integer": (lambda: Block((1,), value=0.5), "a value number from 0 up, found 0.5"),  # type: ignore[arg-type]
    "channels no integer": (lambda: Instance(2.0), "number of channels as an integer"),  # type: ignore[arg-type]
    "contrary blocks": (
        lambda: Instance(4, blocks=(Block((0, 1)), Block((1, 2)), Block((1, 3)))),
        "value 0: expected an order in which its pins and blocks are ranges, found none once block 2",
    ),
    "contrary pins": (
        lambda: Instance(4, pins=(Pin(1, (0, 1)), Pin(1, (1, 0)))),
        "value 1: expected an order .* once pin 1 is added",
    ),
    "block against pin": (
        lambda: Instance(4, blocks=(Block((0, 2)),), pins=(Pin(0, (0, 1, 2)),)),
        "once block 0",
    ),
    "no JSON": (lambda: Instance.from_json("{"), "an instance: expected JSON text"),
    "JSON list": (lambda: Instance.from_json("[]"), "expected a JSON object, found list"),
    "unknown key": (lambda: Instance.from_json({**LEAST, "edgse": []}), r"found \['edgse'\] unknown"),
    "missing key": (lambda: Instance.from_json({"readers": []}), r"and \['channels'\] missing"),
    "reader without weight": (
        lambda: Instance.from_json({"channels": 3, "readers": [{"name": "a", "set": []}]}),
        r"readers\[0\]: .* \['weight'\] missing",
    ),
    "readers no list": (
        lambda: Instance.from_json({"channels": 3, "readers": {}}),
        "readers: expected a list",
    ),
    "block no list": (lambda: Instance.from_json({"channels": 3, "blocks": [3]}), "a block: expected a list"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refuses(case: str) -> None:
    build, message = REFUSED[case]
    with pytest.raises(InstanceError, match=message) as caught:
        build()
    assert isinstance(caught.value, ChanoptError)
    assert isinstance(caught.value, ValueError)


def test_contrary_blocks_of_two_values_are_allowed() -> None:
    blocks = (Block((0, 1)), Block((1, 2)), Block((1, 3), value=1))
    assert Instance(4, blocks=blocks).values == 2
