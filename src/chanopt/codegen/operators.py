"""From an op of a program to the operator that it stands for, and to that operator's arguments."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch

from chanopt.errors import IRError
from chanopt.ir import Arg, Op


def resolve(target: str) -> Callable[..., Any]:
    """The callable behind a target such as ``aten.conv2d.default`` or ``operator.mul``.

    Raises:
        IRError: there is no such operator in this process.
    """
    namespace, _, rest = target.partition(".")
    try:
        if namespace == "torch" and rest.startswith("sym_"):
            return getattr(torch, rest)
        if namespace == "operator":
            return getattr(operator, rest)
        packet, _, overload = rest.rpartition(".")
        return getattr(getattr(getattr(torch.ops, namespace), packet), overload)
    except AttributeError:
        raise IRError(
            f"expected an operator registered in this process, found {target}; import its package first"
        ) from None


def real_args(op: Op, real: Callable[[Any], Any]) -> tuple[list[Any], dict[str, Any]]:
    """The arguments and keyword arguments of an op, with tuples as lists, and every leaf made real."""
    return [_listed(arg, real) for arg in op.args], {key: _listed(arg, real) for key, arg in op.kwargs}


def _listed(arg: Arg, real: Callable[[Any], Any]) -> Any:
    return [_listed(item, real) for item in arg] if isinstance(arg, tuple) else real(arg)
