"""What the operators do on CUDA, with the interpreter in place of the GPU: coverage, tile, memory, fallback."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from chanopt.kernels import Call, Config, op, pack
from chanopt.kernels.emit import DIRECTORY
from chanopt.kernels.reference import reference


@pytest.fixture(autouse=True)
def _h100(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(op, "_machine", lambda device: (90, 132))
    monkeypatch.delenv(DIRECTORY, raising=False)
    op._tell.cache_clear()


def call(dtype: torch.dtype = torch.float16) -> Call:
    packed = pack(range(3, 40), torch.randn(16, 37, 3, 3, dtype=dtype) / 18, 64)
    x = torch.randn(2, 64, 6, 5).to(dtype).contiguous(memory_format=torch.channels_last)
    return Call(x, packed.weight, torch.randn(16), packed.groups, 8, padding=(1, 1), act="relu")


def close(found: torch.Tensor, made: Call) -> None:
    torch.testing.assert_close(found, reference(made), rtol=1e-2, atol=1e-2)


def test_a_result_of_its_own() -> None:
    made = call()
    found = op.run_on_cuda(made, None)
    close(found, made)
    assert found.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("config", [Config(64, 32, 32, 4, 2), Config(128, 256, 64, 8, 3)], ids=["fits", "does not"])
def test_a_tile_that_does_not_fit_is_replaced(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    used: list[Config] = []
    original = op.launch

    def launch(problem: object, tile: Config, *rest: object) -> None:
        used.append(tile)
        original(problem, tile, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(op, "launch", launch)
    made = call()
    close(op.run_on_cuda(made, config), made)
    assert (used == [config]) == (config.warps == 4)


def test_onto_a_slice() -> None:
    made = call()
    buffer = torch.randn(2, 32, 6, 5).half().contiguous(memory_format=torch.channels_last)
    before = buffer.clone()
    op.run_on_cuda(made, None, buffer[:, 8:24], accumulate=True)
    close(buffer[:, 8:24], replace(made, residual=before[:, 8:24]))
    assert torch.equal(buffer[:, :8], before[:, :8])
    assert torch.equal(buffer[:, 24:], before[:, 24:])


def test_what_is_not_covered_runs_in_aten_and_says_so_once(caplog: pytest.LogCaptureFixture) -> None:
    made = call(torch.float64)
    with caplog.at_level(logging.INFO, "chanopt.kernels.op"):
        for _ in range(2):
            assert torch.equal(op.run_on_cuda(made, None), reference(made))
    assert caplog.text.count("runs in ATen: torch.float64 has no kernel") == 1
    out = torch.empty(2, 16, 6, 5, dtype=torch.float64)
    op.run_on_cuda(made, None, out)
    torch.testing.assert_close(out, reference(made))


def test_emitted_kernels_run_where_a_folder_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = call()
    plain = op.run_on_cuda(made, None)
    monkeypatch.setenv(DIRECTORY, str(tmp_path))
    assert torch.equal(op.run_on_cuda(made, None), plain)
    (path,) = tmp_path.glob("*.py")
    assert path.name.startswith("conv_nhwc_fp16_3x3_g8_padded_bias_relu_")


def test_an_empty_batch() -> None:
    made = call()
    made = replace(made, x=made.x[:0])
    assert op.run_on_cuda(made, None).shape == (0, 16, 6, 5)
