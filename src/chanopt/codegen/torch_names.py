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
