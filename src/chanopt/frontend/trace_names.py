"""Where a graph node comes from: the user's module and source line, for names and messages."""

from __future__ import annotations

import re

from torch import fx

_FRAME = re.compile(r'File "([^"]+)", line (\d+), in (\S+)(?:\n\s+(.*))?')
_LIBRARY = ("/torch/nn/", "torch/fx/", "/torch/_", "/torch/export/", "/torch/functional.py", "/torch/utils/")


def layer_of(node: fx.Node) -> str:
    """The dotted name of the innermost module that made the node, e.g. ``layer1.0.conv1`` ("" for the root)."""
    stack = node.meta.get("nn_module_stack") or {}
    names = [path if isinstance(path, str) else str(path) for path, _ in stack.values()]
    return re.sub(r"^L\['self'\]\.?", "", names[-1]).split("@")[0] if names else ""


def source_of(node: fx.Node) -> str:
    """The user's source line as ``file:line in function: code``; "" where torch.export kept none."""
    frames = _FRAME.findall(node.meta.get("stack_trace") or "")
    own = [frame for frame in frames if not any(part in frame[0] for part in _LIBRARY)] or frames
    if not own:
        return ""
    file, line, function, code = own[-1]
    return f"{file}:{line} in {function}" + (f": {code.strip()}" if code else "")
