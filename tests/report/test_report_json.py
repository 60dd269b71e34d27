"""The report as data: its JSON form, and the answers to why."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import chanopt
from chanopt.errors import LoadError
from chanopt.report import Report
from chanopt.report.build import FURTHER, NAMED
from tests.report import samples


@pytest.mark.parametrize("make", [samples.by_hand, samples.hostile, samples.empty, samples.large, samples.by_chanopt])
def test_round_trip(make: Callable[[], Report]) -> None:
    report = make()
    again = Report.from_json(report.to_json())
    assert again == report
    assert str(again) == str(report)


def test_json_is_plain_data() -> None:
    table = json.loads(samples.by_hand().to_json())
    assert table["format"] == 1
    assert table["segments"][0]["instance"]["edges"][0]["name"] == "relu -> relu_1"
    assert table["segments"][0]["solution"]["cut"] == ["relu -> relu_1"]
    assert table["layers"][0]["kept"] == {"read by conv2": "0:16,31", "the model's output": "31,40"}


@pytest.mark.parametrize(
    ("channel", "why"),
    [
        (0, "read by conv2"),
        (15, "read by conv2"),
        (31, "read by conv2; the model's output"),
        (40, "the model's output"),
        (16, "not kept: nothing reads it"),
    ],
)
def test_why_a_channel_is_kept(channel: int, why: str) -> None:
    assert samples.by_hand().why("conv1", channel) == why


def test_why_of_a_layer_that_is_not_there() -> None:
    with pytest.raises(KeyError, match="expected one of the report's layers, found 'conv9'"):
        samples.by_hand().why("conv9", 0)


def test_a_real_report_says_why_and_who() -> None:
    report = samples.by_chanopt()
    stem = next(layer for layer in report.layers if layer.name == "stem")
    kept = [channel for channel in range(16) if not report.why("stem", channel).startswith("not kept")]
    assert len(kept) == stem.channels_out[1] <= stem.channels_out[0] == 16
    reasons = {reason for channel in kept for reason in report.why("stem", channel).split("; ")}
    assert {"read by head", "read by third", "read by first"} <= reasons
    assert report.why("head", 0) == "the model's output"
    assert [refusal.op for refusal in report.refusals] == ["aten.cumsum.default"]
    assert report.macs_after < report.macs_before
    assert report.macs_before == sum(layer.macs[0] for layer in report.layers)


@pytest.mark.parametrize("text", ["[]", "{}", "not json", '{"model": "net"}'])
def test_refuses_what_is_no_report(text: str) -> None:
    with pytest.raises(LoadError, match="expected the JSON of a chanopt report"):
        Report.from_json(text)


def test_refuses_a_newer_format() -> None:
    text = json.dumps({**json.loads(samples.by_chanopt().to_json()), "format": 99})
    with pytest.raises(LoadError, match="found 99; update chanopt"):
        Report.from_json(text)


class _Chain(nn.Module):
    """A stem, and layers that each read the sum of all before and add to it."""

    def __init__(self, layers: int) -> None:
        super().__init__()
        self.stem = nn.Linear(4, 8)
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(layers))

    def forward(self, x: Tensor) -> Tensor:
        total = self.stem(x)
        for layer in self.layers:
            total = total + layer(total)
        return total.sum(1)


def test_a_long_chain_names_so_many_readers_and_no_more() -> None:
    torch.manual_seed(0)
    model = _Chain(NAMED + 8).eval()
    with torch.no_grad():
        for number, layer in enumerate(model.layers):
            layer.weight[:, number % 8] = 0  # no layer reads all, so that none hides what another reads
    report = chanopt.explain(chanopt.optimize(model, (torch.randn(2, 4),)))
    stem = report.layers[0]
    assert stem.name == "stem"
    assert sum(why.startswith("read by layers.") for why in stem.kept) == NAMED
    assert FURTHER in stem.kept
    assert FURTHER not in report.layers[-1].kept
    assert not any(report.why("stem", channel).startswith("not kept") for channel in range(8))
