"""Models that are captured in parts: what forwards write, others read (chanopt.frontend.parts)."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import chanopt
from chanopt.errors import CaptureError, VerifyError
from tests.support.nets.base import randomise


class Writing(nn.Module):
    """A part whose first operator writes into what it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(6, 6, 1), nn.Conv2d(6, 6, 1)

    def forward(self, y: Tensor) -> Tensor:
        return self.second(self.first(F.relu(y, inplace=True)))


class Branching(nn.Module):
    """Captured in parts, as it branches on data; it reads again what it gave to a part, and counts its calls."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.part = nn.Conv2d(3, 6, 3), Writing()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        y = self.stem(x.mul_(2))
        z = self.part(y)
        return self.calls * (z + y if z.sum() > -1e9 else z)


@pytest.fixture
def net() -> Branching:
    torch.manual_seed(0)
    made = randomise(Branching()).double().eval()
    made.calls.zero_()
    with torch.no_grad():
        made.part.second.weight[:, :3] = 0
    return made


def batch() -> Tensor:
    return torch.randn(2, 3, 7, 7, dtype=torch.float64)


def test_what_a_part_writes_into_its_input_is_there_for_the_code_around_it(net: Branching) -> None:
    fast = chanopt.optimize(net, (batch(),))
    assert chanopt.explain(fast).parameters_after < chanopt.explain(fast).parameters_before
    with torch.no_grad():
        for _ in range(2):
            x = batch()
            mine, theirs = x.clone(), x.clone()
            torch.testing.assert_close(fast(mine), net(theirs), rtol=1e-12, atol=1e-12)
            assert torch.equal(mine, theirs)


def test_state_and_example_inputs_are_as_they_were_given(net: Branching) -> None:
    x = batch()
    kept = x.clone()
    fast = chanopt.optimize(net, (x,))
    assert torch.equal(x, kept)
    assert int(net.calls) == int(fast.get_buffer("calls")) == 0


BODIES: dict[str, Callable[[Tensor], Tensor]] = {
    "an activation": lambda x: F.relu(x, inplace=True),
    "a slice": lambda x: x[:, :1].mul_(2).expand(-1, 3, -1, -1) + x,
    "a view": lambda x: x.flatten(1).add_(1).view_as(x),
}


class Normalising(nn.Module):
    def __init__(self, body: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.body, self.layers = body, nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Conv2d(6, 4, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(self.body(x))


@pytest.mark.parametrize("body", BODIES.values(), ids=list(BODIES))
def test_a_forward_that_writes_into_its_input_still_does(body: Callable[[Tensor], Tensor]) -> None:
    torch.manual_seed(0)
    net = randomise(Normalising(body)).double().eval()
    with torch.no_grad():
        net.layers[2].weight[:, ::2] = 0
    with pytest.raises(CaptureError, match=r"leaves its inputs as they are, found that it writes into \['x'\]"):
        chanopt.capture(net, (batch(),))
    fast = chanopt.optimize(net, (batch(),))
    report = chanopt.explain(fast)
    assert report.parameters_after < report.parameters_before
    assert "writes into ['x']" in report.refusals[0].reason
    assert chanopt.verify(net, fast, (batch(),)) < 1e-12


def test_verify_sees_that_an_input_is_not_written_into() -> None:
    class Body(nn.Module):
        def __init__(self, *, inplace: bool) -> None:
            super().__init__()
            self.inplace = inplace

        def forward(self, x: Tensor) -> Tensor:
            return F.relu(x, inplace=self.inplace)

    with pytest.raises(VerifyError, match="expected input 0 within"):
        chanopt.verify(Body(inplace=True), Body(inplace=False), (batch(),))
