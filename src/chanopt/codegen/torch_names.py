"""What chanopt takes from torch that torch gives no public name: kept in one place, for the next release of torch."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx
from torch.fx import graph as fx_graph

OpOverload = torch._ops.OpOverload  # pyright: ignore[reportPrivateUsage]
PyTreeCodeGen = fx_graph._PyTreeCodeGen  # pyright: ignore[reportPrivateUsage]
PyTreeInfo = fx_graph._PyTreeInfo  # pyright: ignore[reportPrivateUsage]


def pytree_info(graph: fx.Graph) -> PyTreeInfo:
    """How the user calls an exported graph: names of the arguments, structures of inputs and outputs."""
    codegen: Any = graph._codegen  # pyright: ignore[reportPrivateUsage]
    return codegen.pytree_info


def parameters(operator: OpOverload) -> list[Any]:
    """The declared parameters of an ATen operator, in order."""
    return operator._schema.arguments  # pyright: ignore[reportPrivateUsage]


def results(operator: OpOverload) -> list[Any]:
    """What an ATen operator is declared to answer, in order."""
    return operator._schema.returns  # pyright: ignore[reportPrivateUsage]


def is_mutable(operator: OpOverload) -> bool:
    """Whether an ATen operator is declared to write into an operand."""
    return operator._schema.is_mutable  # pyright: ignore[reportPrivateUsage]


def is_composite(operator: OpOverload) -> bool:
    """Whether an ATen operator is made of others, so that its declaration does not tell what shares memory."""
    return operator.has_kernel_for_dispatch_key(torch._C.DispatchKey.CompositeImplicitAutograd)  # pyright: ignore


def is_kept(operator: OpOverload) -> bool:
    """Whether ``run_decompositions({})`` keeps an operator if it is composite: one that shares no memory, it says."""
    shares = any(parameter.alias_info is not None for parameter in parameters(operator))
    return not shares and torch.Tag.maybe_aliasing_or_mutating not in operator.tags


def is_transformed() -> bool:
    """Whether ``torch.func`` is at work: a tensor may then stand for many."""
    return torch._C._are_functorch_transforms_active()  # pyright: ignore[reportPrivateUsage]
