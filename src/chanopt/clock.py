"""How long calls take here, and what that depends on."""

from __future__ import annotations

import platform
import time
from collections.abc import Callable
from pathlib import Path

import torch


def seconds(call: Callable[[], object], device: str = "cpu") -> float:
    """The time of one call, with what it leaves running on a CUDA device."""
    _wait(device)
    started = time.perf_counter()
    call()
    _wait(device)
    return time.perf_counter() - started


def _wait(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)


def machine(device: str = "cpu") -> dict[str, str | int]:
    """What timings depend on besides the call: the device's name, threads, torch."""
    name = torch.cuda.get_device_name(device) if device.startswith("cuda") else f"{platform.machine()} {processor()}"
    return {"device": name, "threads": torch.get_num_threads(), "torch": torch.__version__}


def processor() -> str:
    """The processor's name as Linux tells it, elsewhere as Python does."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, "") or platform.processor() or "unknown processor"
