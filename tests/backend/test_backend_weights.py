"""A changed weight is honoured by the next call: twenty trials of every kind of change."""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn

import chanopt
from tests.backend.small import Branches, compiled, error, images, macs, masked, slim

TRIALS = 20
Change = Callable[[Any, int], None]


def _noise(like: torch.Tensor, trial: int) -> torch.Tensor:
    return torch.randn(like.shape, generator=torch.Generator().manual_seed(trial))


@torch.no_grad()
def in_place(model: Any, trial: int) -> None:
    model.left.weight.add_(_noise(model.left.weight, trial))


@torch.no_grad()
def one_entry(model: Any, trial: int) -> None:
    model.right.weight[trial % 6, 2 + trial % 4, 1, 1] += 1


@torch.no_grad()
def a_channel_dies(model: Any, trial: int) -> None:
    model.left.weight.copy_(_noise(model.left.weight, trial))
    model.left.weight[:, trial % 8] = 0


@torch.no_grad()
def a_dead_channel_lives(model: Any, trial: int) -> None:
    model.left.weight[:, 0] = float(trial + 1)


def through_detach(model: Any, trial: int) -> None:
    model.head.weight.detach().add_(_noise(model.head.weight, trial))


@torch.inference_mode()
def in_inference_mode(model: Any, trial: int) -> None:
    model.stem.bias.add_(_noise(model.stem.bias, trial))


def sgd_step(model: Any, trial: int) -> None:
    with torch.enable_grad():
        model(images(seed=trial)).square().sum().backward()
    torch.optim.SGD(model.parameters(), lr=0.01).step()
    model.zero_grad()


def load_state_dict(model: Any, trial: int) -> None:
    model.load_state_dict(_state(model, trial))


def load_state_dict_assign(model: Any, trial: int) -> None:
    model.load_state_dict(_state(model, trial), assign=True)


def _state(model: nn.Module, trial: int) -> dict[str, torch.Tensor]:
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for name in ("stem.weight", "left.bias", "norm.running_mean"):
        state[name] += 0.1 * _noise(state[name], trial)
    return state


def new_data(model: Any, trial: int) -> None:
    model.right.weight.data = _noise(model.right.weight, trial)


def data_scaled(model: Any, trial: int) -> None:
    model.right.weight.data.mul_(-1.1)


def data_copied(model: Any, trial: int) -> None:
    model.left.weight.data.copy_(_noise(model.left.weight, trial))


def data_entry(model: Any, trial: int) -> None:
    model.right.weight.data[trial % 6, 5, 1, 1] += 1


def through_numpy(model: Any, trial: int) -> None:
    model.left.bias.detach().numpy()[trial % 6] += 1


def new_parameter(model: Any, trial: int) -> None:
    model.left.weight = nn.Parameter(_noise(model.left.weight, trial))


def new_module(model: Any, trial: int) -> None:
    model.left = nn.Conv2d(8, 6, 1).eval()


@torch.no_grad()
def statistics(model: Any, trial: int) -> None:
    model.norm.running_mean.copy_(_noise(model.norm.running_mean, trial))
    model.norm.running_var[trial % 8] += 0.5


def statistics_of_a_batch(model: Any, trial: int) -> None:
    model.norm.train()
    with torch.no_grad():
        model.norm(2 * model.stem(images(4, seed=trial)) + 1)
    model.norm.eval()


def new_buffer(model: Any, trial: int) -> None:
    model.norm.running_mean = _noise(model.norm.running_mean, trial)


def converted(model: Any, trial: int) -> None:
    model.double()
    with torch.no_grad():
        model.head.weight += 1e-3 * (trial + 1)
    model.float()


CHANGES: tuple[Change, ...] = (
    *(in_place, one_entry, a_channel_dies, a_dead_channel_lives, through_detach, in_inference_mode, sgd_step),
    *(load_state_dict, load_state_dict_assign, new_data, data_scaled, data_copied, data_entry, through_numpy),
    *(new_parameter, new_module, statistics, statistics_of_a_batch, new_buffer, converted),
)


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_the_next_call_honours_a_change(change: Change) -> None:
    model = masked()
    fast = compiled(model)
    with torch.no_grad():
        fast(images())
    honoured = 0
    for trial in range(TRIALS):
        x = images(seed=100 + trial)
        with torch.no_grad():
            before = model(x)
        change(model, trial)
        with torch.no_grad():
            after = model(x)
            assert error(before, after) > 1e-5, "the trial changes nothing"
            honoured += error(after, fast(x)) < 1e-4
            if trial % 2:  # every other time until the passes have been run again
                honoured -= error(after, fast(x)) >= 1e-4
                assert slim(fast)
    assert honoured == TRIALS


def test_weights_made_in_inference_mode_have_no_version_and_are_watched_all_the_same() -> None:
    with torch.inference_mode():
        model: Any = masked()
        fast = compiled(model)
        x = images()
        assert error(model(x), fast(x)) < 1e-4
        for trial in range(TRIALS):
            before = model(x)
            model.left.weight[trial % 6, 4:] += 1
            after = model(x)
            assert error(before, after) > 1e-5
            assert error(after, fast(x)) < 1e-4
            assert error(after, fast(x)) < 1e-4
        assert slim(fast)


def test_the_passes_are_run_again_when_two_calls_have_seen_the_same_weights() -> None:
    model: Any = masked()
    fast = compiled(model)
    x = images()
    with torch.no_grad():
        fast(x)
        (graph,) = slim(fast)
        before = macs(fast)
        model.left.weight[:, 4:7] = 0
        fast(x)
        assert macs(fast) == before
        assert error(model(x), fast(x)) < 1e-4
    assert macs(fast)[1] < before[1]
    assert slim(fast) == (graph,), "Dynamo has not been asked to compile again"
    (module,) = graph.modules()
    assert tuple(module.get_parameter("left.weight").shape) == (6, 1, 1, 1)


def test_a_loop_that_changes_weights_at_every_call_runs_no_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    model: Any = masked()
    fast = compiled(model)
    x = images()
    with torch.no_grad():
        fast(x)
        (graph,) = slim(fast)
        built: list[object] = []
        monkeypatch.setattr(type(graph), "build", lambda *args: built.append(args))
        for _ in range(5):
            model.left.weight.mul_(1.1)
            assert torch.equal(model(x), fast(x))
    assert not built


def test_unchanged_weights_are_not_looked_at_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    fast = compiled(masked())
    with torch.no_grad():
        fast(images())
        (graph,) = slim(fast)
        monkeypatch.setattr(type(graph), "_renewed", lambda *args: pytest.fail("nothing has changed"))
        for seed in range(3):
            fast(images(seed=seed))


def test_weights_that_become_not_finite_run_as_they_are(caplog: pytest.LogCaptureFixture) -> None:
    model: Any = masked()
    fast = compiled(model)
    x = images()
    with torch.no_grad():
        fast(x)
        kept = model.left.weight[0, 5].clone()
        model.left.weight[0, 5] = float("inf")
        for _ in range(4):
            assert error(model(x), fast(x)) == 0
        assert "expected finite weights" in caplog.text
        assert caplog.text.count("runs as it is until its weights change") == 1
        model.left.weight[0, 5] = kept
        for _ in range(3):
            assert error(model(x), fast(x)) < 1e-4
    assert slim(fast)


def test_two_modules_of_one_class_keep_apart() -> None:
    one, other = masked(), masked()
    with torch.no_grad():
        other.left.weight.mul_(3)  # type: ignore[operator,union-attr]
        fast, faster = compiled(one), compiled(other)
        x = images()
        for _ in range(2):
            assert error(one(x), fast(x)) < 1e-4
            assert error(other(x), faster(x)) < 1e-4
    assert len(slim(fast)) == len(slim(faster)) == 1


def test_a_module_whose_weights_are_replaced_by_those_of_a_copy() -> None:
    model = masked()
    fast = compiled(model)
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.left.weight.mul_(3)  # type: ignore[operator,union-attr]
        fast(images())
        model.left = other.left
        assert error(other(images()), fast(images())) < 1e-4


def test_weights_that_are_new_at_every_call_stop_being_built_for(monkeypatch: pytest.MonkeyPatch) -> None:
    model: Any = masked()
    fast = compiled(model)
    x = images()
    with torch.no_grad():
        fast(x)
        (graph,) = slim(fast)
        built: list[int] = []
        build = type(graph).build
        monkeypatch.setattr(type(graph), "build", lambda self, inputs: (built.append(1), build(self, inputs)))
        for trial in range(15):
            load_state_dict_assign(model, trial)
            assert error(model(x), fast(x)) < 1e-4
        assert 0 < len(built) < 12
        for _ in range(3):
            assert error(model(x), fast(x)) < 1e-4
    assert macs(fast)[1] < macs(fast)[0]


class Wide(nn.Module):
    """A conv whose weight is large."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.body = nn.Conv2d(3, 256, 1), nn.Conv2d(256, 256, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.body(torch.relu(self.stem(x)))


@pytest.mark.parametrize("channels", [slice(64, 128), slice(57, 125), slice(0, 256), slice(255, 256)])
def test_structured_writes_through_data_to_a_large_weight(channels: slice) -> None:
    model: Any = masked(Wide)
    fast = torch.compile(model, backend="chanopt", options={"compiler": "eager"})  # check is "auto"
    x = images()
    with torch.no_grad():
        assert error(model(x), fast(x)) < 1e-4
        for write in (lambda weight: weight.neg_(), lambda weight: weight.zero_()):
            write(model.body.weight.data[:, channels])
            for _ in range(3):
                assert error(model(x), fast(x)) < 1e-4


def test_a_weight_of_a_compiled_model_can_be_swapped() -> None:
    model: Any = masked()
    fast = compiled(model)
    x = images()
    with torch.no_grad():
        fast(x)
        fast(x)
        for name in ("stem", "left"):
            layer = getattr(model, name)
            torch.utils.swap_tensors(layer.weight, nn.Parameter(torch.randn_like(layer.weight)))
            for _ in range(3):
                assert error(model(x), fast(x)) < 1e-4
    assert slim(fast)


@pytest.fixture
def _swapping() -> Iterator[None]:
    torch.__future__.set_swap_module_params_on_conversion(True)
    yield
    torch.__future__.set_swap_module_params_on_conversion(False)


@pytest.mark.usefixtures("_swapping")
def test_conversion_and_loading_by_swapping() -> None:
    model: Any = masked()
    fast = compiled(model)
    with torch.no_grad():
        fast(images())
        load_state_dict(model, 3)
        assert error(model(images()), fast(images())) < 1e-4
        model.double()
        assert error(model(images().double()), fast(images().double())) < 1e-9


def test_what_was_made_for_weights_that_are_gone_goes_with_them() -> None:
    one, other = masked(), masked()
    fast, faster = compiled(one), compiled(other)
    with torch.no_grad():
        fast(images())
        faster(images())
        (graph,) = slim(fast)
        assert slim(faster) == (graph,)
        assert len(graph.modules()) == 2
        del other, faster
        gc.collect()
        assert len(graph.modules()) == 1


def test_a_loop_that_gives_a_weight_new_memory_at_every_call_runs_no_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    model: Any = masked()
    fast = compiled(model)
    with torch.no_grad():
        fast(images())
        (graph,) = slim(fast)
        built: list[object] = []
        monkeypatch.setattr(type(graph), "build", lambda *args: built.append(args))
        for trial in range(5):
            new_data(model, trial)
            assert torch.equal(model(images()), fast(images()))
    assert not built


class Head(nn.Module):
    """A head on a stem that it shares with others."""

    def __init__(self, stem: nn.Module) -> None:
        super().__init__()
        self.stem, self.head = stem, nn.Conv2d(16, 4, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(torch.relu(self.stem(x)))


def test_models_that_share_their_first_weight_keep_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    stem = nn.Conv2d(3, 16, 1)
    one, two = Head(stem).eval(), Head(stem).eval()
    fast, faster = compiled(one), compiled(two)
    with torch.no_grad():
        one.head.weight[:, :8] = 0
        two.head.weight[:, 4:] = 0
        fast(images())
        faster(images())
        (graph,) = slim(fast)
        monkeypatch.setattr(type(graph), "_renewed", lambda *args: pytest.fail("nothing has changed"))
        for _ in range(3):
            assert error(one(images()), fast(images())) < 1e-4
            assert error(two(images()), faster(images())) < 1e-4
    assert [layer.channels_out[1] for layer in chanopt.explain(fast).layers] == [8, 4]
    assert [layer.channels_out[1] for layer in chanopt.explain(faster).layers] == [4, 4]


def test_good_weights_that_are_loaded_into_bad_ones_are_optimised() -> None:
    model: Any = masked()
    good = copy.deepcopy(model.state_dict())
    with torch.no_grad():
        model.left.weight.fill_(float("nan"))
        fast = compiled(model)
        with pytest.warns(UserWarning, match="tried again once its weights have changed"):
            fast(images())
        with pytest.raises(chanopt.errors.ChanoptError, match="no optimised graph"):
            chanopt.explain(fast)
        model.load_state_dict(good)
        for _ in range(3):
            assert error(model(images()), fast(images())) < 1e-4
    assert macs(fast)[1] < macs(fast)[0]


def test_whatever_fails_long_after_the_first_call_the_answer_is_right(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    model: Any = masked()
    fast = compiled(model)
    with torch.no_grad():
        fast(images())
        (graph,) = slim(fast)
        monkeypatch.setattr(type(graph), "_built", lambda *args: (_ for _ in ()).throw(OSError("no space")))
        model.left.weight.mul_(2)
        for _ in range(4):
            assert torch.equal(model(images()), fast(images()))
    assert caplog.text.count("runs as it is until its weights change: OSError: no space") == 1


@pytest.mark.slow
def test_inductor_freezes_weights_and_still_honours_changes() -> None:
    model: Any = masked(Branches)
    fast = torch.compile(model, backend="chanopt")
    with torch.no_grad():
        for change in (in_place, new_data, data_scaled, load_state_dict):
            for trial in range(2):
                x = images(2 + trial, seed=trial)
                change(model, trial)
                for _ in range(3):
                    assert error(model(x), fast(x)) < 1e-4
    assert slim(fast)
