from __future__ import annotations

import copy
import random

import pytest
import torch
from torch import Tensor, nn

import chanopt
from benchmarks import observe, peers, survey, zoo
from benchmarks.arms import ARMS, SAME_MASKS, Arm, ArmError, Copies, Subject, build, plans
from benchmarks.arms.greedy import greedy_order
from benchmarks.masks import Setting, build_masked, mask
from benchmarks.measure import relative_error


def is_range(channels: set[int], order: list[int]) -> bool:
    places = sorted(order.index(channel) for channel in channels)
    return not places or places[-1] - places[0] + 1 == len(places)


ONE = dict.fromkeys(range(12), 0)


def test_two_consumers_are_ranges_and_overlap_in_the_middle() -> None:
    assert greedy_order([{0, 2, 4}, {1, 4, 5}], ONE) == [0, 2, 4, 1, 5]


def test_the_pair_of_the_most_channels_is_taken() -> None:
    sets = [{0, 1, 2}, {2, 3}, {0, 2, 4, 5, 6}]
    order = greedy_order(sets, ONE)
    assert [is_range(channels, order) for channels in sets] == [True, False, True]


def test_a_path_goes_on_while_consumers_share_with_their_neighbours_only() -> None:
    sets = [{0, 1}, {1, 2, 3}, {3, 4}, {4, 5}]
    order = greedy_order(sets, ONE)
    assert all(is_range(channels, order) for channels in sets)


def test_a_subset_is_ordered_inside_the_consumer_that_holds_it() -> None:
    sets = [set(range(8)), {1, 6}, {6, 3}, {1, 6, 3, 5}]
    order = greedy_order(sets, ONE)
    assert all(is_range(channels, order) for channels in sets)


def test_producers_lie_side_by_side_and_a_range_may_only_cross_whole_ones() -> None:
    block_of = {0: 0, 1: 0, 2: 0, 3: 1, 4: 1, 5: 1}
    order = greedy_order([{0, 2, 3, 5}, {1, 2, 4}], block_of)
    assert sorted(order[:3]) == [0, 1, 2]
    assert sorted(order) == list(range(6))
    crossing = [{0, 1, 2, 3}, {2, 3, 4, 5}]
    assert all(
        is_range(channels, greedy_order(crossing, {0: 0, 1: 0, 2: 1, 3: 1, 4: 2, 5: 2})) for channels in crossing
    )


def test_every_channel_that_is_read_stands_once_whatever_the_sets() -> None:
    generator = random.Random(0)
    for _ in range(100):
        sets = [set(generator.sample(range(12), generator.randint(1, 9))) for _ in range(generator.randint(1, 6))]
        order = greedy_order(sets, {channel: channel // 5 for channel in range(12)})
        assert sorted(order) == sorted(set().union(*sets))


class Branches(nn.Module):
    """A residual sum and a concat, whose readers disagree."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.one = nn.Conv2d(8, 8, 3, padding=1)
        self.two = nn.Conv2d(8, 6, 1)
        self.three = nn.Conv2d(14, 5, 1)
        self.four = nn.Conv2d(8, 5, 1)
        self.head = nn.Linear(5, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.stem(x)).relu()
        y = y + self.one(y)
        z = self.three(torch.cat([y, self.two(y)], 1)) + self.four(y)
        return self.head(z.relu().mean((2, 3)))


def subject(dtype: torch.dtype = torch.float64) -> Subject:
    original = Branches().eval().to(dtype)
    nn.init.uniform_(original.norm.running_mean)
    model = copy.deepcopy(original)
    mask(model, "input", 0.5)
    return Subject(model, (torch.randn(2, 3, 8, 8, dtype=dtype),), original)


@pytest.fixture(scope="module")
def arms() -> tuple[Subject, dict[str, Arm]]:
    torch.manual_seed(0)
    made = subject(torch.float32)
    return made, {name: build(name, made) for name in ARMS if name != "torch_pruning"}


def test_the_arms_of_the_same_masks_compute_the_masked_network(arms: tuple[Subject, dict[str, Arm]]) -> None:
    made, by_name = arms
    fresh = (torch.randn(3, 3, 8, 8),)
    for name in SAME_MASKS:
        assert by_name[name].same_function
        assert relative_error(made.model, by_name[name].module, fresh) < 1e-5, name


def test_naive_and_greedy_are_exact_in_float64() -> None:
    made = subject()
    for name in ("naive", "greedy"):
        assert relative_error(made.model, build(name, made).module, (torch.randn(3, 3, 8, 8).double(),)) < 1e-12


def test_copies_are_seen_as_they_are_planned(arms: tuple[Subject, dict[str, Arm]]) -> None:
    made, by_name = arms
    for name, arm in by_name.items():
        assert observe.observe(arm.module, made.inputs, made.model).copies == arm.planned, name
        if name != "upscale_runs":  # the profiler does not tell what a concat joins
            assert observe.profiled(arm.module, made.inputs, network=made.model).copies == arm.planned, name
    # Five masked consumers: half of 8, 8, 14 and 8 channels of 64 pixels for two images.
    assert by_name["naive"].planned == Copies(4, 4 + 4 + 7 + 4, (4 + 4 + 7 + 4) * 64 * 2 * 4)
    assert by_name["chanopt"].planned.bytes <= by_name["greedy"].planned.bytes < by_name["naive"].planned.bytes


def test_the_greedy_order_is_that_of_the_exporter(arms: tuple[Subject, dict[str, Arm]]) -> None:
    _, by_name = arms
    assert by_name["greedy"].planned == by_name["upscale"].planned
    widths = {name: shapes(by_name[name].module) for name in ("greedy", "upscale")}
    assert widths["greedy"] == widths["upscale"]


def shapes(module: nn.Module) -> list[tuple[int, ...]]:
    return sorted(tuple(p.shape) for p in module.parameters() if p.ndim > 1)


def test_the_constrained_arm_agrees_everywhere_at_no_more_multiplications(arms: tuple[Subject, dict[str, Arm]]) -> None:
    made, by_name = arms
    constrained, ours = by_name["constrained"], by_name["chanopt"]
    assert constrained.planned == Copies()
    assert not constrained.same_function
    spent = {arm.name: observe.observe(arm.module, made.inputs).macs.dense for arm in (constrained, ours)}
    assert 0.7 * spent["chanopt"] < spent["constrained"] <= spent["chanopt"]


class Inverted(nn.Module):
    """An inverted residual block."""

    def __init__(self, outside: int, inside: int) -> None:
        super().__init__()
        self.up = nn.Conv2d(outside, inside, 1)
        self.depthwise = nn.Conv2d(inside, inside, 3, padding=1, groups=inside)
        self.down = nn.Conv2d(inside, outside, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(self.depthwise(self.up(x).relu()).relu())


def test_the_constrained_arm_counts_what_rounding_adds() -> None:
    """Channel counts are rounded up when optimised: at the share that was laid out it would cost more than ours."""
    torch.manual_seed(0)
    original = nn.Sequential(nn.Conv2d(3, 20, 1), Inverted(20, 76), Inverted(20, 76), nn.Conv2d(20, 20, 1)).eval()
    model = copy.deepcopy(original)
    mask(model, "input", 0.5)
    made = Subject(model, (torch.randn(1, 3, 16, 16),), original)
    spent = [observe.observe(build(name, made).module, made.inputs).macs.dense for name in ("constrained", "chanopt")]
    assert 0.9 * spent[1] < spent[0] <= spent[1]


def test_the_unmasked_arm_is_the_network_before_masking(arms: tuple[Subject, dict[str, Arm]]) -> None:
    made, by_name = arms
    assert made.original is not None
    assert relative_error(made.original, by_name["unmasked"].module, made.inputs) < 1e-5


def test_arms_leave_the_network_alone() -> None:
    made = subject(torch.float32)
    before = {key: value.clone() for key, value in made.model.state_dict().items()}
    original = {key: value.clone() for key, value in (made.original or made.model).state_dict().items()}
    for name in ("naive", "greedy", "upscale", "constrained", "chanopt"):
        build(name, made)
    assert all(torch.equal(value, before[key]) for key, value in made.model.state_dict().items())
    assert all(torch.equal(value, original[key]) for key, value in (made.original or made.model).state_dict().items())


def test_what_cannot_be_made_says_why() -> None:
    model = build_masked("squeezenet1_1", Setting("output", 0.5), 64)
    with pytest.raises(ArmError, match="PeerError: AssertionError: Invalid layer for output pruning"):
        build("upscale", Subject(model, zoo.example_inputs("squeezenet1_1", 1, 64)))
    with pytest.raises(ArmError, match=r"before masking; give Subject\(\.\.\., original=network\)"):
        build("constrained", Subject(model, zoo.example_inputs("squeezenet1_1", 1, 64)))
    with pytest.raises(KeyError, match="no arm 'fastest'; there are: dense, naive"):
        build("fastest", Subject(model, ()))


class Grouped(nn.Module):
    """What UPSCALE refuses: a grouped convolution, a norm over channels, a slice; the plans keep such labels whole."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.grouped = nn.Conv2d(8, 8, 3, padding=1, groups=2)
        self.norm = nn.GroupNorm(2, 8)
        self.left = nn.Conv2d(4, 6, 1)
        self.right = nn.Conv2d(4, 6, 1)
        self.last = nn.Conv2d(6, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.grouped(self.stem(x)))
        return self.last((self.left(y[:, :4]) + self.right(y[:, 4:])).relu())


def test_plans_go_further_than_the_exporter() -> None:
    model = Grouped().eval().double()
    mask(model, "input", 0.5)
    made = Subject(model, (torch.randn(1, 3, 8, 8).double(),))
    for name in ("naive", "greedy"):
        arm = build(name, made)
        assert relative_error(model, arm.module, (torch.randn(2, 3, 8, 8).double(),)) < 1e-12
        assert observe.observe(arm.module, made.inputs).copies == arm.planned


class Shuffled(nn.Module):
    """A channel shuffle between layers: where the order is not free to swallow it, it is a copy of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.left, self.right = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1)
        self.last = nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.stem(x)
        shuffled = y.unflatten(1, (2, 4)).transpose(1, 2).flatten(1, 2)
        return self.last((self.left(y) + self.right(shuffled)).relu() + shuffled)


def test_shuffles_that_an_arm_still_makes_are_copies() -> None:
    model = Shuffled().eval().double()
    mask(model, "input", 0.5)
    made = Subject(model, (torch.randn(1, 3, 8, 8).double(),))
    arms = {name: build(name, made) for name in ("naive", "greedy", "chanopt")}
    for arm in arms.values():
        assert relative_error(model, arm.module, (torch.randn(2, 3, 8, 8).double(),)) < 1e-12
        assert observe.observe(arm.module, made.inputs).copies == arm.planned
    assert arms["chanopt"].planned.bytes < arms["greedy"].planned.bytes


@pytest.mark.parametrize(
    "amount", [0.5, pytest.param(0.3, marks=pytest.mark.slow), pytest.param(0.7, marks=pytest.mark.slow)]
)
def test_counts_of_resnet18_are_those_of_the_survey(amount: float) -> None:
    check_survey("resnet18", amount)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mobilenet_v2", "googlenet", "densenet121"])
def test_counts_of_large_networks_are_those_of_the_survey(name: str) -> None:
    check_survey(name, 0.5)


def check_survey(name: str, amount: float) -> None:
    known = survey.published()[name, "input", amount]
    flow = plans.Flow(chanopt.lower(build_masked(name, Setting("input", amount)), zoo.example_inputs(name)))
    assert plans.naive_copies(flow) == known.naive
    assert plans.greedy_copies(flow)[1] == known.greedy


def test_the_exporter_still_counts_as_it_did() -> None:
    model, inputs = build_masked("resnet18", Setting("input", 0.3)), zoo.example_inputs("resnet18")
    counts = peers.export(model, inputs).counts
    known = survey.published()["resnet18", "input", 0.3].greedy
    assert Copies(counts.n_copies, counts.channels_copied, counts.bytes_copied) == known
