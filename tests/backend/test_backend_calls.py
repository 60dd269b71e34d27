"""How a compiled model may be called: modes, sizes, structures, types; and how often it is compiled."""

from __future__ import annotations

import copy
import logging
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch._dynamo.utils import counters
from torch._inductor import config as inductor_config
from torch._inductor.compile_fx import compile_fx
from torch._inductor.utils import fresh_inductor_cache, run_and_get_code
from torch.utils.flop_counter import FlopCounterMode

import chanopt
from chanopt.backend.options import parse
from chanopt.errors import CaptureError, ChanoptError, LoweringError
from tests.backend.small import EAGER, Branches, Broken, compiled, error, images, macs, masked, slim
from tests.support.nets.base import Net, conv, conv_bn_relu, randomise

TOLERANCE = 1e-5


class Structured(Branches):
    """Branches with keyword inputs and a dict for an output."""

    def forward(self, x: Tensor, *, scale: float = 1.0, extra: dict[str, Tensor] | None = None) -> dict[str, Any]:
        y = torch.relu(self.norm(self.stem(x)))
        z = self.left(y) + self.right(y) * scale
        if extra is not None:
            z = z + extra["bias"]
        return {"features": [z, y.shape[1]], "scores": self.head(z.mean((2, 3))), "flat": z.reshape(x.shape[0], -1)}


def test_the_graph_is_slim_and_gives_the_same_outputs() -> None:
    model = masked()
    fast = compiled(model)
    x = images()
    with torch.no_grad():
        assert error(model(x), fast(x)) < TOLERANCE
    before, after = macs(fast)
    assert after < 0.8 * before
    ((module,),) = (graph.modules() for graph in slim(fast))
    assert tuple(module.get_parameter("stem.weight").shape) == (6, 3, 3, 3)
    assert tuple(module.get_parameter("left.weight").shape) == (6, 4, 1, 1)
    assert tuple(module.get_parameter("right.weight").shape) == (6, 4, 3, 3)


def test_pytorch_counts_the_operations_that_the_report_claims() -> None:
    model = masked()
    fast = compiled(model)
    x = images()
    with torch.no_grad():
        fast(x)
        counted: list[int] = []
        for module in (model, slim(fast)[0].modules()[0]):
            with FlopCounterMode(display=False) as flops:
                module(x)
            counted.append(flops.get_total_flops() // 2)
    assert tuple(counted) == macs(fast)


def test_the_slim_weights_are_what_is_run() -> None:
    model = masked()
    fast = compiled(model)
    with torch.no_grad():
        fast(images())
        (module,) = slim(fast)[0].modules()
        module.get_parameter("left.weight").zero_()
        assert error(model(images()), fast(images())) > 0.01


def test_layers_in_the_report_have_the_names_and_lines_of_the_users_code() -> None:
    model = masked(
        lambda: Net(lambda n, x: n.tail(torch.cumsum(n.head(x), 1)), head=conv_bn_relu(3, 8), tail=conv(8, 4))
    )
    fast = compiled(model)
    with torch.no_grad():
        fast(images())
    report = chanopt.explain(fast)
    assert [layer.name for layer in report.layers] == ["head.0", "tail"]
    (refusal,) = report.refusals
    assert "cumsum" in refusal.op
    assert "test_backend_calls.py" in refusal.source


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_both_modes_of_inference(mode: Any) -> None:
    model = masked()
    fast = compiled(model)
    with mode():
        assert error(model(images()), fast(images())) < TOLERANCE
    assert macs(fast)[1] < macs(fast)[0]


def test_parameters_that_want_no_gradient_need_no_mode() -> None:
    model = masked().requires_grad_(False)
    fast = compiled(model)
    found = fast(images())
    assert not found.requires_grad
    assert error(model(images()), found) < TOLERANCE
    assert macs(fast)[1] < macs(fast)[0]


def test_a_dynamic_batch_is_compiled_once_more_and_then_never() -> None:
    counter = CompileCounterWithBackend("eager")
    backend = torch._dynamo.lookup_backend("chanopt")
    model = masked(Structured)

    def counting(graph: Any, examples: Any) -> Any:
        counter(graph, examples)
        return backend(graph, examples, options=EAGER)

    fast = torch.compile(model, backend=counting)
    with torch.no_grad():
        for batch in (2, 3, 5, 7, 2, 11):
            assert error(model(images(batch)), fast(images(batch))) < TOLERANCE
    assert counter.frame_count == 2


def test_a_batch_that_is_marked_dynamic_is_compiled_once() -> None:
    counters.clear()
    model = masked(Structured)
    fast = compiled(model)
    with torch.no_grad():
        for batch in (4, 2, 3, 12):  # at 16 Dynamo itself makes another graph: oneDNN starts there
            x = images(batch)
            torch._dynamo.mark_dynamic(x, 0)
            assert error(model(x), fast(x)) < TOLERANCE
    assert counters["stats"]["unique_graphs"] == 1
    assert len(slim(fast)) == 1


def test_all_sizes_open() -> None:
    model = masked()
    fast = torch.compile(model, backend="chanopt", options=EAGER, dynamic=True)
    with torch.no_grad():
        for batch, size in ((2, 8), (3, 10), (5, 12)):
            x = images(batch, size=size)
            assert error(model(x), fast(x)) < TOLERANCE
    assert len(slim(fast)) == 1
    assert macs(fast)[1] < macs(fast)[0]


def test_a_number_that_was_written_in_is_watched_like_a_weight() -> None:
    model: Any = masked()
    fast = torch.compile(model, backend="chanopt", options=EAGER, dynamic=True)
    with torch.no_grad():
        for eps in (1e-5, 0.5, 0.25):
            model.norm.eps = eps
            for _ in range(3):
                assert error(model(images()), fast(images())) < TOLERANCE
    assert macs(fast)[1] < macs(fast)[0]


def test_a_float_argument_may_change_at_every_call() -> None:
    model = masked(Structured)
    fast = compiled(model)
    with torch.no_grad():
        for scale in (1.0, 2.0, 3.5, 3.5, 3.5, -1.0):
            assert error(model(images(), scale=scale), fast(images(), scale=scale)) < TOLERANCE


def test_an_integer_argument_may_change_at_every_call() -> None:
    class Repeated(Branches):
        def forward(self, x: Tensor, times: int = 1) -> Tensor:
            return super().forward(x) * times

    model = masked(Repeated)
    fast = compiled(model)
    with torch.no_grad():
        for times in (1, 2, 3, 5, 5, 5, 7):
            assert error(model(images(), times), fast(images(), times)) < TOLERANCE


def test_graph_breaks_leave_parts_whose_boundaries_are_kept() -> None:
    model = masked(Broken)
    fast = compiled(model)
    x = images()
    with torch.no_grad():
        assert error(model(x), fast(x)) < TOLERANCE
    report = chanopt.explain(fast)
    parts = list(report)  # type: ignore[call-overload]
    assert [[layer.name for layer in part.layers] for part in parts] == [["stem"], ["left", "right", "head"]]
    assert parts[0].layers[0].channels_out == (8, 8)
    assert report.macs_after == sum(part.macs_after for part in parts) < report.macs_before
    assert [str(part) in str(report) for part in parts] == [True, True]


def test_fullgraph_is_one_graph_and_refuses_breaks() -> None:
    with torch.no_grad():
        fast = torch.compile(masked(), backend="chanopt", options=EAGER, fullgraph=True)
        fast(images())
        assert len(slim(fast)) == 1
        with pytest.raises(torch._dynamo.exc.Unsupported):
            torch.compile(masked(Broken), backend="chanopt", options=EAGER, fullgraph=True)(images())


def test_one_graph_serves_all_blocks_of_a_class() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 3, 1)

        def forward(self, x: Tensor) -> Tensor:
            torch._dynamo.graph_break()
            return self.b(torch.relu(self.a(x)))

    model = randomise(nn.Sequential(*(Block() for _ in range(4)))).eval()
    with torch.no_grad():
        for number, block in enumerate(model):
            block.b.weight[:, : number + 1] = 0  # type: ignore[index,union-attr]
        fast = compiled(model)
        for seed in range(3):
            assert error(model(images(seed=seed)), fast(images(seed=seed))) < TOLERANCE
    kept = [layer.channels_out[1] for report in chanopt.explain(fast) for layer in report.layers]  # type: ignore[attr-defined]
    assert sorted(kept[::2]) == [4, 5, 6, 7]


def test_reset_forgets_and_the_next_call_compiles_again() -> None:
    model = masked()
    fast = compiled(model)
    with torch.no_grad():
        fast(images())
        assert len(slim(fast)) == 1
        torch.compiler.reset()
        assert slim(fast) == ()
        assert error(model(images()), fast(images())) < TOLERANCE
    assert len(slim(fast)) == 1


def test_a_compiled_function_and_module_compile_and_the_module_itself() -> None:
    model, other = masked(), masked()

    @torch.compile(backend="chanopt", options=EAGER)
    def function(x: Tensor) -> Tensor:
        return model(x) * 2

    other.compile(backend="chanopt", options=EAGER)
    with torch.no_grad():
        assert error(model(images()) * 2, function(images())) < TOLERANCE
        assert error(model(images()), other(images())) < TOLERANCE
    assert macs(function) == macs(other)
    assert [layer.name for layer in chanopt.explain(function).layers] == ["stem", "left", "right", "head"]


def test_two_networks_in_one_function_keep_their_names_apart() -> None:
    one, two = masked(), masked()

    def ensemble(x: Tensor) -> Tensor:
        return one(x) + two(x)

    fast = compiled(ensemble)
    with torch.no_grad():
        assert error(ensemble(images()), fast(images())) < TOLERANCE
    names = [layer.name for layer in chanopt.explain(fast).layers]
    assert len(set(names)) == 8
    assert {name.rpartition(".")[2] for name in names} == {"stem", "left", "right", "head"}


def test_tied_weights_are_cut_together_or_not_at_all() -> None:
    def tie() -> nn.Module:
        model = Branches()
        model.other = nn.Conv2d(8, 6, 1)
        model.other.weight = model.left.weight
        return Net(lambda n, x: n.net.left(n.net.stem(x)) + n.net.other(n.net.stem(x).flip(1)), net=model)

    model: Any = tie().eval()
    with torch.no_grad():
        model.net.left.weight[:, :3] = 0
        fast = compiled(model)
        for _ in range(3):
            assert error(model(images()), fast(images())) < TOLERANCE
            model.net.other.weight.mul_(1.5)
            assert error(model(images()), fast(images())) < TOLERANCE


@pytest.mark.parametrize("where", ["outside", "inside"])
def test_autocast(where: str) -> None:
    class Inside(Branches):
        def forward(self, x: Tensor) -> Tensor:
            with torch.autocast("cpu", dtype=torch.bfloat16):
                return super().forward(x)

    model = masked(Inside if where == "inside" else Branches)
    fast = compiled(model)
    x = images()
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16, enabled=where == "outside"):
        expected, found = model(x), fast(x)
        assert expected.dtype == found.dtype == torch.bfloat16
        assert error(expected, found) < 3e-2
        assert error(expected, fast(x)) < 3e-2
    with torch.no_grad():
        wide = model(x)
        assert error(wide, fast(x)) < (3e-2 if where == "inside" else TOLERANCE)
    assert all(report.macs_after < report.macs_before for report in _each(chanopt.explain(fast)))


def _each(report: Any) -> list[Any]:
    return list(report) if hasattr(report, "graphs") else [report]


def test_channels_last_stays_channels_last() -> None:
    model: Any = masked(Structured).to(memory_format=torch.channels_last)
    fast = compiled(model)
    x = images().to(memory_format=torch.channels_last)
    with torch.no_grad():
        fast(x)
        expected, found = (call(x)["features"][0] for call in (model, fast))
    assert error(expected, found) < TOLERANCE
    assert found.is_contiguous(memory_format=torch.channels_last)
    assert expected.is_contiguous(memory_format=torch.channels_last)


def test_keyword_inputs_and_structured_outputs() -> None:
    model = masked(Structured)
    fast = compiled(model)
    extra = {"bias": torch.randn(6, 1, 1)}
    with torch.no_grad():
        assert error(model(x=images()), fast(x=images())) < TOLERANCE
        assert error(model(images(), extra=extra), fast(images(), extra=extra)) < TOLERANCE
        assert error(model(images(), scale=2.0, extra=extra), fast(images(), scale=2.0, extra=extra)) < TOLERANCE


def test_another_type_is_another_graph() -> None:
    model = masked()
    fast = compiled(model)
    x = images()
    with torch.no_grad():
        assert error(model(x), fast(x)) < TOLERANCE
        model.double()
        assert error(model(x.double()), fast(x.double())) < 1e-10
        model.bfloat16()
        assert error(model(x.bfloat16()), fast(x.bfloat16())) < 5e-2
        model.float()
        assert error(model(x), fast(x)) < TOLERANCE


def test_an_input_that_is_written_over_is_written_over() -> None:
    model = masked(lambda: Net(lambda n, x: n.right(n.left(x.add_(1)).relu_()), left=conv(3, 8), right=conv(8, 4)))
    fast = compiled(model)
    x, y = images(), images()
    with torch.no_grad(), pytest.warns(UserWarning, match="writes into"):
        found = fast(y)
    with torch.no_grad():
        assert error(model(x), found) < TOLERANCE
    assert torch.equal(x, y)
    assert torch.equal(x, images() + 1)


def test_the_models_own_parameters_are_not_touched() -> None:
    model = masked()
    state = copy.deepcopy(model.state_dict())
    with torch.no_grad():
        compiled(model)(images())
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in state.items())
    assert all(parameter.requires_grad for parameter in model.parameters())


def _warned(model: Any, calls: int = 3, *, grad: bool = False) -> list[str]:
    with warnings.catch_warnings(record=True) as caught, torch.set_grad_enabled(grad):
        warnings.simplefilter("always")
        for seed in range(calls):
            model(images(2 + seed, seed=seed))
    return [str(warning.message) for warning in caught if "chanopt" in str(warning.message)]


def test_train_mode_passes_through_with_one_warning() -> None:
    model = masked(Broken)
    fast = compiled(model)
    model.train()
    told = _warned(fast)
    assert len(told) == 1
    assert "norm is in train mode; call model.eval()" in told[0]
    model.eval()
    assert _warned(fast) == []
    with torch.no_grad():
        assert error(model(images()), fast(images())) < TOLERANCE


def test_train_mode_computes_what_eager_computes() -> None:
    one = masked().train()
    two = copy.deepcopy(one)
    fast = compiled(two)
    with pytest.warns(UserWarning, match="norm is in train mode"):
        found = fast(images())
    expected = one(images())
    assert error(expected, found) < TOLERANCE
    expected.sum().backward()
    found.sum().backward()
    assert error(one.stem.weight.grad, two.stem.weight.grad) < 1e-4  # type: ignore[union-attr]
    assert error(one.norm.running_mean, two.norm.running_mean) < TOLERANCE  # type: ignore[union-attr]


def test_dropout_in_train_mode_passes_through() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.Dropout(0.5), nn.Conv2d(8, 3, 1)).train()
    with torch.no_grad(), pytest.warns(UserWarning, match="is in train mode"):
        compiled(model)(images())


def test_a_batch_norm_without_statistics_is_not_in_train_mode() -> None:
    model = masked(lambda: nn.Sequential(conv(3, 8), nn.BatchNorm2d(8, track_running_stats=False), conv(8, 3)))
    fast = compiled(model)
    with torch.no_grad():
        assert error(model(images()), fast(images())) < TOLERANCE
    assert slim(fast)


def test_gradients_pass_through_with_one_warning() -> None:
    model = masked()
    fast = compiled(model)
    told = _warned(fast, grad=True)
    assert len(told) == 1
    assert "torch.no_grad() or torch.inference_mode()" in told[0]
    fast(images()).sum().backward()
    assert model.stem.weight.grad is not None  # type: ignore[union-attr]
    with pytest.raises(ChanoptError, match="call it once, in eval mode"):
        chanopt.explain(fast)
    with torch.no_grad():
        fast(images())
    assert macs(fast)[1] < macs(fast)[0]


def test_what_cannot_be_captured_passes_through_and_the_warning_says_why() -> None:
    model: Any = masked()
    with torch.no_grad():
        model.left.weight[0, 4] = float("nan")
    fast = compiled(model)
    with torch.no_grad():
        (told,) = _warned(fast)
        assert "runs graph 0/0 as it is: expected finite weights, found 1 NaN" in told
        assert error(model(images()), fast(images())) == 0
    with torch.no_grad(), pytest.raises(ChanoptError, match="expected finite weights"):
        compiled(model, strict=True)(images(7))


def test_a_state_that_is_written_in_forward_passes_through() -> None:
    class Counting(Branches):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("seen", torch.zeros(()))

        def forward(self, x: Tensor) -> Tensor:
            self.seen += 1
            return super().forward(x)

    model: Any = masked(Counting)
    fast = compiled(model)
    (told,) = _warned(fast)
    assert "changes no state in its forward" in told
    assert float(model.seen) == 3
    with torch.no_grad(), pytest.raises(CaptureError, match="changes no state"):
        compiled(model, strict=True)(images(9))


def test_an_operator_without_a_rule_is_refused_in_strict_mode() -> None:
    model = masked(lambda: Net(lambda n, x: n.tail(torch.cumsum(n.head(x), 1)), head=conv(3, 8), tail=conv(8, 4)))
    with torch.no_grad():
        assert error(model(images()), compiled(model)(images())) < TOLERANCE
        with pytest.raises(LoweringError, match="cumsum"):
            compiled(model, strict=True)(images())


def test_a_function_without_weights_is_left_alone_without_a_word() -> None:
    fast = compiled(lambda x: torch.relu(x) * 2)
    assert _warned(fast) == []


def test_fake_tensors_pass_through() -> None:
    from torch._subclasses import FakeTensorMode

    model = masked()
    with FakeTensorMode(allow_non_fake_inputs=True) as mode, torch.no_grad():
        x = mode.from_tensor(images())
        with pytest.warns(UserWarning, match=r"has none \(a fake or meta tensor\)"):
            assert compiled(model)(x).shape == (2, 5)


def test_a_pipeline_of_ones_own() -> None:
    fast = compiled(masked(), pipeline=())
    with torch.no_grad():
        fast(images())
    assert macs(fast)[0] == macs(fast)[1]


class Anchors(nn.Module):
    """Predictions beside what does not depend on the input, in several ways, and copies."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 4, 1)
        self.offset = nn.Parameter(torch.rand(1, 4, 1, 1))
        self.grid: Tensor
        self.register_buffer("grid", torch.arange(4.0))

    def forward(self, x: Tensor) -> tuple[Any, ...]:
        y = self.head(torch.relu(self.stem(x)))
        shift = (self.offset * 2).relu()
        batch = x.shape[0]
        folded = (self.grid * 8, shift.view(-1), self.head(torch.zeros(1, 8, 2, 2)))
        spread = (shift.expand(batch, 4, 1, 1).contiguous(), self.offset.expand(batch, 4, 1, 1).contiguous())
        return torch.relu(shift + y) + shift, *folded, *spread, x.clone(), y, y.clone(), batch, 3


def _written_over(fast: Any, model: nn.Module) -> None:
    """Callers write over all that they get, again and again."""
    with torch.no_grad():
        for seed in range(3):
            x = images(seed=seed)
            found, expected = fast(x), model(x)
            assert error(expected, found) < TOLERANCE
            assert torch.equal(x, images(seed=seed))
            for number, tensor in enumerate(found[:-2]):
                tensor.add_(1)
                later = [(a, b) for a, b in zip(expected[number + 1 : -2], found[number + 1 : -2], strict=True)]
                assert error(*map(list, zip(*later, strict=True))) < TOLERANCE if later else True
            assert torch.equal(x, images(seed=seed))


def test_outputs_may_be_written_over() -> None:
    model = masked(Anchors)
    _written_over(chanopt.optimize(model, (images(),)), model)
    _written_over(compiled(model), model)


@pytest.mark.slow
def test_outputs_of_a_frozen_graph_may_be_written_over() -> None:
    model = masked(Anchors)
    _written_over(torch.compile(model, backend="chanopt"), model)


class Named(nn.Module):
    """Layers that are named like attributes of ours."""

    def __init__(self) -> None:
        super().__init__()
        self._autocast, self._graph, self.held = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.held(torch.relu(self._graph(torch.relu(self._autocast(x)))))


def test_layers_of_any_name() -> None:
    model: Any = masked(Named)
    fast = compiled(model)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.export refuses a layer of the name _graph
        assert error(model(images()), fast(images())) < TOLERANCE


@pytest.mark.slow
def test_inductor_takes_float64() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.ConvTranspose2d(8, 4, 2), nn.Conv2d(4, 4, 1)).eval()
    with torch.no_grad():
        model[2].weight[::2] = 0  # pyright: ignore[reportIndexIssue]
        fast = torch.compile(model, backend="chanopt")
        assert error(model(images()), fast(images())) < 1e-4
        model.double()
        assert error(model(images().double()), fast(images().double())) < 1e-10
    assert macs(fast)[1] < macs(fast)[0]


@pytest.mark.slow
@pytest.mark.parametrize("arguments", [{}, {"mode": "reduce-overhead"}, {"options": {"mode": "reduce-overhead"}}])
def test_inductor(arguments: dict[str, Any]) -> None:
    counters.clear()
    model = masked(Structured)
    fast = torch.compile(model, backend="chanopt", fullgraph=True, **arguments)
    with torch.inference_mode():
        for batch in (2, 3, 5):
            assert error(model(images(batch)), fast(images(batch))) < 1e-4
    assert counters["inductor"]["fxgraph_cache_bypass"] + counters["inductor"]["pattern_matcher_count"] >= 0
    assert macs(fast)[1] < macs(fast)[0]
    assert chanopt.explain(fast).seconds["inductor"] > 0
    assert parse(arguments.get("options"), arguments.get("mode")).patches("cpu")["freezing"]


@pytest.mark.slow
@pytest.mark.parametrize(("given", "in_cpp"), [({}, True), ({"cpp_wrapper": False}, False)])
def test_cpp_calls_the_kernels_unless_python_is_asked_to(given: dict[str, Any], in_cpp: bool) -> None:
    model = masked()
    fast = torch.compile(model, backend="chanopt", options={"inductor": given})
    with torch.inference_mode(), fresh_inductor_cache():
        found, (code, *_) = run_and_get_code(fast, images())
        assert error(model(images()), found) < 1e-4
    assert ("inductor_entry_impl" in code) == in_cpp


@pytest.mark.slow
def test_python_calls_the_kernels_where_inductor_cannot_write_it_in_cpp(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def no_cpp(*args: Any, config_patches: dict[str, Any]) -> Any:
        if config_patches["cpp_wrapper"]:
            raise NotImplementedError("this operator")
        return compile_fx(*args, config_patches=config_patches)

    monkeypatch.setattr("chanopt.backend.inductor.compile_fx", no_cpp)
    model = masked()
    fast = torch.compile(model, backend="chanopt")
    with torch.inference_mode(), caplog.at_level(logging.INFO, "chanopt"):
        assert error(model(images()), fast(images())) < 1e-4
    assert "did not write the C++: NotImplementedError: this operator" in caplog.text
    assert slim(fast)


@pytest.mark.slow
def test_inductor_compiles_what_passes_through() -> None:
    model = masked().train()
    fast = torch.compile(model, backend="chanopt")
    counters.clear()
    with pytest.warns(UserWarning, match="train mode"):
        fast(images()).sum().backward()
    assert counters["aot_autograd"]["ok"] == 1
    assert model.stem.weight.grad is not None  # type: ignore[union-attr]


def test_freezing_for_the_whole_process_hides_the_weights_and_a_warning_says_so() -> None:
    model, x = masked(), images()
    fast = torch.compile(model, backend="chanopt", options={"compiler": "eager"})
    with torch.no_grad(), inductor_config.patch(freezing=True), pytest.warns(UserWarning, match="leave it off"):
        found = fast(x)
    torch.testing.assert_close(found, model(x))
