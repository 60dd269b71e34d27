"""Seeded random networks: acyclic graphs of 10 to 30 small steps over maps of one spatial size."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.support.calibrate import calibrate
from tests.support.equal import assert_sensitive, outputs
from tests.support.nets.base import Inputs, parameter, randomise, tensors

ATTEMPTS = 20
"""How many graphs a seed may try before it gives up; nearly all succeed with the first."""

_WIDEST = 16
_WIDEST_CAT = 32


@dataclass(frozen=True, slots=True)
class Step:
    """Appends `function(parts[name], *[values[i] for i in reads])` to the values; a tuple appends several."""

    name: str
    function: Callable[..., Any]
    reads: tuple[int, ...]

    def __str__(self) -> str:
        return f"{self.name}({', '.join(f'v{i}' for i in self.reads)})"


class RandomNet(nn.Module):
    """Runs its steps in order over a list of values; values 0.. are the inputs.

    `results` names the outputs: one index gives a tensor, several a tuple, a dict of indices a dict.
    """

    def __init__(
        self, steps: list[Step], parts: nn.ModuleDict, results: int | tuple[int, ...] | dict[str, int]
    ) -> None:
        super().__init__()
        self.steps, self.parts, self.results = steps, parts, results

    def run(self, *inputs: Tensor) -> Any:
        values, parts = list(inputs), dict(self.parts.items())
        for step in self.steps:
            part = parts.get(step.name)
            found = step.function(part, *(values[i] for i in step.reads))
            values.extend(found if isinstance(found, (tuple, list)) else [found])
        if isinstance(self.results, int):
            return values[self.results]
        if isinstance(self.results, dict):
            return {name: values[i] for name, i in self.results.items()}
        return tuple(values[i] for i in self.results)

    def extra_repr(self) -> str:
        return "\n".join([*map(str, self.steps), f"return {self.results}"])


class OneInput(RandomNet):
    """A random network of one input."""

    def forward(self, x: Tensor) -> Any:
        return self.run(x)


class TwoInputs(RandomNet):
    """A random network of two inputs."""

    def forward(self, x: Tensor, y: Tensor) -> Any:
        return self.run(x, y)


def random_net(seed: int) -> tuple[nn.Module, Inputs]:
    """A random network in eval mode, float32, and its inputs: `(batch, dtype, seed) -> arguments`.

    The same seed gives the same network and weights. Any batch of 1 or more works, also a symbolic one.
    Outputs are sensitive (`assert_sensitive`): a graph that is not is drawn again from the same seed.

    Raises:
        RuntimeError: no sensitive graph in `ATTEMPTS`; not met in 2000 seeds.
    """
    net, inputs, _ = random_net_counted(seed)
    return net, inputs


def random_net_counted(seed: int) -> tuple[nn.Module, Inputs, int]:
    """`random_net` and how many graphs it took."""
    for attempt in range(ATTEMPTS):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed * ATTEMPTS + attempt)
            writer = _Writer(random.Random(f"{seed}/{attempt}"))
            net = randomise(writer.write()).eval()
        inputs = tensors(*writer.inputs)
        calibrate(net, inputs(8, torch.float32, 1))
        if _sensitive(net, inputs):
            return net, inputs, attempt + 1
    raise RuntimeError(f"seed {seed}: no random net with sensitive outputs in {ATTEMPTS} attempts; use another seed")


def _sensitive(net: nn.Module, inputs: Inputs) -> bool:
    found = outputs(net, inputs(4, torch.float32, 2))
    try:
        assert_sensitive(found, floor=1e-2)
    except AssertionError:
        return False
    return all(output.abs().max() < 1e3 for output in found)


# Functions of steps. The first argument is the step's module, or None.


def _call(part: nn.Module, x: Tensor) -> Tensor:
    return part(x)


def _add(_: None, x: Tensor, y: Tensor) -> Tensor:
    return x + y


def _sub(_: None, x: Tensor, y: Tensor) -> Tensor:
    return x - y


def _max(_: None, x: Tensor, y: Tensor) -> Tensor:
    return torch.maximum(x, y)


def _gate(_: None, x: Tensor, y: Tensor) -> Tensor:
    return x * torch.sigmoid(y)


def _cat(_: None, *values: Tensor) -> Tensor:
    return torch.cat(values, 1)


def _chunk(_: None, x: Tensor, parts: int) -> tuple[Tensor, ...]:
    return x.chunk(parts, 1)


def _split(_: None, x: Tensor, sizes: list[int]) -> tuple[Tensor, ...]:
    return torch.split(x, sizes, 1)


def _slice(_: None, x: Tensor, start: int, stop: int, step: int) -> Tensor:
    return x[:, start:stop:step]


def _permuted(_: None, x: Tensor, order: list[int]) -> Tensor:
    return x[:, order]


def _flip(_: None, x: Tensor) -> Tensor:
    return x + x.flip(1)


def _shuffle(_: None, x: Tensor, groups: int) -> Tensor:
    batch, channels, height, width = x.shape
    x = x.view(batch, groups, channels // groups, height, width).transpose(1, 2)
    return x.reshape(batch, channels, height, width)


def _affine(_: None, x: Tensor, scale: float, shift: float) -> Tensor:
    return x * scale + shift


def _mean_product(_: None, x: Tensor) -> Tensor:
    return x * x.mean(1, keepdim=True)


def _softmax(_: None, x: Tensor) -> Tensor:
    return x.softmax(1) * x.shape[1]


def _pool_up(part: nn.Module, x: Tensor) -> Tensor:
    """A part that makes the map smaller, then nearest or bilinear back to where it was."""
    return F.interpolate(part(x), size=x.shape[-2:])


def _up_bilinear(part: nn.Module, x: Tensor) -> Tensor:
    return F.interpolate(part(x), size=x.shape[-2:], mode="bilinear", align_corners=False)


def _flat(part: nn.Module, x: Tensor) -> Tensor:
    return part(x.flatten(1))


def _pooled(part: nn.Module, x: Tensor) -> Tensor:
    return part(x.mean((2, 3)))


def _twice(part: nn.Module, x: Tensor) -> Tensor:
    return part(F.relu(part(x)))


class SqueezeExcite(nn.Module):
    """Channel gate from pooled channels."""

    def __init__(self, width: int, squeezed: int) -> None:
        super().__init__()
        self.reduce, self.expand = nn.Conv2d(width, squeezed, 1), nn.Conv2d(squeezed, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(self.expand(F.relu(self.reduce(F.adaptive_avg_pool2d(x, 1)))))


class ChannelScale(nn.Module):
    """One factor per channel."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.scale = parameter(1, width, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale


class ChannelsLastNorm(nn.Module):
    """Layer norm over channels through a permute."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


_ACTIVATIONS: tuple[Callable[[int], nn.Module], ...] = (
    lambda width: nn.ReLU(),
    lambda width: nn.ReLU6(),
    lambda width: nn.Hardswish(),
    lambda width: nn.SiLU(),
    lambda width: nn.GELU(),
    lambda width: nn.LeakyReLU(0.1),
    lambda width: nn.Sigmoid(),
    lambda width: nn.Tanh(),
    lambda width: nn.PReLU(width),
)


@dataclass(slots=True)
class _Writer:
    """Draws one network. `widths[i]` is the channel count of value i; all have the spatial size `size`."""

    rng: random.Random
    inputs: list[tuple[int, int, int]] = field(default_factory=list)
    widths: list[int] = field(default_factory=list)
    unread: set[int] = field(default_factory=set)
    steps: list[Step] = field(default_factory=list)
    parts: dict[str, nn.Module] = field(default_factory=dict)
    size: tuple[int, int] = (8, 8)

    def write(self) -> RandomNet:
        rng = self.rng
        self.size = (rng.randint(6, 9), rng.randint(6, 9))
        count = 2 if rng.random() < 0.15 else 1
        self.inputs = [(rng.randint(3, 6), *self.size) for _ in range(count)]
        self.widths = [shape[0] for shape in self.inputs]
        stems = [self.block(i) for i in range(count)]
        self.unread = set(stems)
        length = rng.randint(10, 30)
        while len(self.steps) < length:
            self.grow()
        results = self.heads()
        kind = TwoInputs if count == 2 else OneInput
        return kind(self.steps, nn.ModuleDict(self.parts), results)

    def step(
        self,
        name: str,
        function: Callable[..., Any],
        reads: tuple[int, ...],
        *widths: int,
        part: nn.Module | None = None,
    ) -> int:
        """Append a step with results of these channel counts; the index of the first."""
        name = f"{name}{len(self.steps)}"
        if part is not None:
            self.parts[name] = part
        self.steps.append(Step(name, function, reads))
        first = len(self.widths)
        self.widths.extend(widths)
        self.unread -= set(reads)
        self.unread |= set(range(first, first + len(widths)))
        return first

    def pick(self) -> int:
        """A value: mostly the newest or one that nothing reads yet, sometimes any, never a network input."""
        born = range(len(self.inputs), len(self.widths))
        if self.unread and self.rng.random() < 0.6:
            return self.rng.choice(sorted(self.unread))
        return self.rng.choice(born[-4:] if self.rng.random() < 0.6 else born)

    def width(self) -> int:
        return self.rng.choice((4, 6, 8, 8, 12, 16))

    def pair(self) -> tuple[int, int]:
        """Two values of equal channel count; a 1x1 convolution makes the second where there is none."""
        first = self.pick()
        partners = [
            i for i in range(len(self.inputs), len(self.widths)) if i != first and self.widths[i] == self.widths[first]
        ]
        if partners and self.rng.random() < 0.8:
            return first, self.rng.choice(partners)
        other = self.pick()
        return first, self.step(
            "match",
            _call,
            (other,),
            self.widths[first],
            part=self.mix(self.widths[other], self.widths[first]),
        )

    def mix(self, inputs: int, outputs: int, kernel: int | None = None) -> nn.Conv2d:
        """A dense convolution that keeps the spatial size."""
        kernel = kernel or self.rng.choice((1, 1, 3))
        dilation = 2 if kernel == 3 and self.rng.random() < 0.15 else 1
        padding_mode = "reflect" if kernel == 3 and self.rng.random() < 0.1 else "zeros"
        return nn.Conv2d(
            inputs,
            outputs,
            kernel,
            padding=dilation * (kernel // 2),
            dilation=dilation,
            bias=self.rng.random() < 0.7,
            padding_mode=padding_mode,
        )

    def block(self, read: int) -> int:
        """Convolution, then perhaps batch norm, then perhaps an activation; each a step of its own."""
        width = self.width()
        value = self.step("conv", _call, (read,), width, part=self.mix(self.widths[read], width))
        if self.rng.random() < 0.6:
            value = self.step("bn", _call, (value,), width, part=nn.BatchNorm2d(width))
        if self.rng.random() < 0.7:
            value = self.activation(value)
        return value

    def activation(self, read: int) -> int:
        width = self.widths[read]
        return self.step("act", _call, (read,), width, part=self.rng.choice(_ACTIVATIONS)(width))

    def grow(self) -> None:
        """One random production of the grammar; one that does not fit the drawn value is drawn again."""
        makers, weights = zip(*_GRAMMAR, strict=True)
        self.rng.choices(makers, weights)[0](self)

    # Productions

    def conv(self) -> None:
        self.block(self.pick())

    def activate(self) -> None:
        self.activation(self.pick())

    def norm(self) -> None:
        read = self.pick()
        width = self.widths[read]
        groups = self.rng.choice([g for g in (1, 2, 4, width) if width % g == 0])
        kinds: tuple[tuple[str, Callable[[], nn.Module]], ...] = (
            ("bn", lambda: nn.BatchNorm2d(width)),
            ("bn", lambda: nn.BatchNorm2d(width, affine=False)),
            ("groupnorm", lambda: nn.GroupNorm(groups, width)),
            ("instancenorm", lambda: nn.InstanceNorm2d(width, affine=True)),
            ("layernorm", lambda: ChannelsLastNorm(width)),
        )
        name, make = self.rng.choices(kinds, (4, 1, 2, 1, 1))[0]
        self.step(name, _call, (read,), width, part=make())

    def join(self) -> None:
        function = self.rng.choices((_add, _sub, _max, _gate), (6, 1, 1, 1))[0]
        first, second = self.pair()
        self.step(function.__name__.strip("_"), function, (first, second), self.widths[first])

    def residual(self) -> None:
        """A stream with two blocks on it, as residual networks have them."""
        stream = self.pick()
        width = self.widths[stream]
        for _ in range(2):
            inner = self.block(stream)
            branch = self.step("conv", _call, (inner,), width, part=self.mix(self.widths[inner], width))
            stream = self.step("add", _add, (stream, branch), width)

    def concat(self) -> None:
        values = [self.pick() for _ in range(self.rng.choice((2, 2, 3)))]
        if sum(self.widths[i] for i in values) > _WIDEST_CAT:
            return
        if self.rng.random() < 0.1:
            values[-1] = 0
        joined = self.step("cat", _cat, tuple(values), sum(self.widths[i] for i in values))
        if self.rng.random() < 0.7:
            self.block(joined)

    def chunk(self) -> None:
        read = self.pick()
        if self.widths[read] < 6 or self.widths[read] % 2:
            return
        half = self.widths[read] // 2
        self.step("chunk", partial(_chunk, parts=2), (read,), half, half)

    def split(self) -> None:
        read = self.pick()
        if self.widths[read] < 6:
            return
        first = self.rng.randint(2, self.widths[read] - 2)
        sizes = [first, self.widths[read] - first]
        self.step("split", partial(_split, sizes=sizes), (read,), *sizes)

    def slice(self) -> None:
        read = self.pick()
        if self.widths[read] < 6:
            return
        start, step = self.rng.randint(0, 2), self.rng.choice((1, 1, 2))
        stop = self.widths[read] - self.rng.randint(0, 2)
        self.step(
            "slice",
            partial(_slice, start=start, stop=stop, step=step),
            (read,),
            len(range(start, stop, step)),
        )

    def reorder(self) -> None:
        read = self.pick()
        width = self.widths[read]
        options: list[Callable[..., Any]] = [
            _flip,
            partial(_permuted, order=self.rng.sample(range(width), width)),
        ]
        options += [partial(_shuffle, groups=g) for g in (2, 4) if width % g == 0]
        self.step("reorder", self.rng.choice(options), (read,), width)

    def excite(self) -> None:
        read = self.pick()
        self.step("se", _call, (read,), self.widths[read], part=SqueezeExcite(self.widths[read], 4))

    def depthwise(self) -> None:
        read = self.pick()
        width = self.widths[read]
        multiplier = 2 if width <= _WIDEST // 2 and self.rng.random() < 0.3 else 1
        part = nn.Conv2d(width, width * multiplier, 3, padding=1, groups=width, bias=self.rng.random() < 0.5)
        self.step("depthwise", _call, (read,), width * multiplier, part=part)

    def grouped(self) -> None:
        read = self.pick()
        fits = [g for g in (2, 4) if self.widths[read] % g == 0]
        if not fits:
            return
        groups, width = self.rng.choice(fits), self.rng.choice((4, 8, 12, 16))
        kernel = self.rng.choice((1, 3))
        part = nn.Conv2d(self.widths[read], width, kernel, padding=kernel // 2, groups=groups)
        self.step("grouped", _call, (read,), width, part=part)

    def resample(self) -> None:
        read = self.pick()
        pool = self.rng.choice(
            (nn.MaxPool2d(3, 2, 1), nn.AvgPool2d(2), nn.AvgPool2d(3, 2, 1), nn.MaxPool2d(2, ceil_mode=True))
        )
        up = self.rng.choice((_pool_up, _up_bilinear))
        self.step("resample", up, (read,), self.widths[read], part=pool)

    def strided(self) -> None:
        """Strided convolution down, then a transposed convolution or a resize back up."""
        read, inner, width = self.pick(), self.width(), self.width()
        down = nn.Conv2d(self.widths[read], inner, 3, stride=2, padding=1)
        up = nn.ConvTranspose2d(inner, width, 2, 2, groups=self.rng.choice((1, 2)))
        part = nn.Sequential(down, nn.ReLU(), up) if self.rng.random() < 0.6 else down
        self.step("strided", _pool_up, (read,), width if part is not down else inner, part=part)

    def transposed(self) -> None:
        read, width = self.pick(), self.width()
        part = nn.ConvTranspose2d(self.widths[read], width, 3, padding=1)
        self.step("transposed", _call, (read,), width, part=part)

    def twice(self) -> None:
        """One convolution applied to its own result."""
        read = self.pick()
        width = self.widths[read]
        self.step("twice", _twice, (read,), width, part=self.mix(width, width))

    def arithmetic(self) -> None:
        read = self.pick()
        width = self.widths[read]
        if self.rng.random() < 0.5:
            self.step("scale", _call, (read,), width, part=ChannelScale(width))
            return
        affine = partial(_affine, scale=self.rng.uniform(0.5, 2), shift=self.rng.uniform(-1, 1))
        self.step("affine", affine, (read,), width)

    def statistic(self) -> None:
        read = self.pick()
        self.step("statistic", self.rng.choice((_mean_product, _softmax)), (read,), self.widths[read])

    # Outputs

    def heads(self) -> int | tuple[int, ...] | dict[str, int]:
        """Collect most of what nothing reads, end in a random head, and return other values too now and then.

        What is left out stays in the graph as a dead branch.
        """
        loose = sorted(self.unread)[-4:]
        last = self.step("cat", _cat, tuple(loose), sum(self.widths[i] for i in loose)) if len(loose) > 1 else loose[0]
        last = self.block(last)
        main = self.head(last)
        roll = self.rng.random()
        if roll < 0.65:
            return main
        if roll < 0.8:
            return main, self.pick_output(last)
        return {"out": main, "aux": self.head(self.pick_output(last))}

    def pick_output(self, last: int) -> int:
        """A value that is also read inside: it becomes an output, so its channels are pinned."""
        return self.rng.randint(len(self.inputs), last)

    def head(self, read: int) -> int:
        width, classes = self.widths[read], self.rng.randint(2, 6)
        kind = self.rng.choice(("flat", "pool", "conv", "conv", "raw"))
        if kind == "flat":
            features = width * self.size[0] * self.size[1]
            return self.step("flat", _flat, (read,), classes, part=nn.Linear(features, classes))
        if kind == "pool":
            hidden = self.width()
            part = nn.Sequential(nn.Linear(width, hidden), nn.ReLU(), nn.Linear(hidden, classes))
            return self.step("pool", _pooled, (read,), classes, part=part)
        if kind == "conv":
            return self.step("head", _call, (read,), classes, part=self.mix(width, classes))
        return read


_GRAMMAR: tuple[tuple[Callable[[_Writer], None], float], ...] = (
    (_Writer.conv, 6),
    (_Writer.activate, 2),
    (_Writer.norm, 2),
    (_Writer.join, 4),
    (_Writer.residual, 1),
    (_Writer.concat, 3),
    (_Writer.chunk, 1),
    (_Writer.split, 1),
    (_Writer.slice, 1),
    (_Writer.reorder, 1),
    (_Writer.excite, 1),
    (_Writer.depthwise, 2),
    (_Writer.grouped, 2),
    (_Writer.resample, 1),
    (_Writer.strided, 1),
    (_Writer.transposed, 0.7),
    (_Writer.twice, 0.5),
    (_Writer.arithmetic, 1),
    (_Writer.statistic, 0.7),
)
