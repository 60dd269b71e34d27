"""Kernels compiled without a GPU, for sm_80 and sm_90: what their machine code shows, and that emitted source is the same.

These compile the hardest of each kind; `python -m chanopt.kernels.aot` compiles every config that the tuner may pick.
"""

from __future__ import annotations

import os
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="triton is published for Linux only")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("kernels are interpreted in this process, not compiled", allow_module_level=True)

from chanopt.kernels import Config, Kind, Problem, candidates
from chanopt.kernels.aot import ARCHITECTURES, Metrics, compile_kernel, faults, main, main_loop, metrics, ptx
from chanopt.kernels.emit import name_of

LARGE = Problem(Kind.CONV, "fp16", 64, 56, 56, 256, 256, 256, act="relu")
SPATIAL = replace(LARGE, kernel=(3, 3), padding=(1, 1))
DEPTHWISE = replace(SPATIAL, kind=Kind.DEPTHWISE)
POINT = replace(LARGE, kind=Kind.POINT, group=1)
PROBLEMS = {
    "1x1": LARGE,
    "3x3 accumulate": replace(SPATIAL, residual="accumulate", act="silu"),
    "3x3 prologue": replace(SPATIAL, affine=True, pre_act="relu"),
    "3x3 bf16": replace(SPATIAL, dtype="bf16"),
    "1x1 tf32": replace(LARGE, dtype="fp32", group=4, residual="add"),
    "nchw": POINT,
    "nchw tf32": replace(POINT, dtype="fp32"),
    "depthwise": DEPTHWISE,
}


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("name", PROBLEMS)
def test_machine_code(name: str, architecture: int) -> None:
    """The largest tile that the tuner may pick keeps its sums in registers and moves 16 bytes at a time."""
    problem = PROBLEMS[name]
    config = candidates(problem, architecture)[0]
    found = metrics(compile_kernel(problem, config, architecture))
    assert faults(problem, config, architecture, found) == []


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("name", ["1x1", "3x3 accumulate", "3x3 prologue", "nchw tf32", "depthwise"])
def test_emitted_and_parametrised_kernels_compile_to_the_same_ptx(name: str, architecture: int, tmp_path: Path) -> None:
    problem = PROBLEMS[name]
    config = candidates(problem, architecture)[-1]
    plain = ptx(compile_kernel(problem, config, architecture), problem.kind.value)
    emitted = ptx(compile_kernel(problem, config, architecture, tmp_path), name_of(problem, config))
    assert plain == emitted
    assert ".entry" in plain
    assert len(plain.splitlines()) > 100


@pytest.mark.slow
def test_other_constants_give_other_ptx(tmp_path: Path) -> None:
    """The comparison can fail."""
    config = candidates(LARGE)[-1]
    other = replace(LARGE, act="none")
    plain = ptx(compile_kernel(LARGE, config, 80), LARGE.kind.value)
    assert plain != ptx(compile_kernel(other, config, 80, tmp_path), name_of(other, config))


@pytest.mark.slow
def test_a_gather_costs_the_main_loop_as_little_as_was_found() -> None:
    """Instructions a step, tile 128x128x64, four warps: a conv without a gather has 115 and 176."""
    for problem, most in ((LARGE, 115), (SPATIAL, 176)):
        found = metrics(compile_kernel(problem, Config(128, 128, 64, 4, 3), 90))
        assert 0 < sum(found.loop.values()) <= most


@pytest.mark.slow
def test_narrow_groups_are_seen(capsys: pytest.CaptureFixture[str]) -> None:
    """What the checks are for: a table of single channels compiles, and is all that is said of it."""
    single = replace(LARGE, group=1)
    config = Config(64, 64, 64, 4, 4)
    found = metrics(compile_kernel(single, config, 90))
    assert any("16-byte loads a step" in fault for fault in faults(single, config, 90, found))


@pytest.mark.slow
def test_the_command(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    out = tmp_path / "figures.json"
    assert main(["--arch", "80", "--match", "conv_nhwc_fp16_1x1_g8_bias_relu_64x64x64", "--json", str(out)]) == 0
    assert "1 of 1 kernels are right" in capsys.readouterr().out
    assert '"faults": []' in out.read_text()


def test_faults_of_made_up_code() -> None:
    config = Config(64, 64, 64, 4, 4)
    good = Counter({"HGMMA.64x64x16.F32": 4, "LDGSTS.E.BYPASS.128": 8})
    whole = good + Counter({"STG.E.128": 4})
    right = Metrics(registers=80, stack=0, shared=49152, loop=good, whole=whole)
    assert faults(LARGE, config, 90, right) == []
    cases = [
        (replace(right, stack=16), "spills: 16 bytes"),
        (replace(right, whole=whole + Counter({"STL.64": 2})), "2 stores to it"),
        (replace(right, whole=good), "no 16-byte stores"),
        (replace(right, whole=whole + Counter({"STG.E.U16": 1})), "narrow stores: STG.E.U16"),
        (replace(right, loop=good - Counter({"HGMMA.64x64x16.F32": 4})), "no HGMMA"),
        (replace(right, loop=good - Counter({"LDGSTS.E.BYPASS.128": 1})), "7 asynchronous 16-byte loads a step, not 8"),
        (replace(right, loop=good + Counter({"LDGSTS.E": 1})), "narrow loads in the main loop"),
        (replace(right, loop=good + Counter({"LDG.E.U16": 1})), "narrow loads in the main loop"),
    ]
    for found, message in cases:
        assert any(message in fault for fault in faults(LARGE, config, 90, found)), message
    assert "0 16-byte loads for 9 taps" in faults(DEPTHWISE, config, 90, right)[0]


def test_the_main_loop_is_the_shortest_that_multiplies() -> None:
    code = [
        (0x00, "MOV", ""),
        (0x10, "HMMA.16816.F32", ""),
        (0x20, "IADD3", ""),
        (0x30, "BRA", "0x20"),
        (0x40, "BRA", "0x10"),
        (0x50, "BRA", "0x00"),
        (0x60, "BRA", "0x70"),
        (0x70, "EXIT", ""),
    ]
    assert [address for address, _, _ in main_loop(code)] == [0x10, 0x20, 0x30, 0x40]
    assert list(main_loop(code[2:])) == []
