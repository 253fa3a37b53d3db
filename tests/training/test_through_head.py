"""Training through a solved head: the splits, the steps, and whole runs."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from recast_exp.cli import main as cli
from recast_exp.data.episodes import Episodes, EpisodeSampler
from recast_exp.data.loader import EpochSampler
from recast_exp.errors import UserError
from recast_exp.experiment.heads import finish_head
from recast_exp.heads import Features
from recast_exp.heads.lda import LDA
from recast_exp.models.features import tapped
from recast_exp.training.features import extract
from recast_exp.training.loop import fit
from recast_exp.training.module import TaskModule
from recast_exp.training.objectives.through_head import ThroughHead, supports
from recast_exp.training.recipe import Recipe
from support.running import run_commands, run_stage

QUICK = (
    "trainer.accelerator=cpu",
    "trainer.max_epochs=2",
    "dataset.max_per_class=12",
    "probe=false",
    "training=through_head",
    "training.splits=2",
    "head=ridge",
)


# Splits and episodes


@pytest.mark.parametrize("share", [0.5, 0.3])
def test_each_class_has_its_share_of_the_support(share: float) -> None:
    labels = torch.tensor([0] * 10 + [1] * 4 + [2] * 2 + [3])
    masks = list(supports(labels[torch.randperm(17)], 5, share, seed=0))
    assert len(masks) == 5
    assert len({tuple(mask.tolist()) for mask in masks}) > 1
    labels = torch.tensor([0] * 10 + [1] * 4 + [2] * 2 + [3])
    for mask in supports(labels, 5, share, seed=0):
        counts = torch.bincount(labels[mask], minlength=4).tolist()
        assert counts == [round(10 * share), round(4 * share), 1, 1]
    again = list(supports(labels, 5, share, seed=0))
    assert all(torch.equal(one, other) for one, other in zip(supports(labels, 5, share, seed=0), again, strict=True))


def test_a_small_set_is_taken_whole() -> None:
    sampler = EpisodeSampler(EpochSampler(10, 0), torch.arange(10) % 3, Episodes(10, 2), seed=0)
    assert list(sampler) == [[(0, row) for row in range(10)]]
    assert len(sampler) == 1
    assert sampler.share(0).total == 10


def test_episodes_have_as_many_images_of_each_of_their_classes() -> None:
    labels = torch.arange(100) % 20
    epochs = EpochSampler(100, 0)
    sampler = EpisodeSampler(epochs, labels, Episodes(images=24, classes=6), seed=0)
    batches = list(sampler)
    assert len(batches) == len(sampler) == math.ceil(100 / 24)
    for number, batch in enumerate(batches):
        rows = [row for _, row in batch]
        assert len(set(rows)) == len(rows) == sampler.share(number).total
        assert sorted(torch.bincount(labels[rows], minlength=20).tolist())[-7:] == [0] + [4] * 6
    assert list(sampler) == batches
    epochs.set_epoch(1)
    assert list(sampler) != batches


@pytest.mark.parametrize(("images", "per_class", "classes"), [(8, None, 4), (12, 4, 3), (9, 4, 2), (5, 4, 2)])
def test_a_step_has_fewer_classes_rather_than_more_images(images: int, per_class: int | None, classes: int) -> None:
    labels = torch.arange(200) % 20
    sampler = EpisodeSampler(EpochSampler(200, 0), labels, Episodes(images, 16, per_class), seed=0)
    for batch in sampler:
        found = torch.bincount(labels[[row for _, row in batch]], minlength=20)
        assert found[found > 0].tolist() == [per_class or 2] * classes


def test_a_class_of_one_image_is_not_asked_for() -> None:
    """Where nothing is left to ask for, a step would have no loss."""
    labels = torch.cat([torch.arange(40), torch.tensor([0, 0, 1])])
    sampler = EpisodeSampler(EpochSampler(43, 0), labels, Episodes(images=16, classes=4), seed=0)
    assert all({int(labels[row]) for _, row in episode} == {0, 1} for episode in sampler)


def test_a_class_with_fewer_images_brings_what_it_has() -> None:
    labels = torch.tensor([0] * 30 + [1] * 2)
    sampler = EpisodeSampler(EpochSampler(32, 0), labels, Episodes(images=16, classes=4), seed=0)
    for batch in sampler:
        assert torch.bincount(labels[[row for _, row in batch]]).tolist() == [8, 2]


# Steps


@pytest.fixture
def module(build: Any) -> TaskModule:
    run = build("model=vit_att", *QUICK)
    run.adapted.set_trainable(*ThroughHead.trains)
    return TaskModule(run.adapted, run.recipe, 5, run.data)


def batch(module: TaskModule) -> tuple[Tensor, Tensor]:
    assert module._data is not None
    images, labels = module._data.example(40)
    return module._data.normalize(images), labels


@pytest.mark.parametrize("measured", ["splits", "leave_one_out"])
def test_the_gradient_of_a_step_is_that_of_finite_differences(build: Any, measured: str) -> None:
    run = build("model=vit_att", *QUICK, f"training.measured={measured}")
    run.adapted.set_trainable(*ThroughHead.trains)
    run.adapted.network.double()
    module = TaskModule(run.adapted, run.recipe, 5, run.data)
    images, labels = batch(module)
    images = images.double()

    def loss() -> Tensor:
        # In the float64 of the solve: the step itself ends in float32
        step = run.recipe.objective.step(module, images, labels, 0)
        return step.loss

    (name, coefficients), *_ = run.adapted.parameters("coefficients")
    loss().backward()
    assert coefficients.grad is not None
    at = int(coefficients.grad.abs().argmax())
    slope = coefficients.grad.flatten()[at].item()
    width = 1e-3
    with torch.no_grad():
        values = []
        for shift in (width, -2 * width):
            coefficients.view(-1)[at] += shift
            values.append(loss().item())
    assert (values[0] - values[1]) / (2 * width) == pytest.approx(slope, rel=0.05), name


def test_penalty_and_scale_have_gradients_and_the_head_has_none(module: TaskModule) -> None:
    step = module.objective.step(module, *batch(module), 0)
    step.loss.backward()
    assert module.objective_state is not None
    for parameter in module.objective_state.parameters():
        assert parameter.grad is not None
        assert parameter.grad.abs() > 0
    assert all(parameter.grad is None for _, parameter in module.adapted.parameters("head"))
    assert step.logits.shape == (len(step.labels), 5)


def test_absent_classes_are_never_predicted(module: TaskModule) -> None:
    images, labels = batch(module)
    kept = labels != 2
    step = module.objective.step(module, images[kept], labels[kept], 0)
    assert torch.isfinite(step.loss)
    assert 2 not in step.logits.argmax(1).tolist()
    assert set(step.labels.tolist()) <= {0, 1, 3, 4}


# Runs


def test_a_run_trains_coefficients_and_ends_with_the_chosen_head(tiny: Any, tmp_path: Path) -> None:
    metrics = run_stage(tiny("model=vit_att", *QUICK), tmp_path)
    assert metrics["head"].startswith("ridge strength=")
    assert metrics["coefficients/change"] > 0
    assert metrics["head/temperature"] > 0
    rows = (tmp_path / "metrics.csv").read_text().splitlines()
    assert "train/loss" in rows[0]
    assert "lr/objective" in rows[0]
    assert "lr/head" not in rows[0]


def test_the_head_of_an_epoch_is_solved_for_the_features_that_evaluation_sees(
    build: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So the validation accuracy of each epoch is that of the model as it is then."""
    seen = []
    original = TaskModule.training_features

    def note(self: TaskModule) -> Features:
        seen.append(original(self))
        return seen[-1]

    monkeypatch.setattr(TaskModule, "training_features", note)
    run = build("model=vit_att", *QUICK, "trainer.limit_batches=null")
    result = fit(run.recipe, run.adapted, run.data)
    assert len(seen) == 2
    expected = extract(run.recipe, run.adapted.network, run.data, "train")
    torch.testing.assert_close(seen[-1].values, expected.values)
    assert torch.equal(seen[-1].labels, expected.labels)
    assert result.history[-1]["val/accuracy"] > 0.6  # the frozen features alone have 0.8


def test_views_of_an_image_differ_and_are_those_of_the_epochs(build: Any) -> None:
    run = build("model=vit_frozen", "dataset.max_per_class=4", "head=lda")
    size = len(run.data.datasets["train"])
    values = extract(run.recipe, run.adapted.network, run.data, "train", views=2).values
    assert len(values) == 3 * size
    plain, first, second = values.split(size)
    assert not torch.allclose(plain, first)
    assert not torch.allclose(first, second)
    images, _ = run.data.datasets["train"].batch([(1, row) for row in range(size)], alter=True)[:2]
    with torch.no_grad(), tapped(run.adapted.network.eval()) as tap:
        run.adapted.network(run.data.normalize(images))
        torch.testing.assert_close(tap.take(), second, rtol=1e-3, atol=1e-4)


def test_the_task_file_holds_the_solved_head(build: Any) -> None:
    run = build("model=vit_frozen", "dataset.max_per_class=12", "head=lda")
    head = LDA(calibrate=False)
    finished = finish_head(run.recipe, run.adapted, run.data, head)
    assert finished.changed
    features = extract(run.recipe, run.adapted.network, run.data, "train")
    ((_, weight), _) = run.adapted.parameters("head")
    assert weight.shape == (5, features.width)
    logits = features.values @ weight.T
    images, _labels = run.data.datasets["plain"].batch([(0, row) for row in range(8)], alter=True)[:2]
    with torch.no_grad():
        computed = run.adapted.network.eval()(run.data.normalize(images))
    ((_, _), (_, bias)) = run.adapted.parameters("head")
    torch.testing.assert_close(computed, logits[:8] + bias, rtol=1e-3, atol=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        ("model=vit_att_mlp", "adapter=melo"),
        ("model=resnet", "adapter=clr"),
        ("model=vit_frozen", "adapter=bitfit"),
        ("model=vit_frozen", "adapter=peft"),
        ("model=vit_full",),
        ("model=vit_att", "trainer.precision=bf16-mixed"),
        ("model=vit_att", "training.images=20", "training.classes=2"),
        ("model=vit_att", "training.images=60", "training.shots=30", "training.queries=30"),  # the set is taken whole
        ("model=vit_att", "training.measured=leave_one_out"),
        ("model=vit_att", "training.shots=2", "training.queries=1", "training.images=15", "head.views=1"),
        ("model=vit_att", "head=best", "head.refit=train_val", "head.class_weight=balanced"),
    ],
    ids=" ".join,
)
def test_everything_trains_through_the_head(tiny: Any, tmp_path: Path, options: tuple[str, ...]) -> None:
    metrics = run_stage(tiny(*QUICK, *options), tmp_path)
    assert 0 <= metrics["test/accuracy"] <= 1
    assert math.isfinite(metrics["val/loss"])
    assert math.isfinite(metrics["test/calibration_error"])


@pytest.mark.parametrize("key", ["optimizer.coefficients_weight_decay", "optimizer.coefficients_lr"])
def test_a_run_that_diverges_in_its_last_step_says_so(build: Any, key: str) -> None:
    """No loss is measured after it: the head is solved on features that are not finite."""
    run = build(*QUICK, "model=vit_att", "trainer.max_epochs=1", "trainer.limit_batches=1", f"{key}=1e30")
    with pytest.raises(UserError, match=r"^optimizer\.lr: training diverged, the features of .* in epoch 1; lower "):
        fit(run.recipe, run.adapted, run.data)


@pytest.mark.parametrize(
    "options",
    [
        ("training=through_head",),
        ("training=through_head", "training.images=20"),  # several steps in an epoch
        ("training=through_head", "training.images=20", "training.measured=leave_one_out"),
        ("training=alternating",),
    ],
    ids=" ".join,
)
def test_a_diverged_run_says_so(build: Any, options: tuple[str, ...]) -> None:
    quick = (option for option in QUICK if not option.startswith("training"))
    run = build("model=vit_att", *quick, *options, "optimizer.coefficients_lr=1e30")
    with pytest.raises(UserError, match=r"^optimizer\.lr: training diverged, .* in epoch 1; lower optimizer\.lr, "):
        fit(run.recipe, run.adapted, run.data)


def test_features_of_broken_weights_are_no_divergence(build: Any) -> None:
    run = build("model=vit_att", *QUICK)
    run.adapted.network.get_parameter("norm.bias").data.fill_(math.inf)
    with pytest.raises(UserError, match=r"^features: expected finite numbers, .*; check the weights of the backbone$"):
        fit(run.recipe, run.adapted, run.data)


@pytest.mark.parametrize("model", ["vit_frozen", "vit_att"])
def test_a_head_that_has_seen_the_validation_images_is_not_measured_on_them(
    tiny: Any, tmp_path: Path, model: str
) -> None:
    typed = (f"model={model}", "head.shrinkages=[0.1]", "head.ledoit_wolf=false")
    first, second = (
        run_stage(tiny(*QUICK, "head=lda", f"head.refit={refit}", *typed), tmp_path / refit)
        for refit in ("train", "train_val")
    )
    assert {name: value for name, value in first.items() if name.startswith("val/")} == {
        name: value for name, value in second.items() if name.startswith("val/")
    }
    assert first["test/loss"] != second["test/loss"]
    heads = (load_file(tmp_path / refit / "task.safetensors")["head/head.weight"] for refit in ("train", "train_val"))
    assert not torch.equal(*heads)


@pytest.mark.slow
@pytest.mark.parametrize(
    "options", [("training.splits=2",), ("training=alternating",), ("training=lp_ft", "head=linear")], ids=" ".join
)
def test_an_interrupted_run_goes_on_bit_for_bit(tmp_path: Path, options: tuple[str, ...]) -> None:
    quick = [option for option in QUICK if not option.startswith("training.")]
    command = [*quick, *options, "trainer.max_epochs=4"]
    code = (
        "import os, sys\n"
        "from recast_exp.training.history import History\n"
        "end = History.on_train_epoch_end\n"
        "def stop(self, trainer, module):\n"
        "    if trainer.current_epoch == 2: os._exit(9)\n"
        "    end(self, trainer, module)\n"
        "History.on_train_epoch_end = stop\n"
        "from recast_exp.cli.main import run\n"
        "run(sys.argv[1:])\n"
    )
    killed = [sys.executable, "-c", code, *command, f"hydra.run.dir={tmp_path}/killed"]
    assert subprocess.run(killed, timeout=200, check=False).returncode == 9
    run_commands([f"resume={tmp_path}/killed"], [*command, f"hydra.run.dir={tmp_path}/whole"])
    one, other = (load_file(tmp_path / name / "task.safetensors") for name in ("whole", "killed"))
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert torch.equal(tensor, other[name]), name
    first, second = (json.loads((tmp_path / name / "metrics.json").read_text()) for name in ("whole", "killed"))
    for name in {"test/accuracy", "test/loss", "val/loss", "head", "head/temperature"} & (first.keys() | second.keys()):
        assert first[name] == second[name]


@pytest.mark.parametrize(
    ("typed", "expected"),
    [
        (("head=linear",), "head: expected one that is solved with training=through_head, such as best, got linear"),
        (("trainer.head_first_epochs=1",), "trainer.head_first_epochs: expected 0 with training=through_head"),
        (
            ("training.images=30", "training.shots=10", "training.queries=6"),
            "training.images: expected at least 32, which two classes have with training.shots + training.queries = 16",
        ),
        (("trainer=ddp", "trainer.devices=2"), "training: expected joint with trainer.devices=2, got through_head"),
        (("training.splits=0",), "training.splits: expected an integer ≥ 1 and ≤ 1000, got 0"),
        (("training.split=2",), "training.split: unknown option, training=through_head takes"),
        (
            ("model=recast", "model.backbone=deit_tiny_distilled_patch16_224", "model.pretrained=false"),
            "model.backbone: expected a model with one linear classifier for a solved head, got 2",
        ),
        (("head.strength=1",), "head.strength: unknown option, head=ridge takes"),
        (("head.refit=test",), "head.refit: expected one of train, train_val, got 'test'"),
        (("head=svm",), "head: expected one of best, lda, linear, logistic, nearest_mean, ridge, got 'svm'"),
        (("training=bilevel",), "training: expected one of alternating, joint, lp_ft, through_head, got 'bilevel'"),
    ],
)
def test_wrong_requests_are_one_line(
    typed: tuple[str, ...], expected: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.run([*QUICK, *typed, f"hydra.run.dir={tmp_path}/run"]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"error: {expected}")
    assert said.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_a_model_without_one_linear_classifier_is_refused(build: Any) -> None:
    run = build("model=vit_frozen", "dataset.max_per_class=4", "head=lda")
    run.adapted.network.head = torch.nn.Sequential(torch.nn.Linear(96, 5))
    with pytest.raises(
        UserError, match=r"^model.backbone: expected a model with one linear classifier .* got a Sequential"
    ):
        extract(run.recipe, run.adapted.network, run.data, "train")


def test_extracting_features_changes_no_generator_and_no_network(build: Any) -> None:
    run = build("model=vit_frozen", "dataset.max_per_class=4")
    recipe: Recipe = run.recipe
    torch.manual_seed(5)
    before = torch.get_rng_state()
    state = {name: tensor.clone() for name, tensor in run.adapted.network.state_dict().items()}
    first = extract(recipe, run.adapted.network, run.data, "train")
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(first.values, extract(recipe, run.adapted.network, run.data, "train").values)
    assert all(torch.equal(tensor, state[name]) for name, tensor in run.adapted.network.state_dict().items())
