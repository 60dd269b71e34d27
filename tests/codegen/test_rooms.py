"""Concats without copies: who writes where, that it computes the same bit for bit, and when it is left alone."""

from __future__ import annotations

import copy
import functools
import inspect
import pickle
import random
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.flop_counter import FlopCounterMode

import chanopt
from benchmarks import gpu_plans
from chanopt.codegen import rooms
from chanopt.codegen.module import ChanoptModule
from chanopt.codegen.rooms import write_into_rooms
from chanopt.kernels import Call, Config, coverage
from chanopt.kernels.op import call_of
from chanopt.kernels.tiles import pin
from chanopt.target import ConvRead, Realization, Target
from tests.support.equal import assert_same_function
from tests.support.nets.base import Net, conv, randomise
from tests.support.passes import kill

aten, ours = torch.ops.aten, torch.ops.chanopt
LAST = torch.channels_last
FUSED: Callable[[ConvRead, Realization], float] = lambda _, way: float(way is not Realization.FUSED)  # noqa: E731


@pytest.fixture(autouse=True)
def in_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernels know no float64; what stands for them on a CPU does."""
    monkeypatch.setattr(ConvRead, "has_kernel", property(lambda read: read.stored % 8 == 0))


def images(batch: int = 2, size: int = 6) -> Tensor:
    return torch.randn(batch, 3, size, size, dtype=torch.float64).contiguous(memory_format=LAST)


def compiled(body: Callable[[Any, Tensor], Any], *gather: str, **parts: nn.Module) -> fx.GraphModule:
    """A net planned for a GPU, and right; the layers named read half of the channels, each another half."""
    net = randomise(Net(body, stem=conv(3, 32), **parts)).eval().double()
    generator = torch.Generator().manual_seed(0)
    for name in gather:
        channels = getattr(net, name).in_channels
        kill(getattr(net, name), inputs=torch.randperm(channels, generator=generator)[: channels // 2].tolist())
    fast = chanopt.optimize(net, (images(),), target=Target("cuda", cost=FUSED))
    assert isinstance(fast, fx.GraphModule)
    assert_same_function(net, fast, (images(3, 5),))
    return fast


def counts(graph: fx.Graph) -> Counter[str]:
    """How often a graph concatenates, copies, and writes into memory that is there."""
    kinds = {aten.cat.default: "cat", aten.copy_.default: "copy", ours.gather_conv2d_into.default: "conv"}
    found = Counter(kinds[node.target] for node in graph.nodes if node.target in kinds)
    return found + Counter("pointwise" for node in graph.nodes if "out" in node.kwargs)


def written(fast: fx.GraphModule) -> dict[str, int]:
    """The same of the form for inference, which must answer as the other does; {} if there is none."""
    graph = write_into_rooms(fast)
    for given in (images(), images(1, 9)):
        plain = fast(given)
        for module in (fast, copy.deepcopy(fast)):
            with torch.no_grad():
                quick = module(given)
            torch.testing.assert_close(quick, plain.detach(), rtol=0, atol=0)
    return {} if graph is None else dict(counts(graph))


def grown(n: Any, x: Tensor) -> Tensor:
    """DenseNet: every layer joins what all before it have made."""
    made = [n.stem(x).relu()]
    for layer in (n.a, n.b, n.c):
        made.append(layer(torch.cat(made, 1)))
    return n.head(torch.cat(made, 1))


def grown_by_two(n: Any, x: Tensor) -> Tensor:
    """The same, each joining the last sum with one more."""
    made = n.stem(x).relu()
    for layer in (n.a, n.b, n.c):
        made = torch.cat([made, layer(made)], 1)
    return n.head(made)


DENSE = {"a": conv(32, 16), "b": conv(48, 16), "c": conv(64, 16), "head": conv(80, 8)}


@pytest.mark.parametrize("body", [grown, grown_by_two])
def test_concats_that_grow_share_memory(body: Callable[[Any, Tensor], Tensor]) -> None:
    fast = compiled(body, "a", "b", "c", "head", **copy.deepcopy(DENSE))
    before = counts(fast.graph)["cat"]
    found = written(fast)
    assert before == 3
    assert found == {"copy": 1, "conv": 3}


def test_tiles_that_are_pinned_go_with_a_conv_into_its_room(monkeypatch: pytest.MonkeyPatch) -> None:
    fast = compiled(grown, "a", "b", "c", "head", **copy.deepcopy(DENSE))
    convs = [node.name for node in fast.graph.nodes if node.target is ours.gather_conv2d.default]
    tiles = {name: Config(64, 32, 32, 4, 2 + number) for number, name in enumerate(convs)}
    pin(fast, tiles)
    made: list[Call] = []
    monkeypatch.setattr(rooms, "call_of", lambda *given: (made.append(call_of(*given)[0]), call_of(*given))[1])
    assert written(fast) == {"copy": 1, "conv": 3}
    assert made
    assert [call.check().depthwise for call in made] == [False] * len(made)
    graph = write_into_rooms(fast)
    assert graph is not None
    into = [node.args[-1] for node in graph.nodes if node.target is ours.gather_conv2d_into.default]
    assert into == [tiles[name].to_list() for name in convs[:3]]


def test_what_reads_no_slices_has_a_concat_of_its_own() -> None:
    """A conv of ATen would copy the slice."""
    fast = compiled(grown, "a", "c", "head", **copy.deepcopy(DENSE))  # b reads all, without a kernel
    found = written(fast)
    assert found["cat"] == 1
    assert found["conv"] >= 1


BRANCHES = {"a": conv(32, 16), "b": conv(32, 16), "head": conv(32, 8)}


def joined(left: Callable[[Tensor], Tensor], right: Callable[[Tensor], Tensor]) -> Callable[[Any, Tensor], Tensor]:
    """Two convs, something after each, and a concat."""

    def body(n: Any, x: Tensor) -> Tensor:
        y = n.stem(x).relu()
        return n.head(torch.cat([left(n.a(y)), right(n.b(y))], 1))

    return body


POINTWISE: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "relu6": F.relu6,
    "hardtanh": functools.partial(F.hardtanh, min_val=-0.3, max_val=0.4),
    "silu": F.silu,
    "hardswish": F.hardswish,
    "hardsigmoid": F.hardsigmoid,
    "sigmoid": torch.sigmoid,
    "leaky_relu": functools.partial(F.leaky_relu, negative_slope=0.2),
    "elu": functools.partial(F.elu, alpha=0.7),
}


@pytest.mark.parametrize("name", list(POINTWISE))
def test_what_makes_a_part_writes_it(name: str) -> None:
    """`b` reads all and is ATen's; what comes after it writes, and so does the kernel of `a`."""
    fast = compiled(joined(lambda y: y, POINTWISE[name]), "a", "head", **copy.deepcopy(BRANCHES))
    assert written(fast) == {"conv": 1, "pointwise": 1}


def test_a_sum_writes() -> None:
    def body(n: Any, x: Tensor) -> Tensor:
        y = n.stem(x).relu()
        return n.head(torch.cat([n.b(y) + n.c(y), n.a(y)], 1))

    fast = compiled(body, "a", "head", c=conv(32, 16), **copy.deepcopy(BRANCHES))
    assert written(fast) == {"conv": 1, "pointwise": 1}


def test_outputs_are_of_their_own() -> None:
    """The caller may write over an output, and keep it when the next call comes."""

    def body(n: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        y = n.stem(x).relu()
        short = torch.cat([y, n.a(y)], 1)
        return short, torch.cat([y, n.a(y), n.b(y)], 1)

    net = randomise(Net(body, stem=conv(3, 32), a=conv(32, 16), b=conv(32, 16))).eval().double()
    kill(net.a, inputs=range(16))
    kill(net.b, inputs=range(8, 24))
    fast = chanopt.optimize(net, (images(),), target=Target("cuda", cost=FUSED))
    with torch.no_grad():
        first = fast(images())
        kept = [output.clone() for output in first]
        first[1].zero_()
        fast(images())
        assert torch.equal(first[0], kept[0])
        assert len({output.untyped_storage().data_ptr() for output in first}) == 2


class Hand:
    """A graph written by hand, of convs that gather from what may have any number of channels."""

    def __init__(self) -> None:
        self.root, self.graph = nn.Module(), fx.Graph()
        self.x = self.conv(self.graph.placeholder("x"), 32, 24, aten.conv2d.default)

    def call(self, target: Any, *args: Any) -> fx.Node:
        return self.graph.call_function(target, args)

    def cat(self, *pieces: fx.Node) -> fx.Node:
        return self.call(aten.cat.default, list(pieces), 1)

    def conv(self, operand: fx.Node, made: int, taken: int, target: Any = ours.gather_conv2d.default) -> fx.Node:
        """A conv of the first channels (of all, if it is ATen's)."""
        name = f"weight{len(self.graph.nodes)}"
        self.root.register_parameter(name, nn.Parameter(torch.randn(made, taken, 1, 1).double()))
        self.root.register_buffer(f"{name}_groups", torch.arange(taken // 8, dtype=torch.int32))
        weight, groups = self.graph.get_attr(name), self.graph.get_attr(f"{name}_groups")
        more = (None, groups, 8) if target is ours.gather_conv2d.default else ()
        return self.call(target, operand, weight, *more)

    def found(self, *outputs: fx.Node) -> dict[str, int]:
        """What is written and copied for inference, which must answer as the graph does."""
        self.graph.output(outputs)
        module = ChanoptModule(self.root, self.graph)
        x = torch.randn(2, 24, 6, 6, dtype=torch.float64).contiguous(memory_format=LAST)
        plain = module(x)
        with torch.no_grad():
            torch.testing.assert_close(module(x), tuple(map(Tensor.detach, plain)), rtol=0, atol=0)
        graph = write_into_rooms(module)
        return {} if graph is None else dict(counts(graph))


@pytest.mark.parametrize("over", [False, True])
def test_a_concat_that_somebody_writes_over_shares_no_memory(over: bool) -> None:
    """What is written over the long concat must not be what the short one is read as."""
    hand = Hand()
    short, made = hand.cat(hand.x, hand.x), hand.call(aten.exp.default, hand.x)
    long = hand.cat(hand.x, hand.x, hand.call(aten.relu.default, hand.x))
    after = hand.call(aten.relu_.default if over else aten.relu.default, long)
    found = hand.found(hand.conv(after, 8, 96), hand.conv(short, 8, 64), made)
    assert found == ({} if over else {"copy": 2, "pointwise": 1})


def test_concats_of_concats_without_end() -> None:
    """Forty times twice the same would be 2**40 pieces; a chain may be nearly as deep as Python's stack."""
    hand = Hand()
    doubled = hand.x
    for _ in range(12):
        doubled = hand.cat(doubled, doubled)
    for _ in range(28):
        doubled = hand.cat(hand.call(aten.slice.Tensor, doubled, 1, 0, 32), doubled)
        doubled = hand.call(aten.slice.Tensor, doubled, 1, 0, 32 * 1024)
    chain = hand.x
    for _ in range(904):
        chain = hand.cat(chain, hand.call(aten.slice.Tensor, hand.x, 1, 0, 1))
    read = hand.conv(chain, 8, 936)
    short = hand.conv(hand.call(aten.slice.Tensor, doubled, 1, 0, 64), 8, 64)
    found = hand.found(read, short)
    assert found["copy"] == 905  # every piece of the chain, once
    assert found["cat"] == 40


def test_what_others_read_too_is_copied() -> None:
    hand = Hand()
    left, right = (
        hand.conv(hand.x, 16, 32),
        hand.call(aten.relu_.default, hand.conv(hand.x, 16, 32, aten.conv2d.default)),
    )
    joined = hand.cat(left, right)
    assert hand.found(hand.conv(joined, 8, 32), left) == {"copy": 1, "pointwise": 1}


def test_one_concat_is_not_made_many_copies() -> None:
    """A copy more is a launch more; where concats share their memory, each copy saves others."""
    hand = Hand()
    made = hand.conv(hand.x, 16, 32)
    short = hand.cat(hand.x, hand.x, made)
    assert hand.found(hand.conv(short, 8, 80)) == {}
    hand = Hand()
    made = hand.conv(hand.x, 16, 32)
    short, long = hand.cat(hand.x, hand.x), hand.cat(hand.x, hand.x, made)
    assert hand.found(hand.conv(short, 8, 64), hand.conv(long, 8, 80)) == {"copy": 2, "conv": 1}


@pytest.mark.parametrize("target", [aten.relu_.default, None])
@pytest.mark.parametrize("size", [3, 5, 7])
def test_what_does_not_fit_is_for_the_concat_to_tell(target: Any, size: int) -> None:
    """A copy would spread one pixel over a place, and an op that writes elsewhere would resize it."""
    hand = Hand()
    halved = hand.conv(hand.call(aten.max_pool2d.default, hand.x, [2, 2]), 16, 32, aten.conv2d.default)
    halved = halved if target is None else hand.call(target, halved)
    strided = hand.call(ours.gather_conv2d.default, *hand.conv(hand.x, 16, 32).args, [2, 2])
    hand.graph.output((hand.conv(hand.cat(strided, halved), 8, 32),))
    hand.graph.eliminate_dead_code()
    module = ChanoptModule(hand.root, hand.graph)
    assert write_into_rooms(module) is not None
    with torch.no_grad():
        assert module(torch.randn(2, 24, 6, 6, dtype=torch.float64))[0].shape[2:] == (3, 3)
        with pytest.raises(RuntimeError, match="Sizes of tensors must match"):
            module(torch.randn(2, 24, size, size, dtype=torch.float64))


def test_types_are_promoted_as_by_a_concat() -> None:
    hand = Hand()
    wide = hand.call(aten.add.Tensor, hand.conv(hand.x, 16, 32), hand.call(aten.ones.default, [1, 1, 1, 1]))
    joined = hand.cat(hand.conv(hand.x, 16, 32), wide)
    hand.graph.output((joined, hand.conv(hand.x, 8, 32)))
    module = ChanoptModule(hand.root, hand.graph).float()
    assert write_into_rooms(module) is not None
    for node in module.graph.find_nodes(op="call_function", target=aten.ones.default):
        node.kwargs = {"dtype": torch.float64}
    module.recompile()
    x = torch.randn(2, 24, 6, 6)
    with torch.no_grad():
        quick = module(x)[0]
    assert quick.dtype == module(x)[0].dtype == torch.float64
    assert torch.equal(quick, module(x)[0])


def test_channels_that_nothing_tells_are_left_to_the_concat() -> None:
    """A weight that is computed, or is gone; a slice to a size known only at run time, or with fewer bounds."""
    hand = Hand()
    first = hand.conv(hand.x, 16, 32)
    scaled = hand.call(aten.mul.Tensor, hand.conv(hand.x, 16, 32, aten.conv2d.default).args[1], 2)
    computed = hand.call(aten.conv2d.default, hand.x, scaled)
    batch = hand.call(aten.sym_size.int, hand.x, 0)
    open_end = hand.call(aten.slice.Tensor, first, 1, 0, batch)
    from_four = hand.call(aten.slice.Tensor, first, 1, 8)
    all_of_it = hand.call(aten.slice.Tensor, first, 1)
    joined = [hand.cat(hand.conv(hand.x, 16, 32), piece) for piece in (computed, open_end)]
    known = hand.cat(hand.conv(hand.x, 16, 32), hand.call(aten.relu.default, from_four))
    whole = hand.cat(hand.conv(hand.x, 16, 32), all_of_it)
    assert hand.found(*joined, known, whole) == {"cat": 2, "conv": 2, "copy": 1, "pointwise": 1}


def test_a_weight_that_is_gone_is_no_matter_for_the_code() -> None:
    hand = Hand()
    joined = hand.cat(hand.conv(hand.x, 16, 32), hand.conv(hand.x, 16, 32))
    hand.graph.output((joined,))
    module = ChanoptModule(hand.root, hand.graph)
    del module._parameters[next(iter(module._parameters))]
    assert module.recompile() is not None


def test_what_is_written_over_before_others_read_it() -> None:
    """Graphs that are edited by hand may do so."""
    hand = Hand()
    conv = hand.conv(hand.x, 16, 32, aten.conv2d.default)
    over = hand.cat(hand.call(aten.relu_.default, conv), hand.conv(hand.x, 16, 32))
    inner = hand.cat(hand.x)
    hand.call(aten.relu_.default, inner)
    outer = hand.cat(inner, hand.conv(hand.x, 16, 32))
    assert hand.found(hand.conv(over, 8, 32), conv, hand.conv(outer, 8, 48)) == {"cat": 2, "copy": 1, "conv": 1}


def test_a_concat_of_single_images_is_not_of_channels() -> None:
    """Without a batch, the second axis is the height."""
    hand = Hand()
    single = hand.call(aten.select.int, hand.x, 0, 0)
    made = hand.call(aten.relu_.default, hand.conv(single, 16, 32, aten.conv2d.default))
    joined = hand.cat(made, hand.conv(single, 16, 32, aten.conv2d.default))
    assert hand.found(joined, hand.conv(hand.x, 8, 32)) == {}


@pytest.mark.parametrize(("first", "second", "written"), [(16, 8, 2), (12, 12, 0), (16, 12, 0), (12, 4, 0)])
def test_kernels_write_where_whole_groups_end(first: int, second: int, written: int) -> None:
    """Their loads and stores are of 8 channels; ATen would have to take over."""
    hand = Hand()
    joined = hand.cat(hand.conv(hand.x, first, 32), hand.conv(hand.x, second, 32))
    assert hand.found(hand.conv(joined, 8, 16)).get("conv", 0) == written


@pytest.mark.parametrize(("last", "shared"), [(8, True), (12, False)])
def test_a_room_that_is_shared_is_of_whole_groups(last: int, shared: bool) -> None:
    """Its pixels lie as far apart as it has channels, and kernels load 8 at a time."""
    hand = Hand()
    short = hand.cat(hand.x, hand.x)
    long = hand.cat(hand.x, hand.x, hand.call(aten.exp.default, hand.conv(hand.x, last, 32)))
    hand_made = hand.found(hand.conv(short, 8, 64), hand.conv(long, 8, 64))
    assert hand_made == {}  # nothing says how many channels exp has
    hand = Hand()
    short, tail = hand.cat(hand.x, hand.x), hand.conv(hand.x, last, 32, aten.conv2d.default)
    assert hand.found(hand.conv(short, 8, 64), hand.conv(hand.cat(hand.x, hand.x, tail), 8, 64)) == (
        {"copy": 3} if shared else {}
    )


def test_what_goes_into_two_rooms_is_copied_into_both() -> None:
    """The conv of ATen reads no slice, so the inner concat is not the first part of the outer one."""
    hand = Hand()
    left = hand.conv(hand.x, 16, 32)
    inner = hand.cat(left)
    outer = hand.cat(inner, hand.conv(hand.x, 16, 32))
    found = hand.found(hand.conv(inner, 8, 16, aten.conv2d.default), hand.conv(outer, 8, 32))
    assert found == {"cat": 1, "copy": 1, "conv": 1}


class TestWhenItIsLeftAlone:
    """Calls that want more than the outputs run the graph as it stands."""

    @pytest.fixture(autouse=True)
    def noted(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.fast = compiled(grown, "a", "b", "c", "head", **copy.deepcopy(DENSE))
        self.calls = 0
        note = torch.empty

        def counted(*args: Any, **kwargs: Any) -> Tensor:
            self.calls += "memory_format" in kwargs and "like" not in kwargs
            return note(*args, **kwargs)

        monkeypatch.setattr("chanopt.codegen.rooms.torch.empty", counted)

    def rooms(self, call: Callable[[], Any]) -> int:
        self.calls = 0
        call()
        return self.calls

    def test_inference_is_not(self) -> None:
        x = images()
        with torch.inference_mode():
            assert self.rooms(lambda: self.fast(x)) > 0
        with torch.no_grad():
            assert self.rooms(lambda: self.fast(x)) > 0

    def test_gradients(self) -> None:
        x = images()
        assert self.rooms(lambda: self.fast(x).sum().backward()) == 0
        assert all(parameter.grad is not None for parameter in self.fast.parameters())

    @torch.no_grad()
    def test_traces_and_transforms(self) -> None:
        x = images()
        exported = torch.export.export(self.fast, (x,), strict=False)
        assert not any("into" in str(node.target) for node in exported.graph.nodes)
        assert torch.equal(exported.module()(x), self.fast(x))
        traced = torch.jit.trace(self.fast, (x,), check_trace=False)
        assert "gather_conv2d_into" not in str(traced.graph)  # type: ignore[attr-defined]
        mapped = torch.func.vmap(self.fast)(torch.stack([x, x + 1]))
        torch.testing.assert_close(mapped[1], self.fast(x + 1))
        graphs: list[fx.GraphModule] = []

        def backend(graph: fx.GraphModule, _: Any) -> Callable[..., Any]:
            graphs.append(graph)
            return graph.forward

        answered = torch.compile(self.fast, backend=backend)(x)
        assert torch.equal(answered, self.fast(x))
        assert len(graphs) == 1
        assert not any("into" in str(node.target) for node in graphs[0].graph.nodes)

    @torch.no_grad()
    def test_autocast(self) -> None:
        fast, x = self.fast.float(), images().float()
        with torch.autocast("cpu", torch.bfloat16):
            assert self.rooms(lambda: fast(x)) == 0

    @torch.no_grad()
    def test_a_changed_graph_and_changed_weights_are_followed(self) -> None:
        x = images()
        before = self.fast(x)
        self.fast.load_state_dict({name: 2 * tensor if tensor.is_floating_point() else tensor
                                   for name, tensor in self.fast.state_dict().items()})  # fmt: skip
        assert not torch.allclose(self.fast(x), before)
        (output,) = self.fast.graph.find_nodes(op="output")
        twice = self.fast.graph.find_nodes(op="call_function", target=ours.gather_conv2d.default)[-1]
        with self.fast.graph.inserting_after(twice):
            doubled = self.fast.graph.call_function(aten.mul.Tensor, (twice, 2))
        twice.replace_all_uses_with(doubled, delete_user_cb=lambda user: user is not doubled)
        assert output.users == {}
        after = self.fast(x)
        self.fast.recompile()
        assert torch.allclose(self.fast(x), 2 * after)

    @torch.no_grad()
    def test_it_is_an_ordinary_module_otherwise(self) -> None:
        x = images()
        assert copy.deepcopy(self.fast).to("meta")(x.to("meta")).shape == (2, 8, 6, 6)
        assert list(inspect.signature(self.fast.forward).parameters) == ["x"]
        for other in (fx.symbolic_trace(self.fast), pickle.loads(pickle.dumps(self.fast)), make_fx(self.fast)(x)):
            assert torch.equal(other(x), self.fast(x))
        with FlopCounterMode(display=False) as quick:
            self.fast(x)
        with FlopCounterMode(display=False) as plain, torch.enable_grad():
            self.fast(x)
        assert quick.get_total_flops() == plain.get_total_flops() > 0


class Wild(nn.Module):
    """Convs that join any of what there is, concats of concats, sums, activations; all of it joined at the end."""

    acts = (F.relu, F.silu, torch.sigmoid, torch.exp, lambda y: y, lambda y: F.max_pool2d(y, 3, 1, 1))

    def __init__(self, seed: int) -> None:
        super().__init__()
        dice, widths = random.Random(seed), [32]
        self.stem, self.convs = nn.Conv2d(3, 32, 3, padding=1), nn.ModuleList()
        self.norms = nn.ModuleList()
        self.steps: list[tuple[Any, ...]] = []
        for _ in range(dice.randint(4, 9)):
            first, some = (
                range(dice.randint(1, len(widths))),
                sorted(dice.sample(range(len(widths)), len(widths) // 2 + 1)),
            )
            joined, kind = dice.choice([first, first, some]), dice.random()
            total, act = sum(widths[i] for i in joined), dice.choice(self.acts)
            pairs = [(i, j) for j in range(len(widths)) for i in range(j) if widths[i] == widths[j]]
            if kind < 0.7:
                kernel, made = dice.choice([1, 1, 3]), dice.choice([8, 16, 16, 12])
                self.convs.append(nn.Conv2d(total, made, kernel, padding=kernel // 2))
                self.norms.append(dice.choice([nn.BatchNorm2d(total), nn.Identity()]))
                self.steps.append(("conv", joined, len(self.convs) - 1, act))
            elif kind < 0.85 or not pairs:
                made = total
                self.steps.append(("cat", joined))
            else:
                i, j = dice.choice(pairs)
                made = widths[i]
                self.steps.append(("add", i, j))
            widths.append(made)
        self.head = nn.Conv2d(sum(widths), 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        made = [self.stem(x).relu()]
        for kind, first, *rest in self.steps:
            if kind == "add":
                made.append((made[first] + made[rest[0]]).relu())
                continue
            joined = torch.cat([made[i] for i in first], 1)
            if kind == "conv":
                joined = rest[1](self.convs[rest[0]](self.norms[rest[0]](joined).relu()))
            made.append(joined)
        return self.head(torch.cat(made, 1))


@pytest.mark.parametrize("seed", range(12))
def test_wild_concats(seed: int) -> None:
    torch.manual_seed(seed)
    net = randomise(Wild(seed)).eval().double()
    for layer in (*net.convs, net.head):
        kill(layer, inputs=torch.randperm(layer.in_channels)[: layer.in_channels // 2].tolist())
    fast = chanopt.optimize(net, (images(),), target=Target("cuda", cost=FUSED))
    assert_same_function(net, fast, (images(3, 5),))
    written(fast)


class _Covered(fx.Interpreter):
    """Counts the convs that have a kernel, those that have none, and the elements that are moved."""

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        self.seen: Counter[str] = Counter()

    def run_node(self, n: fx.Node) -> Any:
        args, _ = self.fetch_args_kwargs_from_env(n)
        into = n.target is ours.gather_conv2d_into.default
        if into or n.target is ours.gather_conv2d.default:
            out, operands = (args[0], args[1:]) if into else (None, args)
            self.seen["kernel" if coverage(Call(*operands).check(), out) else "none"] += 1
        if n.target is aten.cat.default:
            self.seen["moved"] += sum(piece.numel() for piece in args[0])
        if n.target is aten.copy_.default:
            self.seen["moved"] += args[1].numel()
        return super().run_node(n)


@torch.no_grad()
def test_densenet_keeps_its_kernels_and_moves_a_sixth() -> None:
    """Of the plan that is timed on a GPU; in half precision, whose kernels ask for more."""
    fast = gpu_plans.load(gpu_plans.plan_path("densenet121", "chanopt"))
    graph = write_into_rooms(fast)
    assert graph is not None
    x = torch.randn(2, 3, 64, 64).contiguous(memory_format=LAST)
    plain, quick = (_Covered(fx.GraphModule(fast, form)) for form in (fast.graph, graph))
    torch.testing.assert_close(plain.run(x), quick.run(x), rtol=0, atol=0)
    assert plain.seen["kernel"] == quick.seen["kernel"] > 50
    assert quick.seen["none"] == 0
    assert 0 < quick.seen["moved"] < plain.seen["moved"] / 6
