"""What a program that comes out of a file may hold.

``torch.fx`` writes Python source for a graph and runs it, so a name in a file can become code. Everything that reaches
that source is checked here, before a module is made: names are names, literals are literals, targets are operators.
"""

from __future__ import annotations

import json
import keyword
import re
from collections.abc import Iterator
from typing import Any

import torch

from chanopt.codegen.operators import resolve
from chanopt.codegen.torch_names import OpOverload, parameters
from chanopt.errors import IRError
from chanopt.ir import Kind, Marker, Op, Param, Program, Read, leaves

_OPERATOR = re.compile(r"(?!_)\w+\.(?!__)\w+\.(?!__)\w+")
_PART = re.compile(r"(?!__)[^\"'\\.\x00-\x1f\x7f\u2028\u2029]+")
_SIZES = frozenset({"add", "sub", "mul", "floordiv", "truediv", "mod", "pow", "neg", "getitem", "eq", "ne"})
_SIZES_TOO = frozenset({"lt", "le", "gt", "ge", "and_", "or_", "not_", "abs"})
_LITERALS = (bool, int, float, str, torch.dtype, torch.layout, torch.memory_format, torch.device)
_OUR_OWN = frozenset({"input", "output", "alias"})


def require_harmless(program: Program) -> None:
    """Check that making and running a module of this program runs nothing but tensor operators.

    Raises:
        IRError: a name that is none, an argument that is no literal, a target that is no operator of this process.
    """
    for name in program.interface.arguments:
        _require_identifier(name, "an argument of the model")
    for spec in (program.interface.inputs, program.interface.outputs):
        _require_plain_structure(json.loads(spec))
    for op in program.ops:
        _require_harmless_op(op)


def _require_harmless_op(op: Op) -> None:
    if op.target not in _OUR_OWN:
        _require_operator(op.target)
    if op.kind is Kind.SOURCE:
        _require_identifier(op.args[0] if len(op.args) == 1 else op.args, "an input of the model")
    for key, _ in op.kwargs:
        _require_identifier(key, f"a keyword of {op.target}")
    for leaf in leaves((op.args, tuple(arg for _, arg in op.kwargs))):
        _require_literal(leaf, op)


def _require_identifier(name: Any, what: str) -> None:
    if not isinstance(name, str) or not name.isidentifier() or keyword.iskeyword(name):
        raise IRError(f"expected the name of {what} to be a Python name, found {name!r}")


def _require_operator(target: str) -> None:
    namespace, _, rest = target.partition(".")
    if namespace == "operator" and rest in _SIZES | _SIZES_TOO:
        return
    found = resolve(target) if namespace != "operator" and _OPERATOR.fullmatch(target) else None
    if not isinstance(found, OpOverload):
        raise IRError(f"expected a tensor operator, found {target}")
    if any(argument.name == "filename" for argument in parameters(found)):
        raise IRError(f"expected an operator that touches tensors alone, found {target}, which touches files")


def _require_literal(leaf: Any, op: Op) -> None:
    if isinstance(leaf, Param):
        wrong = [part for part in leaf.name.split(".") if not _PART.fullmatch(part)]
        if wrong:
            raise IRError(f"expected the name of a parameter, found {leaf.name!r} in {op.target}")
        return
    if leaf is not None and not isinstance(leaf, (*_LITERALS, Read, Marker)):
        raise IRError(f"expected a literal argument of {op.target}, found {leaf!r}")


def _require_plain_structure(spec: Any) -> None:
    """Refuse structures that would make torch import a module by name: enumerations, default factories."""
    for text in _contexts(spec):
        context = _decoded(text)
        if _has_object(context):
            raise IRError(f"expected inputs and outputs in tuples, lists and dicts with names, found {text}")
        for name in context if isinstance(context, list) else ():
            if isinstance(name, str) and not _PART.fullmatch(name):
                raise IRError(f"expected the name of an input or output, found {name!r}")


def _decoded(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text  # the name of a named tuple's class, say


def _has_object(context: Any) -> bool:
    return isinstance(context, dict) or (isinstance(context, list) and any(map(_has_object, context)))


def _contexts(spec: Any) -> Iterator[str]:
    if isinstance(spec, list):
        for item in spec:
            yield from _contexts(item)
    if isinstance(spec, dict):
        context = spec.get("context")
        if context is not None:
            yield context if isinstance(context, str) else json.dumps(context)
        yield from _contexts(spec.get("children_spec", []))
