"""Triton's just-in-time path without a GPU: a stand-in for the driver says that there is an sm_90.

Arguments are bound, specialised on and compiled as on a GPU; only the launch is left out.
"""

from __future__ import annotations

import os
from dataclasses import replace
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="triton is published for Linux only")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("kernels are interpreted in this process, not compiled", allow_module_level=True)

from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from benchmarks import gpu
from chanopt.kernels import Config, Kind, Problem
from chanopt.kernels.aot import compile_kernel, ptx
from chanopt.kernels.launch import arguments, constants, grid
from chanopt.kernels.triton_conv import KERNELS
from chanopt.kernels.tuner import Work

SMALL = Problem(Kind.CONV, "fp16", 2, 6, 6, 64, 32, 96, kernel=(3, 3), padding=(1, 1), act="relu")
TILE = Config(64, 32, 64, 4, 3)
CASES = {
    "3x3": (SMALL, TILE),
    "1x1 residual, one image": (replace(SMALL, kernel=(1, 1), padding=(0, 0), residual="add", batch=1), TILE),
    "depthwise": (replace(SMALL, kind=Kind.DEPTHWISE, outputs=64, bias=False), Config(32, 32, 1, 4, 1)),
    "nchw prologue": (
        Problem(Kind.POINT, "fp16", 2, 4, 4, 64, 32, 96, group=1, affine=True, pre_act="relu"),
        Config(32, 64, 32, 4, 3),
    ),
}


class Driver:
    """Says what Triton asks of a driver before it compiles."""

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)


@pytest.fixture(autouse=True)
def _driver(monkeypatch: pytest.MonkeyPatch) -> None:
    # Triton's own reset would look for a GPU.
    monkeypatch.setattr(driver, "_active", Driver())


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_the_launch_compiles_what_was_checked_ahead_of_time(name: str) -> None:
    """Bound from real tensors, sizes among them that equal 1 and multiples of 16, the binary is the one of aot.py."""
    problem, config = CASES[name]
    work = Work(problem, torch.device("cpu"))
    values = arguments(problem, config, work.calls[0], work.outs[0]) | constants(problem, config)
    kernel: Any = KERNELS[problem.kind.value]
    kernel.device_caches.clear()
    made = kernel.run(
        grid=grid(problem, config), warmup=True, num_warps=config.warps, num_stages=config.stages, **values
    )
    assert ptx(made, problem.kind.value) == ptx(compile_kernel(problem, config, 90), problem.kind.value)
    # Other sizes, the same binary.
    again = Work(replace(problem, batch=3, height=8, width=8, channels=128), torch.device("cpu"))
    other = again.problem
    values = arguments(other, config, again.calls[0], again.outs[0]) | constants(other, config)
    options = {"num_warps": config.warps, "num_stages": config.stages}
    assert kernel.run(grid=grid(other, config), warmup=True, **options, **values) is made


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_the_benchmark_compiles_beforehand_what_it_launches(name: str) -> None:
    problem, config = CASES[name]
    kernel: Any = KERNELS[problem.kind.value]
    kernel.device_caches.clear()
    gpu._compile_one((problem, config))
    (cache,) = [entry[0] for entry in kernel.device_caches.values()]
    (before,) = cache.values()
    work = Work(problem, torch.device("cpu"))
    values = arguments(problem, config, work.calls[0], work.outs[0]) | constants(problem, config)
    options = {"num_warps": config.warps, "num_stages": config.stages}
    assert kernel.run(grid=grid(problem, config), warmup=True, **options, **values) is before
