"""Models of folders and of the Hub: their `config.json` is checked whole, and what timm writes still loads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.models import save_for_hf

from recast_exp.config.schema import ModelConfig
from recast_exp.errors import UserError
from recast_exp.models.backbones import create_backbone
from recast_exp.models.create import blueprint
from recast_exp.models.elsewhere import architecture

ARGUMENTS = {"img_size": 32, "depth": 2}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    stock = timm.create_model("vit_tiny_patch16_224", num_classes=5, **ARGUMENTS)
    save_for_hf(stock, folder, {"label_names": list("abcde")}, ARGUMENTS, safe_serialization=True)
    return folder


@pytest.fixture
def changed(folder: Path, tmp_path: Path) -> Any:
    """A function: the model of the folder with other entries in its config; None removes one."""
    config = json.loads((folder / "config.json").read_text())
    (tmp_path / "model.safetensors").symlink_to(folder / "model.safetensors")

    def change(changes: dict[str, Any]) -> ModelConfig:
        for place, value in changes.items():
            *parents, key = place.split(".")
            node = config
            for parent in parents:
                node = node.setdefault(parent, {})
            node[key] = value
        (tmp_path / "config.json").write_text(json.dumps(config))
        return ModelConfig(backbone=f"local-dir:{tmp_path}")

    return change


@pytest.mark.parametrize(
    "content",
    [b"", b"\xff", b"[1, 2]", b'"x"', b"null", b"[" * 100_000, b"{}", b'{"num_classes": 3}', b'{"architecture": NaN}'],
)
def test_files_that_are_no_config(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(UserError) as error:
        architecture(f"local-dir:{tmp_path}")
    assert f"model.backbone: expected the config.json of a timm model, got {tmp_path / 'config.json'} (" in str(
        error.value
    )
    assert "\n" not in str(error.value)


WRONG = {
    **{f"architecture = {value!r}": {"architecture": value} for value in (5, [], {}, "nonsense", "", "vit_tiny")},
    **{f"num_classes = {value!r}": {"num_classes": value} for value in (-1, "x")},
    **{f"model_args = {value!r}": {"model_args": value} for value in (5, [], "x", None)},
    **{
        f"model_args.{name} = {value!r}": {f"model_args.{name}": value}
        for name, values in {
            "depht": (3,),
            "depth": (-1, 10**9, 1e300),
            "embed_dim": (10**7, [10**4, 10**4]),
            "num_heads": (0,),
            "drop_rate": (2,),
            "norm_layer": ("os.system",),
            "act_layer": ("os",),
            "img_size": ("x", 10**7, 0, [32, 64]),
            "in_chans": (1,),
            "num_classes": ("x", -1),
            "pretrained": (True,),
            "checkpoint_path": ("/etc/passwd",),
            "pretrained_cfg": ({},),
            "pretrained_cfg_overlay": ({},),
            "cache_dir": ("/",),
            "features_only": (True,),
        }.items()
        for value in values
    },
    **{f"pretrained_cfg = {value!r}": {"pretrained_cfg": value} for value in (5, [1], None)},
    **{
        f"pretrained_cfg.{name} = {value!r}": {f"pretrained_cfg.{name}": value}
        for name, values in {
            "input_sise": ([3, 32, 32],),
            "global_pool": ("avg",),
            "input_size": (5, [], "x", [3, 32, 64], [3, 0, 0], [3, 32.5, 32.5], [1, 32, 32], [3, 10**7, 10**7]),
            "fixed_input_size": ("x",),
            "mean": (5, [], [0.5, 0.5], "abc", [1e308] * 3),
            "std": ([0, 0, 0], [-1, 1, 1], []),
            "crop_pct": ("x", 0, -1, 1e300),
            "crop_mode": ("x", 5),
            "interpolation": ("os", 5, "random"),
            "classifier": (5, [5]),
            "num_classes": (-1, "x"),
        }.items()
        for value in values
    },
}  # fmt: skip


@pytest.mark.parametrize("changes", WRONG.values(), ids=WRONG)
def test_entries_that_are_wrong(changes: dict[str, Any], changed: Any) -> None:
    model = changed(changes)
    with pytest.raises(UserError) as error:
        blueprint(model)
    message = str(error.value)
    place = next(iter(changes)).partition(".")[2] or next(iter(changes))
    assert message.startswith("model.backbone: expected the config.json of a timm model, got /") and "\n" not in message
    assert "config.json" in message and (place in message or "with which timm cannot make" in message)


def test_a_model_larger_than_its_weights_is_not_made(changed: Any) -> None:
    for pretrained, says in ((True, "model.safetensors holds"), (False, "no file holds 10,000,000,000")):
        model = changed({"model_args.embed_dim": 16320, "model_args.num_heads": 3, "model_args.depth": 100})
        model.pretrained = pretrained
        with pytest.raises(UserError, match="expected a model of the size of its weights") as error:
            create_backbone(model)
        assert says in str(error.value)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"license": "mit", "num_features": 192, "global_pool": "token", "tags": [1], "label_names": {"0": "a"}},
        {"label_descriptions": {"a": "b"}, "pretrained_cfg.label_names": ["a"], "pretrained_cfg.paper_ids": ["x"]},
        {"pretrained_cfg.classifier": ["head", "head_dist"], "pretrained_cfg.test_input_size": None},
        {"pretrained_cfg.crop_mode": "border", "pretrained_cfg.hf_hub_id": "a/b", "pretrained_cfg.url": ""},
        {"model_args.num_classes": 7, "model_args.in_chans": 3, "model_args.img_size": [32, 32], "num_classes": 7},
    ],
)
def test_what_repositories_hold_loads(changes: dict[str, Any], changed: Any, folder: Path) -> None:
    found = create_backbone(changed(changes)).network.state_dict()
    expected = create_backbone(ModelConfig(backbone=f"local-dir:{folder}")).network.state_dict()
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in found)


def test_a_config_of_early_timm_loads(tmp_path: Path) -> None:
    stock = timm.create_model("resnet10t", num_classes=0)
    save_file(stock.state_dict(), tmp_path / "model.safetensors")
    config = {"architecture": "resnet10t", "num_classes": 2, "num_features": 512, "labels": ["a", "b"]}
    own = {
        "input_size": [3, 64, 64],
        "mean": [0.1, 0.2, 0.3],
        "std": [1, 1, 1],
        "crop_pct": 1,
        "interpolation": "bicubic",
    }
    (tmp_path / "config.json").write_text(json.dumps(config | own))
    backbone = create_backbone(ModelConfig(backbone=f"local-dir:{tmp_path}"))
    assert (backbone.input.size, backbone.input.mean) == (64, (0.1, 0.2, 0.3))


def test_the_home_folder(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(folder.parent))
    name = f"local-dir:~/{folder.name}"
    assert create_backbone(ModelConfig(backbone=name)).name == name
