"""The module that is handed out: a graph of ordinary operators, and quicker code of the same function for inference."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from functools import wraps
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.graph import PythonCode

from chanopt.codegen.rooms import UnfitError, write_into_rooms
from chanopt.codegen.torch_names import is_transformed


class ChanoptModule(fx.GraphModule):
    """A ``GraphModule`` that concatenates without copies where it can and nobody minds.

    `graph` and `code` are functional: they are what is differentiated, exported, compiled, saved and edited. A call
    that only wants outputs (``torch.no_grad``, ``torch.inference_mode``) runs the same graph with
    :func:`~chanopt.codegen.rooms.write_into_rooms` applied, which is made anew whenever the graph is.
    """

    def recompile(self) -> PythonCode:
        """Make the code of both forms."""
        made = super().recompile()
        graph = write_into_rooms(self)
        if graph is not None:
            # Both run on this module's own tensors; fx gives every instance a class of its own.
            quick = type(fx.GraphModule(self, graph)).forward
            type(self).forward = _either(type(self).forward, quick)
        return made


def _either(plain: Callable[..., Any], quick: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(plain)  # torch.export and torch.fx ask for the names of the arguments
    def forward(self: ChanoptModule, *args: Any, **kwargs: Any) -> Any:
        if _wants_outputs(*args, *kwargs.values()):
            with suppress(UnfitError):
                return quick(self, *args, **kwargs)
        return plain(self, *args, **kwargs)

    return forward


def _wants_outputs(*args: Any) -> bool:
    """Whether a call is for its outputs alone: nothing is differentiated, traced, transformed or cast on the way."""
    if torch.is_grad_enabled() or torch.compiler.is_compiling() or torch.jit.is_tracing() or is_transformed():
        return False
    return all(type(arg) is Tensor and not _is_cast(arg.device.type) for arg in args)


def _is_cast(device: str) -> bool:
    return torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
