"""The allocation program: how many channels each group keeps, with the true cost of every layer.

Plain data in, plain data out; knows neither torch nor the rest of the compiler.
"""

from __future__ import annotations

from chanopt.pruning.smcp.allocation.instance import Group, Instance, Layer, Product, Table
from chanopt.pruning.smcp.allocation.knapsack import Knapsack, Pick, condense, solve_dp, solve_halving, solve_pareto
from chanopt.pruning.smcp.allocation.linearised import Linearised, group_cost, linearise, solve_linearised
from chanopt.pruning.smcp.allocation.program import allocate
from chanopt.pruning.smcp.allocation.solution import Allocation

__all__ = [
    "Allocation",
    "Group",
    "Instance",
    "Knapsack",
    "Layer",
    "Linearised",
    "Pick",
    "Product",
    "Table",
    "allocate",
    "condense",
    "group_cost",
    "linearise",
    "solve_dp",
    "solve_halving",
    "solve_linearised",
    "solve_pareto",
]
