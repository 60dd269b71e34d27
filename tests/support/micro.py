"""MICRO: some 260 small networks with one feature each, by name.

What each is for stands in its `note`; the families are in `tests.support.nets`.
"""

from __future__ import annotations

from tests.support.nets import blocks, channels, convs, interfaces, joins, linears, norms
from tests.support.nets.base import MICRO, Inputs, Micro

FAMILIES = (norms, channels, joins, convs, linears, blocks, interfaces)
"""The modules whose import fills MICRO."""

__all__ = ["FAMILIES", "MICRO", "Inputs", "Micro"]
