"""The permutation program: an exact order of channels in which as few readers as possible must gather.

Plain data in, plain data out; knows neither torch nor the rest of the compiler.
"""

from __future__ import annotations

from chanopt.solve.instance import Block, Edge, Instance, Pin, Preference, Reader
from chanopt.solve.parallel import solve_all
from chanopt.solve.pqtree import PQTree
from chanopt.solve.solution import Solution
from chanopt.solve.solver import solve

__all__ = ["Block", "Edge", "Instance", "PQTree", "Pin", "Preference", "Reader", "Solution", "solve", "solve_all"]
