"""Constants, against an interpreter: a claim holds for every input, at every pixel."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from chanopt.analysis.constants import constants
from chanopt.ir import Program
from tests.support.masks import MODES, mask_randomly
from tests.support.micro import MICRO
from tests.support.nets.base import Inputs, Net, conv, image, randomise
from tests.support.passes import kill, layer, lowered, run_program, sink_values
from tests.support.random_nets import random_net


def assert_right(program: Program, inputs: Inputs, seeds: tuple[int, ...] = (1, 2, 3)) -> int:
    """Every claimed constant is the value at every pixel of every sample, for several inputs; how many there were."""
    claims = constants(program)
    runs = [run_program(program, inputs(2, torch.float64, seed)) for seed in seeds]
    count = 0
    for name, values in claims.items():
        axis = program.values[name].axis
        assert axis is not None
        for channel in np.flatnonzero(~np.isnan(values)):
            seen = torch.cat([made[name].select(axis, int(channel)).double().reshape(-1) for made in runs])
            scale = max(1.0, abs(float(values[channel])))
            assert float((seen - values[channel]).abs().max()) <= 1e-12 * scale, (name, channel, values[channel])
            count += 1
    return count


NETS = (
    "bottleneck",
    "residual_pre",
    "dense_block",
    "c2f",
    "shufflenet",
    "grouped_chain",
    "depthwise_2",
    "group_norm_2",
    "softmax_channels",
    "join_div",
    "join_atan2",
    "where_three",
    "add_alpha",
    "max_pool_padded",
    "avg_pool_padded",
    "avg_pool_uncounted",
    "upsample_bicubic",
    "reflection_pad",
    "constant_pad",
    "zero_pad",
    "pixel_shuffle",
    "pixel_unshuffle",
    "flatten_one",
    "squeeze_excite_linear",
    "prelu_channels",
    "transposed",
    "padding_wide",
    "global_response_norm",
    "mask_buffer",
    "masked_fill",
    "selective_kernel",
    "layer_norm_plain",
    "conv_twice",
    "mlp_residual",
)


@pytest.mark.parametrize("name", NETS)
def test_claims_hold(name: str) -> None:
    """Whether there are any or not: with dead layers nearly every net has some."""
    model = MICRO[name].build()
    mask_randomly(model, 3, side="output", mode="dead_layers", amount=0.6, keep_bias=True)
    assert_right(lowered(model, MICRO[name].inputs), MICRO[name].inputs)


@pytest.mark.parametrize("seed", range(320, 329))
def test_claims_hold_in_random_nets(seed: int) -> None:
    model, inputs = random_net(seed)
    mask_randomly(model, seed, side="output", mode=MODES[seed % len(MODES)], amount=0.7, keep_bias=True)
    assert_right(lowered(model, inputs), inputs)


def found(body: Any, lost: list[int], value: float = 0.75, **parts: nn.Module) -> np.ndarray:
    """The constants of what `body` makes of a conv's eight channels, of which some are dead with this bias."""
    model: Any = randomise(Net(lambda n, x: body(n, n.a(x)), a=conv(3, 8, 3), **parts)).eval()
    kill(model.a, outputs=lost, bias=value)
    program = lowered(model, image())
    assert_right(program, image())
    return constants(program)[sink_values(program)[0]]


def close(values: np.ndarray, expected: dict[int, float]) -> bool:
    known = {int(c): float(values[c]) for c in np.flatnonzero(~np.isnan(values))}
    return known.keys() == expected.keys() and all(abs(known[c] - expected[c]) < 1e-12 for c in known)


def test_a_zero_row_is_its_bias() -> None:
    assert close(found(lambda n, t: t, [1, 6]), {1: 0.75, 6: 0.75})


def test_maps_and_pools_keep_constants() -> None:
    assert close(found(lambda n, t: (t * 2 - 1).relu(), [1]), {1: 0.5})
    assert close(found(lambda n, t: F.max_pool2d(t, 2), [1, 6]), {1: 0.75, 6: 0.75})
    assert close(found(lambda n, t: F.avg_pool2d(t, 2), [1]), {1: 0.75})
    assert close(found(lambda n, t: t.mean((2, 3)), [1]), {1: 0.75})


def test_zero_padding_breaks_a_constant_that_is_not_zero() -> None:
    assert close(found(lambda n, t: F.pad(t, (1, 1, 1, 1)), [1]), {})
    assert close(found(lambda n, t: F.pad(t, (1, 1, 1, 1)), [1], 0.0), {1: 0.0})
    assert close(found(lambda n, t: F.pad(t, (1, 1, 1, 1), value=0.75), [1]), {1: 0.75})
    assert close(found(lambda n, t: F.pad(t, (1, 1, 1, 1), mode="replicate"), [1]), {1: 0.75})


def test_joins_of_constants_are_constants() -> None:
    assert close(found(lambda n, t: t + t.flip(1), [1, 6, 0]), {1: 1.5, 6: 1.5})
    assert close(found(lambda n, t: torch.where(t > 0.5, t, t * 2), [1]), {1: 0.75})


def test_a_zero_factor_makes_zero_of_anything() -> None:
    assert close(found(lambda n, t: t * t.roll(1, 1), [0, 1], 0.0), {0: 0.0, 1: 0.0, 2: 0.0})
    assert close(found(lambda n, t: t * t.roll(1, 1), [0, 1], 0.5), {1: 0.25})


def test_moves_carry_constants_along() -> None:
    assert close(found(lambda n, t: t.flip(1), [1]), {6: 0.75})
    assert close(found(lambda n, t: torch.cat([t, t[:, :2]], 1), [1]), {1: 0.75, 9: 0.75})
    assert close(found(lambda n, t: F.pixel_shuffle(t, 2), [4, 5, 6, 7]), {1: 0.75})
    assert close(found(lambda n, t: F.pixel_shuffle(t, 2), [4, 5, 6]), {})


def test_statistics_claim_nothing() -> None:
    assert close(found(lambda n, t: t.softmax(1), [1]), {})
    assert close(found(lambda n, t: n.norm(t), [0, 1], norm=nn.GroupNorm(4, 8)), {})


def test_a_row_with_weights_for_constants_alone_is_a_constant() -> None:
    model: Any = randomise(nn.Sequential(conv(3, 4, 3), conv(4, 3, 1), conv(3, 2, 3))).eval()
    kill(model[0], outputs=[0, 1], bias=0.5)
    kill(model[1], inputs=[2, 3])
    program = lowered(model, image())
    assert_right(program, image())
    claims = constants(program)
    expected = (model[1].bias + 0.5 * model[1].weight[:, :2, 0, 0].sum(1)).tolist()
    assert np.allclose(claims[layer(program, "1").result], expected, atol=1e-6)
    assert np.isnan(claims[layer(program, "2").result]).all()  # padded: the border differs


def test_a_spatial_factor_makes_a_constant_uneven() -> None:
    plane = torch.linspace(0, 1, 64).reshape(8, 8)
    assert close(found(lambda n, t: t * plane.to(t.dtype), [1]), {})
    assert close(found(lambda n, t: t * plane.to(t.dtype), [1], 0.0), {1: 0.0})


def test_what_depends_on_another_value_is_no_constant() -> None:
    def body(n: Any, t: Tensor) -> Tensor:
        return t + t[:, 2:3] * 0

    assert close(found(body, [1]), {}) or close(found(body, [1]), {1: 0.75})
