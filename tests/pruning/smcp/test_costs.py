"""S12: costs by the formulas, the latency table with its rounding, and latencies of this machine."""

from __future__ import annotations

import itertools
import logging
from dataclasses import replace
from pathlib import Path

import pytest

from chanopt.errors import AllocationError
from chanopt.pruning.smcp import LatencyTable, MacCost, ParameterCost, measure
from chanopt.pruning.smcp.allocation import Product, Table
from chanopt.pruning.smcp.costs import Key, key_of, layer_cost
from chanopt.pruning.structure import Layer

CONV = Layer(
    "conv", "conv2d", 64, 128, 1, (3, 3), (2, 2), (1, 1), (1, 1), positions=28 * 28, input_size=(56, 56),
    output_size=(28, 28),
)  # fmt: skip
DEEP = replace(CONV, name="deep", in_channels=64, out_channels=64, groups=64)
KEY = Key(1, 64, 64, "56", "3", "2")
TABLE = LatencyTable({KEY: 1.5, KEY._replace(outputs=128): 2.5})


def test_s12_parameters_and_macs() -> None:
    assert layer_cost(ParameterCost(), CONV, 64, 128) == 0.073728
    assert layer_cost(MacCost(), CONV, 64, 128) == pytest.approx(0.0578028, abs=5e-8)
    assert layer_cost(MacCost(), CONV, 0, 128) == layer_cost(MacCost(), CONV, 64, 0) == 0


def test_s12_depthwise_counts_once() -> None:
    """SMCP asserts groups == 1 here, and fails."""
    assert layer_cost(ParameterCost(), DEEP, 64, 64) == 64 * 9 / 1e6
    assert layer_cost(MacCost(), DEEP, 40, 40) == 40 * 9 * 784 / 1e9


def test_s12_table_rounds_up_to_eight(caplog: pytest.LogCaptureFixture) -> None:
    assert TABLE.lookup(KEY._replace(inputs=57)) == 1.5
    assert TABLE.lookup(KEY._replace(outputs=121)) == 2.5
    assert TABLE.lookup(KEY._replace(inputs=60, outputs=125)) == 2.5
    assert TABLE.lookup(KEY._replace(inputs=0)) == 0
    with caplog.at_level(logging.WARNING):
        assert replace(TABLE, missing="zero").lookup(KEY._replace(inputs=56)) == 0
    assert "counts as free" in caplog.text


def test_a_missing_latency_is_an_error_unless_asked_otherwise() -> None:
    """In SMCP a layer that was not measured is free, and so is kept whole."""
    with pytest.raises(AllocationError, match=r"1_56_64_56_3_2 .*found 1_64_64_56_3_2, 1_64_128_56_3_2"):
        TABLE.lookup(KEY._replace(inputs=56))
    with pytest.raises(AllocationError, match="none of this size"):
        TABLE.of(replace(CONV, kernel=(5, 5)))
    with pytest.raises(AllocationError, match="1_80_128_56_3_2"):
        TABLE.of(replace(CONV, in_channels=80))
    assert replace(TABLE, missing="zero").of(replace(CONV, kernel=(5, 5))) == Product(0)


def test_a_table_serves_every_count_by_the_next_larger() -> None:
    table = TABLE.of(CONV)
    assert table == Table((64,), (64, 128), ((1.5, 2.5),))
    assert [table.at(*c) for c in ((1, 1), (64, 64), (64, 65), (0, 9), (9, 0))] == [1.5, 1.5, 2.5, 0, 0]
    holes = LatencyTable({KEY._replace(inputs=8): 1.0, KEY._replace(outputs=128): 3.0})
    assert holes.of(CONV) == Table((8, 64), (64, 128), ((1.0, 3.0), (3.0, 3.0)))


def test_depthwise_latencies_go_by_one_count() -> None:
    entries = {KEY._replace(inputs=c, outputs=c, groups=c): c / 10 for c in (32, 64)}
    assert LatencyTable(entries).of(DEEP) == Table((32, 64), (1,), ((3.2,), (6.4,)))


@pytest.mark.parametrize("ending", ["json", "csv"])
def test_tables_are_read_back(ending: str, tmp_path: Path) -> None:
    table = LatencyTable({**TABLE.entries, Key(2, 9, 9, "7x5", "3x1", "1", 9): 0.25}, batch=2)
    table.save(tmp_path / f"t.{ending}")
    assert LatencyTable.load(tmp_path / f"t.{ending}", batch=2) == table


@pytest.mark.parametrize(
    ("name", "text", "told"),
    [("t.json", '{"1_2": 3}', "found '1_2'"), ("t.json", "[1]", "AttributeError"), ("t.csv", "a,b\n1,2\n", "batch")],
)
def test_files_that_are_no_tables(name: str, text: str, told: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(AllocationError, match=told):
        LatencyTable.load(tmp_path / name)


LAYERS = (
    Layer("conv", "conv2d", 20, 16, 1, (3, 3), (1, 1), (1, 1), (1, 1), True, input_size=(6, 6)),
    Layer("deep", "conv2d", 16, 16, 16, (3, 3), (1, 1), (1, 1), (1, 1), input_size=(6, 6)),
    Layer("up", "conv_transpose2d", 16, 8, 1, (2, 2), (2, 2), (0, 0), (1, 1), True, input_size=(6, 6)),
    Layer("fc", "linear", 32, 10, bias=True),
)


def test_this_machine_is_measured_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Key] = []
    real = measure._time

    def timed(layer: Layer, key: Key, machine: measure.Machine, repeats: int) -> float:
        calls.append(key)
        return real(layer, key, machine, repeats)

    monkeypatch.setattr(measure, "_time", timed)
    table = measure.measure_latencies(LAYERS, cache=tmp_path, points=2, repeats=1)
    assert len(calls) == len(set(calls)) == 2 * 2 + 2 + 2 * 1 + 2 * 2
    for layer in LAYERS:
        cost = table.of(layer)
        assert isinstance(cost, Table)
        assert all(entry > 0 for row in cost.costs for entry in row)
        assert all(a <= b for row in cost.costs for a, b in itertools.pairwise(row))
        assert cost.at(layer.out_channels if layer.depthwise else layer.in_channels, cost.outputs[-1]) > 0
    again = measure.measure_latencies(LAYERS, cache=tmp_path, points=2, repeats=1)
    assert again == table
    assert len(calls) == 12


def test_latencies_between_measured_counts_are_interpolated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Timings that fall by noise are lifted to the largest before."""
    fake = {(8, 8): 1.0, (8, 40): 5.0, (40, 8): 0.5, (40, 40): 9.0}
    monkeypatch.setattr(measure, "_time", lambda layer, key, machine, repeats: fake[key.inputs, key.outputs])
    layer = Layer("conv", "conv2d", 40, 40, 1, (1, 1), (1, 1), (0, 0), (1, 1), input_size=(4, 4))
    table = measure.measure_latencies([layer], cache=tmp_path, points=2).of(layer)
    assert isinstance(table, Table)
    assert table.inputs == table.outputs == (8, 16, 24, 32, 40)
    assert [table.at(8, 8), table.at(8, 24), table.at(40, 8), table.at(24, 24), table.at(40, 40)] == [1, 3, 1, 4, 9]


def test_grouped_convs_are_not_measured(tmp_path: Path) -> None:
    with pytest.raises(AllocationError, match="conv in 2"):
        measure.measure_latencies([replace(LAYERS[0], groups=2)], cache=tmp_path)


def test_keys_of_layers() -> None:
    assert str(key_of(CONV, 4)) == "4_64_128_56_3_2"
    assert str(key_of(DEEP, 1)) == "1_64_64_56_3_2_64"
    assert str(key_of(LAYERS[3], 1)) == "1_32_10_1_1_1"
    assert Key.parse("1_64_64_56_3_2_64") == key_of(DEEP, 1)
