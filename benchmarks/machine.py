"""What figures were taken on: processor, versions, threads. Every record says so."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version

import torch

from chanopt import clock

_PACKAGES = ("torch", "torchvision", "timm", "numpy", "ortools", "apple-upscale", "torch-pruning")


def machine(device: str = "cpu") -> dict[str, str]:
    """The machine as words, with the GPU if `device` is "cuda". Threads are this process's."""
    on = {
        "processor": clock.processor(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "threads": str(torch.get_num_threads()),
        **{name: _version(name) for name in _PACKAGES},
        "node": platform.node(),
    }
    if device == "cuda":
        on |= {"gpu": torch.cuda.get_device_name(), "cuda": str(torch.version.cuda)}
    return on


def told(on: dict[str, str]) -> str:
    """The machine as one line; its name on the network is left out."""
    return ", ".join(f"{name} {value}" for name, value in on.items() if name != "node")


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"
