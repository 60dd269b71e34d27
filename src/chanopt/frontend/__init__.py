"""From a PyTorch model to the IR: capture, normalise, lower."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn
from torch.export import ExportedProgram

from chanopt.frontend.capture import Captured, capture
from chanopt.frontend.lower import lower_captured
from chanopt.frontend.rules import RULES
from chanopt.ir import Program


def lower(
    model: nn.Module | ExportedProgram,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any] | None = None,
    *,
    strict: bool = False,
) -> Program:
    """Capture a model and lower it to the channel-flow IR; see :func:`chanopt.lower`."""
    return lower_captured(capture(model, args, kwargs), RULES, strict=strict)


__all__ = ["RULES", "Captured", "capture", "lower", "lower_captured"]
