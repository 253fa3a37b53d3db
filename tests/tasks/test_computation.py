"""The same weights with other arguments of timm compute other features: a task knows its own, and refuses others."""

from __future__ import annotations

import copy
import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from recast_exp import (
    MeLo,
    Peft,
    RecastConfig,
    RecastModel,
    UserError,
    apply_task,
    find_groups,
    inject,
    inject_adapter,
    load_task,
    merge_tasks,
    mimic,
    save_task,
)
from recast_exp.adapters import Adapter
from recast_exp.models.computation import differences, stock
from recast_exp.runs.task_header import read_record
from recast_exp.tasks.library import described
from support.helpers import assert_one_line

VIT: dict[str, Any] = {"img_size": 32, "depth": 2, "embed_dim": 24, "num_heads": 2}
OTHERS: list[tuple[str, dict[str, Any], dict[str, Any], str]] = [
    ("vit_tiny_patch16_224", VIT, {"num_heads": 4}, "num_heads of blocks.0.attn"),
    ("vit_tiny_patch16_224", VIT, {"act_layer": "relu"}, "kind of blocks.0.mlp.act"),
    ("resnet18", {"channels": (8, 8, 16, 24)}, {"output_stride": 8}, "stride of layer3.0"),
]
"""timm's name, arguments that make it small, arguments that no weight shows, and what they change."""


@torch.no_grad()
def network(name: str, num_classes: int = 3, **arguments: Any) -> nn.Module:
    """The same weights with all arguments."""
    torch.manual_seed(0)
    made: nn.Module = timm.create_model(name, num_classes=0, **arguments)
    generator = torch.Generator().manual_seed(0)
    for parameter in made.parameters():
        if parameter.dim() > 1:
            parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    made.reset_classifier(num_classes)  # type: ignore[operator]
    return made.eval()


def targets_of(model: nn.Module) -> list[str]:
    return ["*.attn.qkv"] if hasattr(model, "blocks") else ["layer1.?.conv?"]


def images(size: int = 32) -> Tensor:
    return torch.randn(4, 3, size, size, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def saved(path: Path, model: nn.Module, adapter: Adapter | None = None) -> tuple[Path, Tensor]:
    """The file of a task whose parameters have moved, and its logits."""
    model.requires_grad_(False)
    banks = mimic(model, find_groups(model, targets=targets_of(model)))
    inject(model, banks)
    if adapter is not None:
        inject_adapter(model, adapter)
    model.get_classifier().requires_grad_(True)  # type: ignore[operator]
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter += 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(2))
    return save_task(model, path, banks=banks), model(images())


@pytest.mark.parametrize(("name", "small", "more", "fact"), OTHERS, ids=lambda value: str(value)[:30])
def test_a_task_is_one_of_a_model_that_computes_the_same(
    name: str, small: dict[str, Any], more: dict[str, Any], fact: str, tmp_path: Path
) -> None:
    plain, other = small, small | more
    of_plain, _ = saved(tmp_path / "plain.safetensors", network(name, **plain))
    of_other, expected = saved(tmp_path / "other.safetensors", network(name, **other))
    for arguments, path in ((plain, of_other), (other, of_plain)):
        with pytest.raises(UserError) as error:
            apply_task(network(name, **arguments), path)
        assert_one_line(error, "model: expected one that computes as ", f"for {path}", fact)
        model = RecastModel.wrap(
            network(name, **arguments), recast=RecastConfig(targets=targets_of(network(name, **small)))
        )
        with pytest.raises(UserError) as error:
            model.load_task(path, "pets")
        assert_one_line(error, fact)
        assert not model.tasks
    assert torch.equal(apply_task(network(name, **other), of_other)(images()), expected)


@pytest.mark.parametrize("adapter", [None, MeLo(rank=2), Peft(), Peft(method="IA3")], ids=str)
@pytest.mark.parametrize("num_classes", [0, 5])
def test_classifiers_and_adapters_are_no_difference(adapter: Adapter | None, num_classes: int, tmp_path: Path) -> None:
    path, expected = saved(tmp_path / "task.safetensors", network("vit_tiny_patch16_224", **VIT), adapter)
    model = network("vit_tiny_patch16_224", num_classes, **VIT)
    assert torch.equal(apply_task(model, path)(images()), expected)


def test_what_trains_a_model_is_no_difference() -> None:
    model = network("vit_tiny_patch16_224", 0, img_size=32, drop_path_rate=0.1, proj_drop_rate=0.1)
    model.set_grad_checkpointing()  # type: ignore[operator]
    plain = stock(described(model))
    assert plain is not None and differences(plain, model) == {}


@pytest.mark.parametrize("backbone", ["hf-hub:owner/name", "no_model_of_timm"])
def test_what_timm_does_not_make_is_not_compared(backbone: str) -> None:
    model = network("vit_tiny_patch16_224", 0, img_size=32)
    settings = dataclasses.replace(described(model), backbone=backbone)
    assert stock(settings) is None


def test_a_size_that_the_name_alone_does_not_take_is_no_reason_to_lose_a_task(tmp_path: Path) -> None:
    model = network("swin_tiny_patch4_window7_224", depths=(2,), num_heads=(2,), embed_dim=8, img_size=28, patch_size=2)
    model.requires_grad_(False).get_classifier().requires_grad_(True)  # type: ignore[operator]
    plain = copy.deepcopy(model)
    path = save_task(model, tmp_path / "task.safetensors")
    assert torch.equal(apply_task(plain, path)(images(28)), model(images(28)))


def without_the_entry(path: Path) -> Path:
    """The file as versions before the entry have written it."""
    record: Any = read_record(path)
    for entry in ("computation", "checksum"):
        del record[entry]
    save_file(load_file(path), path, {"recast_exp": json.dumps(record)})
    return path


def test_files_that_do_not_tell_load_as_before(tmp_path: Path) -> None:
    model = network("vit_tiny_patch16_224", **VIT | {"num_heads": 4})
    path, expected = saved(tmp_path / "task.safetensors", model)
    applied = apply_task(network("vit_tiny_patch16_224", **VIT | {"num_heads": 4}), without_the_entry(path))
    assert torch.equal(applied(images()), expected)


def with_arguments(path: Path, tmp_path: Path) -> Path:
    """The file as a run with `model.arguments` writes it, whose network is timm's with these arguments."""
    record: Any = read_record(path)
    del record["checksum"]
    record["computation"] = {}
    record["config"]["model"]["arguments"] = VIT | {"num_heads": 4}
    del record["config"]["model"]["arguments"]["img_size"]
    save_file(load_file(path), tmp_path / "run.safetensors", {"recast_exp": json.dumps(record)})
    return tmp_path / "run.safetensors"


def test_arguments_stay_with_a_task(tmp_path: Path) -> None:
    """In a model of several tasks, in a file of it, and in files of merged tasks."""
    arguments = VIT | {"num_heads": 4}
    of_run, expected = saved(tmp_path / "task.safetensors", network("vit_tiny_patch16_224", **arguments))
    of_run = with_arguments(of_run, tmp_path)
    task = load_task(of_run)
    assert task.settings.arguments["num_heads"] == 4
    for num_classes in (0, 3):
        model = network("vit_tiny_patch16_224", num_classes, img_size=32, **task.settings.arguments)
        assert torch.equal(apply_task(model, task)(images()), expected)
    with pytest.raises(UserError, match=r"blocks\.0\.attn is 2, not 4; pass \*\*task\.settings\.arguments"):
        apply_task(network("vit_tiny_patch16_224", **VIT), task)

    model = RecastModel.wrap(network("vit_tiny_patch16_224", **arguments), recast=RecastConfig(targets=["*.attn.qkv"]))
    model.load_task(of_run, "pets")
    model.add_task("birds", 2)
    for name in ("pets", "birds"):
        assert load_task(model.save_task(name, tmp_path / f"{name}.safetensors")).settings.arguments["num_heads"] == 4

    pair = [of_run, tmp_path / "pets.safetensors"]
    merged = merge_tasks(network("vit_tiny_patch16_224", 0, **arguments), pair)
    for path in merged.save(tmp_path / "merged"):
        found = load_task(path)
        assert found.settings.arguments == task.settings.arguments
        applied = apply_task(network("vit_tiny_patch16_224", **arguments), found)
        torch.testing.assert_close(applied(images()), expected, rtol=1e-4, atol=1e-5)


def test_a_task_keeps_the_images_that_it_expects(tmp_path: Path) -> None:
    first = network("vit_tiny_patch16_224", **VIT)
    first.pretrained_cfg = {**first.pretrained_cfg, "mean": (0.1, 0.2, 0.3), "std": (1.0, 1.0, 1.0)}  # type: ignore
    first.default_cfg = first.pretrained_cfg
    path, _ = saved(tmp_path / "task.safetensors", first)
    model = RecastModel.wrap(network("vit_tiny_patch16_224", **VIT), recast=RecastConfig(targets=["*.attn.qkv"]))
    assert model.input is not None and model.input.mean == (0.5, 0.5, 0.5)
    model.load_task(path, "pets")
    again = load_task(model.save_task("pets", tmp_path / "again.safetensors"))
    assert again.input == load_task(path).input and again.input.mean == (0.1, 0.2, 0.3)
