"""What options the backend takes, and what it says to those it does not."""

from __future__ import annotations

import re
from dataclasses import FrozenInstanceError, fields
from typing import Any

import pytest
import torch

import chanopt.backend
from chanopt.backend.options import Options, parse
from chanopt.errors import ChanoptError, OptionError
from chanopt.passes import DEFAULT, DropDead
from tests.backend.small import images, masked


def test_without_options_the_defaults_hold() -> None:
    options = parse(None)
    assert options == Options()
    assert (options.compiler, options.pipeline, options.strict) == ("inductor", DEFAULT, False)


def test_every_field_can_be_given() -> None:
    given = {
        "compiler": "eager",
        "freezing": False,
        "mode": "max-autotune",
        "inductor": {"max-autotune": True},
        "target": "cpu",
        "pipeline": (DropDead(),),
        "strict": True,
        "check": "all",
        "dump_ir": "/somewhere",
    }
    assert set(given) == {field.name for field in fields(Options)}
    options = parse(given)
    assert {name: getattr(options, name) for name in given} == given


def test_options_are_frozen() -> None:
    with pytest.raises(FrozenInstanceError):
        parse(None).strict = True  # type: ignore[misc]


def test_an_unknown_key_is_a_value_error_that_lists_the_valid_ones() -> None:
    with pytest.raises(ValueError, match="did you mean 'compiler'") as caught:
        parse({"compilr": "eager"})
    assert isinstance(caught.value, OptionError)
    assert isinstance(caught.value, ChanoptError)
    for field in fields(Options):
        assert field.name in str(caught.value)


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"compiler": "tvm"}, "'inductor' or 'eager', found 'tvm'"),
        ({"compiler": None}, "found None"),
        ({"target": "tpu"}, "'auto', 'cpu', 'cuda' or a chanopt.Target, found 'tpu'"),
        ({"check": True}, "found True"),
        ({"freezing": "yes"}, "True, False or None, found 'yes'"),
        ({"strict": 1}, "True or False, found 1"),
        ({"inductor": [1]}, "a dict of Inductor's options, found [1]"),
        ({"inductor": {"max_autotun": True}}, "did you mean 'max_autotune'"),
        ({"inductor": {3: 1}}, "options of Inductor's, found '3'; The nearest are"),
        ({"mode": "fast"}, "a mode of Inductor's, found 'fast'"),
        ({"mode": 3}, "the name of a mode or None, found 3"),
        ({"pipeline": "default"}, "a pass or a sequence of passes, found 'default'"),
        ({"pipeline": [1]}, "a pass or a sequence of passes, found [1]"),
        ({"dump_ir": 3}, "a folder or None, found 3"),
        ({"dump_ir": ""}, "a folder or None, found ''"),
    ],
)
def test_a_value_that_makes_no_sense_is_refused(given: dict[str, Any], told: str) -> None:
    with pytest.raises(OptionError, match=re.escape(told)):
        parse(given)


def test_mode_and_inductors_own_options_become_its_configuration() -> None:
    options = parse({"inductor": {"triton.cudagraphs": False}}, mode="reduce-overhead")
    assert options.patches("cuda") == {"triton.cudagraphs": False, "freezing": False}
    assert parse(None, mode="reduce-overhead").patches("cuda")["triton.cudagraphs"] is True


@pytest.mark.parametrize(("freezing", "on"), [(None, ("cpu",)), (True, ("cpu", "cuda")), (False, ())])
def test_weights_are_frozen_on_a_cpu_unless_told_otherwise(freezing: bool | None, on: tuple[str, ...]) -> None:
    options = Options(freezing=freezing)
    assert [device for device in ("cpu", "cuda") if options.patches(device)["freezing"]] == list(on)


def test_what_is_float64_is_not_frozen_unless_told() -> None:
    assert not Options().patches("cpu", double=True)["freezing"]
    assert Options(freezing=True).patches("cpu", double=True)["freezing"]


def test_values_are_watched_where_that_does_not_wait_for_the_device() -> None:
    assert (Options().checked("cpu"), Options().checked("cuda")) == ("all", "version")
    assert Options(check="all").checked("cuda") == "all"


def test_torch_compile_raises_the_error_itself() -> None:
    model = torch.compile(masked(), backend="chanopt", options={"nonsense": 1})
    with pytest.raises(ValueError, match="Valid are: check, compiler") as caught, torch.no_grad():
        model(images())
    assert isinstance(caught.value, OptionError)
    assert type(caught.value).__name__ == "OptionError"


@pytest.mark.parametrize("folder", ["/proc/nothing/here", __file__])
def test_a_folder_that_cannot_be_written_is_refused_at_the_first_call(folder: str) -> None:
    model = torch.compile(masked(), backend="chanopt", options={"compiler": "eager", "dump_ir": folder})
    with pytest.raises(OptionError, match="to be a folder to write into, found"), torch.no_grad():
        model(images())


def test_mode_is_checked_at_the_first_call() -> None:
    model = torch.compile(masked(), backend="chanopt", mode="fastest")
    with pytest.raises(OptionError, match="expected a mode of Inductor's"), torch.no_grad():
        model(images())


def test_the_backend_is_listed() -> None:
    assert chanopt.backend.NAME in torch.compiler.list_backends()
