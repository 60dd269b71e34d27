"""S17 and S21: ratios per epoch, and counts of what changed."""

from __future__ import annotations

import math

import pytest

from chanopt.errors import AllocationError
from chanopt.pruning.smcp import Schedule
from chanopt.pruning.smcp.tracking import Tracker

RAMPS = {
    "exp": [0.0826, 0.1611, 0.2358, 0.3069, 0.3745, 0.4388],
    "exp2": [0.0943, 0.1797, 0.257, 0.327, 0.3905, 0.448],
    "linear": [0.0714, 0.1429, 0.2143, 0.2857, 0.3571, 0.4286],
}


@pytest.mark.parametrize("curve", RAMPS)
def test_s17_ramps_to_the_digit(curve: str) -> None:
    schedule = Schedule(0.5, epochs=12, warmup=2, ramp=6, cooldown=4, curve=curve)  # type: ignore[arg-type]
    found = [schedule.at(epoch) for epoch in range(12)]
    assert found[:2] == [0, 0]
    assert found[2:8] == pytest.approx(RAMPS[curve], abs=5e-5)
    assert found[8:] == [0.5] * 4


def test_s17_formulas() -> None:
    for t in range(1, 6):
        assert Schedule(0.3, 20, 0, 5, 0).at(t - 1) == pytest.approx(
            0.3 * (1 - math.exp(-0.05 * t)) / (1 - math.exp(-0.05 * 6))
        )
        assert Schedule(0.3, 20, 0, 5, 0, curve="exp2").at(t - 1) == pytest.approx(1 - 0.7 ** (t / 6))


def test_defaults_are_those_of_the_paper() -> None:
    schedule = Schedule(0.5)
    assert (schedule.epochs, schedule.warmup, schedule.ramp, schedule.cooldown, schedule.every) == (90, 10, 55, 25, 80)
    assert schedule.curve == "exp"


def test_s18_when_masks_are_chosen() -> None:
    schedule = Schedule(0.5, epochs=6, warmup=1, ramp=2, cooldown=2, every=3)
    steps = [(epoch, epoch * 4 + batch) for epoch in range(6) for batch in range(4)]
    assert [step for epoch, step in steps if schedule.prunes(epoch, step)] == [6, 9, 12, 15]
    assert not Schedule(0.0, 6, 1, 2, 2, every=1).prunes(3, 0)


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"ratio": 1.0}, "ratio"),
        ({"ratio": -0.1}, "ratio"),
        ({"ratio": 0.5, "epochs": 80}, "within 80 epochs"),
        ({"ratio": 0.5, "every": 0}, "at least one step"),
        ({"ratio": 0.5, "curve": "cubic"}, "'exp2'"),
    ],
)
def test_schedules_that_make_no_sense(given: dict[str, object], told: str) -> None:
    with pytest.raises(AllocationError, match=told):
        Schedule(**given)  # type: ignore[arg-type]


def test_s21_counters_by_hand() -> None:
    tracker = Tracker({"a": 4, "b": 2}, {"a": 10, "b": 30})
    first = tracker.record(5, {"a": [True, False, False, True], "b": [True, True]})
    assert (first.pruned, first.newly, first.returned) == (2 / 6, 2 / 6, 0)
    assert (first.weights, first.newly_weights, first.returned_weights) == (0.2, 0.2, 0)
    second = tracker.record(9, {"a": [True, True, False, True], "b": [False, True]})
    assert (second.pruned, second.newly, second.returned) == (2 / 6, 1 / 6, 1 / 6)
    assert (second.weights, second.newly_weights, second.returned_weights) == (0.4, 0.3, 0.1)
    assert tracker.last_change == {"a": [-1, 9, 5, -1], "b": [9, -1]}
    assert tracker.settled(9) == pytest.approx(4 / 6)
    assert tracker.settled(5) == pytest.approx(3 / 6)
    again = Tracker({"a": 4, "b": 2}, {"a": 10, "b": 30})
    again.restore(tracker.state())
    assert again.record(12, {"a": [True] * 4, "b": [True] * 2}) == tracker.record(
        12, {"a": [True] * 4, "b": [True] * 2}
    )
