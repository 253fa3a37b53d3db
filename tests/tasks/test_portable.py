"""A task file needs nothing of the machine that wrote it but the pretrained weights."""

from __future__ import annotations

import copy
import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

import recast_exp
from recast_exp import RecastConfig, RecastModel
from recast_exp.models import loading
from recast_exp.recast import Banks, Origin
from recast_exp.runs.task_header import read_record
from recast_exp.tasks import library
from support import task_files
from support.adapted import create, images, logits, train
from support.helpers import assert_one_line

Enliven = Callable[..., nn.Module]

RANDOM = {
    "TINYLORA": {"u": 4},
    "VERA": {"r": 4},
    "RANDLORA": {"r": 4},
    "ADAMSS": {"r": 4},
    "VBLORA": {"num_vectors": 8, "vector_length": 24, "topk": 2},
}
"""Methods of peft that begin with random numbers."""


@pytest.fixture
def stock(enliven: Enliven) -> nn.Module:
    return enliven(create("vit", num_classes=4))


def trained(stock: nn.Module, *adapters: Any, **grouping: Any) -> tuple[nn.Module, Banks]:
    model = copy.deepcopy(stock).requires_grad_(False)
    model.get_classifier().requires_grad_(True)  # type: ignore[operator]
    banks = recast_exp.mimic(model, recast_exp.find_groups(model, **{"targets": ["*.attn.qkv", "*.fc1"], **grouping}))
    recast_exp.inject(model, banks)
    for adapter in adapters:
        recast_exp.inject_adapter(model, adapter)
    train(library._task_of(model, banks))
    return model, banks


@pytest.mark.parametrize("grouping", [{}, {"granularity": "row"}, {"num_templates": 1}], ids=str)
def test_templates_with_other_last_bits_give_the_same_logits(
    grouping: dict[str, Any], stock: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stand-in for another processor: templates that are mixed in another way, which no bit of the first survives."""
    model, banks = trained(stock, **grouping)
    task = recast_exp.load_task(recast_exp.save_task(model, tmp_path / "task.safetensors", banks=banks))
    real = loading.remake

    def remake(network: nn.Module, groups: Any, origin: Origin) -> Banks:
        return real(network, groups, dataclasses.replace(origin, seed=origin.seed + 1))

    monkeypatch.setattr(loading, "remake", remake)
    applied = recast_exp.apply_task(copy.deepcopy(stock), task)
    assert not torch.equal(logits(model), logits(stock))
    torch.testing.assert_close(logits(applied), logits(model), rtol=1e-4, atol=1e-5)


def test_a_model_with_templates_of_another_seed_takes_a_task(enliven: Enliven, tmp_path: Path) -> None:
    backbone = enliven(create("vit"))
    config = RecastConfig(targets=["*.attn.qkv"])
    first, second = (RecastModel.wrap(copy.deepcopy(backbone), recast=config, seed=seed) for seed in (1, 2))
    first.add_task("pets", ["cat", "dog"])
    first.set_task("pets")
    with torch.no_grad():
        for parameter in first.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1)
        expected = first(images())
        second.load_task(first.save_task("pets", tmp_path / "pets.safetensors"))
        second.set_task("pets")
        torch.testing.assert_close(second(images()), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("dtype", "seed", "other", "other_seed"), [("int8", 1, "float32", 1), ("int8", 1, "int8", 2)])
def test_rounded_templates_of_another_kind_or_seed_are_refused(
    dtype: str, seed: int, other: str, other_seed: int, enliven: Enliven, tmp_path: Path
) -> None:
    """They make the pretrained weights but roughly, each in its own way."""
    backbone = enliven(create("vit"))
    first, second = (
        RecastModel.wrap(
            copy.deepcopy(backbone), recast=RecastConfig(targets=["*.attn.qkv"], template_dtype=name), seed=number
        )
        for name, number in ((dtype, seed), (other, other_seed))
    )
    first.add_task("pets", 2)
    path = first.save_task("pets", tmp_path / "pets.safetensors")
    first.load_task(path, "again")
    with pytest.raises(recast_exp.UserError) as error:
        second.load_task(path)
    assert_one_line(error, path, "has coefficients for templates made by", dtype)


LOAD = """
import sys, torch
import recast_exp
from support.adapted import create, images, logits
folder = sys.argv[1]
for name in sys.argv[2:]:
    model = create("vit", num_classes=4)
    model.load_state_dict(torch.load(f"{folder}/weights.pth", weights_only=True))
    torch.manual_seed(1234)
    torch.rand(7)
    task = recast_exp.load_task(f"{folder}/{name}.safetensors")
    torch.save(logits(recast_exp.apply_task(model, task)), f"{folder}/{name}.pth")
"""


def test_files_are_restored_to_the_bit_elsewhere(stock: nn.Module, tmp_path: Path) -> None:
    """In another process, with another cache and another state of the generators."""
    expected = {}
    for name, arguments in {"none": None, **RANDOM}.items():
        adapters = [recast_exp.Peft(method=name, arguments=arguments)] if arguments else []
        model, banks = trained(stock, *adapters)
        recast_exp.save_task(model, tmp_path / f"{name}.safetensors", banks=banks)
        expected[name] = logits(model)
    torch.save(stock.state_dict(), tmp_path / "weights.pth")
    own = {"RECAST_EXP_CACHE": str(tmp_path / "empty"), "PYTHONPATH": str(Path(__file__).parents[1])}
    command = [sys.executable, "-c", LOAD, str(tmp_path), *expected]
    subprocess.run(command, check=True, env=os.environ | own, timeout=120)
    for name, values in expected.items():
        assert torch.equal(torch.load(tmp_path / f"{name}.pth", weights_only=True), values), name


def test_only_what_is_random_is_kept_beside_what_trains(stock: nn.Module, tmp_path: Path) -> None:
    sizes = {}
    for method, arguments in {**RANDOM, "LORA": {"r": 4}, "BOFT": {"boft_block_size": 4}}.items():
        model, banks = trained(stock, recast_exp.Peft(method=method, arguments=arguments))
        task = recast_exp.load_task(recast_exp.save_task(model, tmp_path / f"{method}.safetensors", banks=banks))
        sizes[method] = sum(tensor.numel() for name, tensor in task.tensors.items() if name.startswith("fixed/"))
    # BOFT's permutations and VeRA's projections follow from their options
    assert sizes["LORA"] == sizes["BOFT"] == sizes["VBLORA"] == sizes["VERA"] == 0
    assert sizes["TINYLORA"] > 0  # random projections, and singular vectors, whose signs depend on the machine


def test_a_task_of_recast_att_takes_two_kibibytes_without_its_head(tmp_path: Path) -> None:
    network = timm.create_model("vit_small_patch16_224", num_classes=0, img_size=32)
    model = RecastModel.wrap(network, recast=RecastConfig(targets=["*.attn.qkv"]))
    model.add_task("pets", 2)
    path = model.save_task("pets", tmp_path / "pets.safetensors")
    with safe_open(path, "pt") as file:
        record = json.loads(file.metadata()["recast_exp"])
        head = [file.get_slice(name).get_shape() for name in file.keys() if name.startswith("head/")]  # noqa: SIM118
    of_head = 4 * sum(torch.Size(shape).numel() for shape in head)
    assert of_head == 4 * 2 * 385
    assert path.stat().st_size - of_head <= 2048
    assert record["templates"]["solver"] == "closed_form"
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


def test_the_relative_form_is_the_identity_before_training(tmp_path: Path, enliven: Enliven) -> None:
    model = RecastModel.wrap(enliven(create("vit")), recast=RecastConfig(targets=["*.attn.qkv"]))
    model.add_task("pets", 2)
    before = recast_exp.load_task(model.save_task("pets", tmp_path / "before.safetensors")).relative
    own = [relative[0, at] for at, relative in enumerate(before.values())]
    assert list(before) == ["blocks.0.attn.qkv", "blocks.1.attn.qkv"]
    torch.testing.assert_close(torch.stack(own), torch.ones(2))
    torch.testing.assert_close(torch.stack([r.sum() for r in before.values()]), torch.ones(2))
    model.set_task("pets")
    weights = [layer.attn.qkv.weight.detach().clone() for layer in model.network.blocks]  # type: ignore[union-attr]
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.2 * torch.randn_like(parameter))
    after = recast_exp.load_task(model.save_task("pets", tmp_path / "after.safetensors")).relative
    for layer, row in zip(model.network.blocks, after.values(), strict=True):  # type: ignore[arg-type]
        rebuilt = row[0, 0] * weights[0] + row[0, 1] * weights[1]
        torch.testing.assert_close(layer.attn.qkv.weight, rebuilt, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("way", [["bfloat16"], ["half"], ["double"], ["half", "float"], ["double", "float"]], ids=str)
def test_a_model_that_was_converted_after_inject_is_saved_only_as_it_was(
    way: list[str], stock: nn.Module, tmp_path: Path
) -> None:
    model, banks = trained(stock)
    expected = logits(model)
    for name in way:
        getattr(model, name)()
    path = tmp_path / "task.safetensors"
    if way == ["double", "float"]:
        recast_exp.save_task(model, path, banks=banks)
        assert torch.equal(logits(recast_exp.apply_task(copy.deepcopy(stock), path)), expected)
        return
    with pytest.raises(recast_exp.UserError) as error:
        recast_exp.save_task(model, path, banks=banks)
    assert_one_line(error, "onvert a model before mimic")
    assert not path.exists()


def test_other_weights_are_refused(stock: nn.Module, tmp_path: Path) -> None:
    model, banks = trained(stock)
    task = recast_exp.load_task(recast_exp.save_task(model, tmp_path / "task.safetensors", banks=banks))
    for layer in ("blocks.0.attn.qkv.weight", "blocks.0.norm1.bias"):  # in a template, and in none
        other = copy.deepcopy(stock)
        with torch.no_grad():
            other.get_parameter(layer).view(-1)[0] += 1
        with pytest.raises(recast_exp.UserError) as error:
            recast_exp.apply_task(other, task)
        assert_one_line(error, task.path, "expected", "got other")


@pytest.mark.parametrize(
    "groups",
    [
        [["g", 2, 1, "blocks.0.attn.qkv", "blocks.9.attn.qkv"]],
        [["g", 2, 7, "blocks.0.attn.qkv", "blocks.1.attn.qkv"]],
        [["g", 2, 1, "blocks.0.attn.qkv", "blocks.1.mlp.fc2"]],
        [["g", 2**30, 1, "blocks.0.attn.qkv", "blocks.1.attn.qkv"]],
        [["g", 3, 1, "blocks.0.attn.qkv", "blocks.1.attn.qkv"]],
        [["g", 2, 1, "blocks.0.norm1", "blocks.1.norm1"]],
    ],
    ids=str,
)
@pytest.mark.parametrize("sets", [2, 2**30])
def test_groups_that_the_backbone_does_not_have(
    groups: list[Any], sets: int, stock: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A record that others have changed: one line, and no memory for what it announces."""
    monkeypatch.setenv("RECAST_EXP_CACHE", str(tmp_path / "cache"))
    model, banks = trained(stock, targets=["*.attn.qkv"])
    path = recast_exp.save_task(model, tmp_path / "task.safetensors", banks=banks)
    record = read_record(path)
    record["templates"] |= {"groups": groups, "num_sets": sets}  # type: ignore[typeddict-item]
    tensors = load_file(path)
    size = sets * sum((len(group) - 3) * group[1] * group[2] for group in groups)
    if size < 10_000:
        tensors["coefficients"] = torch.zeros(size)
    save_file(tensors, path, {"recast_exp": json.dumps(record)})
    with pytest.raises(recast_exp.UserError) as error:
        recast_exp.apply_task(copy.deepcopy(stock), recast_exp.load_task(path))
    assert "\n" not in str(error.value) and "task" in str(error.value)


def test_a_damaged_bank_in_the_cache_is_made_again(
    stock: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("RECAST_EXP_CACHE", str(tmp_path / "cache"))
    model, banks = trained(stock)
    task = recast_exp.load_task(recast_exp.save_task(model, tmp_path / "task.safetensors", banks=banks))
    cached = tmp_path / "cache" / "banks" / f"{banks.hash}.safetensors"
    banks.save(cached)
    cached.write_bytes(cached.read_bytes()[:-8] + b"damaged!")
    assert torch.equal(logits(recast_exp.apply_task(copy.deepcopy(stock), task)), logits(model))
    assert f"{cached}" in caplog.text and "made again" in caplog.text


@pytest.mark.parametrize("changed", ["coefficients", "relative", "more"])
def test_tensors_of_other_lengths_are_refused(changed: str, stock: nn.Module, tmp_path: Path) -> None:
    model, banks = trained(stock)
    task = recast_exp.load_task(recast_exp.save_task(model, tmp_path / "task.safetensors", banks=banks))
    task.tensors[changed] = torch.zeros(3)
    with pytest.raises(recast_exp.UserError) as error:
        if changed == "relative":
            _ = task.relative
        else:
            recast_exp.apply_task(copy.deepcopy(stock), task)
    assert_one_line(error, "task: expected", changed)


def test_adapters_of_the_package_keep_nothing_fixed_that_is_not_declared(enliven: Enliven, tmp_path: Path) -> None:
    model = enliven(create("vit", num_classes=4))
    recast_exp.inject_adapter(model, recast_exp.MeLo(rank=2))
    adapted = library._task_of(model.requires_grad_(False), None)
    task_files.write(tmp_path / "task.safetensors", adapted)
    assert not adapted.fixed


def without_templates(path: Path, adapter: recast_exp.Adapter | None, name: str = "vit_tiny_patch16_224") -> nn.Module:
    """The file of a task that is an adapter and a head; returns its model."""
    torch.manual_seed(0)
    model: nn.Module = timm.create_model(name, num_classes=3, **IMAGES.get(name, {})).eval().requires_grad_(False)
    if adapter is not None:
        recast_exp.inject_adapter(model, adapter)
    model.get_classifier().requires_grad_(True)  # type: ignore[operator]
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn_like(parameter)
    recast_exp.save_task(model, path)
    return model


IMAGES: dict[str, dict[str, Any]] = {"vit_tiny_patch16_224": {"img_size": 32}}


def recast(name: str = "vit_tiny_patch16_224", **config: Any) -> RecastModel:
    torch.manual_seed(0)
    targets = ["*.attn.qkv"] if "vit" in name else ["layer1.?.conv?"]
    network = timm.create_model(name, num_classes=3, **IMAGES.get(name, {}))
    return RecastModel.wrap(network, recast=RecastConfig(targets=targets, **config))


@pytest.mark.parametrize(
    "adapter",
    [None, recast_exp.MeLo(rank=2), recast_exp.SSF(), recast_exp.Piggyback(), recast_exp.Peft(), recast_exp.Growth()],
    ids=str,
)
def test_a_task_of_save_task_without_templates_is_added(adapter: Any, tmp_path: Path) -> None:
    path = tmp_path / "task.safetensors"
    expected = logits(without_templates(path, adapter))
    model = recast()
    model.load_task(path, "pets")
    with model.task("pets"):
        torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-5)
    torch.manual_seed(1)
    other = timm.create_model("vit_tiny_patch16_224", num_classes=3, img_size=32)
    with pytest.raises(recast_exp.UserError, match="other weights"):
        RecastModel.wrap(other, recast=RecastConfig(targets=["*.attn.qkv"])).load_task(path)


@pytest.mark.parametrize(
    ("adapter", "name", "config", "reason"),
    [
        (recast_exp.BitFit(), "vit_tiny_patch16_224", {}, "does not tell all of its own"),
        (None, "resnet18", {}, "does not tell all of its own"),
        (None, "vit_tiny_patch16_224", {"num_templates": 1}, "do not make the pretrained weights exactly"),
        (None, "vit_tiny_patch16_224", {"template_dtype": "int8"}, "do not make the pretrained weights exactly"),
    ],
    ids=str,
)
def test_a_task_without_templates_that_would_be_another_is_refused(
    adapter: Any, name: str, config: dict[str, Any], reason: str, tmp_path: Path
) -> None:
    without_templates(tmp_path / "task.safetensors", adapter, name)
    model = recast(name, **config)
    with pytest.raises(recast_exp.UserError) as error:
        model.load_task(tmp_path / "task.safetensors")
    assert_one_line(error, reason, "apply_task")
    assert not model.tasks
