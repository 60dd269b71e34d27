"""Inductor for a slim graph, when Dynamo compiles it and again later, when its weights have changed."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from copy import deepcopy
from typing import Any

import torch
from torch import fx
from torch._guards import TracingContext, detect_fake_mode, tracing
from torch._inductor.compile_fx import compile_fx
from torch.utils import _pytree as pytree

_LOG = logging.getLogger(__name__)
Compiled = Callable[..., Any]


def compile_slim(
    module: fx.GraphModule, given: Sequence[Any], traced: Sequence[Any], patches: Mapping[str, Any]
) -> tuple[Compiled, Callable[..., bool] | None]:
    """Compile a slim graph for the sizes that Dynamo left open.

    Args:
        module: the slim graph; not modified.
        given: its inputs as Dynamo traced them, with symbolic sizes.
        traced: all inputs of Dynamo's graph, likewise.
        patches: Inductor's configuration.

    Returns:
        What runs it, and what must hold for its inputs. While Dynamo compiles, conditions on sizes become conditions
        of its own (None here); later nobody else would look at them.
    """
    mode: Any = detect_fake_mode(list(traced))
    env: Any = mode.shape_env
    known = len(env.guards) if env is not None and env.frozen else None
    with _thawed(env):
        run = _compiled(module, given, mode, patches)
    run = _copying(run, _own_outputs(module))
    added = env.guards[known:] if env is not None and known is not None else []
    condition = env.produce_guards_expression(list(given), guards=added) if env is not None and added else None
    if env is None or condition is None:
        return run, None
    return run, lambda *inputs: bool(env.evaluate_guards_expression(condition, list(inputs)))


def _compiled(module: fx.GraphModule, given: Sequence[Any], mode: Any, patches: Mapping[str, Any]) -> Compiled:
    """What Inductor makes of a graph.

    On a CPU C++ calls the kernels, not Python, which is a tenth of the time of a small network; Python does where
    Inductor cannot write that C++, or the patches say so.
    """

    def made(**more: Any) -> Any:
        own = fx.GraphModule(module, deepcopy(module.graph))  # Inductor takes what it is given for its own
        with tracing(TracingContext(mode)):
            return compile_fx(own, list(given), config_patches={**patches, **more})

    if device_of(given) != "cpu" or "cpp_wrapper" in patches:
        return made()
    try:
        return made(cpp_wrapper=True)
    except Exception as error:  # noqa: BLE001  whatever it cannot write in C++, it may do without
        _LOG.info("Python calls the kernels, as Inductor did not write the C++: %s: %s", type(error).__name__, error)
        return made(cpp_wrapper=False)


def _own_outputs(module: fx.GraphModule) -> list[int]:
    """Which outputs must have memory of their own, and may not have it from Inductor.

    Those that depend on weights and sizes alone: of a frozen graph they would be its own constants. And copies, which
    Inductor drops when it freezes.
    """
    fed: set[fx.Node] = set()
    for node in module.graph.nodes:
        is_size = node.target is torch.ops.aten.sym_size.int
        if node.op == "placeholder" or (not is_size and any(operand in fed for operand in node.all_input_nodes)):
            fed.add(node)
    outputs = pytree.tree_leaves(module.graph.output_node().args[0])
    return [
        number
        for number, node in enumerate(outputs)
        if isinstance(node, fx.Node) and (node not in fed or node.target is torch.ops.aten.clone.default)
    ]


def _copying(run: Compiled, positions: Sequence[int]) -> Compiled:
    """Copies of some outputs, which a caller may write over."""
    if not positions:
        return run

    def copied(*inputs: Any) -> Any:
        outputs = list(run(*inputs))
        for position in positions:
            if isinstance(outputs[position], torch.Tensor):
                outputs[position] = outputs[position].clone()
        return tuple(outputs)

    return copied


def compile_whole(graph: fx.GraphModule, examples: Sequence[Any], patches: Mapping[str, Any]) -> Compiled:
    """Compile a graph of Dynamo's as it is, with its weights as inputs, for inference or training."""
    made: Any = compile_fx(graph, list(examples), config_patches={**patches, "freezing": False})
    return made


@contextlib.contextmanager
def _thawed(env: Any) -> Generator[None]:
    """Let Inductor add conditions on symbolic sizes, which Dynamo forbids once it has written its own."""
    if env is None or not env.frozen:
        yield
        return
    env.frozen = False
    try:
        yield
    finally:
        env.frozen = True


def release(values: Iterable[Any]) -> None:
    """Make fake tensors forget which real ones they stand for: PyTorch swaps no tensor that something refers to.

    Args:
        values: what was traced; all fake tensors of its modes forget.
    """
    modes = {id(mode): mode for value in values if (mode := getattr(value, "fake_mode", None)) is not None}
    for mode in modes.values():
        mode.fake_tensor_converter.meta_converter.describer.lookup_tensor.clear()


def device_of(examples: Sequence[Any]) -> str:
    """The kind of device that a graph runs on: "cpu" if no input is elsewhere."""
    kinds = [example.device.type for example in examples if isinstance(example, torch.Tensor)]
    return next((kind for kind in kinds if kind != "cpu"), "cpu")
