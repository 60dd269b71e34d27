"""The tutorial as an example that runs."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest

EXAMPLE = Path(__file__).resolve().parents[3] / "examples" / "flux_tutorial.py"


def test_the_tutorial_prints_its_table(capsys: pytest.CaptureFixture[str]) -> None:
    spec = importlib.util.spec_from_file_location("flux_tutorial", EXAMPLE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.main(["--steps", "1"])
    lines = capsys.readouterr().out.splitlines()
    table = [
        re.match(r"(.*MobileNet) Mults (\d+) Adds (\d+)  \(exactly (\d+) multiplications\)", line) for line in lines
    ]
    stages = [(row[1], *(int(number) for number in row.groups()[1:])) for row in table if row is not None]
    assert stages[:3] == [
        ("MobileNet", 7_505_600, 7_273_983, 7_505_600),
        ("MobileNet", 7_460_806, 7_273_983, 6_009_230),
        ("MobileNet", 6_105_200, 5_915_181, stages[2][3]),
    ]
    assert [name for name, *_ in stages[3:]] == [
        f"{stage} MobileNet" for stage in ("Propagated", "Resized", "Optimised", "Fine-tuned")
    ]
    propagated, resized, optimised = (stage[1:] for stage in stages[3:6])
    # The range over 20 builds of the tutorial's page and 300 seeds of a check.
    assert 4_889_000 < propagated[0] < 5_176_000
    assert 3_540_000 < resized[0] < 3_868_000
    assert propagated[2] == resized[2] == optimised[2]
    differences = [float(line.split(" by ")[1].split()[0]) for line in lines if "differs" in line]
    assert len(differences) == 3
    assert max(differences) < 1e-5
