"""What is decided about one problem."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Decision"]


@dataclass(frozen=True, slots=True)
class Decision:
    """The free items of a problem, hard ones included, the links that are cut, and what is proven."""

    free: frozenset[int]
    cut: frozenset[int]
    cost: int
    bound: int
    """What any choice pays at least; `cost` if this choice is proven to be the best."""
    cuts: int = 0
    masters: int = 0
