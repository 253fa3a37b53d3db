"""The options of adapters: what is refused, on construction and in a configuration, and what a module has to hold."""

from __future__ import annotations

import dataclasses
import importlib
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from recast_exp import adapters, plugins
from recast_exp.adapters import Adapter, from_config
from recast_exp.adapters.clr import CLR
from recast_exp.adapters.melo import MeLo
from recast_exp.adapters.peft import Peft
from recast_exp.config.fields import option
from recast_exp.errors import UnknownNameError, UserError
from support.adapted import create, create_without_weights
from support.helpers import assert_one_line

HEAD = """
from dataclasses import dataclass
from typing import Any
from recast_exp.adapters import Adapter
from recast_exp.config.fields import option

"""
WIDTH = "    fits = 'anything'\n    width: int = option(2, 'width', ge=1)\n    def inject(self, network): return {}\n"


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Makes an adapter of the package `recast_exp.adapters` out of source text."""
    monkeypatch.setattr(adapters, "__path__", [*adapters.__path__, str(tmp_path)])

    def module(source: str) -> str:
        (tmp_path / "made_up.py").write_text(HEAD + source, encoding="utf-8")
        importlib.invalidate_caches()
        return "made_up"

    yield module
    sys.modules.pop("recast_exp.adapters.made_up", None)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"name": "melow"}, ("adapter.name: expected one of", "melo", "got 'melow'")),
        ({}, ("adapter.name: expected one of", "melo", "got ''")),
        ({"name": "melo", "rnak": 3}, ("adapter.rnak: unknown option; adapter=melo takes rank, alpha",)),
        ({"name": "melo", "rank": 0}, ("adapter.rank: expected ", " ≥ 1, got 0")),
        ({"name": "melo", "rank": "four"}, ("adapter.rank: expected ", " ≥ 1, got 'four'")),
        ({"name": "melo", "rank": 2.0}, ("adapter.rank: expected ", " ≥ 1, got 2.0")),
        ({"name": "melo", "rank": None}, ("adapter.rank: expected ", " ≥ 1, got None")),
        ({"name": "melo", "alpha": -1.0}, ("adapter.alpha: expected a number > 0 and ≤ 10000, got -1.0",)),
        ({"name": "melo", "alpha": math.nan}, ("adapter.alpha: expected a number > 0 and ≤ 10000, got nan",)),
        (
            {"name": "melo", "rank": 0, "alpha": "two"},
            ("adapter.rank: expected an integer ≥ 1, got 0; ", "adapter.alpha: expected a number > 0 and ≤ 10000, got"),
        ),
        ({"name": "clr", "kernel_size": 4}, ("adapter.kernel_size: expected an odd integer, got 4",)),
        ({"name": "clr", "train_norm": "maybe"}, ("adapter.train_norm: expected true or false, got 'maybe'",)),
        ({"name": "peft", "arguments": 3}, ("adapter.arguments: expected a mapping, got 3",)),
        ({"name": "piggyback", "start": 1e-3}, ("adapter.start: expected a number above threshold=0.005, got 0.001",)),
        ({"name": "bitfit", "rank": 3}, ("adapter.rank: unknown option; adapter=bitfit takes no options",)),
    ],
)
def test_wrong_options(options: dict[str, Any], expected: tuple[str, ...]) -> None:
    for node in (options, OmegaConf.create(options)):
        with pytest.raises(UserError) as error:
            from_config(node)
        assert_one_line(error, *expected)


def test_an_unknown_name_is_a_key_error_too() -> None:
    with pytest.raises(UnknownNameError, match=r"^name: expected one of adaptformer, .*, got 'lora'$"):
        adapters.load("lora")


def test_a_wrong_argument_is_refused_on_construction() -> None:
    with pytest.raises(ValueError, match=r"^rank: expected .* ≥ 1, got 0$"):
        MeLo(rank=0)
    with pytest.raises(ValueError, match=r"^rank: expected .* ≥ 1, got 'four'$"):
        MeLo(rank="four")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"^kernel_size: expected an odd integer, got 2$"):
        CLR(kernel_size=2)
    assert MeLo(rank=2) == from_config({"name": "melo", "rank": 2})
    assert MeLo(alpha=8).alpha == 8.0 and isinstance(MeLo(alpha=8).alpha, float)


def test_nodes_of_omegaconf_become_plain_containers() -> None:
    node = OmegaConf.create({"name": "peft", "arguments": {"r": "${oc.decode:'8'}", "target_modules": ["qkv", "fc1"]}})
    adapter = from_config(node)
    assert isinstance(adapter, Peft)
    assert type(adapter.arguments) is dict and type(adapter.arguments["target_modules"]) is list
    assert adapter.arguments == {"r": 8, "target_modules": ["qkv", "fc1"]}
    assert adapter.label == "peft LORA"


@dataclasses.dataclass
class Every(Adapter):
    """One option of every type."""

    fits = "nothing"

    integer: int = option(1, "help")
    number: float = option(1.0, "help")
    boolean: bool = option(False, "help")
    string: str = option("", "help")
    optional: int | None = option(None, "help")
    integers: list[int] = option([], "help")
    strings: list[str] = option([], "help")
    optional_numbers: list[float] | None = option(None, "help")
    mapping: dict[str, Any] = option({}, "help")
    numbers: dict[str, float] = option({}, "help")

    def inject(self, network: Any) -> dict[str, str]:
        return {}


VALUES = [
    *(0, 1, -3, 2.0, 2.5, 1e3, True, False, None, "", "4", "4.0", "1e-3", "four", "true", "Yes", "n", "off", "0", "2"),
    *([], [1, 2], [1.5], ["a"], ["1"], [None], [[1]], {}, {"a": 1}, {"a": "x"}, {"a": {"b": [1, {"c": None}]}}, b"a"),
]


@pytest.mark.parametrize("option", [field.name for field in dataclasses.fields(Every)])
def test_types_are_those_of_all_other_keys(option: str) -> None:
    """A value is taken, and as what, by the same rules as OmegaConf applies to the rest of the configuration."""
    for value in VALUES:
        node = OmegaConf.structured(Every)
        try:
            node[option] = value
            expected = OmegaConf.to_container(node)[option]
        except OmegaConfBaseException:
            with pytest.raises(UserError) as error:
                Every(**{option: value})
            assert_one_line(error, f"{option}: expected ", f", got {value!r}")
        else:
            found = getattr(Every(**{option: value}), option)
            assert repr(found) == repr(expected)  # 4 is not 4.0, nor true 1


def test_annotations_may_be_types_instead_of_their_names(module: Any) -> None:
    name = module(f"@dataclass\nclass MadeUp(Adapter):\n{WIDTH}")
    adapter = from_config({"name": name, "width": 3})
    assert (adapter.name, adapter.label) == ("made_up", "MadeUp")
    with pytest.raises(UserError) as error:
        from_config({"name": name, "width": "x"})
    assert_one_line(error, "adapter.width: expected ", " ≥ 1, got 'x'")
    assert "class" not in str(error.value)


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("", "expected one class that derives from Adapter in recast_exp.adapters.made_up, got none"),
        (f"@dataclass\nclass A(Adapter):\n{WIDTH}\n@dataclass\nclass B(Adapter):\n{WIDTH}", "got A, B"),
        (f"class MadeUp(Adapter):\n{WIDTH}", "expected recast_exp.adapters.made_up.MadeUp to be a dataclass"),
        ("@dataclass\nclass MadeUp(Adapter):\n    width: int\n", "expected a default for each option of"),
    ],
)
def test_what_a_module_has_to_hold(module: Any, source: str, expected: str) -> None:
    name = module(source)
    with pytest.raises(UserError) as error:
        from_config({"name": name})
    assert_one_line(error, "adapter.name: ", expected)


def test_an_adapter_of_another_package_goes_by_the_name_of_its_entry_point(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """And what cannot be imported is no obstacle to merging and listing."""
    elsewhere = ModuleType("somewhere.else_")
    monkeypatch.setitem(sys.modules, "somewhere", ModuleType("somewhere"))
    monkeypatch.setitem(sys.modules, "somewhere.else_", elsewhere)
    exec(f"{HEAD}@dataclass\nclass Other(Adapter):\n{WIDTH}", elsewhere.__dict__)

    def entry_points(*, group: str) -> list[importlib.metadata.EntryPoint]:
        values = {"other": "somewhere.else_", "broken": "somewhere.nowhere"}
        points = [importlib.metadata.EntryPoint(name, value, group) for name, value in values.items()]
        return points if group == "recast_exp.adapters" else []

    monkeypatch.setattr(importlib.metadata, "entry_points", entry_points)
    plugins._entry_points.cache_clear()
    try:
        assert {"other", "broken", "melo"} <= set(adapters.names())
        assert adapters.from_config({"name": "other", "width": 3}).name == "other"
        with pytest.raises(UserError) as error:
            adapters.from_config({"name": "broken"})
        assert_one_line(error, "adapter.name: the adapter broken of somewhere.nowhere cannot be imported")
        assert "broken" not in adapters.fitting(lambda: create_without_weights("cnn"))
        monkeypatch.setattr(elsewhere.Other, "inject", lambda self, network: 1 // 0)
        fitting = adapters.fitting(lambda: create_without_weights("cnn"))
        assert "clr" in fitting and "other" not in fitting
        assert "adapter: other is left out: it raises ZeroDivisionError: integer division" in caplog.text
        network = create("cnn")
        assert adapters.merge(network) is network
    finally:
        plugins._entry_points.cache_clear()
