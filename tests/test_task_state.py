"""Task files and bank files, and the numbers that are reported of a model."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from omegaconf import DictConfig
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from recast_exp import bank_store
from recast_exp.assembly import assemble
from recast_exp.backbones import Backbone, create_backbone
from recast_exp.bank_store import bank_by_hash, bank_for
from recast_exp.data.transforms import InputSpec
from recast_exp.errors import MissingInputError, UserError
from recast_exp.recast import Banks, find_groups, mimic
from recast_exp.task_state import apply_task, count, load_task, save_task

Build = Callable[..., Any]
Compose = Callable[..., DictConfig]


def assert_one_line(error: pytest.ExceptionInfo[UserError], *expected: object) -> None:
    message = str(error.value)
    assert "\n" not in message
    for text in expected:
        assert str(text) in message, message


def copied(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in tensors.items()}


def equal(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


# Counts: by the papers' architectures, from the options under conf/


@pytest.mark.parametrize(
    ("overrides", "coefficients", "banks", "templates"),
    [
        (["model=vit_att"], 48, 6, 12 * 3 * 384**2),
        (["model=vit_mlp"], 96, 12, 12 * 8 * 384**2),
        (["model=vit_att_mlp"], 144, 18, 12 * 11 * 384**2),
        (["model=vit_att", "recast.granularity=projection"], 144, 6, 12 * 3 * 384**2),
        (["model=vit_att", "recast.granularity=head"], 48 * 3 * 6, 6, 12 * 3 * 384**2),
        (["model=vit_mlp", "recast.granularity=head"], 48 * (4 * 6 + 6), 12, 12 * 8 * 384**2),
        (["model=vit_att", "recast.num_coefficient_sets=1"], 24, 6, 12 * 3 * 384**2),
        (["model=vit_att", "recast.num_groups=3", "recast.num_templates=2"], 48, 3, 6 * 3 * 384**2),
        (["model=vit_att", "recast.num_groups=5", "recast.num_templates=null"], 2 * (9 + 9 + 4 * 3), 5, 12 * 3 * 384**2),
        (["model=resnet"], 168, 8, 9 * 2 * (2 * 64**2 + 3 * 128**2 + 5 * 256**2 + 2 * 512**2)),
        (["model=resnet", "model.backbone=resnet18"], 16, 8, 9 * 2 * (64**2 + 128**2 + 256**2 + 512**2)),
        (["model=vit_frozen"], 0, 0, 0),
        (["model=resnet_frozen"], 0, 0, 0),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_counts(overrides: list[str], coefficients: int, banks: int, templates: int, compose: Compose) -> None:
    family = "resnet34" if "model=resnet" in overrides[0] else "vit_small_patch16_224"
    name = next((text.partition("=")[2] for text in overrides if text.startswith("model.backbone=")), family)
    cfg = compose(f"model.backbone={name}", *overrides, "model.pretrained=false", "seed=7")
    network = timm.create_model(name, num_classes=0)
    whole = sum(parameter.numel() for parameter in network.parameters())
    spec = InputSpec(224, (0.5,), (0.5,), 1.0, "bicubic")
    backbone = Backbone(network, name, "fingerprint", spec)
    found = None
    if cfg.model.method == "recast":
        # The shapes alone matter here: nothing has to be solved.
        groups = bank_store.groups_of(backbone, cfg)
        found = mimic(network, groups, num_sets=cfg.recast.num_coefficient_sets)
    counts = count(assemble(network, cfg, found, 67), 1234)
    head = 68 - 1 and 67 * (network.num_features + 1)
    assert len(found.groups if found else ()) == banks
    assert {name: value for name, value in counts.items() if name != "layers"} == {
        "coefficients": coefficients,
        "adapter": 0,
        "buffers": 0,
        "backbone_trained": 0,
        "task_specific": coefficients,
        "head": head,
        "templates": templates,
        "frozen": counts["frozen"],
        "total": counts["total"],
        "task_bits": 32 * coefficients,
        "task_file_bytes": 1234,
    }
    grouped = sum(
        len(group.layers) * found.templates[group.name][0].numel() for group in (found.groups if found else ())
    )
    assert counts["frozen"] == whole - grouped
    assert counts["total"] == whole - grouped + templates + head + coefficients
    layers = counts["layers"]
    assert sum(layer.get("coefficients", 0) for layer in layers.values()) == coefficients
    assert sum(layer.get("head", 0) for layer in layers.values()) == head
