"""What is noticed about weights, by each way of looking."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from chanopt.backend import guard
from chanopt.backend.guard import Watch
from chanopt.backend.options import Check
from chanopt.torchvision_shim import ensure_torchvision

ensure_torchvision()
import torchvision  # noqa: E402

LARGE = (512, 1024)  # more entries than are compared one by one, with check="sample"

Change = Callable[[nn.Parameter], None]


def in_place(p: nn.Parameter) -> None:
    with torch.no_grad():
        p[0, 0] += 1


def in_inference_mode(p: nn.Parameter) -> None:
    with torch.inference_mode():
        p[0, 0] += 1


def through_detach(p: nn.Parameter) -> None:
    p.detach()[0, 0] += 1


def new_data(p: nn.Parameter) -> None:
    p.data = p.data.clone()


def transposed(p: nn.Parameter) -> None:
    p.data = p.data.t()


def data_scaled(p: nn.Parameter) -> None:
    p.data.mul_(2)


def data_negated(p: nn.Parameter) -> None:
    p.data.neg_()


def data_channels(p: nn.Parameter) -> None:
    p.data[:, 100:116] = 0


def numpy_scaled(p: nn.Parameter) -> None:
    p.detach().numpy()[...] *= 2


def data_entry(p: nn.Parameter) -> None:
    p.data[3, 7] += 1


COUNTED: tuple[Change, ...] = (in_place, in_inference_mode, through_detach, new_data, transposed)
UNCOUNTED: tuple[Change, ...] = (data_scaled, data_negated, data_channels, numpy_scaled)


def parameter(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(shape, generator=torch.Generator().manual_seed(0)))


def noticed(change: Change, check: Check, shape: tuple[int, ...]) -> bool:
    p, other = parameter(*shape), parameter(3)
    watch = Watch([other, p], check)
    assert watch.holds([other, p])
    change(p)
    return not watch.holds([other, p])


@pytest.mark.parametrize("check", ["version", "sample", "all"])
@pytest.mark.parametrize("change", COUNTED, ids=lambda change: change.__name__)
def test_what_pytorch_counts_is_noticed_by_all(change: Change, check: Check) -> None:
    assert noticed(change, check, LARGE)


@pytest.mark.parametrize("change", UNCOUNTED, ids=lambda change: change.__name__)
def test_what_it_does_not_count_is_noticed_by_values(change: Change) -> None:
    assert noticed(change, "sample", LARGE)
    assert noticed(change, "all", LARGE)
    assert not noticed(change, "version", LARGE)


@pytest.mark.parametrize("check", ["sample", "all"])
@pytest.mark.parametrize("shape", [(512, 512, 3, 3), (256, 1024, 1, 1), (1000, 512), (1024, 1, 3, 3), (128, 96, 5, 5)])
def test_every_channel_that_is_written_through_data_is_noticed(shape: tuple[int, ...], check: Check) -> None:
    p = parameter(*shape)
    weights: list[Tensor] = [parameter(1 << 18), p]  # too many entries for all to be compared with "sample"
    watch = Watch(weights, check)
    missed = [
        (axis, index)
        for axis in (0, 1)
        for index in range(shape[axis])
        if _survives(watch, weights, p.data.select(axis, index))
    ]
    assert missed == []
    assert watch.holds(weights)


def _survives(watch: Watch, weights: list[Tensor], channel: Tensor) -> bool:
    """Whether zeroing a channel goes unnoticed; it is put back."""
    kept = channel.clone()
    channel.zero_()
    survived = watch.holds(weights)
    channel.copy_(kept)
    return survived


@pytest.mark.parametrize("name", ["resnet50", "vgg16", "densenet121", "mobilenet_v2", "googlenet"])
def test_samples_reach_every_filter_and_every_input_of_every_layer(name: str) -> None:
    with torch.device("meta"):
        model = torchvision.models.get_model(
            name, weights=None, **({"init_weights": False} if name == "googlenet" else {})
        )
    shapes = {tuple(p.shape) for p in model.parameters() if p.ndim > 1}
    assert len(shapes) > 10
    for shape in shapes:
        positions = guard._sample(torch.empty(shape, device="meta"), torch.Generator().manual_seed(1))
        assert len(positions) == max(shape)
        for size, indices in zip(shape, torch.unravel_index(positions, shape), strict=True):
            assert len(indices.unique()) == size, shape


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("shape", [(64, 128, 3, 3), (71, 73), (4097,)])
def test_every_entry_counts_where_all_are_compared(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    p = nn.Parameter(parameter(*shape).detach().to(dtype))
    watch = Watch([p], "all")
    flat = p.data.view(-1)
    for index in (0, 1, 17, flat.numel() // 2, flat.numel() - 1):
        flat[index].neg_()
        assert not watch.holds([p])
        flat[index].neg_()
        assert watch.holds([p])
    for swapped in (slice(0, 2), slice(100, 102)):
        kept = flat[swapped].clone()
        flat[swapped] = kept.flip(0)
        assert not watch.holds([p])
        flat[swapped] = kept


def test_a_large_channels_last_weight_is_compared_where_it_lies() -> None:
    p = nn.Parameter(parameter(64, 64, 3, 3).detach().contiguous(memory_format=torch.channels_last))
    watch = Watch([p], "all")
    assert watch.holds([p])
    p.data[5, 3, 1, 1] += 1
    assert not watch.holds([p])


def test_a_single_entry_is_noticed_in_small_weights_and_where_all_are_compared() -> None:
    assert noticed(data_entry, "sample", (4, 1000))
    assert noticed(data_entry, "sample", (255, 1024))  # small as a whole
    assert noticed(data_entry, "all", LARGE)
    assert not noticed(data_entry, "sample", LARGE)


def test_another_object_of_equal_value_is_a_change() -> None:
    p = parameter(4, 4)
    assert not Watch([p], "version").holds([nn.Parameter(p.detach().clone())])
    assert not Watch([p], "version").holds([nn.Parameter(p.detach())])


def test_writing_the_same_value_through_data_changes_nothing() -> None:
    assert not noticed(lambda p: p.data.mul_(1), "all", (4, 4))  # type: ignore[arg-type,return-value]


@pytest.mark.parametrize("check", ["version", "sample", "all"])
def test_inference_tensors_have_no_version_and_are_compared_whole(check: Check) -> None:
    with torch.inference_mode():
        tensor = torch.randn(LARGE)
        watch = Watch([tensor], check)
        assert watch.holds([tensor])
        tensor[3, 7] += 1
        assert not watch.holds([tensor])
    watch = Watch([tensor], check)
    assert watch.holds([tensor])
    with torch.inference_mode():
        tensor[3, 7] += 1
    assert not watch.holds([tensor])


def test_no_memory_is_held_and_whoever_asks_is_told_that_it_is_gone() -> None:
    gone: list[int] = []
    small, large = parameter(4), parameter(*LARGE)
    watch = Watch([small, large], "all", lambda: gone.append(1))
    assert watch.holds([small, large])
    large.data = large.data.clone()
    assert gone == [1]
    assert not watch.holds([small, large])
    del small
    assert gone == [1, 1]


@pytest.mark.parametrize("check", ["version", "sample", "all"])
def test_a_watched_weight_can_be_swapped_and_that_is_noticed(check: Check) -> None:
    p, other = parameter(64, 64), nn.Parameter(torch.zeros(64, 64))
    watch = Watch([p], check)
    torch.utils.swap_tensors(p, other)
    assert not watch.holds([p])


def test_an_address_that_is_given_to_another_is_a_change() -> None:
    p = parameter(64, 64)
    watch = Watch([p], "version")
    for _ in range(50):
        p.data = torch.randn(64, 64)
        assert not watch.holds([p])


@pytest.mark.parametrize(
    "dtype", [torch.float16, torch.bfloat16, torch.float64, torch.complex64, torch.uint8, torch.bool, torch.int64]
)
def test_every_type_of_entry_is_compared(dtype: torch.dtype) -> None:
    tensor, other = torch.zeros(3, 5).to(dtype), torch.zeros(2)
    watch = Watch([other, tensor], "sample")
    assert watch.holds([other, tensor])
    tensor.data[2, 4] = 1
    assert not watch.holds([other, tensor])


def _column(tensor: Tensor) -> Tensor:
    return tensor[:, 1]


def _spread(tensor: Tensor) -> Tensor:
    return tensor[1:2].expand(3, 8)


def _channels_last(tensor: Tensor) -> Tensor:
    return tensor.reshape(2, 2, 2, 8).contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("view", [_column, _spread, _channels_last], ids=lambda view: view.__name__)
def test_views_and_other_layouts_are_seen(view: Callable[[Tensor], Tensor]) -> None:
    tensor = view(torch.randn(8, 8))
    watch = Watch([tensor], "sample")
    assert watch.holds([tensor])
    tensor.data.as_strided((1,), (1,))[0] += 1
    assert not watch.holds([tensor])


def test_empty_and_scalar_weights_are_fine() -> None:
    tensors = [torch.empty(0, 4), torch.tensor(1.0), torch.empty(0, dtype=torch.int64)]
    watch = Watch(tensors, "all")
    assert watch.holds(tensors)
    tensors[1].data.add_(1)
    assert not watch.holds(tensors)
    assert Watch([], "all").holds([])


def test_not_a_number_equals_itself() -> None:
    tensor = torch.tensor([1.0, float("nan")])
    assert Watch([tensor], "all").holds([tensor])
