"""The stages in one process: what they write, that it fits together, and that a task file repeats its test."""

from __future__ import annotations

import csv
import dataclasses
import json
import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch.utilities import rank_zero_only
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from recast_exp.config.schema import Config, DatasetConfig, with_values
from recast_exp.data import load_dataset
from recast_exp.data.types import ImageSet, Samples
from recast_exp.errors import UserError
from recast_exp.experiment import card, features
from recast_exp.files import cache_folder
from recast_exp.models.backbones import create_backbone
from recast_exp.models.bank_cache import bank_for
from recast_exp.recast import Banks
from recast_exp.runs.task_header import read_record
from recast_exp.training import loop
from recast_exp.training.recipe import Recipe
from support.fixtures_data import make_folder, write_image
from support.running import run_stage
from support.task_files import coefficients

Compose = Callable[..., Config]
Stage = Callable[..., tuple[dict[str, Any], Path]]


@pytest.fixture(scope="module")
def stage(tiny: Compose, tmp_path_factory: pytest.TempPathFactory) -> Stage:
    """Run a stage in a folder of its own: its metrics, and the folder."""

    def stage(*overrides: str) -> tuple[dict[str, Any], Path]:
        folder = tmp_path_factory.mktemp("run")
        return run_stage(tiny(*overrides), folder), folder

    return stage


KINDS = {
    "att": ("model=vit_att", "probe=true", "seed=1998"),
    "resnet": ("model=resnet", "model.batchnorm_statistics=update", "select=best"),
    "frozen": ("model=vit_frozen", "probe=true", "seed=1998"),
    "full": ("model=resnet_full", "trainer.max_epochs=1"),
}
TEMPLATES = {"att", "resnet"}


@pytest.fixture(scope="module")
def adapted(stage: Stage) -> Callable[[str], tuple[dict[str, Any], Path]]:
    """The run of a kind, made once."""
    runs: dict[str, tuple[dict[str, Any], Path]] = {}

    def adapted(kind: str) -> tuple[dict[str, Any], Path]:
        if kind not in runs:
            runs[kind] = stage(*KINDS[kind])
        return runs[kind]

    return adapted


def read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def assert_picture(path: Path) -> None:
    pixels = np.asarray(Image.open(path).convert("L"))
    assert min(pixels.shape) > 100
    assert len(np.unique(pixels)) > 10


def assert_one_line(error: pytest.ExceptionInfo[UserError], *expected: object) -> None:
    message = str(error.value)
    assert "\n" not in message
    for text in expected:
        assert str(text) in message, message


# adapt


@pytest.mark.parametrize("kind", KINDS)
def test_adapt_writes_every_file(kind: str, adapted: Any) -> None:
    _, folder = adapted(kind)
    names = ["learning_curves", "batch", "confusion", "mistakes", *(["coefficients"] if kind in TEMPLATES else [])]
    plots = {f"plots/{name}.png" for name in names}
    files = {str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file()}
    expected = {"metrics.json", "parameters.json", "task.safetensors", "metrics.csv", "dataset.json", *plots}
    expected |= {"predictions.csv"}
    assert files == expected | {"checkpoints/last.ckpt"}
    for plot in plots:
        assert_picture(folder / plot)


@pytest.mark.parametrize("kind", KINDS)
def test_metrics_are_flat_finite_and_agree_with_each_other(kind: str, adapted: Any) -> None:
    returned, folder = adapted(kind)
    metrics = read(folder / "metrics.json")
    assert metrics == returned
    assert all(isinstance(value, int | float | str) for value in metrics.values())
    assert all(math.isfinite(value) for value in metrics.values() if not isinstance(value, str))
    names = {f"{part}/{name}" for part in ("train", "val", "test") for name in ("accuracy", "loss")}
    names |= {f"test/accuracy_per_class/{label}" for label in range(5, 10)}
    names |= {"epoch", "epochs", "seconds", "images_per_second", "peak_memory_mb", "device", "version/torch"}
    names |= {"probe/test/accuracy", "probe/val/accuracy"} if kind == "att" else set()
    assert names <= metrics.keys()
    assert ("probe/test/accuracy" in metrics) == (kind == "att")
    assert metrics["version/torch"] == torch.__version__
    assert ("mimicry/relative_error" in metrics) == (kind in TEMPLATES)
    assert metrics.get("mimicry/relative_error", 0.0) < 5e-7
    total = read(folder / "dataset.json")["images"]["test"]
    assert (metrics["test/images"], metrics["test/images_left_out"]) == (32, total - 32)
    assert len((folder / "predictions.csv").read_text().splitlines()) == 1 + 32
    assert metrics["test/accuracy"] * 32 == pytest.approx(round(metrics["test/accuracy"] * 32))
    per_class = [metrics[f"test/accuracy_per_class/{label}"] for label in range(5, 10)]
    assert min(per_class) <= metrics["test/accuracy"] <= max(per_class)
    with (folder / "metrics.csv").open() as file:
        rows = [{name: float(value) for name, value in row.items()} for row in csv.DictReader(file)]
    assert [row["epoch"] for row in rows] == list(range(1, int(metrics["epochs"]) + 1))
    reported = rows[int(metrics["epoch"]) - 1]
    for name in ("train/loss", "train/accuracy", "val/loss", "val/accuracy"):
        assert metrics[name] == reported[name]
    if kind == "resnet":  # select=best
        assert metrics["val/accuracy"] == max(row["val/accuracy"] for row in rows)
    assert metrics["seconds"] == pytest.approx(sum(row["seconds"] for row in rows))
    assert {row["images"] for row in rows} == {2 * 8}


@pytest.mark.parametrize("kind", KINDS)
def test_parameters_add_up_and_are_those_of_the_task_file(kind: str, adapted: Any) -> None:
    _, folder = adapted(kind)
    counts = read(folder / "parameters.json")
    tensors = load_file(folder / "task.safetensors")
    sizes: dict[str, int] = {}
    for name, tensor in tensors.items():
        sizes[name.partition("/")[0]] = sizes.get(name.partition("/")[0], 0) + tensor.numel()
    own = {"coefficients": "coefficients", "adapter": "adapter", "buffers": "buffers", "backbone_trained": "backbone"}
    assert {key: counts[key] for key in own} == {key: sizes.get(kind, 0) for key, kind in own.items()}
    assert counts["task_specific"] == sum(counts[key] for key in own)
    assert counts["head"] == sizes["head"]
    assert counts["total"] == counts["task_specific"] + counts["head"] + counts["templates"] + counts["frozen"]
    assert counts["task_bits"] == 32 * counts["task_specific"]
    assert counts["task_file_bytes"] == (folder / "task.safetensors").stat().st_size
    by_layer = [sum(layer.values()) for layer in counts["layers"].values()]
    assert sum(by_layer) == counts["task_specific"] + counts["head"]
    assert counts["coefficients"] == {"att": 48, "resnet": 168}.get(kind, 0)
    assert (counts["templates"] > 0) == (kind in TEMPLATES)
    assert (counts["frozen"] == 0) == (kind == "full")


def test_reported_numbers_are_those_of_the_task_file(adapted: Any) -> None:
    """Coefficients moved from where mimicry put them, and all of them are finite."""
    _, folder = adapted("att")
    with safe_open(folder / "task.safetensors", "pt") as file:
        record = json.loads(file.metadata()["recast_exp"])
    bank = Banks.load(cache_folder(None) / "banks" / f"{record['bank']}.safetensors", record["bank"])
    found = coefficients(folder / "task.safetensors", bank)
    for layer, start in bank.coefficients.items():
        moved = (found[layer] - start).abs()
        assert 0 < moved.max() < 10


def test_a_finished_run_that_is_resumed_is_only_shown(
    adapted: Any, tiny: Compose, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    metrics, folder = adapted("att")
    files = {file: file.stat().st_mtime_ns for file in folder.rglob("*")}
    monkeypatch.setattr("recast_exp.experiment.adaptation.fit", None)
    assert run_stage(tiny(*KINDS["att"], f"resume={folder}"), folder) == metrics
    assert files == {file: file.stat().st_mtime_ns for file in folder.rglob("*")}
    table = capsys.readouterr().out
    assert "linear probe" in table
    assert f"{100 * metrics['test/accuracy']:.1f} %" in table


def test_a_failure_keeps_the_trained_numbers_and_is_no_finished_run(
    stage: Stage, tiny: Compose, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ("model=vit_att", "seed=3")
    whole, folder = stage(*options)

    def failing(*args: Any) -> None:
        raise RuntimeError("out of memory")

    with monkeypatch.context() as patch:
        patch.setattr("recast_exp.experiment.adaptation.test", failing)
        with pytest.raises(RuntimeError, match="out of memory"):
            run_stage(tiny(*options), tmp_path)
    kept, trained = load_file(tmp_path / "task.safetensors"), load_file(folder / "task.safetensors")
    assert kept.keys() == trained.keys() and all(torch.equal(kept[name], trained[name]) for name in kept)
    assert "test/accuracy" not in read_record(tmp_path / "task.safetensors")["metrics"]
    assert not (tmp_path / "metrics.json").exists()
    continued = run_stage(tiny(*options, f"resume={tmp_path}"), tmp_path)
    assert continued["test/loss"] == whole["test/loss"]
    assert (tmp_path / "task.safetensors").read_bytes() == (folder / "task.safetensors").read_bytes()


def renamed(root: Path) -> None:
    (root / "class2").rename(root / "class3")


def exchanged(root: Path) -> None:
    for old, new in (("class2", "x"), ("class10", "class2"), ("x", "class10")):
        (root / old).rename(root / new)


def added(root: Path) -> None:
    write_image(root / "class2" / "new.png", seed=9, size=(12, 10))


def replaced(root: Path) -> None:
    for path in (root / "class2").iterdir():
        Image.new("RGB", (12, 10)).save(path)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (renamed, "got other classes (class2, class3)"),
        (exchanged, "got other files or labels in train"),
        (added, "got other files or labels in"),
        (replaced, "got other files or labels in train"),
    ],
)
def test_a_run_goes_on_with_its_images_alone(
    change: Callable[[Path], None], says: str, tiny: Compose, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root, folder = make_folder(tmp_path / "images", count=10), tmp_path / "run"
    for path in (root / "class2").iterdir():  # files are told from each other by name and size
        write_image(path, seed=3, size=(12, 20))
    typed = ("model=vit_att", "model.backbone=digits_vit", "dataset=folder", f"dataset.path={root}", "probe=false")
    with monkeypatch.context() as patch:
        patch.setattr("recast_exp.experiment.adaptation.test", None)
        with pytest.raises(TypeError):  # stopped at the test
            run_stage(tiny(*typed), folder)
    before = (folder / "dataset.json").read_bytes(), (folder / "task.safetensors").read_bytes()
    change(root)
    with pytest.raises(UserError) as error:
        run_stage(tiny(*typed, f"resume={folder}"), folder)
    assert_one_line(error, f"dataset: expected the images that the run in {folder} was started with, {says}")
    assert ((folder / "dataset.json").read_bytes(), (folder / "task.safetensors").read_bytes()) == before


def test_a_run_of_an_older_version_tells_classes_alone(tmp_path: Path) -> None:
    samples = Samples(np.zeros((2, 4, 4, 3), np.uint8), np.array([0, 1]))
    images = ImageSet("x", ("a", "b"), dict.fromkeys(("train", "val", "test"), samples))
    card.check_images(tmp_path, images)  # there is nothing to compare with
    (tmp_path / "dataset.json").write_text(json.dumps(images.describe()))
    card.check_images(tmp_path, images)
    with pytest.raises(UserError, match=r"got other classes \(in another order\)"):
        card.check_images(tmp_path, dataclasses.replace(images, classes=("b", "a")))


@pytest.mark.parametrize(("rate", "idle"), [("1e-4", True), ("1e-2", False)])
def test_masks_that_never_flip_are_said(stage: Stage, caplog: pytest.LogCaptureFixture, rate: str, idle: bool) -> None:
    """Four steps of 1e-4 do not reach the threshold, 5e-3 away."""
    metrics, folder = stage("model=vit_frozen", "adapter=piggyback", f"optimizer.adapter_lr={rate}")
    assert ("masked no weight" in caplog.text) == idle == (metrics["adapter/masked"] == 0)
    task = load_file(folder / "task.safetensors")
    packed = [tensor for name, tensor in task.items() if name.startswith("adapter/")]
    kept = sum(int(np.unpackbits(tensor.numpy()).sum()) for tensor in packed)
    numbers = json.loads((folder / "parameters.json").read_text())["adapter"]
    assert metrics["adapter/masked"] == pytest.approx(1 - kept / numbers)


# The linear probe


def test_the_probe_is_the_best_solved_head_and_its_features_are_computed_once(
    adapted: Any, stage: Stage, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    metrics, _ = adapted("att")
    frozen, _ = stage(*KINDS["frozen"], "head=best", "trainer.limit_batches=null")
    assert metrics["probe/head"] == frozen["head"]
    for name in ("test/accuracy", "test/loss", "val/accuracy", "val/loss", "test/accuracy_macro"):
        assert metrics[f"probe/{name}"] == pytest.approx(frozen[name], rel=1e-2)  # float32
    assert frozen["epochs"] == 0
    computed: list[str] = []
    extract = features.extract

    def counted(recipe: Any, network: Any, data: Any, split: str, views: int = 0) -> Any:
        computed.append(split)
        return extract(recipe, network, data, split, views)

    monkeypatch.setattr(features, "extract", counted)
    again, _ = stage(*KINDS["att"], "optimizer.coefficients_lr=0.5", "recast.num_templates=1", "seed=7")
    assert {name: value for name, value in again.items() if name.startswith("probe/")} == {
        name: value for name, value in metrics.items() if name.startswith("probe/")
    }
    assert computed == []
    assert again["mimicry/relative_error"] > 0.1
    assert "lossy" in caplog.text
    stage(*KINDS["att"], "dataset.split_seed=1")
    assert "train" in computed


def test_the_probe_leaves_the_run_as_it_is(adapted: Any, stage: Stage) -> None:
    metrics, folder = adapted("att")
    without, other = stage(*KINDS["att"], "probe=false")
    assert {name for name in metrics if name.startswith("probe/")} == metrics.keys() - without.keys()
    assert metrics["test/loss"] == without["test/loss"]
    assert (folder / "task.safetensors").read_bytes() == (other / "task.safetensors").read_bytes()


# evaluate


def task_of(folder: Path) -> tuple[str, str]:
    return "stage=evaluate", f"task={folder / 'task.safetensors'}"


@pytest.mark.parametrize("kind", KINDS)
def test_evaluate_repeats_the_test_to_the_bit(kind: str, adapted: Any, tiny: Compose, tmp_path: Path) -> None:
    metrics, folder = adapted(kind)
    settings, other = tiny(KINDS[kind][0], *task_of(folder)), tmp_path / "again"
    again = run_stage(with_values(settings, {"seed": 5}), other)  # nothing is drawn: the seed makes no difference
    tested = {name: value for name, value in metrics.items() if name.startswith("test/")}
    assert len(tested) == 11
    assert {name: value for name, value in again.items() if name.startswith("test/")} == tested
    assert read(other / "metrics.json") == again
    assert read(other / "parameters.json") == read(folder / "parameters.json")


def test_evaluate_repeats_the_test_of_an_unusual_batch_size(stage: Stage) -> None:
    metrics, folder = stage("model=vit_att", "dataset.eval_batch_size=7")
    again, _ = stage("model=vit_att", *task_of(folder), "dataset.eval_batch_size=null")
    assert again["test/loss"] == metrics["test/loss"]


def test_evaluate_uses_what_was_trained(adapted: Any, stage: Stage, tmp_path: Path) -> None:
    """Not what mimicry gave: with another task's numbers, other results."""
    _, folder = adapted("att")
    _, other = stage("model=vit_att", "seed=5")
    first, second = (stage("model=vit_att", *task_of(each))[0] for each in (folder, other))
    assert first["test/loss"] != second["test/loss"]


def test_evaluate_refuses_other_weights(adapted: Any, stage: Stage, weights: dict[str, Path], tmp_path: Path) -> None:
    _, folder = adapted("att")
    state = load_file(weights["digits_vit"])
    state["blocks.3.norm1.bias"][5] += 1e-3
    save_file(state, tmp_path / "other.safetensors")
    with pytest.raises(UserError) as error:
        stage("model=vit_att", f"model.weights={tmp_path / 'other.safetensors'}", *task_of(folder))
    assert_one_line(error, "task", folder, "digits_vit", "weights")


def test_evaluate_refuses_other_classes(adapted: Any, tiny: Compose, tmp_path: Path) -> None:
    _, folder = adapted("att")
    cfg = tiny("model=vit_att", *task_of(folder))
    cfg.dataset.part = "source"
    with pytest.raises(UserError) as error:
        run_stage(cfg, tmp_path)
    assert_one_line(error, "task", "classes", "digits")
    assert list(tmp_path.iterdir()) == []


def test_evaluate_takes_other_images_of_the_same_classes(
    adapted: Any, tiny: Compose, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The digits' own test images as files, of two of the classes: each class is found by its name."""
    _, folder = adapted("att")
    images = load_dataset(DatasetConfig(name="digits", part="target"), "nowhere")
    test = images.splits["test"]
    for split in ("train", "test"):
        for number, (image, label) in enumerate(zip(test.images, test.labels, strict=True)):
            if (name := images.classes[label]) in ("6", "9"):
                path = tmp_path / "images" / split / name / f"{split}{number}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(image).save(path)
    typed = (KINDS["att"][0], "dataset=folder", f"dataset.path={tmp_path / 'images'}", *task_of(folder))
    every = {"trainer.limit_batches": None}
    metrics = run_stage(with_values(tiny(KINDS["att"][0], *task_of(folder)), every), tmp_path / "own")
    assert not caplog.messages
    settings = with_values(tiny("model.backbone=digits_vit", *typed), every)
    found = run_stage(settings, tmp_path / "other")
    assert "these are not the images that" in caplog.text
    per_class = {name: value for name, value in found.items() if name.startswith("test/accuracy_per_class/")}
    assert per_class == {name: metrics[name] for name in (f"test/accuracy_per_class/{digit}" for digit in "69")}
    assert found["test/accuracy_macro"] == pytest.approx(sum(per_class.values()) / 2)


def test_images_are_given_the_labels_of_a_task_by_name() -> None:
    images = load_dataset(DatasetConfig(name="digits", part="target"), "nowhere")
    other = images.relabelled(("9", "x", "8", "7", "6", "5"))
    assert len(other.classes) == 6
    for split in ("train", "val", "test"):
        before = [images.classes[label] for label in images.splits[split].labels]
        assert [other.classes[label] for label in other.splits[split].labels] == before


def test_evaluate_refuses_another_bank_and_makes_its_own_again(
    adapted: Any, stage: Stage, tiny: Compose, tmp_path: Path
) -> None:
    metrics, folder = adapted("att")
    cfg = tiny("model=vit_att", "mimicry.seed=1", f"cache_dir={tmp_path / 'other'}")
    banks, path = bank_for(create_backbone(cfg.model), cfg.recast, cfg.mimicry, tmp_path / "other")
    with pytest.raises(UserError) as error:
        stage("model=vit_att", *task_of(folder), f"bank={path}")
    assert_one_line(error, "bank", path, banks.hash[:16])
    again, _ = stage("model=vit_att", *task_of(folder), f"cache_dir={tmp_path / 'other'}")
    assert again["test/loss"] == metrics["test/loss"]
    assert [file.name for file in (tmp_path / "other" / "banks").glob("*.safetensors")] == [path.name]


def test_evaluate_takes_the_bank_from_a_file(adapted: Any, stage: Stage, tmp_path: Path) -> None:
    metrics, folder = adapted("att")
    with safe_open(folder / "task.safetensors", "pt") as file:
        bank = json.loads(file.metadata()["recast_exp"])["bank"]
    given = tmp_path / "given.safetensors"
    given.write_bytes((cache_folder(None) / "banks" / f"{bank}.safetensors").read_bytes())
    again, _ = stage("model=vit_att", *task_of(folder), f"bank={given}", f"cache_dir={tmp_path / 'empty'}")
    assert again["test/loss"] == metrics["test/loss"]


# reconstruct


@pytest.mark.parametrize("model", ["vit_att_mlp", "resnet"])
def test_reconstruct_reports_an_exact_bank(model: str, stage: Stage) -> None:
    metrics, folder = stage(f"model={model}", "stage=reconstruct")
    report = read(folder / "reconstruction.json")
    assert {name for name in report if isinstance(report[name], float)} == metrics.keys()
    bank = Banks.load(Path(report["bank"]), report["hash"])
    assert report["layers"].keys() == bank.coefficients.keys()
    assert report["relative_error"] < 5e-7
    assert report["max_error"] < 1e-5
    assert report["cosine_similarity"] > 1 - 1e-9
    assert report["feature_similarity"] > 1 - 1e-6
    assert_picture(folder / "plots" / "reconstruction.png")
    counts = read(folder / "parameters.json")
    assert counts["coefficients"] == {"vit_att_mlp": 144, "resnet": 168}[model]
    assert counts["templates"] == sum(tensor.numel() for tensor in bank.templates.values())
    assert counts["task_file_bytes"] == 0


def test_reconstruct_measures_what_a_small_bank_loses(stage: Stage, weights: dict[str, Path]) -> None:
    _, folder = stage("model=vit_att", "stage=reconstruct", "recast.num_templates=1")
    report = read(folder / "reconstruction.json")
    bank = Banks.load(Path(report["bank"]))
    state = load_file(weights["digits_vit"])
    for layer, row in report["layers"].items():
        weight, rebuilt = state[f"{layer}.weight"].double(), bank.rebuilt(layer).double()
        assert row["relative_error"] == pytest.approx(((rebuilt - weight).norm() / weight.norm()).item())
        assert row["max_error"] == pytest.approx((rebuilt - weight).abs().max().item())
        cosine = (rebuilt * weight).sum() / rebuilt.norm() / weight.norm()
        assert row["cosine_similarity"] == pytest.approx(cosine.item())
        assert 0.1 < row["relative_error"] < 1
        assert row["feature_similarity"] < 0.999
    assert report["relative_error"] == max(row["relative_error"] for row in report["layers"].values())
    assert report["cosine_similarity"] == min(row["cosine_similarity"] for row in report["layers"].values())


@pytest.mark.parametrize("solver", ["gradient", "autoencoder"])
def test_reconstruct_with_the_authors_solvers_is_worse_than_the_closed_form(solver: str, stage: Stage) -> None:
    options = ("model=vit_att", "stage=reconstruct", "recast.num_groups=1", "recast.num_templates=2")
    exact, _ = stage(*options)
    metrics, folder = stage(*options, f"mimicry={solver}", "mimicry.steps=3")
    assert metrics["relative_error"] > exact["relative_error"]
    assert read(folder / "reconstruction.json")["settings"]["mimicry"]["name"] == solver


def test_reconstruct_gives_adapt_its_bank(stage: Stage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = f"cache_dir={tmp_path}"
    _, folder = stage("model=vit_mlp", "stage=reconstruct", cache)
    monkeypatch.setattr("recast_exp.models.bank_cache.mimic", None)
    _, other = stage("model=vit_mlp", cache)
    with safe_open(other / "task.safetensors", "pt") as file:
        record = json.loads(file.metadata()["recast_exp"])
    assert record["bank"] == read(folder / "reconstruction.json")["hash"]


def test_a_corrupted_cached_bank_is_made_anew_for_adapt(stage: Stage, adapted: Any, tmp_path: Path) -> None:
    metrics, folder = adapted("att")
    cache = f"cache_dir={tmp_path}"
    stage("model=vit_att", "stage=reconstruct", cache)
    (bank,) = (tmp_path / "banks").glob("*.safetensors")
    whole = bank.read_bytes()
    bank.write_bytes(whole[:-8] + bytes(8))
    again, other = stage(*KINDS["att"], "probe=false", cache)
    assert bank.read_bytes() == whole
    assert again["test/loss"] == metrics["test/loss"]
    assert (other / "task.safetensors").read_bytes() == (folder / "task.safetensors").read_bytes()


# Ranks


@pytest.fixture
def second_rank(monkeypatch: pytest.MonkeyPatch) -> tuple[str, ...]:
    """This process is the second one of a run on two devices; the overrides of such a run."""
    monkeypatch.setenv("LOCAL_RANK", "1")
    return "trainer.devices=2", "trainer.strategy=ddp"


@pytest.mark.parametrize("name", ["reconstruct", "check"])
def test_the_first_rank_alone_writes_and_prints(
    name: str, second_rank: tuple[str, ...], stage: Stage, capsys: pytest.CaptureFixture[str]
) -> None:
    metrics, folder = stage("model=vit_att", f"stage={name}", *second_rank)
    assert metrics
    assert list(folder.iterdir()) == []
    assert capsys.readouterr().out == ""


def test_the_first_rank_alone_writes_and_prints_an_evaluation(
    adapted: Any, second_rank: tuple[str, ...], stage: Stage, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    whole, folder = adapted("att")
    capsys.readouterr()

    def alone(recipe: Recipe, *args: Any) -> loop.Tested:
        """The first rank, which the test would wait for, is not there."""
        trainer = dataclasses.replace(recipe.trainer, devices=1, strategy="auto")
        return loop.test(dataclasses.replace(recipe, trainer=trainer), *args)

    monkeypatch.setattr("recast_exp.experiment.evaluation.test", alone)
    metrics, other = stage("model=vit_att", *task_of(folder), *second_rank)
    assert metrics["test/loss"] == whole["test/loss"]
    assert list(other.iterdir()) == []
    assert capsys.readouterr().out == ""


def test_ranks_of_a_program_around_it_do_not_matter_to_a_run_on_one_device(
    adapted: Any, stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, folder = adapted("att")
    variables = {"NODE_RANK": 1, "LOCAL_RANK": 1, "RANK": 3, "WORLD_SIZE": 4}
    variables |= {"SLURM_NTASKS": 4, "SLURM_JOB_NAME": "train", "SLURM_PROCID": 3, "SLURM_LOCALID": 1}
    for name, value in variables.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setattr(rank_zero_only, "rank", 3)  # as where Lightning is imported with these variables
    metrics, other = stage(*KINDS["att"], "logger=tensorboard")
    assert metrics["test/loss"] == whole["test/loss"]
    assert (other / "task.safetensors").read_bytes() == (folder / "task.safetensors").read_bytes()
    assert read(other / "metrics.json") == metrics
    assert list(other.rglob("events.out.tfevents.*"))
    assert rank_zero_only.rank == 3
    assert os.environ["WORLD_SIZE"] == "4"
    stage("model=vit_att", *task_of(other))


@pytest.mark.slow
@pytest.mark.parametrize(
    "variables", [{"NODE_RANK": "1", "LOCAL_RANK": "1"}, {"SLURM_NTASKS": "4", "SLURM_JOB_NAME": "train"}]
)
def test_a_command_among_other_processes_writes_its_results(
    variables: dict[str, str], weights: dict[str, Path], tmp_path: Path
) -> None:
    options = ("trainer=cpu", "trainer.max_epochs=1", "trainer.limit_batches=1", "probe=false")
    command = [sys.executable, "-m", "recast_exp", *options, f"model.weights={weights['digits_vit']}"]
    done = subprocess.run(
        [*command, "hydra.run.dir=run"], cwd=tmp_path, env=os.environ | variables, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert {"metrics.json", "task.safetensors"} <= {file.name for file in (tmp_path / "run").iterdir()}
    assert "test" in done.stdout
