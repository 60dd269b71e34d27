"""Good choices by local search: what the program starts from."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from chanopt.pruning.smcp.allocation.curves import Curves

__all__ = ["ascend", "choices_by_price", "improve"]

_SWEEPS = 20
"""Sweeps over the groups at one price; the choice is usually stable after three."""
_STEPS = 40
"""Prices tried by bisection."""

Choice = tuple[int, ...]
"""Per group, the index of its option."""


def kept_of(curves: Curves, choice: Sequence[int]) -> list[int]:
    """The channels that a choice keeps, per group."""
    return [int(options[option]) for options, option in zip(curves.options, choice, strict=True)]


def ascend(curves: Curves, start: Sequence[int], price: float) -> Choice:
    """Choose the best option of one group after the other at a price, until none changes."""
    choice = list(start)
    kept = kept_of(curves, choice)
    for _ in range(_SWEEPS):
        before = list(choice)
        for group, options in enumerate(curves.options):
            choice[group] = int(np.argmax(curves.values[group] - price * curves.curve(group, kept)))
            kept[group] = int(options[choice[group]])
        if choice == before:
            break
    return tuple(choice)


def choices_by_price(curves: Curves) -> Iterator[Choice]:
    """Locally best choices at prices that close in on the capacity from both sides."""
    instance = curves.instance
    full = tuple(len(options) - 1 for options in curves.options)
    yield full
    total = sum(float(np.ptp(values)) for values in curves.values)
    # At this price the whole value buys the capacity; where there is next to none, a millionth of the whole cost.
    low, high = 0.0, total / max(instance.capacity, 1e-6 * instance.cost(kept_of(curves, full)), 1e-9)
    for _ in range(_STEPS):
        choice = ascend(curves, full, high)
        if instance.cost(kept_of(curves, choice)) <= instance.capacity:
            break
        low, high = high, high * 4
    for _ in range(_STEPS):
        price = (low + high) / 2
        choice = ascend(curves, full, price)
        yield choice
        fits = instance.cost(kept_of(curves, choice)) <= instance.capacity
        low, high = (low, price) if fits else (price, high)


def improve(curves: Curves, choice: Sequence[int]) -> Choice:
    """Take what still fits, then give one group's step up for steps of others, while that gains.

    The choice must be within the capacity; so is every one that is made of it.
    """
    best = _fill(curves, list(choice))
    worth = _value(curves, best)
    gained = True
    while gained:
        gained = False
        for group in range(len(best)):
            if not best[group]:
                continue
            lower = list(best)
            lower[group] -= 1
            if not curves.instance.allows(kept_of(curves, lower)):
                continue
            trial = _fill(curves, lower, group)
            if _value(curves, trial) > worth:
                best, worth, gained = trial, _value(curves, trial), True
    return tuple(best)


def _value(curves: Curves, choice: Sequence[int]) -> float:
    return float(sum(values[option] for values, option in zip(curves.values, choice, strict=True)))


def _fill(curves: Curves, choice: list[int], spared: int = -1) -> list[int]:
    """Raise the group of the best value per cost by one option, as long as one fits; `spared` comes last."""
    kept = kept_of(curves, choice)
    left = curves.instance.capacity - curves.instance.cost(kept)
    stuck: set[int] = set()
    while True:
        steps = [
            step
            for group in range(len(choice))
            if group not in stuck and (step := _step(curves, group, choice, kept)) is not None
        ]
        fitting = [step for step in steps if step[1] <= left]
        # What does not fit now fits later only if another group shrinks, which does not happen here.
        stuck |= {group for _, cost, group in steps if cost > left}
        if not fitting:
            return choice
        _, _, group = max(fitting, key=lambda step: (step[2] != spared, step[0] / max(step[1], 1e-300)))
        choice[group] += 1
        kept[group] = int(curves.options[group][choice[group]])
        left = curves.instance.capacity - curves.instance.cost(kept)


def _step(curves: Curves, group: int, choice: Sequence[int], kept: Sequence[int]) -> tuple[float, float, int] | None:
    """(gained value, added cost, group) of one option more; None at the last, or if it gains nothing."""
    at = choice[group]
    if at + 1 >= len(curves.options[group]):
        return None
    gain = float(curves.values[group][at + 1] - curves.values[group][at])
    if gain <= 0:
        return None
    curve = curves.curve(group, kept)
    return gain, float(curve[at + 1] - curve[at]), group
