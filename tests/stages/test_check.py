"""`stage=check`, and what a run writes for people to look at."""

from __future__ import annotations

import csv
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from recast_exp.config.schema import Config
from recast_exp.data.listing import images_at
from recast_exp.errors import MissingInputError
from recast_exp.models.loading import load_task
from support.fixtures_data import make_cub, make_flowers, make_folder, write_image
from support.helpers import assert_one_line
from support.running import run_stage

Compose = Callable[..., Config]
CUB = ("stage=check", "dataset=cub", "model.backbone=digits_vit", "dataset.verify=false")


def read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def assert_picture(path: Path) -> None:
    assert len(np.unique(np.asarray(Image.open(path).convert("L")))) > 10


def test_what_is_there(tiny: Compose, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_cub(tmp_path, numbers=(1, 4, 12), train=10, test=5)
    run = tmp_path / "run"
    metrics = run_stage(tiny(*CUB, f"data_dir={tmp_path}"), run)
    assert metrics == {"images/train": 24, "images/val": 6, "images/test": 15}
    out = capsys.readouterr().out
    for line in ("train 24 3 8", "val 6 3 2", "test 15 3 5"):
        assert line in " ".join(out.split())
    assert "Found: 3 classes, 30 train, 15 test images; not compared with an official set." in out
    assert "Images: 40 × 30 pixels." in out
    report = read(run / "check.json")
    assert report["bad"] == {}
    assert report["height"] == {"min": 30, "median": 30.0, "max": 30}
    card = read(run / "dataset.json")
    assert card["official_numbers"] == [1, 4, 12]
    assert card["images_per_class"] == {"train": [8] * 3, "val": [2] * 3, "test": [5] * 3}
    assert_picture(run / "plots" / "batch.png")
    assert not list(tmp_path.glob("**/pixels.bin"))


def test_copies_are_counted(tiny: Compose, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    images = make_cub(tmp_path, train=10, test=5) / "images"
    bird, other = sorted(images.glob("001*/*")), sorted(images.glob("004*/*"))  # the first ten of each are trained on
    shutil.copy(bird[0], bird[10])
    shutil.copy(bird[11], bird[12])
    shutil.copy(bird[1], other[10])
    run_stage(tiny(*CUB, f"data_dir={tmp_path}"), tmp_path / "run")
    found = read(tmp_path / "run" / "check.json")["copies"]
    assert found["seen_before"] == {"test": 2}
    assert found["other_classes"] == 1
    pairs = [(bird[0], bird[10]), (bird[11], bird[12]), (bird[1], other[10])]
    assert {frozenset(group) for group in found["groups"]} == {frozenset(map(str, pair)) for pair in pairs}
    assert (
        "Copies: 2 test image(s) are training or validation images, too; 1 image(s) are in more than one class; "
        "named in check.json."
    ) in capsys.readouterr().out.replace("\n", " ")


def test_images_without_copies_say_nothing(tiny: Compose, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_cub(tmp_path, train=10, test=5)
    run_stage(tiny(*CUB, f"data_dir={tmp_path}"), tmp_path / "run")
    assert read(tmp_path / "run" / "check.json")["copies"] == {"seen_before": {}, "other_classes": 0, "groups": []}
    assert "Copies" not in capsys.readouterr().out


def test_all_bad_images_are_named_at_once(tiny: Compose, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    images = make_cub(tmp_path, train=10, test=5) / "images"
    gone, cut = images / "001.Bird_1" / "Bird_0000.jpg", images / "004.Bird_4" / "Bird_0011.jpg"
    gone.unlink()
    cut.write_bytes(cut.read_bytes()[:200])
    with pytest.raises(MissingInputError) as error:
        run_stage(tiny(*CUB, f"data_dir={tmp_path}"), tmp_path / "run")
    report = tmp_path / "run" / "check.json"
    assert_one_line(error, "2 of 45 images are missing or damaged", report, "dataset.bad_images=skip")
    assert set(read(report)["bad"]) == {str(gone), str(cut)}
    assert read(report)["bad"][str(gone)] == "missing"
    out = capsys.readouterr().out.replace("\n", "")
    assert "2 image(s) cannot be used" in out
    metrics = run_stage(tiny(*CUB, f"data_dir={tmp_path}", "dataset.bad_images=skip"), tmp_path / "skipped")
    assert sum(metrics.values()) == 43
    assert set(read(tmp_path / "skipped" / "dataset.json")["skipped"]) == {str(gone), str(cut)}
    assert "Left out: 2 missing or damaged image(s)" in capsys.readouterr().out


def test_nothing_there(tiny: Compose, tmp_path: Path) -> None:
    with pytest.raises(MissingInputError, match="dataset cub: no folder"):
        run_stage(tiny(*CUB, f"data_dir={tmp_path}"), tmp_path / "run")


def test_the_input_is_the_backbones(tiny: Compose, tmp_path: Path) -> None:
    make_flowers(tmp_path)
    typed = ("stage=check", "dataset=flowers", "dataset.verify=false", "model.pretrained=true", f"data_dir={tmp_path}")
    run_stage(tiny(*typed, "model.backbone=resnet34.a1_in1k", "model.img_size=32"), tmp_path)
    assert_picture(tmp_path / "plots" / "batch.png")


@pytest.mark.parametrize("cache", ["memmap", "ram", "off"])
def test_a_run_shows_its_images_and_its_mistakes(tiny: Compose, tmp_path: Path, cache: str) -> None:
    make_cub(tmp_path, numbers=(1, 4, 12), train=4, test=5)
    typed = ("dataset=cub", "dataset.verify=false", "model=vit_att", "model.backbone=digits_vit", "recast.num_groups=6")
    cfg = tiny(*typed, f"data_dir={tmp_path}", f"dataset.cache={cache}", f"cache_dir={tmp_path / 'cache'}")
    metrics = run_stage(cfg, tmp_path / "run")
    for name in ("batch", "confusion", "mistakes"):
        assert_picture(tmp_path / "run" / "plots" / f"{name}.png")
    with (tmp_path / "run" / "predictions.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 15
    assert all(row["image"].startswith(row["class"] + "/Bird_") for row in rows)
    right = sum(row["class"] == row["predicted"] for row in rows)
    assert right / 15 == pytest.approx(metrics["test/accuracy"])
    assert sum(float(row["loss"]) for row in rows) / 15 == pytest.approx(metrics["test/loss"], rel=1e-5)
    assert bool(list((tmp_path / "cache").glob("images/*/pixels.bin"))) == (cache == "memmap")


def test_a_class_may_have_any_name(tiny: Compose, tmp_path: Path) -> None:
    root = make_folder(tmp_path / "images", count=10)
    (root / "class2").rename(root / "${oc.env:HOME} ü")
    typed = ("dataset=folder", "model=vit_frozen", "model.backbone=digits_vit", f"dataset.path={root}")
    trained = run_stage(tiny(*typed), tmp_path / "run")
    task = load_task(tmp_path / "run" / "task.safetensors")
    assert "${oc.env:HOME} ü" in task.classes
    again = run_stage(tiny("stage=evaluate", f"task={task.path}", f"dataset.path={root}"), tmp_path / "again")
    assert again["test/accuracy"] == trained["test/accuracy"]


def test_links_that_lead_round_in_a_circle_are_missing_images(tiny: Compose, tmp_path: Path) -> None:
    root = make_folder(tmp_path / "images", count=10)
    loop = root / "class2" / "loop.png"
    loop.symlink_to(loop)
    typed = ("dataset=folder", "stage=check", "model.backbone=digits_vit", f"dataset.path={root}")
    with pytest.raises(MissingInputError, match="1 of 21 images are missing or damaged"):
        run_stage(tiny(*typed), tmp_path / "refused")
    run_stage(tiny(*typed, "dataset.bad_images=skip"), tmp_path / "skipped")
    assert list(images_at(str(root))).count(loop) == 1  # a prediction names it among what cannot be read


def test_other_test_images_are_noticed(tiny: Compose, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    root = make_folder(tmp_path / "images", count=10)
    typed = ("dataset=folder", "model=vit_frozen", "model.backbone=digits_vit", f"dataset.path={root}")
    run_stage(tiny(*typed), tmp_path / "run")
    task = f"task={tmp_path / 'run' / 'task.safetensors'}"
    evaluate = ("stage=evaluate", task, f"dataset.path={root}")
    run_stage(tiny(*evaluate), tmp_path / "again")
    assert "not the images" not in caplog.text
    for name in ("predictions.csv", "plots/confusion.png"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "run" / name).read_bytes()
    write_image(root / "class2" / "0b.png", seed=5)
    run_stage(tiny(*evaluate), tmp_path / "other")
    assert "these are not the images" in caplog.text
