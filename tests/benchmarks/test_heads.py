"""`benchmarks/heads.py`: each of its parts runs, on real code paths, and measures what it says."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch

from recast_exp.config.schema import Config
from recast_exp.heads import Features, Head, load


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    return importlib.import_module("heads")


def test_both_probes_compute_anew_each_time(script: ModuleType, tiny: Callable[..., Config], tmp_path: Path) -> None:
    probes = script.Probes(tiny("model=vit_frozen", "dataset.max_per_class=8"), tmp_path)
    images = {split: len(samples.labels) for split, samples in probes.experiment.images.splits.items()}
    times = script.probe_times(probes, rounds=2)
    for parts in (times.seconds, times.processor):
        both = zip(parts[script.FORWARD], parts[script.SOLVE], strict=True)
        assert parts[script.SOLVED] == pytest.approx([forward + solve for forward, solve in both])
        assert len(parts[script.TRAINED]) == 2
    assert set(probes.accuracy) == {script.SOLVED, script.TRAINED}
    assert probes.passed[script.FORWARD] == sum(images.values())  # of the last round: nothing came from a cache
    batches = 2 * (2 * 8 + min(2 * 16, images["val"])) + min(2 * 16, images["test"])  # of TINY
    assert probes.passed[script.TRAINED] == batches


@pytest.mark.parametrize("name", ["nearest_mean", "lda", "ridge", "logistic"])
def test_a_head_is_solved_for_all_its_strengths(script: ModuleType, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    head, features = load(name)(), script.synthetic((40, 6, 3))
    assert features.values.shape == (40, 6)
    assert features.labels.unique().tolist() == [0, 1, 2]
    solved: list[tuple[Features, Head]] = []
    solve = type(head).solve

    def counted(self: Head, given: Features, settings: object) -> object:
        for solution in solve(self, given, settings):  # type: ignore[arg-type]
            solved.append((given, self))
            yield solution

    monkeypatch.setattr(type(head), "solve", counted)
    run = script.solver(head, features)
    run()
    run()
    assert len(solved) == 2 * len(head.settings())
    assert solved[0][0] is not solved[-1][0]  # the sums over images are computed each time
    peak = script.peak_memory(run)
    assert peak is None or peak < 1000


def test_a_step_trains_what_its_objective_trains(
    script: ModuleType, tiny: Callable[..., Config], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[script.TaskModule] = []

    class Kept(script.TaskModule):  # type: ignore[misc, name-defined]
        def __init__(self, *args: object) -> None:
            super().__init__(*args)
            made.append(self)

    monkeypatch.setattr(script, "TaskModule", Kept)
    for name, more in script.STEPS.items():
        step = script.make_step(tiny("model=vit_att", "dataset.max_per_class=8", *more), 24, tmp_path)
        adapted = made[-1].adapted
        before = {key: tensor.clone() for key, tensor in adapted.task_tensors().items()}
        step()
        moved = {
            key.partition("/")[0] for key, old in before.items() if not torch.equal(old, adapted.task_tensors()[key])
        }
        assert moved == ({"coefficients", "head"} if name == script.JOINT else {"coefficients"})


@pytest.mark.slow
def test_the_whole_benchmark(
    script: ModuleType, weights: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "heads.json"
    overrides = [
        f"model.weights={weights['digits_vit']}",
        "dataset.max_per_class=8",
        "trainer.max_epochs=1",
        "trainer.num_threads=1",
    ]
    monkeypatch.setattr(script, "SMALL", [(40, 6, 3)])
    monkeypatch.setattr(
        sys, "argv", ["heads.py", *overrides, "--rounds", "1", "--batch-size", "16", "--json", str(file)]
    )
    script.main()
    probe, heads, step = json.loads(file.read_text(encoding="utf-8"))["parts"]
    assert list(probe["cases"]) == [script.FORWARD, script.SOLVE, script.SOLVED, script.TRAINED]
    assert list(heads["cases"]) == list(script.HEADS)
    assert list(step["cases"]) == list(script.STEPS)
    assert heads["cases"][heads["baseline"]]["median"] == min(case["median"] for case in heads["cases"].values())
