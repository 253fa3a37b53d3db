"""Training changes what it declares and nothing else, follows its recipe, and continues to the bit after a stop."""

from __future__ import annotations

import csv
import json
import math
import os
import pickle
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import cache, partialmethod
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from recast_exp.adapters import NoAdapter
from recast_exp.config.schema import Config, ModelConfig, OptimizerConfig, SchedulerConfig, TrainerConfig
from recast_exp.data.loader import derive_seed
from recast_exp.errors import UserError
from recast_exp.files import write_json
from recast_exp.models.adapted import assemble, normalisations_with_statistics, running_statistics
from recast_exp.models.check import check_single_images
from recast_exp.models.count import count
from recast_exp.training.loop import FitResult, fit
from recast_exp.training.loop import test as measure
from recast_exp.training.module import TaskModule
from recast_exp.training.optim import make_optimizer
from recast_exp.training.recipe import Recipe
from recast_exp.training.trainer import quiet
from support.running import run_stage

Build = Callable[..., Any]
Trained = tuple[FitResult, dict[str, Tensor]]
TIMES = ("seconds", "images_per_second")


@pytest.fixture(autouse=True)
def without_hints() -> Iterator[None]:
    with quiet():
        yield


def snapshot(network: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in network.state_dict().items()}


def equal(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def without_times(rows: list[dict[str, float]]) -> list[dict[str, float]]:
    return [{name: value for name, value in row.items() if name not in TIMES} for row in rows]


def distance(tensors: dict[str, Tensor], start: dict[str, Tensor]) -> float:
    return math.sqrt(
        sum((tensors[f"coefficients/{name}"] - value).square().sum().item() for name, value in start.items())
    )


@pytest.fixture
def epochs(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Tensor]]:
    """The task's tensors at the end of each epoch of the runs that follow."""
    seen: list[dict[str, Tensor]] = []

    def on_train_epoch_end(self: TaskModule) -> None:
        seen.append({name: tensor.clone() for name, tensor in self.adapted.task_tensors().items()})

    monkeypatch.setattr(TaskModule, "on_train_epoch_end", on_train_epoch_end)
    return seen


# What changes


@pytest.mark.parametrize(
    ("overrides", "kinds"),
    [
        (["model=vit_att"], {"coefficients", "head"}),
        (["model=vit_att_mlp", "recast.granularity=head"], {"coefficients", "head"}),
        (["model=resnet"], {"coefficients", "head"}),
        (["model=resnet", "model.batchnorm_statistics=update"], {"coefficients", "head", "buffers"}),
        (["model=vit_frozen"], {"head"}),
        (["model=vit_full"], {"backbone", "head"}),
        (["model=resnet_full"], {"backbone", "head", "buffers"}),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_only_what_is_declared_changes_and_all_of_it(overrides: list[str], kinds: set[str], build: Build) -> None:
    run = build(*overrides)
    network = run.adapted.network
    before = snapshot(network)
    result = fit(run.recipe, run.adapted, run.data)
    after = network.state_dict()
    changed = {name for name, tensor in before.items() if not torch.equal(tensor, after[name])}
    declared = {path for names in run.adapted.trainable.values() for path in names.values()}
    declared |= set(run.adapted.buffers)
    assert {name for name in changed if not name.endswith("num_batches_tracked")} == declared
    assert {name.partition("/")[0] for name in run.adapted.task_tensors()} == kinds
    assert ("buffers" in kinds) == any(name.endswith("num_batches_tracked") for name in changed)
    assert {name for name, parameter in network.named_parameters() if parameter.requires_grad} <= declared
    assert all(math.isfinite(value) for value in result.metrics.values())


@pytest.mark.parametrize("mode", ["frozen", "update"])
def test_frozen_batchnorm_stays_in_evaluation_mode(mode: str, build: Build) -> None:
    run = build("model=resnet", f"model.batchnorm_statistics={mode}")
    module = TaskModule(run.adapted, run.recipe, 5).train()
    layers = [layer for _, layer in normalisations_with_statistics(run.adapted.network)]
    assert len(layers) > 30
    assert {layer.training for layer in layers} == {mode == "update"}
    assert run.adapted.network.training
    assert not any(layer.training for layer in (module.eval(), *layers))


@pytest.mark.slow
def test_two_processes_train_as_one(compose: Callable[..., Config], weights: dict[str, Path], tmp_path: Path) -> None:
    """The same numbers up to rounding, where shares are uneven: of the last batches, ranks have 2 and 1, and 1 and 0.

    Each forward pass of a ResNet under DDP exchanges its buffers, so unequally many batches would hang here.
    """
    options = (
        "training=joint", "model=resnet", f"model.weights={weights['digits_resnet']}", "dataset.batch_size=134",
        "dataset.eval_batch_size=179", "trainer.max_epochs=2", "trainer.num_threads=1", "probe=false", "optimizer=sgd",
        "optimizer.coefficients_pull=0.1", "optimizer.label_smoothing=0.1",
    )  # fmt: skip
    assert (539 % 134, 359 % (2 * 179)) == (3, 1)
    command = [
        sys.executable,
        "-m",
        "recast_exp",
        "trainer=ddp",
        "trainer.accelerator=cpu",
        "hydra.run.dir=two",
        *options,
    ]
    process = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    one, two = tmp_path / "one", tmp_path / "two"
    one.mkdir()
    run_stage(compose("trainer=cpu", *options), one)
    _, errors = process.communicate(timeout=250)
    assert process.returncode == 0, errors
    assert (two / "train_ddp_process_1.log").is_file()  # the second process
    expected, found = (json.loads((folder / "metrics.json").read_text()) for folder in (one, two))
    measured = {name: value for name, value in expected.items() if name.startswith(("train/", "val/", "test/"))}
    assert {name: found[name] for name in measured} == pytest.approx(measured, rel=1e-5)
    assert [row.split(",")[:3] for row in (two / "predictions.csv").read_text().splitlines()] == [
        row.split(",")[:3] for row in (one / "predictions.csv").read_text().splitlines()
    ]
    before, after = (load_file(folder / "task.safetensors") for folder in (one, two))
    for name, tensor in before.items():
        torch.testing.assert_close(after[name], tensor, rtol=1e-4, atol=1e-6)
    counted = [[row["images"] for row in csv.DictReader((folder / "metrics.csv").open())] for folder in (one, two)]
    assert counted[0] == counted[1]


@pytest.mark.parametrize("options", [("training=joint",), ("training=alternating",)])
def test_batches_that_are_accumulated_are_one_batch(build: Build, options: tuple[str, ...]) -> None:
    """Of 359 images, the last step has 103, in batches of 64 and 39: every image counts the same."""
    quick = ("model=vit_att", "trainer.max_epochs=2", "trainer.limit_batches=null", "optimizer=sgd")
    shared = (*quick, "optimizer.coefficients_pull=0.1", *options)
    found = []
    for more in (("dataset.batch_size=256",), ("dataset.batch_size=64", "trainer.accumulate=4")):
        run = build(*shared, *more)
        fit(run.recipe, run.adapted, run.data)
        found.append(run.adapted.task_tensors())
    for name, tensor in found[0].items():
        torch.testing.assert_close(found[1][name], tensor, rtol=1e-3, atol=1e-4)


def test_the_batchnorm_of_a_new_head_learns_its_statistics() -> None:
    """LeViT's classifier begins with one, whose statistics are nobody's before."""
    network = timm.create_model("levit_128s", num_classes=0)
    model = ModelConfig(name="levit", backbone="levit_128s", method="frozen")
    adapted = assemble(network, model, NoAdapter(), None, num_classes=3, seed=0)
    heads = {"head.bn.running_mean", "head.bn.running_var", "head_dist.bn.running_mean", "head_dist.bn.running_var"}
    assert set(adapted.buffers) == heads and not adapted.updates_trunk
    counts = count(adapted, 0)
    assert counts["buffers"] == counts["task_specific"] == 0
    assert counts["head"] == 2 * (3 * 384 + 3 + 4 * 384)  # weights and biases, of the norm with its statistics
    before = {name: tensor.clone() for name, tensor in network.named_buffers()}
    module = TaskModule(adapted, Recipe(OptimizerConfig(), SchedulerConfig(), TrainerConfig(), seed=0), 3)
    module.train()
    network(torch.randn(4, 3, 224, 224))
    changed = {name for name, tensor in network.named_buffers() if not torch.equal(tensor, before[name])}
    assert {name for name in changed if not name.endswith("num_batches_tracked")} == heads
    recipe = Recipe(OptimizerConfig(), SchedulerConfig(), TrainerConfig(head_first_epochs=1), seed=0)
    layers = normalisations_with_statistics(network)
    for update in (False, True):  # they learn with their weights, while those of the trunk wait
        adapted.buffers = running_statistics(network) if update else adapted.buffers
        TaskModule(adapted, recipe, 3)
        assert [name for name, layer in layers if layer.training] == ["head.bn", "head_dist.bn"]


@pytest.mark.parametrize(
    ("backbone", "options", "taken"),
    [
        ("resnet18", {"method": "full", "batchnorm_statistics": "update"}, True),  # maps of 7 x 7 pixels
        ("resnet18", {"method": "full", "batchnorm_statistics": "update", "img_size": 32}, False),
        ("resnet18", {"method": "full", "batchnorm_statistics": "frozen", "img_size": 32}, True),
        ("resnet18", {"method": "frozen", "batchnorm_statistics": "update", "img_size": 32}, False),
        ("vit_tiny_patch16_224", {"method": "full"}, True),
        ("levit_128s", {"method": "frozen", "batchnorm_statistics": "frozen"}, False),
    ],
)
def test_batches_of_one_image_where_statistics_can_be_taken(
    backbone: str, options: dict[str, Any], taken: bool
) -> None:
    model = ModelConfig(name="model", backbone=backbone, **options)
    if taken:
        check_single_images(model, 1, 1)
    else:
        with pytest.raises(UserError, match=rf"^dataset\.batch_size: expected at least 2, .* of {backbone} .*, got 1$"):
            check_single_images(model, 1, 1)
        with pytest.raises(UserError, match=r"^dataset\.batch_size: expected at least 4, .*, got 3$"):
            check_single_images(model, 3, 2)
    network = timm.create_model(backbone, num_classes=0)
    module = TaskModule(
        assemble(network, model, NoAdapter(), None, 2, 0),
        Recipe(OptimizerConfig(), SchedulerConfig(), TrainerConfig(), seed=0),
        2,
    ).train()
    with nullcontext() if taken else pytest.raises(ValueError, match="more than 1 value per channel"):
        module(torch.zeros(1, 3, model.img_size or 224, model.img_size or 224))


def test_sets_of_coefficients_stay_equal(build: Build) -> None:
    run = build("model=vit_att", "recast.num_coefficient_sets=3")
    fit(run.recipe, run.adapted, run.data)
    for _, coefficients in run.adapted.parameters("coefficients"):
        assert torch.equal(coefficients[0], coefficients[1])
        assert torch.equal(coefficients[0], coefficients[2])


def test_training_learns(build: Build) -> None:
    """Coefficients and head together fit better than the head alone, and both better than chance."""
    recipe = (
        "trainer.max_epochs=4",
        "trainer.limit_batches=8",
        "scheduler=constant",
        "dataset.transform=none",
        "dataset.batch_size=16",
    )
    rates = ("optimizer.lr=1e-2", "optimizer.coefficients_lr=2e-2")
    loss = {}
    for model in ("resnet_frozen", "resnet"):
        run = build(f"model={model}", *recipe, *rates)
        history = fit(run.recipe, run.adapted, run.data).history
        loss[model] = history[-1]["train/loss"]
        assert history[-1]["train/loss"] < history[0]["train/loss"]
    assert loss["resnet"] < 0.9 * loss["resnet_frozen"]
    assert loss["resnet_frozen"] < 0.95 * math.log(5)


# Options


@pytest.mark.parametrize("several_devices", [False, True])
def test_head_first_keeps_everything_else_still_and_then_lets_go(
    several_devices: bool, build: Build, epochs: list[dict[str, Tensor]], monkeypatch: pytest.MonkeyPatch
) -> None:
    if several_devices:  # where nothing can be frozen after the start, and gradients are dropped instead
        monkeypatch.setattr(TaskModule, "on_train_epoch_start", lambda self: None)
    run = build("model=vit_att", "trainer.head_first_epochs=2", "trainer.max_epochs=3", "trainer.limit_batches=2")
    start = run.adapted.start_coefficients()
    before = {name: tensor.clone() for name, tensor in run.adapted.task_tensors().items()}
    fit(run.recipe, run.adapted, run.data)
    assert [distance(tensors, start) for tensors in epochs[:2]] == [0.0, 0.0]
    for name, tensor in epochs[2].items():
        assert not torch.equal(tensor, before[name]), name
    assert not torch.equal(epochs[0]["head/head.weight"], before["head/head.weight"])


def test_pull_keeps_coefficients_near_their_start(build: Build) -> None:
    found = {}
    for pull in (0.0, 1e5):
        run = build(
            "model=vit_att",
            "optimizer=sgd",
            "scheduler=constant",
            "optimizer.coefficients_lr=1e-6",
            "trainer.gradient_clip=0",
            "optimizer.momentum=0",
            f"optimizer.coefficients_pull={pull}",
        )
        start = {name: tensor + 0.1 for name, tensor in run.adapted.start_coefficients().items()}
        with torch.no_grad():
            for name, coefficients in run.adapted.parameters("coefficients"):
                coefficients.copy_(start[name])
        fit(run.recipe, run.adapted, run.data)
        found[pull] = distance(run.adapted.task_tensors(), run.adapted.start_coefficients())
    displaced = 0.1 * math.sqrt(48)
    assert found[0.0] == pytest.approx(displaced, rel=0.01)
    assert found[1e5] == pytest.approx(0.8**4 * displaced, rel=0.01)  # four steps of SGD on the square


# The head trains first; then coefficients are blown away: the best epoch is an early one.
def test_running_statistics_wait_for_the_head(build: Build, epochs: list[dict[str, Tensor]]) -> None:
    options = ("model.batchnorm_statistics=update", "trainer.head_first_epochs=1", "trainer.max_epochs=2")
    run = build("model=resnet", *options)
    before = {name: each.clone() for name, each in run.adapted.task_tensors().items() if name.startswith("buffers/")}
    fit(run.recipe, run.adapted, run.data)
    assert before
    assert all(torch.equal(epochs[0][name], tensor) for name, tensor in before.items())
    assert not any(
        torch.equal(epochs[1][name], tensor) for name, tensor in before.items() if tensor.is_floating_point()
    )


RUINOUS = ("model=vit_att", "trainer.head_first_epochs=2", "optimizer.coefficients_lr=30", "dataset.transform=none")


def test_best_restores_the_best_epoch(build: Build, epochs: list[dict[str, Tensor]]) -> None:
    run = build(
        *RUINOUS,
        "trainer.max_epochs=4",
        "select=best",
        "dataset.batch_size=32",
        "trainer.limit_batches=4",
        "optimizer.lr=1e-2",
    )
    result = fit(run.recipe, run.adapted, run.data)
    accuracies = [row["val/accuracy"] for row in result.history]
    best = accuracies.index(max(accuracies))
    assert best < 3
    assert equal(run.adapted.task_tensors(), epochs[best])
    assert not equal(run.adapted.task_tensors(), epochs[-1])
    assert result.metrics["epoch"] == best + 1
    assert result.metrics["epochs"] == 4
    assert result.metrics["val/accuracy"] == accuracies[best]


def test_last_reports_the_last_epoch(build: Build, epochs: list[dict[str, Tensor]]) -> None:
    run = build(*RUINOUS, "trainer.max_epochs=3")
    result = fit(run.recipe, run.adapted, run.data)
    assert equal(run.adapted.task_tensors(), epochs[-1])
    assert result.metrics["epoch"] == 3
    assert result.metrics["val/loss"] == result.history[-1]["val/loss"]


def test_early_stopping_waits_for_its_patience(build: Build) -> None:
    run = build(*RUINOUS, "trainer.max_epochs=20", "trainer.early_stopping=2", "optimizer.lr=1e-2")
    losses = [row["val/loss"] for row in fit(run.recipe, run.adapted, run.data).history]
    assert len(losses) < 20
    assert losses.index(min(losses)) == len(losses) - 3


def test_validation_can_be_rarer_and_never_misses_the_last_epoch(build: Build, epochs: list[dict[str, Tensor]]) -> None:
    """The task is that of validating in each epoch; epochs without a validation say nothing of it."""
    run = build(*RUINOUS, "trainer.max_epochs=4", "trainer.validate_every=2")
    result = fit(run.recipe, run.adapted, run.data)
    assert ["val/loss" in row for row in result.history] == [False, True, False, True]
    each = build(*RUINOUS, "trainer.max_epochs=4")
    expected = fit(each.recipe, each.adapted, each.data).history
    assert equal(run.adapted.task_tensors(), each.adapted.task_tensors())
    assert [row["val/loss"] for row in result.history[1::2]] == [row["val/loss"] for row in expected[1::2]]

    best = build(*RUINOUS, "trainer.max_epochs=4", "trainer.validate_every=2", "select=best")
    reported = fit(best.recipe, best.adapted, best.data).metrics
    accuracies = [row["val/accuracy"] for row in expected[1::2]]
    assert reported["val/accuracy"] == max(accuracies)
    assert reported["epoch"] == 2 * accuracies.index(max(accuracies)) + 2
    assert equal(best.adapted.task_tensors(), epochs[int(reported["epoch"]) - 1]) or reported["epoch"] == 4

    rare = build(*RUINOUS, "trainer.max_epochs=3", "trainer.validate_every=9")
    assert ["val/loss" in row for row in fit(rare.recipe, rare.adapted, rare.data).history] == [False, False, True]


def test_variables_of_the_environment_set_nothing_of_a_trainer(build: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PL_TRAINER_MAX_STEPS", "1")
    run = build("model=vit_att", "trainer.max_epochs=2")
    assert len(fit(run.recipe, run.adapted, run.data).history) == 2
    assert os.environ["PL_TRAINER_MAX_STEPS"] == "1"


@pytest.mark.parametrize("optimizer", ["adamw", "adam", "sgd"])
def test_each_kind_has_its_own_rate_and_decay(optimizer: str, build: Build) -> None:
    options = ("optimizer.lr=0.3", "optimizer.weight_decay=0.01", "optimizer.head_weight_decay=0.02")
    options += ("optimizer.lr_scale=2",)  # of all but the head
    run = build("model=vit_att", f"optimizer={optimizer}", *options, "optimizer.coefficients_lr=0.35")
    groups = {group["name"]: group for group in make_optimizer(run.adapted, run.settings.optimizer).param_groups}
    assert {name: (group["lr"], group["weight_decay"]) for name, group in groups.items()} == {
        "coefficients": (0.7, 0.0),
        "head": (0.3, 0.02),
    }
    for kind, group in groups.items():
        assert [id(each) for each in group["params"]] == [id(each) for _, each in run.adapted.parameters(kind)]
    full = build("model=vit_full", f"optimizer={optimizer}", *options, "optimizer.backbone_lr=0.025")
    groups = {group["name"]: group for group in make_optimizer(full.adapted, full.settings.optimizer).param_groups}
    assert {name: group["lr"] for name, group in groups.items()} == {"backbone": 0.05, "head": 0.3}
    assert groups["backbone"]["weight_decay"] == 0.01


@pytest.mark.parametrize(
    ("options", "factors"),
    [
        (["scheduler=step", "scheduler.step_size=2", "scheduler.gamma=0.5"], [1, 1, 0.5, 0.5, 0.25]),
        (["scheduler=constant"], [1, 1, 1, 1, 1]),
        (["scheduler=cosine"], [(1 + math.cos(math.pi * epoch / 5)) / 2 for epoch in range(5)]),
        (
            ["scheduler=cosine", "scheduler.warmup_epochs=2"],
            [1 / 3, 2 / 3, *((1 + math.cos(math.pi * epoch / 3)) / 2 for epoch in range(3))],
        ),
        (
            ["scheduler=step", "scheduler.step_size=2", "scheduler.gamma=0.5", "scheduler.warmup_epochs=1"],
            [1 / 2, 1, 1, 0.5, 0.5],
        ),
    ],
    ids=lambda value: " ".join(value) if isinstance(value[0], str) else "",
)
def test_schedules_over_the_epochs(options: list[str], factors: list[float], build: Build, tmp_path: Path) -> None:
    rates = ("optimizer.lr=0.4", "optimizer.coefficients_lr=0.02")
    run = build("model=vit_att", "trainer.max_epochs=5", "trainer.limit_batches=1", *rates, *options)
    history = fit(run.recipe, run.adapted, run.data, run_dir=tmp_path).history
    assert [row["lr/head"] for row in history] == pytest.approx([0.4 * factor for factor in factors])
    assert [row["lr/coefficients"] for row in history] == pytest.approx([0.02 * factor for factor in factors])
    with (tmp_path / "metrics.csv").open() as file:
        written = [{name: float(value) for name, value in row.items()} for row in csv.DictReader(file)]
    assert written == history


def test_bfloat16_runs_and_keeps_the_task_in_float32(build: Build) -> None:
    run, plain = (
        build("model=vit_att", "trainer.max_epochs=1", f"trainer.precision={precision}")
        for precision in ("bf16-mixed", "32-true")
    )
    results = [fit(each.recipe, each.adapted, each.data) for each in (run, plain)]
    assert {tensor.dtype for tensor in run.adapted.task_tensors().values()} == {torch.float32}
    losses = [result.metrics["val/loss"] for result in results]
    assert losses[0] != losses[1]  # it was not run in float32
    assert losses[0] == pytest.approx(losses[1], rel=0.05)


def two_blocks(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """As small as a model with templates can be."""
    del pretrained, kwargs
    options = {"img_size": 16, "patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2, "num_classes": 0}
    return timm.models.VisionTransformer(**options)


def test_compiled_training_gives_the_same_result(build: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    """Traced and differentiated as a whole; without the C++ of the last step, which takes a compiler and a minute."""
    monkeypatch.setattr(nn.Module, "compile", partialmethod(nn.Module.compile, backend="aot_eager", fullgraph=True))
    two_blocks.__module__ = "timm.models.vision_transformer"  # where register_model looks for its surroundings
    timm.models.register_model(two_blocks)
    small = (
        "model=recast",
        "model.backbone=two_blocks",
        "model.pretrained=false",
        "model.img_size=16",
        "recast.targets=['*.qkv']",
    )
    losses = []
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()  # of what other tests in this process have compiled
    for compiled in (False, True):
        run = build(*small, f"trainer.compile={compiled}", "trainer.max_epochs=1", "trainer.limit_batches=2")
        losses.append(fit(run.recipe, run.adapted, run.data).metrics["val/loss"])
        calls = torch._dynamo.utils.counters["stats"]["calls_captured"]
        assert (calls > 0) == compiled
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)


def test_seed_decides_the_run_and_nothing_else_does(build: Build) -> None:
    runs = []
    for seed in (7, 7, 8):
        torch.manual_seed(derive_seed("surroundings", len(runs)))
        run = build("model=vit_att", f"seed={seed}")
        torch.rand(len(runs) + 1)
        fit(run.recipe, run.adapted, run.data)
        runs.append(run.adapted.task_tensors())
    assert equal(runs[0], runs[1])
    assert not torch.equal(runs[0]["head/head.weight"], runs[2]["head/head.weight"])
    assert not torch.equal(runs[0]["coefficients/blocks.0.attn.qkv"], runs[2]["coefficients/blocks.0.attn.qkv"])


@pytest.mark.parametrize("model", ["vit_frozen", "vit_full"])
def test_a_new_head_follows_the_seed_alone(model: str, build: Build) -> None:
    run = build(f"model={model}")
    heads = []
    for number, seed in enumerate((7, 7, 8)):
        torch.manual_seed(number)
        adapted = assemble(run.adapted.network, run.settings.model, NoAdapter(), None, 5, seed)
        heads.append(adapted.task_tensors()["head/head.weight"].clone())
    assert torch.equal(heads[0], heads[1])
    assert not torch.equal(heads[0], heads[2])


def test_measuring_counts_every_image_once(build: Build) -> None:
    """Against a plain loop over the test images, with a batch size that does not divide their number."""
    run = build("model=vit_frozen", "dataset.eval_batch_size=100", "trainer.limit_batches=null")
    tested = measure(run.recipe, run.adapted, run.data)
    found = tested.metrics
    images, labels = zip(
        *(run.data.datasets["test"][0, index] for index in range(len(run.data.datasets["test"]))), strict=True
    )
    targets = torch.tensor(labels)
    with torch.no_grad():
        logits = run.adapted.network.eval()(run.data.normalize(torch.stack(images)))
    right = (logits.argmax(1) == targets).float()
    assert found["test/accuracy"] == pytest.approx(right.mean().item())
    assert found["test/loss"] == pytest.approx(nn.functional.cross_entropy(logits, targets).item(), rel=1e-5)
    for label, name in enumerate(run.data.image_set.classes):
        assert found[f"test/accuracy_per_class/{name}"] == pytest.approx(right[targets == label].mean().item())
    rows = tested.predictions
    assert [row.image for row in rows] == list(range(len(targets)))
    assert [row.label for row in rows] == targets.tolist()
    assert [row.predicted for row in rows] == logits.argmax(1).tolist()
    probabilities, losses = logits.softmax(1).amax(1), nn.functional.cross_entropy(logits, targets, reduction="none")
    assert [row.probability for row in rows] == pytest.approx(probabilities.tolist(), rel=1e-4)
    assert [row.loss for row in rows] == pytest.approx(losses.tolist(), rel=1e-3, abs=1e-5)


# Resume

RESUMED = {
    "plain": ("model=vit_att",),
    "best": (*RUINOUS, "select=best", "optimizer.lr=1e-2"),
    "head first": ("model=vit_att", "trainer.head_first_epochs=2", "optimizer.coefficients_pull=0.1"),
    "batchnorm": ("model=resnet", "model.batchnorm_statistics=update"),
    "sgd, warm-up": ("model=vit_att", "optimizer=sgd", "scheduler=cosine", "scheduler.warmup_epochs=2"),
    "full": ("model=resnet_full",),
    "rare validation": (*RUINOUS, "select=best", "trainer.validate_every=2", "trainer.max_epochs=4"),
    "nested ranks": ("model=vit_frozen", "adapter=melo", "adapter.nested=true", "training=alternating"),
    "early stopping": (*RUINOUS, "trainer.early_stopping=1", "optimizer.lr=1e-2", "trainer.max_epochs=5"),
}
EPOCHS = ("trainer.max_epochs=3",)


class StoppedError(Exception):
    pass


def stop_at(epoch: int, batch: int, stop: Callable[[], None], method: str) -> Callable[..., Any]:
    original = getattr(TaskModule, method)

    def step(self: TaskModule, batch_of_images: Any, batch_idx: int) -> Any:
        if (self.current_epoch, batch_idx) == (epoch, batch):
            stop()
        return original(self, batch_of_images, batch_idx)

    return step


def raise_stopped() -> None:
    raise StoppedError


def train(build: Build, run_dir: Path, *overrides: str) -> Trained:
    run = build(*EPOCHS, *overrides)
    for module in run.adapted.network.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.1  # so that an epoch draws from torch's generator
    result = fit(run.recipe, run.adapted, run.data, run_dir=run_dir)
    return result, run.adapted.task_tensors()


@pytest.fixture(scope="module")
def undisturbed(build: Build, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Trained]:
    """The run of some options that was never stopped, made once."""
    return cache(lambda options: train(build, tmp_path_factory.mktemp("undisturbed"), *RESUMED[options]))


def assert_same_run(first: Trained, second: Trained) -> None:
    assert equal(first[1], second[1])
    assert without_times(first[0].history) == without_times(second[0].history)
    (metrics,), (others,) = (without_times([result.metrics]) for result, _ in (first, second))
    assert metrics == others


@pytest.mark.parametrize(
    ("options", "epoch", "batch", "method"),
    [
        ("plain", 0, 1, "training_step"),
        ("plain", 2, 1, "training_step"),
        ("plain", 2, 0, "validation_step"),
        ("best", 2, 1, "training_step"),
        ("head first", 1, 1, "training_step"),
        ("head first", 2, 1, "training_step"),
        ("batchnorm", 1, 1, "training_step"),
        ("sgd, warm-up", 2, 0, "training_step"),
        ("full", 1, 1, "training_step"),
        ("early stopping", 2, 1, "training_step"),
        ("rare validation", 1, 1, "training_step"),  # before the first one
        ("nested ranks", 2, 1, "training_step"),
    ],
)
def test_a_continued_run_equals_an_undisturbed_one_to_the_bit(
    options: str,
    epoch: int,
    batch: int,
    method: str,
    undisturbed: Callable[[str], Trained],
    build: Build,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    whole = undisturbed(options)
    with monkeypatch.context() as patch:
        patch.setattr(TaskModule, method, stop_at(epoch, batch, raise_stopped, method))
        with pytest.raises(StoppedError):
            train(build, tmp_path / "stopped", *RESUMED[options])
    assert (tmp_path / "stopped" / "checkpoints" / "last.ckpt").exists() == (epoch > 0)
    torch.rand(7)
    assert_same_run(train(build, tmp_path / "stopped", *RESUMED[options]), whole)
    assert (tmp_path / "stopped" / "metrics.csv").read_text().count("\n") == len(whole[0].history) + 1


@pytest.mark.parametrize("options", ["plain", "best", "early stopping"])
def test_a_run_that_was_stopped_after_its_last_epoch_is_not_trained_on(
    options: str, build: Build, tmp_path: Path
) -> None:
    undisturbed = train(build, tmp_path, *RESUMED[options])
    assert_same_run(train(build, tmp_path, *RESUMED[options]), undisturbed)


@pytest.mark.slow
def test_a_killed_process_is_continued_to_the_bit(
    build: Build, tmp_path: Path, weights: dict[str, Path], cache_dir: Path
) -> None:
    """SIGKILL in the middle of the third epoch; then, here, the rest."""
    options = ("model=vit_att_mlp", "select=best", "trainer.num_threads=1")
    undisturbed = train(build, tmp_path / "undisturbed", *options)
    plan = {"options": options, "run_dir": str(tmp_path / "killed"), "weights": {k: str(v) for k, v in weights.items()}}
    write_json(tmp_path / "plan.json", plan)
    here = Path(__file__).parent
    code = f"import sys; sys.path[:0] = {[str(here), str(here.parent)]!r}; import test_training; test_training.die()"
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "plan.json")], capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert (tmp_path / "killed" / "metrics.csv").read_text().count("\n") == 3
    assert_same_run(train(build, tmp_path / "killed", *options), undisturbed)


def die() -> None:
    """What the other process does."""
    import json
    import os

    import conftest

    plan = json.loads(Path(sys.argv[1]).read_text())
    build = conftest.build.__wrapped__(conftest.tiny.__wrapped__(conftest.compose.__wrapped__(), plan["weights"]))
    TaskModule.training_step = stop_at(2, 1, lambda: os.kill(os.getpid(), signal.SIGKILL), "training_step")
    train(build, Path(plan["run_dir"]), *plan["options"])


class Code:
    """Unpickling it would make a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


OTHERS = {
    "other model": ("model=vit_mlp",),
    "other bank": ("model=vit_att", "mimicry.seed=7"),
    "other weights": ("model=vit_frozen", "model.pretrained=false"),
}


@pytest.mark.parametrize("damage", ["cut", "empty", "text", "bytes", "foreign", "code", *OTHERS])
def test_a_damaged_checkpoint_is_refused_in_one_line(
    damage: str, build: Build, tmp_path: Path, epochs: list[dict[str, Tensor]]
) -> None:
    path = tmp_path / "checkpoints" / "last.ckpt"
    train(build, tmp_path, *OTHERS.get(damage, ("model=vit_att",)), "trainer.max_epochs=1")
    whole = path.read_bytes()
    if damage == "cut":
        path.write_bytes(whole[: len(whole) // 2])
    elif damage == "foreign":
        torch.save({"weights": torch.ones(3)}, path)
    elif damage == "code":
        path.write_bytes(pickle.dumps(Code(tmp_path / "executed"), protocol=2))
    elif damage not in OTHERS:
        path.write_bytes({"empty": b"", "text": b"not a checkpoint\n", "bytes": bytes(range(256)) * 9}[damage])
    files = {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}
    epochs.clear()
    with pytest.raises(UserError) as error:
        train(build, tmp_path, "model=vit_frozen" if damage == "other weights" else "model=vit_att")
    assert "\n" not in str(error.value)
    assert str(error.value).startswith("resume: ")
    assert files == {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}
    assert epochs == []


@pytest.mark.parametrize(
    ("callback", "change"),
    [
        ("History", None),
        ("History", {"rows": []}),
        ("History", {"rows": [{}, {}]}),
        ("History", {"rows": [{"epoch": 1, "images": 3, "seconds": 1.0}, {"epoch": 2, "images": 3}]}),
        ("History", {"rows": [{"epoch": 1, "images": 3, "seconds": 1.0}, {"epoch": 2, "images": 3, "seconds": 0}]}),
        ("History", {"rows": [{"epoch": 1, "images": 3, "seconds": 1.0}] * 2}),
        ("History", {"rows": [{"epoch": e, "images": 3, "seconds": 1.0, "val/accuracy": 1e308} for e in (1, 2)]}),
        ("Snapshots", None),
        ("Snapshots", {"epoch": 99}),
        ("Snapshots", {"epoch": -5}),
        ("Snapshots", {"epoch": "x"}),
        ("Snapshots", {"best": 9.0}),
        ("Snapshots", {"tensors": "x"}),
        ("Snapshots", {"tensors": {"head.bias": torch.tensor([torch.nan])}}),
        ("Snapshots", {"tensors": {}}),
    ],
)
def test_the_epochs_of_a_checkpoint_agree(
    callback: str, change: dict[str, Any] | None, build: Build, tmp_path: Path
) -> None:
    typed = ("model=vit_att", "select=best")
    train(build, tmp_path, *typed, "trainer.max_epochs=2")
    path = tmp_path / "checkpoints" / "last.ckpt"
    content = torch.load(path, weights_only=True)
    if change is None:
        del content["callbacks"][callback]
    else:
        content["callbacks"][callback] |= change
    torch.save(content, path)
    with pytest.raises(UserError, match=r"^resume: expected a checkpoint ") as error:
        train(build, tmp_path, *typed, "trainer.max_epochs=3")
    assert "\n" not in str(error.value)


def train_and_change(change: Callable[[dict[str, Any]], None], build: Build, run_dir: Path) -> None:
    """Train for an epoch, and change what its checkpoint holds."""
    train(build, run_dir, "model=vit_att", "trainer.max_epochs=1")
    path = run_dir / "checkpoints" / "last.ckpt"
    content = torch.load(path, weights_only=True)
    change(content)
    torch.save(content, path)


def _group(**entries: object) -> Callable[[dict[str, Any]], None]:
    return lambda content: content["optimizer_states"][0]["param_groups"][0].update(entries)


@pytest.mark.parametrize(
    "change",
    [
        _group(lr="x"),
        _group(betas=3),
        lambda content: content["optimizer_states"][0]["state"][0].update(exp_avg=torch.zeros(3, 3)),
        lambda content: content["lr_schedulers"][0].update(step=5),
        lambda content: content["lr_schedulers"][0].update(base_lrs=["x", "y"]),
    ],
)
def test_states_of_an_optimizer_that_cannot_be_are_one_line(
    change: Callable[[dict[str, Any]], None], build: Build, tmp_path: Path
) -> None:
    train_and_change(change, build, tmp_path)
    with pytest.raises(UserError, match=r"^resume: expected a checkpoint of this run, got .*from scratch$"):
        train(build, tmp_path, "model=vit_att", "trainer.max_epochs=3")


def _progress(**counts: int) -> Callable[[dict[str, Any]], None]:
    return lambda content: content["loops"]["fit_loop"]["epoch_progress"]["current"].update(counts)


def _expanded(content: dict[str, Any]) -> None:
    name = next(iter(content["state_dict"]))
    content["state_dict"][name] = torch.zeros(1).expand(10**12)


@pytest.mark.parametrize(
    "change",
    [
        _progress(processed=-(10**6), completed=-(10**6), ready=-(10**6), started=-(10**6)),
        _progress(processed=0, completed=0),
        _progress(processed=10**9),
        lambda content: content.update(epoch=-5),
        lambda content: content.update(loops={}),
        _expanded,
    ],
)
def test_numbers_of_a_checkpoint_that_would_train_for_ever(
    change: Callable[[dict[str, Any]], None], build: Build, tmp_path: Path
) -> None:
    train_and_change(change, build, tmp_path)
    with pytest.raises(UserError, match=r"^resume: expected a checkpoint of a run, got "):
        train(build, tmp_path, "model=vit_att", "trainer.max_epochs=2")


@pytest.mark.parametrize("scheme", ["", "local://"])
def test_a_checkpoint_of_others_removes_nothing(scheme: str, build: Build, tmp_path: Path) -> None:
    victim = tmp_path / "victim" / "precious.txt"
    victim.parent.mkdir()
    victim.write_text("x")
    run_dir = tmp_path / "run"
    train(build, run_dir, "model=vit_att", "trainer.max_epochs=1")
    path = run_dir / "checkpoints" / "last.ckpt"
    content = torch.load(path, weights_only=True)
    [state] = [state for name, state in content["callbacks"].items() if "Checkpoint" in name]
    for name in ("best_model_path", "last_model_path", "kth_best_model_path"):
        state[name] = f"{scheme}{victim.parent}"
    torch.save(content, path)
    train(build, run_dir, "model=vit_att", "trainer.max_epochs=3")
    assert victim.read_text() == "x"


def test_a_diverged_run_says_so(build: Callable[..., Any]) -> None:
    run = build("optimizer.lr=1e30", "optimizer.coefficients_lr=1e30", "trainer.gradient_clip=0")
    with quiet(), pytest.raises(UserError, match=r"optimizer\.lr: training diverged, \w+/loss is nan in epoch 1"):
        fit(run.recipe, run.adapted, run.data)


def test_a_device_that_is_not_there_is_refused(build: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    run = build("trainer.accelerator=gpu")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(UserError, match=r"trainer\.accelerator: expected auto, cpu or fewer devices, got gpu"):
        fit(run.recipe, run.adapted, run.data)
