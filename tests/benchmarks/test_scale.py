from __future__ import annotations

import json
import mmap
from pathlib import Path

import pytest
import torch
from torch import nn

from benchmarks import scale


@pytest.mark.parametrize("layers", [18, 34, 50, 98, 1002])
def test_residual_nets_have_as_many_layers_as_asked(layers: int) -> None:
    net = scale.residual(layers)
    kernels = [m for m in net.modules() if isinstance(m, nn.Conv2d) and m.kernel_size == (3, 3)]
    assert len(kernels) + 1 == layers


def test_the_nets_run_at_32_pixels() -> None:
    for family, size in (("residual", 18), ("dense", 121), ("wide", 256)):
        net = scale.FAMILIES[family][0](size).eval()
        with torch.no_grad():
            assert bool(net(torch.randn(2, 3, 32, 32)).isfinite().all())


def test_a_point_has_times_of_every_stage() -> None:
    point = scale.measure("wide", 64)
    assert (point["family"], point["size"], point["segments_optimal"]) == ("wide", 64, point["segments"])
    assert min(point[stage] for stage in ("capture", "rest")) > 0
    assert point["memory"] >= 0
    assert "order_channels" in point["passes"]
    assert 0 < point["solver"] <= point["passes"]["order_channels"]
    assert point["operands"] >= point["ops"] - 1
    assert point["optimize"] > 0


def test_slopes_are_those_of_a_power() -> None:
    assert scale.slope([10, 100, 1000], [3, 30, 300]) == pytest.approx(1)
    assert scale.slope([10, 100], [5, 500]) == pytest.approx(2)
    assert scale.slope([10, 10], [1, 2]) is None
    assert scale.slope([10, 100], [0, 2]) is None


def points(family: str) -> list[dict[str, object]]:
    base = {"family": family, "status": "ok", "job": "x", "solver": 1.0, "segments": 1, "parameters": 5}
    return [
        {**base, "size": size, "ops": 7, "operands": size * 2, "capture": 0.1 * size, "rest": size**2, "memory": size}
        | {"passes": {"drop_dead": size}}
        for size in (10, 20, 40)
    ]


def test_slopes_are_told_by_family_and_stage(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = [*points("residual"), *points("wide")]
    found = scale.slopes(lines)
    assert found["residual"]["capture"] == pytest.approx(1)
    assert found["wide"]["rest"] == pytest.approx(2)
    assert found["wide"]["drop_dead"] == pytest.approx(1)
    assert scale.slopes(lines, "ops")["residual"]["capture"] is None  # as many ops in all of them
    bent = [*points("residual")[:2], {**points("residual")[2], "capture": 8.0}]
    assert scale.slopes(bent, last=2)["residual"]["capture"] == pytest.approx(2)
    assert scale.finish(lines, tmp_path / "scale.json") == 0
    assert len(json.loads((tmp_path / "scale.json").read_text())) == 6
    lost = {"job": "residual 9", "status": "lost", "exception": "boom"}
    assert scale.finish([*lines, lost], tmp_path / "scale.json") == 1
    printed = capsys.readouterr().out
    assert "residual: slopes capture 1.00, solver 0.00, rest 2.00, memory 1.00, drop_dead 1.00" in printed
    assert "residual 9: boom" in printed


def test_the_peak_begins_anew_at_what_is_held() -> None:
    """What was freed before does not hide what is held now; mapped pages, which no allocator keeps for later."""
    megabyte = b"1" * (1 << 20)
    with mmap.mmap(-1, 64 << 20) as freed:
        for _ in range(64):
            freed.write(megabyte)
    scale._forget_peak()
    before = scale._peak()
    with mmap.mmap(-1, 16 << 20) as held:
        for _ in range(16):
            held.write(megabyte)
        assert 15 << 20 <= scale._peak() - before < 32 << 20
