"""What figures were taken on: processor, versions, threads, and by which code. Every record says so."""

from __future__ import annotations

import os
import platform
import subprocess
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

import chanopt
from chanopt import clock

_SOURCE = Path(chanopt.__file__).resolve().parents[2]
"""Where chanopt's source lies, if it is not installed without it."""
_WRITTEN = ("benchmarks/results", "docs")
"""What the benchmarks write themselves, while they run: changes there are none of the code."""
_PACKAGES = ("torch", "torchvision", "timm", "numpy", "ortools", "apple-upscale", "torch-pruning")


def machine(device: str = "cpu") -> dict[str, str]:
    """The machine as words, with the GPU if `device` is "cuda". Threads are this process's."""
    on = {
        "processor": clock.processor(),
        "vectors": torch.backends.cpu.get_cpu_capability(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "threads": str(torch.get_num_threads()),
        **{name: _version(name) for name in _PACKAGES},
        "chanopt": chanopt.__version__,
        "node": platform.node(),
    }
    if made_by := revision(_SOURCE):
        on["revision"] = made_by
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


@cache
def revision(tree: Path) -> str:
    """What git calls the code of a checkout, with "-dirty" if files that it knows are changed; "" if it is none.

    As `git describe --always --dirty` tells, but that what the benchmarks write makes nothing dirty.
    """
    # A folder that lies in someone else's checkout has no revision of its own.
    if not (tree / ".git").exists():
        return ""
    described = _git(tree, "describe", "--always")
    changed = _git(tree, "diff", "--name-only", "HEAD", "--", ".", *(f":!{path}" for path in _WRITTEN))
    if not described or changed is None:
        return ""
    return f"{described}-dirty" if changed else described


def _git(tree: Path, *words: str) -> str | None:
    """What git prints; None if there is no git or it fails."""
    # Without optional locks it does not disturb a git command of the user's.
    environment = os.environ | {"GIT_OPTIONAL_LOCKS": "0"}
    try:
        done = subprocess.run(
            ["git", "-C", str(tree), *words], env=environment, text=True, capture_output=True, check=False
        )
    except OSError:
        return None
    return None if done.returncode else done.stdout.strip()
