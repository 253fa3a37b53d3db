"""`stage=sequence`: nothing is forgotten on one backbone, what is reported is what the files give, and it goes on."""

from __future__ import annotations

import csv
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import timm
import torch
from PIL import Image

from recast_exp.cli import main as cli
from recast_exp.config import sequences
from recast_exp.config.schema import Config
from recast_exp.errors import UserError
from recast_exp.experiment import accumulated, baselines, unknown_task
from recast_exp.heads import Features, Moments, Solution
from recast_exp.heads.lda import discriminants
from recast_exp.heads.ridge import regressions
from recast_exp.models.adapted import AdaptedModel
from recast_exp.models.loading import load_task
from support.helpers import assert_one_line
from support.running import run_commands, run_stage

Compose = Callable[..., Config]
FOLDERS = ("01 digits_0_3_", "02 digits_3_7_", "03 digits_7_10_")
THREE = ("stage=sequence", "dataset.part=all", "stage.splits=3", "dataset.max_per_class=12")


def read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def sequence(tiny: Compose, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path]:
    """Three tasks of the digits with all that is compared with them."""
    folder = tmp_path_factory.mktemp("sequence")
    return run_stage(tiny(*THREE, "model=vit_att", "stage.random_features=200"), folder), folder


def test_nothing_is_forgotten(sequence: tuple[dict[str, Any], Path]) -> None:
    metrics, folder = sequence
    found = read(folder / "sequence.json")
    assert found["tasks"] == ["digits[0:3]", "digits[3:7]", "digits[7:10]"]
    assert [len(row) for row in found["accuracy"]] == [1, 2, 3]
    for later, row in enumerate(found["accuracy"]):
        assert row == [found["accuracy"][task][task] for task in range(later + 1)]
    assert found["identical"] is True
    assert found["backward_transfer"] == found["methods"][0]["forgetting"] == metrics["forgetting"] == 0
    assert found["forward_transfer"] is None
    assert metrics["test/accuracy"] == pytest.approx(sum(found["accuracy"][-1]) / 3)
    assert found["parameters"] == [48, 48, 48] and len(found["seconds"]) == 3
    assert found["bytes"] == [(folder / "tasks" / name / "task.safetensors").stat().st_size for name in FOLDERS]
    with (folder / "accuracy.csv").open(newline="") as file:
        rows = list(csv.reader(file))
    assert [row[0] for row in rows] == ["after", *found["tasks"]]
    with Image.open(folder / "plots" / "sequence.png") as image:
        image.verify()


def test_the_methods_beside_it(sequence: tuple[dict[str, Any], Path]) -> None:
    metrics, folder = sequence
    found = read(folder / "sequence.json")
    methods = {row["method"]: row for row in found["methods"]}
    assert list(methods) == [
        "RECAST-Att",
        unknown_task.NEAREST,
        unknown_task.LDA_FROZEN,
        unknown_task.RANPAC,
        unknown_task.FIRST,
        baselines.JOINT,
        baselines.SEPARATE,
        baselines.FINE_TUNING,
    ]
    assert methods["RECAST-Att"]["parameters"] == 3 * 48
    assert methods[unknown_task.FIRST]["parameters"] == methods[baselines.JOINT]["parameters"] == 48
    assert methods[baselines.SEPARATE]["parameters"] == 3 * methods[baselines.FINE_TUNING]["parameters"]
    assert methods[baselines.SEPARATE]["unknown"] is None
    for name, row in methods.items():
        # With more classes to choose from, no image is classified better
        assert row["unknown"] is None or 0 <= row["unknown"] <= row["known"] <= 1, name
        assert metrics[f"{name}/test/accuracy"] == row["known"]
    assert {len(curve) for curve in found["unknown"].values()} == {3}
    for curve in found["unknown"].values():
        assert curve[0] >= curve[-1] - 0.34


def test_a_task_is_evaluated_from_its_file(
    sequence: tuple[dict[str, Any], Path], tiny: Compose, tmp_path: Path
) -> None:
    _, folder = sequence
    found = read(folder / "sequence.json")
    files = [folder / "tasks" / name / "task.safetensors" for name in FOLDERS]
    for number, file in enumerate(files):
        metrics = read(file.parent / "metrics.json")
        settings = tiny(
            "stage=evaluate", f"task={file}", "model=vit_att", "dataset.part=all", "dataset.max_per_class=12"
        )
        classes = read(file.parent / "dataset.json")["classes"]
        settings.dataset.classes = classes
        again = run_stage(settings, tmp_path / str(number))
        assert again["test/accuracy"] == found["accuracy"][-1][number] == metrics["test/accuracy"]
        assert again["test/loss"] == metrics["test/loss"]


@pytest.mark.parametrize(
    "typed",
    [
        ("model=resnet", "model.batchnorm_statistics=update"),
        ("model=vit_att", "adapter=melo"),
        ("model=vit_frozen", "adapter=melo"),
    ],
    ids=" ".join,
)
def test_nothing_is_forgotten_by_others(typed: tuple[str, ...], tiny: Compose, tmp_path: Path) -> None:
    run_stage(tiny(*THREE, *typed, "stage.splits=2", "stage.baselines=[]", "stage.unknown=false"), tmp_path)
    first, second = read(tmp_path / "sequence.json")["accuracy"]
    assert second[0] == first[0]


def test_a_task_may_start_from_earlier_ones(tiny: Compose, tmp_path: Path) -> None:
    typed = (*THREE, "model=vit_att", "stage.baselines=[]", "stage.unknown=false")
    for start in ("mean", "task"):
        run_stage(tiny(*typed, f"stage.start_from={start}"), tmp_path / start)
        found = read(tmp_path / start / "sequence.json")
        names = sorted(path.name for path in (tmp_path / start / "tasks").iterdir())
        assert len(names) == 5 and sum("from_zero" in name for name in names) == 2
        zero = [
            read(tmp_path / start / "tasks" / name / "metrics.json")["test/accuracy"]
            for name in names
            if "zero" in name
        ]
        own = [found["accuracy"][1][1], found["accuracy"][2][2]]
        assert found["forward_transfer"] == pytest.approx(sum(own) / 2 - sum(zero) / 2)


def test_tasks_are_trained_with_the_method_that_was_typed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    typed = ("stage=sequence", "method=vit_melo", "stage.baselines=[]", "stage.unknown=false", "trainer.max_epochs=1")
    small = ("model.pretrained=false", "logger=none", "dataset.shots=2", f"hydra.run.dir={tmp_path}")
    tasks = "stage.tasks=[digits[0:2],digits[2:5]]"
    assert cli.run([*typed, *small, tasks]) == 0
    counts = read(next((tmp_path / "tasks").glob("01*")) / "parameters.json")
    assert counts["coefficients"] == 0 and counts["adapter"] > 0
    before = (tmp_path / "sequence.json").read_bytes()
    for changed in (
        (tasks.replace("[0:2]", "[0:3]"),),
        (tasks, "optimizer.adapter_lr=0.5"),
        ("stage.splits=2",),
    ):
        assert cli.run([*typed, *small, *changed]) == 2
        assert "was started with" in capsys.readouterr().err
    assert (tmp_path / "sequence.json").read_bytes() == before


def test_a_finished_sequence_is_not_trained_again(
    sequence: tuple[dict[str, Any], Path], tiny: Compose, monkeypatch: pytest.MonkeyPatch
) -> None:
    metrics, folder = sequence

    def trained(*_: Any) -> None:
        raise AssertionError("trained again")

    monkeypatch.setattr("recast_exp.experiment.sequence.adapt", trained)
    monkeypatch.setattr("recast_exp.experiment.baselines.adapt", trained)
    assert run_stage(tiny(*THREE, "model=vit_att", "stage.random_features=200"), folder) == metrics


@pytest.mark.slow
def test_a_killed_sequence_goes_on(tmp_path: Path, weights: dict[str, Path]) -> None:
    command = [*THREE, "trainer.max_epochs=4", "probe=false", "stage.baselines=[]"]
    command += ["stage.unknown=false", f"model.weights={weights['digits_vit']}", "trainer.accelerator=cpu"]

    def matrix(folder: Path) -> Any:
        return read(folder / "sequence.json")["accuracy"]

    whole, killed = tmp_path / "whole", tmp_path / "killed"
    started = [sys.executable, "-m", "recast_exp", *command, f"hydra.run.dir={killed}"]
    process = subprocess.Popen(started, start_new_session=True)
    second = killed / "tasks" / "02 digits_3_7_" / "checkpoints" / "last.ckpt"
    end = time.monotonic() + 120
    while not second.is_file() and time.monotonic() < end:
        time.sleep(0.05)
    time.sleep(0.5 * random.random())
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert not (killed / "sequence.json").is_file()
    before = (killed / "tasks" / "01 digits_0_3_" / "task.safetensors").stat().st_mtime_ns
    run_commands(*([*command, f"hydra.run.dir={folder}"] for folder in (killed, whole)))
    assert matrix(killed) == matrix(whole)
    assert (killed / "tasks" / "01 digits_0_3_" / "task.safetensors").stat().st_mtime_ns == before


# Parts


def features(seed: int, classes: int, count: int = 60) -> Features:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % classes
    centres = 3 * torch.randn(classes, 8, generator=generator)
    return Features(centres[labels] + torch.randn(count, 8, generator=generator), labels, classes)


def test_joint_heads_are_exact_and_know_no_order() -> None:
    first, second = features(0, 2), features(1, 3)
    both = Features(torch.cat([first.values, second.values]), torch.cat([first.labels, second.labels + 2]), 5)
    for solve, strengths in ((discriminants, [0.1]), (regressions, [0.1])):
        (whole,) = solve(both.moments, strengths)
        (joined,) = solve(Moments.joined([first.moments, second.moments]), strengths)
        (turned,) = solve(Moments.joined([second.moments, first.moments]), strengths)
        torch.testing.assert_close(joined.weight, whole.weight)
        torch.testing.assert_close(joined.bias, whole.bias)
        torch.testing.assert_close(turned.weight.roll(2, 0), joined.weight)


def test_scores() -> None:
    # Two tasks of two classes; an image in a row
    logits = [torch.tensor([[2.0, 1, 3, 0], [0, 1, 0, 0]]), torch.tensor([[0.0, 0, 0, 1], [5, 0, 4, 1]])]
    found = unknown_task.score(logits, [torch.tensor([0, 1]), torch.tensor([1, 0])], [2, 2])
    assert (found.known, found.unknown) == (1.0, 0.5)
    assert found.per_task == [1.0, 1.0]


def test_forgetting() -> None:
    assert baselines.forgetting([[0.9], [0.6, 0.8], [0.7, 0.5, 1.0]]) == pytest.approx((0.2 + 0.3) / 2)
    assert baselines.forgetting([[0.9]]) == 0


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("flowers", ("flowers", slice(None, None), ())),
        ("cub[0:50]", ("cub", slice(0, 50), ())),
        (" cub[50:] dataset.shots=5 seed=1", ("cub", slice(50, None), ("dataset.shots=5", "seed=1"))),
        ("folder 'dataset.path=my birds'", ("folder", slice(None, None), ("dataset.path=my birds",))),
    ],
)
def test_how_a_task_is_written(text: str, expected: tuple[Any, ...]) -> None:
    assert sequences.parse(text) == expected


@pytest.mark.parametrize("text", ["", "cub[3]", "cub[0:5", "cub dataset.shots", "cub 'a=b", "a/b"])
def test_what_is_no_task(text: str) -> None:
    with pytest.raises(UserError) as error:
        sequences.parse(text)
    assert_one_line(error, "stage.tasks: expected a dataset such as", repr(text))


@pytest.mark.parametrize(
    ("typed", "message"),
    [
        ((), "stage.tasks: expected at least two tasks, or stage.splits"),
        (("stage.tasks=[digits,digits]", "stage.splits=2"), "stage.splits: expected null with several stage.tasks"),
        (("stage.splits=2", "stage.baselines=[all]"), "stage.baselines: expected some of lae, separate"),
        (("stage.tasks=[digits,'digits resume=x']",), "got 'resume=x', which is the whole command's"),
        (("stage.tasks=[digits,'digits stage=report']",), "got 'stage=report', which is the whole command's"),
        (("stage.splits=2", "model=vit_full"), "model.method: expected recast or frozen"),
        (("stage.splits=2", "model=vit_frozen", "stage.start_from=mean"), "stage.start_from: expected zero"),
        (
            ("stage.splits=2", "trainer=ddp", "trainer.devices=2"),
            "trainer.devices: expected 1 with stage=sequence, got 2",
        ),
    ],
)
def test_refusals(typed: tuple[str, ...], message: str, compose: Compose) -> None:
    with pytest.raises(UserError) as error:
        compose("stage=sequence", *typed)
    assert_one_line(error, message)


def test_too_many_splits_and_too_few_classes(tiny: Compose, tmp_path: Path) -> None:
    for typed, message in (
        (("stage.splits=3",), "stage.splits: expected at most 2 for 5 classes, got 3"),
        (("stage.tasks=['digits[0:1]',digits]",), "expected at least two of its 5 classes, got 1"),
    ):
        settings = tiny("stage=sequence", "model=vit_att", *typed)
        with pytest.raises(UserError) as error:
            run_stage(settings, tmp_path, typed=("model=vit_att",))
        assert_one_line(error, "stage.tasks: digits", message)


@pytest.mark.parametrize("method", [["model=vit_att"], ["model=vit_frozen", "adapter=melo"]], ids=["recast", "melo"])
def test_one_set_of_parameters_for_all_tasks(tiny: Compose, tmp_path: Path, method: list[str]) -> None:
    typed = (*THREE, *method, "stage.splits=2", "stage.baselines=[lae]")
    run_stage(tiny(*typed), tmp_path)
    own, *others = read(tmp_path / "sequence.json")["methods"]
    lae = next(row for row in others if row["method"].endswith(", LAE"))
    # Those of the method grow with the tasks; these are the online and the offline ones, however many tasks there are
    assert lae["parameters"] == own["parameters"]
    assert 0 <= lae["unknown"] <= lae["known"] <= 1
    folders = [tmp_path / "tasks" / name for name in sorted(path.name for path in (tmp_path / "tasks").glob("* lae"))]
    assert len(folders) == 2
    first, second = (load_task(folder / "task.safetensors") for folder in folders)
    # The first task is trained as it is without; the second one starts where that has ended
    first_alone = next(path for path in (tmp_path / "tasks").glob("01*") if "lae" not in path.name)
    alone = load_task(first_alone / "task.safetensors")
    moved = [name for name in alone.tensors if not name.startswith("head/")]
    assert moved
    assert all(torch.equal(first.tensors[name], alone.tensors[name]) for name in moved)
    second_alone = next(path for path in (tmp_path / "tasks").glob("02*") if "lae" not in path.name)
    again = load_task(second_alone / "task.safetensors")
    assert any(not torch.equal(second.tensors[name], again.tensors[name]) for name in moved)


def test_the_parameters_that_accumulate() -> None:
    network = timm.create_model("vit_tiny_patch16_224", num_classes=3, img_size=32, depth=1, embed_dim=24, num_heads=2)
    adapted = AdaptedModel(network, {"head": {"head.weight": "head.weight"}, "adapter": {"norm.bias": "norm.bias"}})
    found = accumulated.shared_tensors(adapted)
    assert list(found) == ["adapter/norm.bias"]
    network.get_parameter("norm.bias").data.add_(1)
    assert not torch.equal(found["adapter/norm.bias"], network.get_parameter("norm.bias"))  # a copy


def test_a_known_task_is_told_by_its_own_classes_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """However large the logits of other heads are: their probabilities would leave nothing of its own."""
    network = timm.create_model("vit_tiny_patch16_224", num_classes=2, img_size=32, depth=1, embed_dim=24, num_heads=2)
    adapted = AdaptedModel(network, {"head": {"head.weight": "head.weight"}})
    values, labels = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.5, 1.0]]), torch.tensor([0, 1, 1])
    monkeypatch.setattr(accumulated, "extract", lambda *_: Features(values, labels, 2))
    plain = torch.eye(2, dtype=torch.float64)
    solutions = [Solution(plain, torch.zeros(2)), Solution(10_000 * plain, torch.full((2,), 10_000.0))]
    part: Any = SimpleNamespace(recipe=None, images=SimpleNamespace(classes=("a", "b")), data=lambda **_: None)
    known, unknown = accumulated._tested(adapted, [{}, {}], solutions, [part, part])
    assert known == [1.0, 1.0]
    assert unknown == 0.5  # the second head takes all images


def test_tasks_of_other_arguments_are_refused_before_one_trains(tiny: Compose, tmp_path: Path) -> None:
    tasks = 'stage.tasks=["digits[0:2]","digits[2:4] model.arguments.num_heads=2"]'
    settings = tiny("stage=sequence", tasks, "model=vit_att", "stage.baselines=[]", "stage.unknown=false")
    with pytest.raises(UserError) as error:
        run_stage(settings, tmp_path)
    assert_one_line(error, "stage.tasks: expected tasks on one backbone, got model.arguments={'num_heads': 2}")
    assert not list(tmp_path.rglob("task.safetensors"))
