"""Import torchvision on a build of torch that its compiled operators do not match.

torchvision's wheel is linked against the CUDA build of torch. On a CPU build its shared library does not
load, and the import then fails with "operator torchvision::nms does not exist" because fake kernels are
registered for schemas that only the library defines. The models need none of that, except the detectors,
which call non-maximum suppression (RoIAlign has a Python form in torchvision itself). So the two schemas are
defined here, with a plain CPU kernel.

Where the import works as it is, nothing is touched.
"""

from __future__ import annotations

import importlib
import inspect
import sys

import torch
from torch import Tensor

# A Library object takes its definitions with it when it is collected, so this list keeps it alive.
_libraries: list[torch.library.Library] = []


def nms(boxes: Tensor, scores: Tensor, iou_threshold: float) -> Tensor:
    """Greedy non-maximum suppression.

    Args:
        boxes: (N, 4) corners x1, y1, x2, y2.
        scores: (N,).
        iou_threshold: a box overlapping an already kept one by more than this (intersection over union) is
            dropped.

    Returns:
        int64 indices of the kept boxes, best score first.

    >>> boxes = torch.tensor([[0.0, 0, 10, 10], [0, 0, 10, 9], [20, 20, 30, 30]])
    >>> nms(boxes, torch.tensor([0.8, 0.9, 0.1]), 0.5)
    tensor([1, 2])
    """
    left = scores.argsort(descending=True, stable=True)
    areas = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    kept: list[Tensor] = []
    while left.numel() > 0:
        best, rest = left[0], left[1:]
        kept.append(best)
        low = torch.maximum(boxes[best, :2], boxes[rest, :2])
        high = torch.minimum(boxes[best, 2:], boxes[rest, 2:])
        common = (high - low).clamp(min=0).prod(dim=1)
        left = rest[common <= iou_threshold * (areas[best] + areas[rest] - common)]
    return torch.stack(kept) if kept else left


def _nothing() -> None:
    """Stand in for torchvision's check that its shared library is loaded."""


def _define_operators() -> None:
    library = torch.library.Library("torchvision", "DEF")
    for name in ("nms", "qnms"):
        library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        library.impl(name, nms, "CPU")
    _libraries.append(library)


def ensure_torchvision() -> None:
    """Make `import torchvision` succeed; idempotent.

    Raises:
        ImportError: torchvision is not installed.
    """
    if "torchvision" in sys.modules:
        return
    try:
        importlib.import_module("torchvision")
        return
    except RuntimeError as error:
        if "torchvision::nms" not in str(error):
            raise
    for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
        del sys.modules[name]
    _define_operators()
    boxes = vars(importlib.import_module("torchvision.ops.boxes"))
    # The check would refuse although the operator now exists.
    boxes["_assert_has_ops"] = _nothing
    # The Python form of RoIAlign compiles itself with Inductor on its first call: half a minute, for a second
    # of work.
    align = vars(importlib.import_module("torchvision.ops.roi_align"))
    align["_roi_align"] = inspect.unwrap(align["_roi_align"])
