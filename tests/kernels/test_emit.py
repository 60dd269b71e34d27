"""Emitted source: golden files, sharing, and hand-made changes; test_aot.py shows that it compiles to the same PTX.

`CHANOPT_UPDATE_GOLDEN=1 python -m pytest tests/kernels/test_emit.py` writes the golden files anew.
"""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="triton is published for Linux only")

from chanopt.kernels import Config, Kind, Problem
from chanopt.kernels.emit import DIRECTORY, chanopt_version, emit, emitted, load, name_of, source

GOLDEN = Path(__file__).parent / "golden"
BASE = Problem(Kind.CONV, "fp16", 64, 56, 56, 128, 64, act="relu")
TILE = Config(128, 64, 64, 4, 4)
CASES = {
    "point": (BASE, TILE),
    "strided_residual": (replace(BASE, stride=(2, 2), residual="add", act="none"), TILE),
    "padded_prologue": (replace(BASE, kernel=(3, 3), padding=(1, 1), affine=True, pre_act="relu", act="silu"), TILE),
    "depthwise": (replace(BASE, kind=Kind.DEPTHWISE, kernel=(3, 3), padding=(1, 1)), Config(32, 64, 1, 4, 1)),
    "nchw_accumulate": (replace(BASE, kind=Kind.POINT, group=1, dtype="fp32", residual="accumulate"), TILE),
}


@pytest.mark.parametrize("name", CASES)
def test_golden(name: str) -> None:
    path = GOLDEN / f"{name}.txt"
    text = source(*CASES[name]).replace(f"chanopt {chanopt_version()}", "chanopt VERSION")
    if os.environ.get("CHANOPT_UPDATE_GOLDEN") == "1":
        path.write_text(text, encoding="utf-8")
    assert text == path.read_text(encoding="utf-8")


@pytest.mark.parametrize("name", CASES)
def test_nothing_is_left_to_decide(name: str) -> None:
    """No constant that had a name, no branch, no pointer that is not read."""
    text = source(*CASES[name]).partition("import triton")[2]
    for word in ("constexpr", "if ", "RESIDUAL", "PRE_ACT", "BM", "POINT", "'none'", "is None"):
        assert word not in text, word
    assert ("scale_ptr" in text) == CASES[name][0].affine
    assert ("r_ptr" in text) == (CASES[name][0].residual == "add")


def test_uses_with_one_specialisation_share_a_file(tmp_path: Path) -> None:
    first = emit(BASE, TILE, tmp_path)
    assert emit(replace(BASE, batch=1, height=7, gathered=512, outputs=2048), TILE, tmp_path) == first
    assert emit(replace(BASE, act="silu"), TILE, tmp_path) != first
    assert emit(BASE, Config(64, 64, 64, 4, 4), tmp_path) != first
    assert len(list(tmp_path.iterdir())) == 3


def test_names_tell_specialisations_apart() -> None:
    names = {name_of(problem, config) for problem, config in CASES.values()}
    assert len(names) == len(CASES)
    flags = [{"kernel": (3, 3)}, {"stride": (2, 1)}, {"padding": (1, 0)}, {"bias": False}, {"residual": "add"},
             {"act": "sigmoid"}, {"affine": True}, {"pre_act": "relu"}, {"dtype": "bf16"}, {"group": 16}]  # fmt: skip
    assert len({name_of(replace(BASE, **flag), TILE) for flag in flags}) == len(flags)
    texts = {source(replace(BASE, **flag), TILE).partition("import triton")[2] for flag in flags}
    assert len(texts) == len(flags)


def test_emitted_modules_import_and_are_loaded_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(DIRECTORY, raising=False)
    assert emitted(BASE, TILE) is None
    monkeypatch.setenv(DIRECTORY, str(tmp_path))
    kernel = emitted(BASE, TILE)
    assert kernel is emitted(replace(BASE, batch=3), TILE)
    assert "KH" not in kernel.arg_names
    assert kernel.arg_names[:2] == ["x_ptr", "w_ptr"]


def test_a_file_changed_by_hand_stays(tmp_path: Path) -> None:
    path = emit(BASE, TILE, tmp_path)
    path.write_text(path.read_text() + "\nMINE = 1\n")
    assert emit(BASE, TILE, tmp_path) == path
    assert load(path, "MINE") == 1
