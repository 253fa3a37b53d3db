"""The page of `make bench`: its figures say what was measured, and every script and option that it runs is there."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def measuring(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("measuring")


@pytest.fixture
def page(measuring: ModuleType) -> ModuleType:
    return importlib.import_module("page")


@pytest.mark.parametrize(
    ("values", "bounds", "verdict"),
    [
        ([0.7, 0.7, 0.7], {"at_most": 0.8}, "met"),
        ([0.9, 0.9, 0.9], {"at_most": 0.8}, "not met"),
        ([0.7, 0.7, 0.9, 0.9, 0.9], {"at_most": 0.8}, "not met?"),
        ([0.7, 0.7, 0.7, 0.9, 0.9], {"at_most": 0.8}, "met?"),
        ([25.0], {"at_least": 20.0}, "met"),
        ([1.01], {"at_least": 0.98, "at_most": 1.02}, "met"),
        ([0.97], {"at_least": 0.98, "at_most": 1.02}, "not met"),
        ([1.0], {}, ""),
    ],
)
def test_verdicts(measuring: ModuleType, values: list[float], bounds: dict[str, float], verdict: str) -> None:
    assert measuring.Figure("a / b", measuring.Spread.of(values), **bounds).verdict == verdict


def test_ratios_are_taken_within_rounds(measuring: ModuleType) -> None:
    times = measuring.Times({"a": [1.0, 4.0, 2.0], "b": [2.0, 2.0, 4.0]}, {"a": [1.0] * 3, "b": [1.0] * 3})
    assert times.ratio("a", "b") == measuring.Spread(0.5, 0.5, 2.0, (0.5, 1.25))


def test_peak_memory_is_that_of_the_largest_moment(measuring: ModuleType) -> None:
    def run() -> None:
        held = torch.ones(50_000_000)  # 200 MB
        other = torch.ones(25_000_000)  # 100 MB
        del held
        torch.ones(25_000_000)
        del other

    peak = measuring.peak_memory(run)
    if peak is None:
        pytest.skip("the memory of a process cannot be told here")
    assert peak == pytest.approx(300, rel=0.15)


def test_the_page(measuring: ModuleType, page: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    times = measuring.Times({"a": [1.0, 1.0], "b": [2.0, 2.0]}, {"a": [1.0, 1.0], "b": [2.0, 2.0]})
    figures = [
        measuring.Figure("b / a", times.ratio("b", "a"), at_most=1.5, limit=1),
        measuring.Figure("b", times.spread("b"), "s", at_most=3),
        measuring.Figure("slow / fast", measuring.Spread.of([400.0])),
    ]
    part = measuring.Report("letters", times, "a", figures, notes=["a note"])
    monkeypatch.setattr(sys, "argv", ["letters.py", "--rounds", "2", "--json", "somewhere"])
    measuring.write(tmp_path / "letters.json", "letters", part)
    content = json.loads((tmp_path / "letters.json").read_text(encoding="utf-8"))
    assert content["command"] == "python benchmarks/letters.py --rounds 2"
    whole = {"date": "2026-11-28", "minutes": 3.2, "benchmarks": [content]}
    text = page.markdown(whole)
    assert "1 of 2 targets are met" in text
    assert "| b / a | 2.000 | 2.000 - 2.000 | 1.000 | ≤ 1.500 | not met |" in text
    assert "| b | 2.00 s | 2.00 s - 2.00 s |  | ≤ 3.00 s | met |" in text
    assert "| a | 1.00 s |" in text
    page.plot(whole, tmp_path / "bench.svg")
    drawn = (tmp_path / "bench.svg").read_text(encoding="utf-8")
    assert drawn.startswith("<?xml")
    assert (tmp_path / "bench.png").stat().st_size > 10_000


def test_scripts_know_the_options_that_the_page_gives_them(
    page: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, options in [*page.RUNS.items(), *page.ON_GPU.items()]:
        script = name.partition(",")[0]
        monkeypatch.setattr(sys, "argv", [f"{script}.py", *options, "--help"])
        with pytest.raises(SystemExit) as ended:
            importlib.import_module(script).main()
        known = capsys.readouterr().out
        assert ended.value.code == 0
        assert all(option in known for option in options if option.startswith("--"))


def test_a_script_writes_what_the_page_shows(page: ModuleType, tmp_path: Path) -> None:
    content = page.measure("startup", ["--rounds", "1"], tmp_path)
    assert page.figures(content)[0]["name"] == "start-up: --help"
    assert page.markdown({"date": "", "minutes": 1, "benchmarks": [content]}).count("\n## start-up") == 1
    assert list(tmp_path.iterdir()) == []


def test_what_a_training_step_is_compared_with(measuring: ModuleType) -> None:
    script = importlib.import_module("training_step")
    model = torch.nn.Sequential(torch.nn.Linear(10, 10), torch.nn.Linear(10, 10))
    model[0].requires_grad_(False)
    assert script.resident(model) == pytest.approx(4 * (110 + 3 * 110) / 1e6)
    times = measuring.Times({"step": [2.0], script.PRODUCT: [1.0]}, {"step": [2.0], script.PRODUCT: [1.0]})
    assert script.shares(times, {"step": 10.0}, 20.0)["step"].median == 0.25  # 5 of 20 GFLOP/s
    full = sum(script.necessary(frozenset({"patch_embed", "qkv", "proj", "fc1", "fc2"})).values())
    assert sum(script.necessary(frozenset({"qkv"})).values()) / full == pytest.approx(0.761, abs=1e-3)
