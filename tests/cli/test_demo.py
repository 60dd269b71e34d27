"""The demo at small resolution, and its parts."""

from __future__ import annotations

import builtins
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from chanopt import cli, demo, torchvision_shim


def test_the_demo_masks_optimises_compares_and_times(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    threads = torch.get_num_threads()
    assert cli.main(["demo", "--quick", "--models", "resnet18", "--rounds", "2", "--out", str(tmp_path / "out")]) == 0
    printed = capsys.readouterr().out
    lines = printed.splitlines()
    start = next(number for number, line in enumerate(lines) if line.split()[:2] == ["model", "masked"])
    head, row = lines[start].split(), lines[start + 1].split()
    assert head[:4] == ["model", "masked", "optimised", "ratio"]
    assert row[0] == "resnet18"
    assert "one thread, batch 1, float32, 64 pixels, 2 rounds" in printed
    assert "segment" in printed
    page = tmp_path / "out" / "resnet18.html"
    assert f"report: {page}" in printed
    assert "<svg" in page.read_text()
    assert torch.get_num_threads() == threads


def test_an_unknown_model_is_named_with_its_neighbours(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["demo", "--models", "resnet5"]) == 2
    told = capsys.readouterr().err
    assert "expected a classifier of torchvision, found 'resnet5'; nearest: " in told
    assert "resnet50" in told


def test_missing_torchvision_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real = builtins.__import__

    def without(name: str, *rest: Any, **named: Any) -> Any:
        if name.split(".")[0] == "torchvision":
            raise ModuleNotFoundError("No module named 'torchvision'", name=name)
        return real(name, *rest, **named)

    def missing() -> None:
        raise ModuleNotFoundError("No module named 'torchvision'", name="torchvision")

    for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(builtins, "__import__", without)
    monkeypatch.setattr(demo, "ensure_torchvision", missing)
    assert cli.main(["demo"]) == 2
    told = capsys.readouterr().err
    assert told.count("\n") == 1
    assert "pip install 'chanopt[bench]'" in told


def test_masks_are_half_of_the_input_channels_of_least_norm() -> None:
    plain = nn.Conv2d(8, 4, 3)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), plain, nn.Conv2d(4, 4, 3, groups=4))
    norms = plain.weight.detach().transpose(0, 1).flatten(1).norm(dim=1)
    untouched = [model[0].weight.clone(), model[2].weight.clone()]
    demo._mask(model, 0.5)
    dead = plain.weight.detach().transpose(0, 1).flatten(1).norm(dim=1) == 0
    assert dead.sum() == 4
    assert norms[dead].max() < norms[~dead].min()
    assert all(torch.equal(was, model[at].weight) for was, at in zip(untouched, (0, 2), strict=True))
    assert not dict(model.named_buffers())


def test_the_masked_model_is_the_same_each_time_and_depends_on_its_inputs() -> None:
    torchvision_shim.ensure_torchvision()
    import torchvision

    state = torch.get_rng_state()
    one, two = (demo.masked(torchvision.models.get_model, "resnet18", 0.5, 32) for _ in range(2))
    assert torch.equal(torch.get_rng_state(), state)
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        made = one(x)
        assert torch.equal(made, two(x))
    assert float(made.std(dim=0).mean() / made.abs().max()) > 1e-2


def test_models_are_called_in_turn_as_often_as_asked() -> None:
    calls: list[str] = []

    class Named(nn.Module):
        def __init__(self, name: str) -> None:
            super().__init__()
            self.label = name

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            calls.append(self.label)
            return x

    rounds: list[None] = []
    timing = demo.timed(Named("dense"), Named("slim"), (torch.ones(1),), 3, lambda: rounds.append(None))
    warmup = 2 * demo._WARMUPS
    assert calls[warmup:] == ["dense", "slim", "slim", "dense", "dense", "slim"]
    assert len(rounds) == 3
    assert min(timing.dense_ms, timing.slim_ms, timing.ratio) > 0
