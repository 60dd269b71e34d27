"""Readable, specialised source of a kernel: the parametrised function with its constants folded in.

`emit` substitutes compile-time arguments, folds what has become constant, drops branches that are never taken and
pointers that are never read, and specialises the helpers that are called. The result is a Python file that Triton can
compile by itself, to the same PTX as the parametrised kernel with the same constants (a test compares them), and that a
person can read, profile, and change. Two uses with the same specialisation share one file.
"""

from __future__ import annotations

import ast
import hashlib
import importlib.util
import inspect
import operator
import os
import sys
import textwrap
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from chanopt.kernels.configs import Config
from chanopt.kernels.launch import absent, constants
from chanopt.kernels.problem import Kind, Problem

# A folder named here is where kernels are written to, and run from; else the parametrised ones run.
DIRECTORY = "CHANOPT_EMIT_DIR"

_OPERATORS: dict[type[ast.AST], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.LShift: operator.lshift,
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
}

_HEADER = '''"""{title}.

Emitted by chanopt {version} from chanopt.kernels.triton_conv.{kernel} with
{settings}
"""

import triton
import triton.language as tl

'''


def name_of(problem: Problem, config: Config) -> str:
    """A name that says what a kernel is specialised on; the same for every use of it."""
    parts = [problem.kind.value, problem.dtype]
    if problem.dtype == "fp32" and problem.kind is not Kind.DEPTHWISE:
        parts.append(problem.precision)
    if problem.kind is not Kind.POINT:
        parts.append(f"{problem.kernel[0]}x{problem.kernel[1]}")
        parts.append(f"g{problem.group}")
    if problem.kind is Kind.CONV and not problem.unit:
        parts.append("strided" if problem.point else "padded")
    parts += ["affine"] * problem.affine + [f"pre_{problem.pre_act}"] * (problem.pre_act != "none")
    parts += ["bias"] * problem.bias + [problem.residual] * (problem.residual != "none")
    parts += [problem.act] * (problem.act != "none")
    return "_".join([*parts, f"{config.block_m}x{config.block_n}x{config.block_k}"])


def chanopt_version() -> str:
    """The version of chanopt; the package itself stands above this part."""
    return sys.modules[__name__.partition(".")[0]].__version__


def source(problem: Problem, config: Config) -> str:
    """The text of a module whose one kernel, called `name_of(problem, config)`, does what the parametrised one does."""
    from chanopt.kernels import triton_conv

    name = name_of(problem, config)
    values = constants(problem, config)
    shown = ", ".join(f"{key}={value!r}" for key, value in values.items())
    header = _HEADER.format(
        title=name,
        version=chanopt_version(),
        kernel=problem.kind.value,
        settings=textwrap.fill(shown, 116),
    )
    folder = _Folder(values | dict.fromkeys(absent(problem)), {"activate": triton_conv.activate})
    kernel = folder.function(triton_conv.KERNELS[problem.kind.value], name)
    sizes = textwrap.fill(str(triton_conv.SIZES[problem.kind.value]), 116, subsequent_indent=" ").replace("'", '"')
    decorator = f"SIZES = {sizes}\n\n\n@triton.jit(do_not_specialize=SIZES)\n"
    helpers = "".join(f"@triton.jit\n{helper}\n\n\n" for helper in folder.helpers.values())
    return f"{header}\n{helpers}{decorator}{kernel}\n"


def emit(problem: Problem, config: Config, directory: Path) -> Path:
    """Write a kernel's source, unless it is there, and return its file.

    A file that was changed by hand stays as it is: its name holds a hash of the text that chanopt would write.
    """
    text = source(problem, config)
    digest = hashlib.sha256(text.encode()).hexdigest()[:10]
    path = directory / f"{name_of(problem, config)}_{digest}.py"
    if not path.exists():
        directory.mkdir(parents=True, exist_ok=True)
        # Another process may read the file while this one writes it.
        draft = path.with_suffix(f".{os.getpid()}.tmp")
        draft.write_text(text, encoding="utf-8")
        draft.replace(path)
    return path


def load(path: Path, name: str) -> Any:
    """The kernel in an emitted file. Triton reads a kernel's source from its file, so text alone would not do."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module: ModuleType = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return getattr(module, name)


_KERNELS: dict[tuple[str, str], Any] = {}


def emitted(problem: Problem, config: Config) -> Any:
    """The emitted kernel if the environment names a folder for them, else None. Loaded once a specialisation."""
    directory = os.environ.get(DIRECTORY)
    if not directory:
        return None
    name = name_of(problem, config)
    if (directory, name) not in _KERNELS:
        _KERNELS[directory, name] = load(emit(problem, config, Path(directory)), name)
    return _KERNELS[directory, name]


class _Folder(ast.NodeTransformer):
    """Constant folding over the few constructs that the kernels use.

    Attributes:
        values: names that stand for a constant.
        helpers: text of the helpers that were specialised, by name.
    """

    def __init__(self, values: Mapping[str, Any], functions: Mapping[str, Any]) -> None:
        self.values = dict(values)
        self.functions = functions
        self.helpers: dict[str, str] = {}

    def function(self, kernel: Any, name: str) -> str:
        """The text of a kernel under another name, specialised."""
        tree = ast.parse(textwrap.dedent(inspect.getsource(kernel.fn))).body[0]
        assert isinstance(tree, ast.FunctionDef)
        tree.name = name
        tree.decorator_list = []
        tree.body = [made for statement in tree.body for made in _listed(self.visit(statement))]
        used = {n.id for n in ast.walk(tree) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Load)}
        tree.body = [statement for statement in tree.body if not _is_unread_constant(statement, used)]
        # Sizes that nothing reads stay, so that both forms of a kernel have the same parameters.
        arguments = ", ".join(arg.arg for arg in tree.args.args if arg.arg not in self.values)
        tree.args.args = []
        text = ast.unparse(ast.fix_missing_locations(tree))
        return text.replace(f"def {name}():", _signature(name, arguments), 1)

    def visit_Name(self, node: ast.Name) -> ast.AST:
        if isinstance(node.ctx, ast.Load) and node.id in self.values:
            return ast.Constant(self.values[node.id])
        return node

    def visit_BinOp(self, node: ast.BinOp) -> ast.AST:
        self.generic_visit(node)
        if not isinstance(node.left, ast.Constant):
            return node
        if isinstance(node.right, ast.Constant) and type(node.op) in _OPERATORS:
            return ast.Constant(_OPERATORS[type(node.op)](node.left.value, node.right.value))
        return node.right if isinstance(node.op, ast.Mult) and node.left.value == 1 else node

    def visit_UnaryOp(self, node: ast.UnaryOp) -> ast.AST:
        self.generic_visit(node)
        if isinstance(node.op, ast.Not) and isinstance(node.operand, ast.Constant):
            return ast.Constant(not node.operand.value)
        return node

    def visit_Compare(self, node: ast.Compare) -> ast.AST:
        self.generic_visit(node)
        right = node.comparators[0]
        if isinstance(node.left, ast.Constant) and isinstance(right, ast.Constant):
            return ast.Constant(_OPERATORS[type(node.ops[0])](node.left.value, right.value))
        return node

    def visit_BoolOp(self, node: ast.BoolOp) -> ast.AST:
        self.generic_visit(node)
        is_and = isinstance(node.op, ast.And)
        known = [bool(value.value) for value in node.values if isinstance(value, ast.Constant)]
        if any(value != is_and for value in known):
            return ast.Constant(not is_and)
        unknown = [value for value in node.values if not isinstance(value, ast.Constant)]
        if not unknown:
            return ast.Constant(is_and)
        return unknown[0] if len(unknown) == 1 else ast.BoolOp(node.op, unknown)

    def visit_If(self, node: ast.If) -> Any:
        node.test = self.visit(node.test)
        if isinstance(node.test, ast.Constant):
            taken = node.body if node.test.value else node.orelse
            return [made for statement in taken for made in _listed(self.visit(statement))]
        self.generic_visit(node)
        return node

    def visit_Call(self, node: ast.Call) -> ast.AST:
        self.generic_visit(node)
        if not (isinstance(node.func, ast.Name) and node.func.id in self.functions):
            return node
        helper = self.functions[node.func.id]
        known = {
            name: arg.value
            for name, arg in zip(helper.arg_names, node.args, strict=True)
            if isinstance(arg, ast.Constant)
        }
        if set(known.values()) == {"none"}:
            return node.args[0]
        name = "_".join(str(value) for value in known.values())
        self.helpers.setdefault(name, _Folder(known, {}).function(helper, name))
        return ast.Call(ast.Name(name, ast.Load()), [arg for arg in node.args if not isinstance(arg, ast.Constant)], [])

    def visit_Assign(self, node: ast.Assign) -> Any:
        self.generic_visit(node)
        target = node.targets[0]
        same = isinstance(target, ast.Name) and isinstance(node.value, ast.Name) and target.id == node.value.id
        return None if same else node


def _signature(name: str, arguments: str) -> str:
    """The line that opens a function, its arguments below it where they are many."""
    short = f"def {name}({arguments}):"
    if len(short) <= 100:
        return short
    filled = textwrap.fill(arguments, 112, initial_indent="    ", subsequent_indent="    ")
    return f"def {name}(\n{filled},\n):"


def _is_unread_constant(statement: ast.stmt, read: set[str]) -> bool:
    """Whether a statement gives a constant a name that nothing reads."""
    if not (isinstance(statement, ast.Assign) and isinstance(statement.value, ast.Constant)):
        return False
    return isinstance(statement.targets[0], ast.Name) and statement.targets[0].id not in read


def _listed(made: Any) -> list[ast.stmt]:
    """Statements that a visit left; docstrings go, the file has its own."""
    statements = made if isinstance(made, list) else [] if made is None else [made]
    return [s for s in statements if not (isinstance(s, ast.Expr) and isinstance(s.value, ast.Constant))]
