"""The torch.compile backend: ``torch.compile(model, backend="chanopt", options={...})``.

Installed, the backend is found by its entry point. From a source tree, ``import chanopt.backend`` registers it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import entry_points
from typing import Any

from torch import fx
from torch._dynamo import register_backend
from torch._dynamo.exc import ShortenTraceback

from chanopt.backend.compile import compile_graph
from chanopt.backend.options import Options, parse
from chanopt.errors import ChanoptError

NAME = "chanopt"


def backend(
    graph: fx.GraphModule,
    examples: Sequence[Any],
    *,
    options: Mapping[str, Any] | None = None,
    mode: str | None = None,
) -> Callable[..., Any]:
    """Compile one of Dynamo's graphs; torch.compile calls this.

    Args:
        graph: the graph.
        examples: an example per input.
        options: fields of :class:`Options` by name.
        mode: a mode of Inductor's, if ``torch.compile(mode=...)`` was given.

    Returns:
        What takes the graph's inputs and returns its outputs.

    Raises:
        OptionError: an option that does not exist, or a value it cannot have.
        ChanoptError: in strict mode, where the graph cannot be optimised.
    """
    try:
        return compile_graph(graph, examples, parse(options, mode))
    except ChanoptError as error:
        raise _plain(error) from error


def _plain(error: ChanoptError) -> Exception:
    """An error of the same class that Dynamo lets through as it is, instead of one of its own that quotes it."""
    kind = type(error)
    shown = type(kind.__name__, (ShortenTraceback, kind), {"__module__": kind.__module__, "__doc__": kind.__doc__})
    return shown(str(error), first_useful_frame=None)


def _register() -> None:
    """Make the name known to torch.compile, unless an installed entry point does."""
    if not entry_points(group="torch_dynamo_backends", name=NAME):
        register_backend(compiler_fn=backend, name=NAME)


_register()

__all__ = ["NAME", "Options", "backend"]
