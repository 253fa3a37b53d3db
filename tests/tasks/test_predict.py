"""`RecastModel.predict`: images of any kind, each prepared for its own task."""

from __future__ import annotations

import dataclasses
import re
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from torch import nn

from recast_exp import MeLo, RecastConfig, RecastModel, UnknownNameError, UserError
from recast_exp.tasks.prediction import prepared

VIT: dict[str, Any] = {"img_size": 32, "depth": 2, "embed_dim": 24, "num_heads": 2}


@pytest.fixture
def model(enliven: Callable[..., nn.Module]) -> RecastModel:
    network = enliven(timm.create_model("vit_tiny_patch16_224", num_classes=0, **VIT))
    made = RecastModel.wrap(network, recast=RecastConfig(targets=["*.attn.qkv"]))
    made.add_task("pets", ["cat", "dog"])
    made.add_task("signs", ["stop", "yield", "other"], adapter=MeLo(rank=2))
    return made


@pytest.fixture
def pixels() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (5, 40, 50, 3), dtype=np.uint8)


def test_images_of_any_kind_are_the_same(model: RecastModel, pixels: np.ndarray, tmp_path: Path) -> None:
    model.set_task("pets")
    files = []
    for number, image in enumerate(pixels):
        files.append(tmp_path / f"{number} ü.png")
        Image.fromarray(image).save(files[-1])
    expected = model.predict(files)
    assert model.predict([str(file) for file in files]) == expected
    assert model.predict([Image.fromarray(image) for image in pixels]) == expected
    assert model.predict(pixels) == model.predict(torch.from_numpy(pixels)) == expected
    assert model.predict(torch.from_numpy(pixels).permute(0, 3, 1, 2)) == expected
    flipped = np.ascontiguousarray(pixels[..., ::-1])
    assert model.predict(list(flipped[..., ::-1])) == expected  # a view that runs backwards
    one = model.predict(files[0])
    assert len(one) == 1 and one[0].label == expected[0].label
    assert model.predict([]) == []
    for found in expected:
        assert found.task == "pets" and {label for label, _ in found.top} == {"cat", "dog"}
        assert sum(probability for _, probability in found.top) == pytest.approx(1)
        assert found.top[0] == (found.label, found.probability) and found.top[0][1] >= found.top[1][1]


def test_predictions_are_those_of_the_model(model: RecastModel, pixels: np.ndarray) -> None:
    assert model.input is not None
    mean, std = model.input.constants()
    batch = torch.stack([(prepared(image, model.input).float() / 255 - mean) / std for image in pixels])
    names = ["signs", "pets", "signs", "pets", "pets"]
    with torch.no_grad():
        logits = model(batch, tasks=names)
    found = model.predict(pixels, tasks=names, top=1)
    assert [each.task for each in found] == names
    for each, line in zip(found, logits, strict=True):
        assert each.label == model.tasks[each.task].classes[line.argmax()]
        assert each.probability == pytest.approx(float(line.softmax(0).max()), abs=1e-5)
        assert len(each.top) == 1
    everything = model.predict(pixels, tasks="signs")
    assert {each.task for each in everything} == {"signs"}


def test_each_task_has_its_own_preprocessing(model: RecastModel, pixels: np.ndarray) -> None:
    before = model.predict(pixels, tasks="pets")
    assert model.input is not None
    model._tasks["pets"].input = dataclasses.replace(model.input, mean=(0.9, 0.1, 0.5))
    assert model.predict(pixels, tasks="pets") != before
    assert model.predict(pixels, tasks="signs") == model.predict(pixels, tasks=["signs"] * 5)


def test_tasks_have_sizes_of_their_own(pixels: np.ndarray, enliven: Callable[..., nn.Module]) -> None:
    network = enliven(timm.create_model("resnet18", num_classes=0, channels=(8, 8, 16, 16)))
    model = RecastModel.wrap(network, recast=RecastConfig(targets=["layer?.1.conv?"]))
    assert model.input is not None
    for name, size in (("small", 32), ("large", 64), ("other", 32)):
        model.add_task(name, ["cat", "dog"])
        model._tasks[name].input = dataclasses.replace(model.input, size=size)
    names = ["small", "large", "other", "large", "small"]
    found = model.predict(pixels, tasks=names)
    for each, name, image in zip(found, names, pixels, strict=True):
        (alone,) = model.predict(image, tasks=name)
        assert each.task == name and each.label == alone.label
        assert each.probability == pytest.approx(alone.probability, abs=1e-5)


def test_threads_predict_while_the_model_trains(pixels: np.ndarray) -> None:
    torch.manual_seed(0)
    network = timm.create_model("vit_tiny_patch16_224", num_classes=0, drop_path_rate=0.5, pos_drop_rate=0.5, **VIT)
    model = RecastModel.wrap(network, recast=RecastConfig(targets=["*.attn.qkv"]))
    model.add_task("pets", ["cat", "dog"])
    expected = model.predict(pixels[0], tasks="pets")
    model.train()
    found: list[Any] = []
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        threads = [
            threading.Thread(target=lambda: found.extend(model.predict(pixels[0], tasks="pets") for _ in range(10)))
            for _ in range(6)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(before)
    assert found == [expected] * 60
    assert model.training and model.network.training


def test_the_mode_and_the_gradients_stay(model: RecastModel, pixels: np.ndarray) -> None:
    model.set_task("signs")
    model.train()
    model.network.norm.eval()
    before = {name: module.training for name, module in model.named_modules()}
    model.predict(pixels, tasks=["pets", "signs", "pets", "signs", "signs"])
    assert model.training and model.active == "signs"
    assert {name: module.training for name, module in model.named_modules()} == before
    assert all(parameter.grad is None for parameter in model.parameters())


def test_refusals(model: RecastModel, pixels: np.ndarray, tmp_path: Path) -> None:
    (tmp_path / "text.png").write_text("no image")
    for call, kind, message in (
        (lambda: model.predict(pixels), UserError, "tasks: expected a task, as none is active"),
        (lambda: model.predict(pixels, tasks="pet"), UnknownNameError, "did you mean 'pets'?"),
        (
            lambda: model.predict(pixels, tasks=["pets"]),
            UserError,
            "tasks: expected 5 names, one for each image, got 1",
        ),
        (lambda: model.predict(pixels, tasks="pets", top=0), UserError, "top: expected an integer ≥ 1, got 0"),
        (lambda: model.predict(tmp_path / "text.png", tasks="pets"), UserError, "cannot be read as an image"),
        (lambda: model.predict(tmp_path / "gone.png", tasks="pets"), UserError, "expected an image file, got nothing"),
        (lambda: model.predict(pixels.astype(float), tasks="pets"), UserError, "or uint8 [3, H, W] or [H, W, 3], got"),
        (lambda: model.predict(pixels[..., :2], tasks="pets"), UserError, "or uint8 [3, H, W] or [H, W, 3], got"),
    ):
        with pytest.raises(kind, match=re.escape(message)) as error:
            call()
        assert "\n" not in str(error.value)
