"""What optimize gives back: an ordinary module, and the user's model as it was."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.export import Dim, export
from torch.nn.utils import prune

import chanopt
from chanopt.errors import ChanoptError
from chanopt.passes import DEFAULT, RealizeReads
from tests.support.equal import assert_same_function, difference, outputs
from tests.support.masks import mask_randomly
from tests.support.micro import MICRO
from tests.support.nets.base import Net, conv, image, randomise
from tests.support.passes import kill

TOL = 1e-6
"""For modules whose weights were folded in float32; the figures in float64 are for the passes' own tests."""


def batch(size: int = 2, seed: int = 0, dtype: torch.dtype = torch.float32) -> tuple[Any, ...]:
    return image()(size, dtype, seed)


def chain() -> Any:
    """Conv a, batch norm, ReLU, conv b, ReLU, conv c; input columns of b and c are masked."""
    net: Any = randomise(
        Net(
            lambda n, x: n.c(n.b(n.norm(n.a(x)).relu()).relu()),
            a=conv(3, 8, 3, bias=False),
            norm=nn.BatchNorm2d(8),
            b=conv(8, 8, 3),
            c=conv(8, 6),
        )
    ).eval()
    kill(net.b, inputs=[0, 3, 6])
    kill(net.c, inputs=[1, 2])
    return net


@pytest.fixture(scope="module")
def pair() -> tuple[Any, Any]:
    """The masked chain and what optimize makes of it; neither may be modified."""
    net = chain()
    return net, chanopt.optimize(net, batch())


def test_the_result_is_a_graph_module_of_aten_ops(pair: tuple[Any, Any]) -> None:
    _, fast = pair
    assert isinstance(fast, fx.GraphModule)
    assert not fast.training
    calls = [node for node in fast.graph.nodes if node.op == "call_function"]
    assert calls
    assert all(isinstance(node.target, torch._ops.OpOverload) for node in calls)
    assert {node.target.namespace for node in calls} == {"aten"}
    assert {node.op for node in fast.graph.nodes} <= {"placeholder", "get_attr", "call_function", "output"}


def test_parameters_keep_their_names_and_are_cut(pair: tuple[Any, Any]) -> None:
    net, fast = pair
    shapes = {name: tuple(p.shape) for name, p in fast.named_parameters()}
    assert shapes == {
        "a.weight": (5, 3, 3, 3),
        "a.bias": (5,),  # of the batch norm
        "b.weight": (6, 5, 3, 3),
        "b.bias": (6,),
        "c.weight": (6, 6, 1, 1),
        "c.bias": (6,),
    }
    assert all(isinstance(p, nn.Parameter) and p.requires_grad and p.is_leaf for p in fast.parameters())
    storages = {p.untyped_storage().data_ptr() for p in net.parameters()}
    assert all(p.untyped_storage().data_ptr() not in storages for p in fast.parameters())


def test_buffers_keep_their_names() -> None:
    net: Any = randomise(
        Net(lambda n, x: n.b(n.norm(n.a(x).relu())), a=conv(3, 8), norm=nn.BatchNorm2d(8), b=conv(8, 4))
    ).eval()
    kill(net.b, inputs=[0, 7])
    fast = chanopt.optimize(net, batch())
    assert torch.equal(fast.get_buffer("norm.running_mean"), net.norm.running_mean[1:7])
    assert torch.equal(fast.get_parameter("norm.weight"), net.norm.weight[1:7])


@pytest.mark.parametrize("size", [1, 2, 5])
def test_any_batch_the_model_takes(pair: tuple[Any, Any], size: int) -> None:
    net, fast = pair
    assert_same_function(net, fast, batch(size, 3), tol=TOL, allow_constant=size == 1)


def test_an_example_of_batch_one_gives_a_module_for_any_batch() -> None:
    net = chain()
    fast = chanopt.optimize(net, batch(1))
    assert_same_function(net, fast, batch(4, 3), tol=TOL)


def test_a_lone_tensor_is_one_input(pair: tuple[Any, Any]) -> None:
    net, fast = pair
    (x,) = batch()
    again = chanopt.optimize(net, x)
    assert torch.equal(again(x), fast(x))


def test_gradients_are_those_of_the_masked_model_on_what_is_left() -> None:
    """A conv chain without batch norm: every surviving weight has the very gradient it had."""
    net: Any = randomise(
        Net(lambda n, x: n.c(n.b(n.a(x).relu()).relu()), a=conv(3, 8, 3), b=conv(8, 8, 3), c=conv(8, 6))
    ).eval()
    net = net.double()
    kill(net.b, inputs=[0, 3, 6])
    kill(net.c, inputs=[1, 2])
    fast = chanopt.optimize(net, batch(dtype=torch.float64))
    (x,) = batch(3, 5, torch.float64)
    for module in (net, fast):
        module(x).square().mean().backward()
    rows, middle = [1, 2, 4, 5, 7], [0, 3, 4, 5, 6, 7]
    expected = {
        "a.weight": net.a.weight.grad[rows],
        "a.bias": net.a.bias.grad[rows],
        "b.weight": net.b.weight.grad[middle][:, rows],
        "b.bias": net.b.bias.grad[middle],
        "c.weight": net.c.weight.grad[:, middle],
        "c.bias": net.c.bias.grad,
    }
    assert dict(fast.named_parameters()).keys() == expected.keys()
    for name, gradient in expected.items():
        assert gradient.abs().max() > 0
        torch.testing.assert_close(fast.get_parameter(name).grad, gradient, rtol=TOL, atol=1e-12)


def test_the_result_trains(pair: tuple[Any, Any]) -> None:
    fast = copy.deepcopy(pair[1]).train()
    optimizer = torch.optim.SGD(fast.parameters(), lr=1e-2, momentum=0.9)
    (x,) = batch(4)
    losses = []
    for _ in range(8):
        optimizer.zero_grad()
        loss = fast(x).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]


@pytest.mark.parametrize(
    "masks",
    [{}, {"a": chanopt.Mask(outputs=[0, 1])}, {"b": chanopt.Mask(inputs=[0, 1])}],
    ids=["zeros", "outputs", "inputs"],
)
def test_frozen_parameters_stay_frozen(masks: dict[str, chanopt.Mask]) -> None:
    """What takes in a batch norm too: a bias that is new trains if the weight beside it does."""
    norm = nn.BatchNorm2d(8)
    net = randomise(
        Net(
            lambda n, x: n.c(n.b(F.relu(n.norm(n.a(x))))),
            a=conv(3, 8, 3, bias=False),
            norm=norm,
            b=conv(8, 6),
            c=conv(6, 4),
        )
    )
    net.eval()
    for part in (net.get_submodule("a"), norm, net.get_submodule("c")):
        part.requires_grad_(False)
    fast = chanopt.optimize(net, image()(2, torch.float32, 0), masks=masks or None)
    trained = {name for name, parameter in fast.named_parameters() if parameter.requires_grad}
    assert trained == {"b.weight", "b.bias"}
    assert {"a.weight", "a.bias", "c.weight", "c.bias"} <= dict(fast.named_parameters()).keys()


@pytest.mark.parametrize("product", [lambda x, w, b: x @ w, lambda x, w, b: torch.addmm(b, x, w)], ids=["mm", "addmm"])
def test_frozen_matrices_stay_frozen(product: Any) -> None:
    class Product(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.bias = nn.Linear(6, 5), nn.Parameter(torch.randn(4))
            self.weight = nn.Parameter(torch.randn(5, 4), requires_grad=False)

        def forward(self, x: Tensor) -> Tensor:
            return product(F.relu(self.layer(x)), self.weight, self.bias)

    fast = chanopt.optimize(Product().eval(), (torch.randn(3, 6),))
    found = {name: parameter.requires_grad for name, parameter in fast.named_parameters()}
    assert [name for name, trained in found.items() if not trained] == ["weight_T"]
    assert found["layer.weight"]


def test_a_deep_copy_is_independent(pair: tuple[Any, Any]) -> None:
    net, fast = pair
    twin = copy.deepcopy(fast)
    assert_same_function(net, twin, batch(3, 1), tol=TOL)
    with torch.no_grad():
        for p in twin.parameters():
            p.zero_()
    assert_same_function(net, fast, batch(3, 1), tol=TOL)
    assert str(chanopt.explain(twin)) == str(chanopt.explain(fast))


def test_the_state_dict_is_saved_and_loaded_without_code(pair: tuple[Any, Any]) -> None:
    _, fast = pair
    file = io.BytesIO()
    torch.save(fast.state_dict(), file)
    file.seek(0)
    twin = chanopt.optimize(chain(), batch())
    with torch.no_grad():
        for p in twin.parameters():
            p.zero_()
    twin.load_state_dict(torch.load(file, weights_only=True), strict=True)
    assert torch.equal(twin(*batch()), fast(*batch()))


def test_the_module_pickles(pair: tuple[Any, Any]) -> None:
    _, fast = pair
    file = io.BytesIO()
    torch.save(fast, file)
    file.seek(0)
    twin = torch.load(file, weights_only=False)
    assert torch.equal(twin(*batch()), fast(*batch()))


def test_the_module_exports_again_with_a_dynamic_batch(pair: tuple[Any, Any]) -> None:
    net, fast = pair
    with torch.no_grad():
        exported = export(fast, batch(), dynamic_shapes=({0: Dim("b", min=1, max=64)},), strict=False)
    assert_same_function(net, exported.module(), batch(7, 2), tol=1e-5, double=False)


def test_an_optimised_module_is_optimised_again_to_itself(pair: tuple[Any, Any]) -> None:
    _, fast = pair
    again = chanopt.optimize(fast, batch())
    assert {n: tuple(p.shape) for n, p in again.named_parameters()} == {
        n: tuple(p.shape) for n, p in fast.named_parameters()
    }
    assert_same_function(fast, again, batch(3, 1), tol=TOL)


def test_the_module_traces_into_an_exported_program_and_back(pair: tuple[Any, Any]) -> None:
    net, _ = pair
    with torch.no_grad():
        exported = export(net, batch(), strict=False)
    fast = chanopt.optimize(exported, batch())
    assert fast.get_parameter("a.weight").shape == (5, 3, 3, 3)
    assert_same_function(net, fast, batch(2, 4), tol=TOL)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 5e-2), (torch.float16, 1e-2)])
def test_the_module_casts_to_half_precision(pair: tuple[Any, Any], dtype: torch.dtype, tolerance: float) -> None:
    net, fast = copy.deepcopy(pair[0]), copy.deepcopy(pair[1])
    (x,) = batch(2, 3)
    with torch.no_grad():
        reference, found = net(x), fast.to(dtype)(x.to(dtype))
    assert found.dtype == dtype
    assert difference(reference, found.float()) < tolerance


def test_a_half_precision_model(pair: tuple[Any, Any]) -> None:
    net = copy.deepcopy(pair[0]).to(torch.bfloat16)
    fast = chanopt.optimize(net, batch(dtype=torch.bfloat16))
    assert {p.dtype for p in fast.parameters()} == {torch.bfloat16}
    assert fast.get_parameter("a.weight").shape == (5, 3, 3, 3)
    chanopt.verify(net, fast, batch(dtype=torch.bfloat16))


# -- the user's model -------------------------------------------------------------------------------------------------


def snapshot(model: nn.Module) -> dict[str, Any]:
    """State, attributes, hooks and identities of everything in a model."""
    seen: dict[str, Any] = {}
    for name, module in model.named_modules():
        seen[name] = (id(module), type(module), module.training, sorted(vars(module)), len(module._forward_pre_hooks))
        for key, tensor in (*module._parameters.items(), *module._buffers.items(), *vars(module).items()):
            if isinstance(tensor, Tensor):
                seen[f"{name}.{key}"] = (
                    id(tensor),
                    tensor.requires_grad,
                    tensor.detach().clone(),
                    tensor.grad if tensor.is_leaf else None,
                )
    return seen


def assert_untouched(before: dict[str, Any], model: nn.Module) -> None:
    after = snapshot(model)
    assert before.keys() == after.keys()
    for key, old in before.items():
        new = after[key]
        assert old[:2] == new[:2], f"{key} has changed"
        if isinstance(old[2], Tensor):
            assert torch.equal(old[2], new[2]), f"{key} has other values"
            assert new[3] is old[3]
        else:
            assert old[2:] == new[2:], f"{key} has changed"


@pytest.mark.parametrize(
    "name", ["batch_norm", "tied_weights", "weight_norm", "conv_twice", "add_in_place", "frozen_norm"]
)
def test_the_model_is_untouched(name: str) -> None:
    net = MICRO[name].build()
    mask_randomly(net, 2, keep_bias=True)
    before = snapshot(net)
    fast = chanopt.optimize(net, MICRO[name].inputs(2, torch.float32, 0))
    assert_untouched(before, net)
    with torch.no_grad():
        for p in fast.parameters():
            p.add_(1.0)
    assert_untouched(before, net)


def test_a_model_under_prune_is_untouched_and_read_as_what_it_computes() -> None:
    net = chain()
    prune.ln_structured(net.b, "weight", amount=3, n=2, dim=0)
    prune.ln_structured(net.c, "weight", amount=2, n=2, dim=1)
    net(*batch())  # the hooks leave a weight behind
    before = snapshot(net)
    fast = chanopt.optimize(net, batch())
    assert_untouched(before, net)
    assert fast.get_parameter("c.weight").shape[1] < 6
    assert sorted(name for name, _ in fast.named_parameters()) == [
        "a.bias",
        "a.weight",
        "b.bias",
        "b.weight",
        "c.bias",
        "c.weight",
    ]
    assert_same_function(prune_removed(net), fast, batch(3, 1), tol=TOL)


def prune_removed(net: nn.Module) -> nn.Module:
    """What a model under prune computes, as a model without hooks."""
    state = dict(net.state_dict())
    for name in [key.removesuffix("_mask") for key in state if key.endswith("_mask")]:
        state[name] = state.pop(f"{name}_orig") * state.pop(f"{name}_mask")
    twin = chain()
    twin.load_state_dict(state)
    return twin


def test_weights_changed_between_two_runs_are_seen() -> None:
    """Nothing about a weight may be remembered past one run."""
    net = chain()
    first = chanopt.optimize(net, batch())
    kill(net.c, inputs=[4, 5])
    second = chanopt.optimize(net, batch())
    assert first.get_parameter("c.weight").shape[1] == 6
    assert second.get_parameter("c.weight").shape[1] == 4
    assert_same_function(net, second, batch(3), tol=TOL)


# -- what goes --------------------------------------------------------------------------------------------------------


def test_a_wholly_dead_branch_disappears() -> None:
    net = MICRO["bottleneck"].build()
    with torch.no_grad():
        net.expand[1].weight.zero_()
        net.expand[1].bias.zero_()
    fast = chanopt.optimize(net, batch())
    left = {name.split(".")[0] for name, _ in fast.named_parameters()}
    assert left == {"stem", "short", "head"}
    assert_same_function(net, fast, batch(3, 1), tol=TOL)
    assert {row.name for row in chanopt.explain(fast).layers if row.channels_out[1] == 0} == {"a.0", "b.0", "expand.0"}


def test_a_network_of_nothing_but_constants() -> None:
    """All outputs are constants: still the same shape for any batch."""
    net = chain()
    kill(net.c, outputs=range(6), bias=0.25)
    fast = chanopt.optimize(net, batch())
    assert_same_function(net, fast, batch(3, 1), tol=TOL, allow_constant=True)
    assert fast.get_parameter("c.weight").shape == (6, 1, 1, 1)
    assert fast.get_parameter("b.weight").shape[0] == 1


def test_all_layers_wholly_masked() -> None:
    net = chain()
    for layer, width in ((net.a, 8), (net.b, 8), (net.c, 6)):
        kill(layer, outputs=range(width), bias=None)
    fast = chanopt.optimize(net, batch())
    assert_same_function(net, fast, batch(3, 1), tol=TOL, allow_constant=True)


def test_a_model_without_masks_keeps_every_channel() -> None:
    net = MICRO["bottleneck"].build()
    fast = chanopt.optimize(net, batch())
    report = chanopt.explain(fast)
    assert report.macs_after == report.macs_before
    assert report.copies == report.slices == 0
    assert_same_function(net, fast, batch(3, 1), tol=TOL)


@pytest.mark.parametrize(
    "name", ["dict_output", "nested_output", "named_tuple_output", "dict_input", "list_input", "unused_input"]
)
def test_inputs_and_outputs_keep_their_structure(name: str) -> None:
    net, inputs = MICRO[name].build(), MICRO[name].inputs
    mask_randomly(net, 1)
    fast = chanopt.optimize(net, inputs(2, torch.float32, 0))
    expected, found = net(*inputs(3, torch.float32, 1)), fast(*inputs(3, torch.float32, 1))
    assert type(found) is type(expected)
    if isinstance(expected, dict):
        assert list(found) == list(expected)
    assert_same_function(net, fast, inputs(3, torch.float32, 1), tol=TOL)


def test_keyword_inputs() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = conv(3, 8, 3), conv(8, 4)

        def forward(self, x: Tensor, *, scale: Tensor, bias: Tensor | None = None) -> Tensor:
            t = self.a(x) * scale
            return self.b(t if bias is None else t + bias)

    net: Any = randomise(Scaled()).eval()
    kill(net.b, inputs=[0, 5])
    (x,) = batch()
    scale = torch.rand(2, 1, 8, 8)
    fast = chanopt.optimize(net, (x,), {"scale": scale})
    assert torch.allclose(fast(x, scale=scale), net(x, scale=scale), atol=1e-5)
    assert fast.get_parameter("a.weight").shape[0] == 6
    chanopt.verify(net, fast, (x,), {"scale": scale})


def test_channels_last_inputs() -> None:
    net = chain()
    (x,) = batch()
    x = x.to(memory_format=torch.channels_last)
    fast = chanopt.optimize(net.to(memory_format=torch.channels_last), (x,))
    assert fast.get_parameter("b.weight").is_contiguous(memory_format=torch.channels_last)
    assert fast(x).is_contiguous(memory_format=torch.channels_last)
    assert_same_function(net, fast, (x,), tol=TOL)


def test_gathers_of_a_channels_last_input_keep_the_layout() -> None:
    net = MICRO["fan_out"].build()
    mask_randomly(net, 5, side="input", mode="uniform")
    inputs = tuple(x.to(memory_format=torch.channels_last) for x in MICRO["fan_out"].inputs(2, torch.float32, 0))
    fast = chanopt.optimize(net, inputs, pipeline=[step for step in DEFAULT if not isinstance(step, RealizeReads)])
    assert chanopt.explain(fast).gathers > 0
    assert_same_function(net, fast, inputs, tol=TOL)


def test_masks_by_name_are_those_of_the_masked_model() -> None:
    net = chain()
    masks = {"a": chanopt.Mask(outputs=range(1, 8)), "b": chanopt.Mask(inputs=[1, 2, 4, 5], outputs={0, 1, 2})}
    fast = chanopt.optimize(net, batch(), masks=masks)
    masked = copy.deepcopy(net)
    kill(masked.a, outputs=[0])
    kill(masked.b, inputs=[0, 3, 6, 7], outputs=[3, 4, 5, 6, 7])
    assert_same_function(masked, fast, batch(3), tol=TOL)
    assert fast.get_parameter("b.weight").shape == (3 - 2, 4, 3, 3)  # c does not read 1 and 2


# -- explain, why -----------------------------------------------------------------------------------------------------


def test_explain_gives_the_figures(pair: tuple[Any, Any]) -> None:
    net, fast = pair
    report = chanopt.explain(fast)
    assert report.model == "Net"
    assert report.consumers == 3
    assert report.parameters_before == sum(p.numel() for p in net.parameters())
    assert report.parameters_after == sum(p.numel() for p in fast.parameters())
    assert report.macs_before == 2 * 64 * (3 * 8 * 9 + 8 * 8 * 9 + 8 * 6)
    assert report.macs_after == 2 * 64 * (3 * 5 * 9 + 5 * 6 * 9 + 6 * 6)
    rows = {row.name: (row.channels_in, row.channels_out) for row in report.layers}
    assert rows == {"a": ((3, 3), (8, 5)), "b": ((8, 5), (8, 6)), "c": ((8, 6), (6, 6))}
    assert report.refusals == ()
    assert {"capture", "optimize", "drop_dead", "order_channels"} <= report.seconds.keys()


def test_explain_round_trips_through_json(pair: tuple[Any, Any]) -> None:
    report = chanopt.explain(pair[1])
    assert chanopt.Report.from_json(report.to_json()) == report


def test_why_a_channel_was_kept() -> None:
    net = MICRO["slices_strided"].build()
    kill(net.b, inputs=[0])
    kill(net.c, inputs=[5])
    report = chanopt.explain(chanopt.optimize(net, batch()))
    assert report.why("a", 0) == "not kept: nothing reads it"
    assert report.why("a", 11) == "not kept: nothing reads it"
    assert report.why("a", 2) == "read by b"
    assert report.why("a", 3) == "read by c"
    assert report.why("b", 1) == "read by %add_36" or "output" in report.why("b", 1)
    with pytest.raises(KeyError, match="expected one of the report's layers, found 'nothing'"):
        report.why("nothing", 0)


def test_why_names_the_operator_that_takes_everything() -> None:
    net = MICRO["cumsum_channels"].build()
    kill(net.b, inputs=[1, 2])
    report = chanopt.explain(chanopt.optimize(net, batch()))
    assert report.why("a", 1) == "aten.cumsum.default takes all channels"
    assert [refusal.op for refusal in report.refusals] == ["aten.cumsum.default"]
    assert "cumsum" in str(report)


@pytest.mark.parametrize(
    "foreign", [nn.Conv2d(3, 4, 1), fx.symbolic_trace(nn.Sequential(nn.ReLU()))], ids=["module", "graph"]
)
def test_explain_refuses_what_chanopt_did_not_make(foreign: nn.Module) -> None:
    name = type(foreign).__name__
    with pytest.raises(
        ChanoptError, match=f"expected a module made by chanopt.optimize, found a {name} without a report"
    ):
        chanopt.explain(foreign)


def test_lower_then_to_module_is_the_model_itself() -> None:
    net = chain()
    program = chanopt.lower(net, batch())
    text = str(program)
    assert chanopt.parse(text) == program
    module = program.to_module()
    assert difference(outputs(net, batch())[0], outputs(module, batch())[0]) < 1e-6
    assert {n: tuple(p.shape) for n, p in module.named_parameters()} == {
        n: tuple(p.shape) for n, p in net.named_parameters()
    }
