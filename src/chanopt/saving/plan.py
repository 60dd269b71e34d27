"""Plans: what rebuilds a slim module, with or without its weights."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from os import PathLike
from types import MappingProxyType
from typing import Any

import torch
from torch import fx, nn

from chanopt.codegen.aten import AtenDialect
from chanopt.codegen.torch_names import OpOverload
from chanopt.errors import ChanoptError, LoadError
from chanopt.frontend.capture import Captured, capture
from chanopt.ir import Program, parse
from chanopt.ir.edit import is_frozen
from chanopt.kernels import tiles
from chanopt.kernels.configs import Tile, tile_of
from chanopt.report import Report
from chanopt.saving.harmless import require_harmless

FORMAT = 1
REPORT = "chanopt"
"""Key of a graph module's ``meta`` under which its report stands."""
_PLAN = "chanopt_plan"
_MOST = 1 << 40  # entries of a tensor: more than any machine holds


@dataclass(frozen=True, slots=True)
class Form:
    """What a tensor looks like, without its values.

    Attributes:
        dtype: the element type's name, e.g. ``float32``.
        shape: its sizes.
        channels_last: whether it lies channels last.
        frozen: whether it is a parameter that was taken out of training.
    """

    dtype: str
    shape: tuple[int, ...]
    channels_last: bool = False
    frozen: bool = False

    @classmethod
    def of(cls, tensor: torch.Tensor) -> Form:
        """The form of a tensor."""
        last = tensor.ndim == 4 and not tensor.is_contiguous()
        last = last and tensor.is_contiguous(memory_format=torch.channels_last)
        return cls(str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape), last, is_frozen(tensor))

    def blank(self) -> torch.Tensor:
        """A tensor of this form whose values say nothing."""
        dtype = getattr(torch, self.dtype, None)
        if not isinstance(dtype, torch.dtype) or min(self.shape, default=0) < 0 or math.prod(self.shape) > _MOST:
            raise LoadError(f"expected the form of a tensor, found {self.dtype} of sizes {list(self.shape)}")
        if self.channels_last:
            made = torch.zeros(self.shape, dtype=dtype).to(memory_format=torch.channels_last)
        else:
            made = torch.zeros((), dtype=dtype).expand(self.shape)  # takes no memory until it is cut
        return nn.Parameter(made, requires_grad=False) if self.frozen else made

    def to_json(self) -> list[Any]:
        """The fields in order."""
        return [self.dtype, list(self.shape), self.channels_last, self.frozen]

    @classmethod
    def from_json(cls, data: Any) -> Form:
        """A form out of :meth:`to_json`; files of before it had a last field have nothing frozen."""
        dtype, shape, *flags = data
        return cls(str(dtype), tuple(map(int, shape)), *map(bool, flags))


@dataclass(frozen=True, slots=True)
class Architecture:
    """How to tell whether a model is one that a plan was made for.

    Attributes:
        name: class name of the model; for messages only.
        modules: names of its modules; empty if it was given as an exported program.
        tensors: sizes of its parameters and buffers, by name; masks and re-parametrisations left out.
        calls: digest of the operators that it runs, in order, and of their arguments but sizes.
    """

    name: str
    modules: tuple[str, ...]
    tensors: Mapping[str, tuple[int, ...]]
    calls: str

    @classmethod
    def of(cls, captured: Captured) -> Architecture:
        """The architecture of a captured model."""
        return cls(captured.name, _plain_modules(captured.modules), _plain_tensors(captured.graph), _calls(captured))


@dataclass(frozen=True)
class Plan:
    """What determines a slim module, apart from its weights: as JSON, without pickle.

    A plan is the optimised program in its text form (docs/ir.md), the form of the tensors it cuts, the architecture
    that it was made from, and the report. It holds no weights: their values come from a state dict.

    Attributes:
        program: the optimised program, without weights.
        weights: the forms of the tensors that the program cuts, by name.
        architecture: the model it was made from.
        report: what was done.
        tiles: the tiles, or ways without one, that :func:`chanopt.kernels.tune` pinned, by node of the module's graph.
    """

    program: Program
    weights: Mapping[str, Form]
    architecture: Architecture
    report: Report = field(compare=False)
    tiles: Mapping[str, Tile] = field(default_factory=dict[str, Tile])

    def __post_init__(self) -> None:
        object.__setattr__(self, "weights", MappingProxyType(dict(self.weights)))
        object.__setattr__(self, "tiles", MappingProxyType(dict(self.tiles)))

    def __reduce__(self) -> Any:
        return Plan.from_json, (self.to_json(),)

    def __deepcopy__(self, _: Any) -> Plan:
        return self  # immutable, like everything in it

    @classmethod
    def of(cls, module: nn.Module) -> Plan:
        """The plan of a module that :func:`chanopt.optimize`, ``load`` or ``apply_plan`` made.

        Raises:
            ChanoptError: it was made by something else, or was optimised in parts; each part has a plan of its own.
        """
        meta = module.meta if isinstance(module, fx.GraphModule) else {}
        plan, report = meta.get(_PLAN), meta.get(REPORT)
        if isinstance(module, fx.GraphModule) and isinstance(plan, Plan) and isinstance(report, Report):
            return replace(plan, report=report, tiles=tiles.pinned(module))
        parts = [name for name, part in module.named_modules() if name and _has_plan(part)]
        if parts:
            raise ChanoptError(
                f"expected a module that was optimised as a whole, found a {type(module).__name__} optimised in parts, "
                f"whose own code no file can hold without pickle; take its parts, one by one: {', '.join(parts)}"
            )
        raise ChanoptError(
            f"expected a module made by chanopt.optimize, found a {type(module).__name__} without a plan "
            "(pickle keeps none; chanopt.save does)"
        )

    def to_json(self) -> str:
        """The plan as JSON; :meth:`from_json` reads it back."""
        hints = self.program.dialect.hints if self.program.dialect is not None else {}
        return json.dumps(
            {
                "format": FORMAT,
                "program": str(self.program).splitlines(),
                "hints": dict(hints),
                "weights": {name: form.to_json() for name, form in self.weights.items()},
                "tiles": {name: config.to_list() for name, config in self.tiles.items()},
                "architecture": {
                    "name": self.architecture.name,
                    "modules": list(self.architecture.modules),
                    "tensors": {name: list(shape) for name, shape in self.architecture.tensors.items()},
                    "calls": self.architecture.calls,
                },
                "report": json.loads(self.report.to_json()),
            }
        )

    @classmethod
    def from_json(cls, text: str) -> Plan:
        """Read a plan from JSON. Runs nothing that stands in it.

        Raises:
            LoadError: the text is not a plan, contradicts itself, or comes from a newer version.
        """
        try:
            data = json.loads(text)
            written = data["format"]
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise LoadError("expected the JSON of a chanopt plan, found something else") from error
        if written != FORMAT:
            raise LoadError(f"expected a plan of format {FORMAT}, found {written!r}; update chanopt to read it")
        try:
            return cls._read(data)
        except LoadError:
            raise
        except _UNREADABLE as error:
            raise LoadError(
                f"expected the JSON of a chanopt plan, found one that was changed: {type(error).__name__}: {error}"
            ) from error

    @classmethod
    def _read(cls, data: Any) -> Plan:
        program = parse("\n".join(data["program"]))
        require_harmless(program)
        weights = {str(name): Form.from_json(form) for name, form in data["weights"].items()}
        hints = {str(size): int(hint) for size, hint in data["hints"].items()}
        about = data["architecture"]
        tensors = {str(name): tuple(map(int, shape)) for name, shape in about["tensors"].items()}
        plan = cls(
            replace(program, dialect=AtenDialect(hints)),
            weights,
            Architecture(str(about["name"]), tuple(map(str, about["modules"])), tensors, str(about["calls"])),
            Report.from_json(json.dumps(data["report"])),
            {str(name): tile_of(config) for name, config in data.get("tiles", {}).items()},
        )
        plan._bound().verify()
        return plan

    def _bound(self) -> Program:
        named = {param.name for op in self.program.ops for param in op.params}
        return replace(self.program, weights={name: self.weights[name].blank() for name in sorted(named)})

    def module(self) -> fx.GraphModule:
        """The slim module without its weights: every floating tensor is NaN until a state dict is loaded.

        Raises:
            LoadError: the plan contradicts itself.
        """
        try:
            module = self._bound().to_module()
            assert isinstance(module, fx.GraphModule)
            tiles.pin(module, self.tiles)
        except _UNREADABLE as error:
            raise LoadError(f"expected a plan that holds together, found {type(error).__name__}: {error}") from error
        with torch.no_grad():
            for tensor in module.state_dict().values():
                if tensor.is_floating_point() or tensor.is_complex():
                    tensor.fill_(float("nan"))
        attach(module, self)
        return module


# What a text that was changed by hand makes our own readers and torch's graph raise.
_UNREADABLE = (
    ChanoptError,
    ArithmeticError,
    AssertionError,
    AttributeError,
    LookupError,
    MemoryError,
    NotImplementedError,
    RecursionError,
    RuntimeError,
    SyntaxError,
    TypeError,
    ValueError,
)


def attach(module: fx.GraphModule, plan: Plan) -> None:
    """Give an emitted module its plan and its report."""
    module.meta[REPORT] = plan.report
    module.meta[_PLAN] = plan


def made_by(captured: Captured, program: Program, report: Report) -> Plan:
    """The plan of an optimised program.

    Args:
        captured: the model.
        program: what the pipeline made of it.
        report: what was done.
    """
    forms = {name: Form.of(tensor) for name, tensor in program.weights.items()}
    return Plan(replace(program, weights={}), forms, Architecture.of(captured), report)


def apply_plan(
    model: nn.Module,
    plan: Plan | str,
    example_inputs: tuple[Any, ...] | None = None,
    kwargs: Mapping[str, Any] | None = None,
) -> fx.GraphModule:
    """The slim module that a plan describes, ready for ``load_state_dict``.

    ``slim.load_state_dict(torch.load(path, weights_only=True))`` then takes any checkpoint of a slim module with this
    plan. Weights never come from ``model``: what a slim weight is depends on what was folded into it. Until a state
    dict is loaded every floating tensor is NaN, so that forgetting it cannot go unseen.

    Args:
        model: an instance of the original architecture, with whatever weights (or none: the meta device serves). It is
            checked against the plan, and not modified.
        plan: a plan, or its JSON.
        example_inputs: if given, the model is captured (it must be in eval mode), and the operators it runs are
            compared too, with their strides, paddings and other arguments; sizes of tensors are not.
        kwargs: keyword inputs, likewise.

    Raises:
        LoadError: the plan was made for another architecture, with the first differences; or its JSON is none.
        ChanoptError: the model is no module, or the plan neither a plan nor a text.
        CaptureError: with example inputs, if the model cannot be captured.
    """
    _require_module(model)
    plan = _plan(plan)
    _require_architecture(model, plan.architecture)
    if example_inputs is not None or kwargs is not None:
        inputs = tuple(example_inputs) if isinstance(example_inputs, tuple | list) else (example_inputs,)
        found = _calls(capture(model, () if example_inputs is None else inputs, kwargs))
        if found != plan.architecture.calls:
            raise LoadError(
                f"expected the operators of the {plan.architecture.name} that the plan was made for, found that this "
                f"{type(model).__name__} runs others, or with other arguments (strides, paddings), on modules of the "
                "same names; build it with the same options"
            )
    return plan.module()


def _require_module(given: Any) -> None:
    if isinstance(given, nn.Module):
        return
    found = f"the class {given.__name__}; make one" if isinstance(given, type) else f"a {type(given).__name__}"
    raise ChanoptError(f"expected a module of the original architecture, found {found}")


def _plan(given: Any) -> Plan:
    if isinstance(given, Plan):
        return given
    if isinstance(given, str):
        return Plan.from_json(given)
    remedy = {
        PathLike: "give the text in it: path.read_text()",
        bytes: "decode it",
        nn.Module: "chanopt.Plan.of(module) is its plan",
        Mapping: "give the text that it was read from",
    }
    told = next((f"; {words}" for kind, words in remedy.items() if isinstance(given, kind)), "")
    raise ChanoptError(f"expected a chanopt.Plan or its JSON, found a {type(given).__name__}{told}")


def _require_architecture(model: nn.Module, wanted: Architecture) -> None:
    found = _plain_tensors(model)
    differences = [
        f"{name} of sizes {list(shape)} (found {list(found[name]) if name in found else 'none'})"
        for name, shape in wanted.tensors.items()
        if found.get(name) != shape
    ]
    if wanted.modules:
        names = set(_plain_modules(tuple(name for name, _ in model.named_modules())))
        differences += [f"module {name} (found none)" for name in wanted.modules if name not in names]
        differences += [f"no module {name} (found one)" for name in sorted(names.difference(wanted.modules))]
    if differences:
        more = f" and {len(differences) - 3} more" if len(differences) > 3 else ""
        raise LoadError(
            f"expected the architecture that the plan was made for, {wanted.name} with {'; '.join(differences[:3])}"
            f"{more}; found {type(model).__name__}; build it with the same options"
        )


_REPARAMETRISED = re.compile(r"(?:^|\.)parametrizations(?:\.|$)")
_ORIGINAL = re.compile(r"((?:.*\.)?)parametrizations\.(\w+)\.original\d*")
_COMPILED = re.compile(r"(^|\.)_orig_mod(?=\.|$)")


def _plain_modules(names: tuple[str, ...]) -> tuple[str, ...]:
    plain = [_uncompiled(name) for name in names if not _REPARAMETRISED.search(name)]
    return tuple(dict.fromkeys(filter(None, plain)))


def _uncompiled(name: str) -> str:
    """A name without what ``torch.compile`` puts between a module and its parts."""
    return _COMPILED.sub("", name).removeprefix(".")


def _plain_tensors(module: nn.Module) -> dict[str, tuple[int, ...]]:
    """Sizes of parameters and persistent buffers under the names that they have without masks on them.

    ``torch.nn.utils.prune`` splits ``weight`` into ``weight_orig`` and ``weight_mask``, ``parametrize`` renames it, or
    makes several tensors of it, the greatest of its sizes (``weight_norm``: a direction, and a length per filter).
    """
    state = {_uncompiled(name): tuple(tensor.shape) for name, tensor in module.state_dict().items()}
    plain: dict[str, tuple[int, ...]] = {}
    for name, shape in state.items():
        stem = name.removesuffix("_orig").removesuffix("_mask")
        original = _ORIGINAL.fullmatch(name)
        if stem != name and f"{stem}_orig" in state and f"{stem}_mask" in state:
            plain[stem] = shape
        elif original is not None:
            name = original[1] + original[2]
            plain[name] = max(plain.get(name, shape), shape, key=math.prod)
        elif not _REPARAMETRISED.search(name):
            plain[name] = shape
    return plain


def _calls(captured: Captured) -> str:
    """A digest of the operators that a graph runs, in order, with their arguments.

    Those of masks are left out with what they compute; sizes are, which differ with the example inputs; and operators
    on memory, of which a capture has more or less with how in-place operators had to be removed.
    """
    graph = captured.graph.graph
    fed: set[fx.Node] = set()
    names: list[str] = []
    for node in graph.nodes:
        depends = node.op == "placeholder" or any(operand in fed for operand in node.all_input_nodes)
        if not depends:
            continue
        fed.add(node)
        if isinstance(node.target, OpOverload) and (name := str(node.target).split(".")[1]) not in _ON_MEMORY:
            spelled = _SPELLINGS.get(name, str(node.target))
            names.append(f"{spelled}{_arguments(node, node.target)}")  # which sizes are open, is no matter
    return hashlib.sha256("\n".join(names).encode()).hexdigest()


_ON_MEMORY = frozenset(
    {"sym_size", "view", "_unsafe_view", "reshape", "flatten", "alias", "detach", "clone", "contiguous", "to"}
    | {"_to_copy", "type_as", "lift_fresh_copy", "dropout", "feature_dropout", "alpha_dropout"}
)
_SPELLINGS = {
    **dict.fromkeys(("batch_norm", "_native_batch_norm_legit_no_training"), "batch_norm"),
    **dict.fromkeys(("chunk", "split", "split_with_sizes"), "split"),
}
"""Operators that are one, taken apart or not."""

_SHAPING = frozenset({"stride", "padding", "dilation", "groups", "output_padding", "kernel_size", "output_size"})
"""Arguments that torch's schemas give the type of a size, and that say what is computed."""


def _arguments(node: fx.Node, target: OpOverload) -> dict[str, Any]:
    """The arguments of a call that are neither tensors nor sizes, nor about memory."""
    schema: Any = target._schema.arguments  # pyright: ignore[reportPrivateUsage]
    given = {argument.name: value for argument, value in zip(schema, node.args, strict=False)} | dict(node.kwargs)
    found: dict[str, Any] = {}
    for argument in schema:
        kind = argument.real_type.str()
        is_size = "SymInt" in kind and argument.name not in _SHAPING
        value = given.get(argument.name, argument.default_value)
        if "Tensor" in kind or is_size or argument.name in _OF_MEMORY | _OF_SPELLING or _is_open(value):
            continue
        found[argument.name] = list(value) if isinstance(value, tuple | list) else value
    return found


_OF_MEMORY = frozenset({"dtype", "layout", "device", "pin_memory", "memory_format", "non_blocking", "copy", "implicit"})
_OF_SPELLING = frozenset({"training", "cudnn_enabled", "chunks"})
"""Arguments that only one spelling of an operator has."""


def _is_open(value: Any) -> bool:
    """Whether an argument is, or holds, something that is only known at run time."""
    items = value if isinstance(value, tuple | list) else (value,)
    return any(isinstance(item, fx.Node | torch.SymInt | torch.SymFloat) for item in items)


def _has_plan(module: nn.Module) -> bool:
    return isinstance(module, fx.GraphModule) and isinstance(module.meta.get(_PLAN), Plan)
