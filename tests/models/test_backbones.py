"""Backbones: weights from files and their refusal, what input they expect, and errors without a network."""

from __future__ import annotations

import argparse
import pickle
import re
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import numpy as np
import pytest
import timm
import torch
from huggingface_hub import constants as hub
from safetensors.torch import load_file, save_file
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import save_for_hf
from torch import Tensor, nn

from recast_exp.config.schema import Config, ModelConfig
from recast_exp.errors import MissingInputError, RecastError, UserError
from recast_exp.experiment import pretrain
from recast_exp.experiment.experiment import Experiment
from recast_exp.experiment.pretrain import pretrained_weights
from recast_exp.models.backbones import Backbone, create_backbone
from recast_exp.models.check import check_model, check_size
from recast_exp.models.create import backbone_name
from recast_exp.models.digits import EMBEDDED
from recast_exp.models.weights import fingerprint
from recast_exp.models.weights import load_file as load_weights
from recast_exp.recast import find_groups, inject, merge, mimic

SHARED = Path(__file__).parents[3] / "shared" / "weights"
Compose = Callable[..., Config]


@pytest.fixture
def create(compose: Compose) -> Callable[..., Backbone]:
    """The backbone of a configuration."""
    return lambda *overrides: create_backbone(compose(*overrides).model)


def assert_one_line(error: pytest.ExceptionInfo[UserError], *expected: object) -> None:
    message = str(error.value)
    assert "\n" not in message
    for text in expected:
        assert str(text) in message, message


# Files


def write_pth(state: dict[str, Tensor], path: Path) -> None:
    torch.save(state, path)


def write_without_checksums(state: dict[str, Tensor], path: Path) -> None:
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(state, path)
    finally:
        torch.serialization.set_crc32_options(True)


def write_nested_pth(state: dict[str, Tensor], path: Path) -> None:
    torch.save({"epoch": 3, "state_dict": {f"module.{name}": tensor for name, tensor in state.items()}}, path)


def write_with_classifier(state: dict[str, Tensor], path: Path) -> None:
    torch.save({**state, "head.weight": torch.ones(7, 96), "head.bias": torch.ones(7)}, path)


def write_npz(state: dict[str, Tensor], path: Path) -> None:
    """The layout of the JAX code that ViTs come from: kernels transposed, heads apart, q, k and v apart."""
    width, heads = 96, 3

    def linear(name: str) -> dict[str, Tensor]:
        return {"kernel": state[f"{name}.weight"].T, "bias": state[f"{name}.bias"]}

    def norm(name: str) -> dict[str, Tensor]:
        return {"scale": state[f"{name}.weight"], "bias": state[f"{name}.bias"]}

    tree: dict[str, dict[str, Tensor]] = {
        "embedding": {
            "kernel": state["patch_embed.proj.weight"].permute(2, 3, 1, 0),
            "bias": state["patch_embed.proj.bias"],
        },
        "Transformer/encoder_norm": norm("norm"),
    }
    for number in range(12):
        ours, theirs = f"blocks.{number}", f"Transformer/encoderblock_{number}"
        attention = f"{theirs}/MultiHeadDotProductAttention_1"
        for index, name in enumerate(("query", "key", "value")):
            rows = slice(index * width, (index + 1) * width)
            tree[f"{attention}/{name}"] = {
                "kernel": state[f"{ours}.attn.qkv.weight"][rows].T.reshape(width, heads, -1),
                "bias": state[f"{ours}.attn.qkv.bias"][rows].reshape(heads, -1),
            }
        out = state[f"{ours}.attn.proj.weight"].T.reshape(heads, -1, width)
        tree[f"{attention}/out"] = {"kernel": out, "bias": state[f"{ours}.attn.proj.bias"]}
        tree[f"{theirs}/MlpBlock_3/Dense_0"] = linear(f"{ours}.mlp.fc1")
        tree[f"{theirs}/MlpBlock_3/Dense_1"] = linear(f"{ours}.mlp.fc2")
        tree[f"{theirs}/LayerNorm_0"] = norm(f"{ours}.norm1")
        tree[f"{theirs}/LayerNorm_2"] = norm(f"{ours}.norm2")
    flat = {f"{place}/{name}": tensor for place, tensors in tree.items() for name, tensor in tensors.items()}
    flat |= {"cls": state["cls_token"], "Transformer/posembed_input/pos_embedding": state["pos_embed"]}
    np.savez(path, **{name: tensor.numpy() for name, tensor in flat.items()})


def write_dino(state: dict[str, Tensor], path: Path) -> None:
    """A student and its teacher, wrapped for several GPUs, with what pretraining has added."""
    teacher = {f"backbone.{name}": tensor for name, tensor in state.items()} | {"head.mlp.weight": torch.ones(2)}
    student = {f"module.{name}": torch.zeros_like(tensor) for name, tensor in teacher.items()}
    torch.save({"student": student, "teacher": teacher, "epoch": 3, "loss": {"alpha": 0.1}}, path)


def write_masked_autoencoder(state: dict[str, Tensor], path: Path) -> None:
    more = {"mask_token": torch.ones(1, 1, 96), "decoder_blocks.0.norm.weight": torch.ones(3)}
    torch.save({"model": {f"module.encoder.{name}": value for name, value in state.items()} | more}, path)


def write_with_decoder(state: dict[str, Tensor], path: Path) -> None:
    torch.save({"model": state | {"decoder.weight": torch.ones(3), "projector.0.bias": torch.ones(3)}}, path)


def write_average(state: dict[str, Tensor], path: Path) -> None:
    wrong = {name: torch.zeros_like(tensor) for name, tensor in state.items()}
    torch.save({"model": wrong, "state_dict_ema": state, "epoch": 3}, path)


WRITERS: dict[str, tuple[str, Callable[[dict[str, Tensor], Path], None]]] = {
    "safetensors": ("weights.safetensors", save_file),
    "pth": ("weights.pth", write_pth),
    "pth without checksums": ("weights.pth", write_without_checksums),
    "nested pth": ("weights.pth", write_nested_pth),
    "with classifier": ("weights.pth", write_with_classifier),
    "npz": ("weights.npz", write_npz),
    "teacher": ("weights.pth", write_dino),
    "masked autoencoder": ("weights.pth", write_masked_autoencoder),
    "decoder": ("weights.pth", write_with_decoder),
    "average": ("weights.pth", write_average),
}


@pytest.mark.parametrize("kind", WRITERS)
def test_weights_come_from_a_file_to_the_bit(
    kind: str, create: Callable[..., Backbone], weights: dict[str, Path], tmp_path: Path
) -> None:
    state = load_file(weights["digits_vit"])
    name, write = WRITERS[kind]
    write(state, tmp_path / name)
    network = create("model=vit_att", f"model.weights={tmp_path / name}").network
    loaded = network.state_dict()
    assert loaded.keys() == state.keys()
    assert all(torch.equal(loaded[key], state[key]) for key in state)


def test_half_precision_files_become_float32(
    create: Callable[..., Backbone], weights: dict[str, Path], tmp_path: Path
) -> None:
    state = {
        name: value.half() if value.is_floating_point() else value
        for name, value in load_file(weights["digits_resnet"]).items()
    }
    save_file(state, tmp_path / "half.safetensors")
    loaded = create("model=resnet", f"model.weights={tmp_path / 'half.safetensors'}").network.state_dict()
    for name, value in state.items():
        assert torch.equal(loaded[name], value.float() if value.is_floating_point() else value)
        assert loaded[name].dtype != torch.half


class Code:
    """Unpickling it would make a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


@pytest.mark.parametrize("suffix", ["pth", "npz", "safetensors"])
def test_code_in_a_file_of_weights_is_refused_and_not_run(
    suffix: str, create: Callable[..., Backbone], tmp_path: Path
) -> None:
    path, trace = tmp_path / f"weights.{suffix}", tmp_path / "trace"
    if suffix == "npz":
        np.savez(path, **{"embedding/kernel": np.array([Code(trace)], dtype=object)})
    elif suffix == "pth":
        torch.save({"state_dict": {"cls_token": Code(trace)}}, path)
    else:
        path.write_bytes(pickle.dumps(Code(trace)))
    with pytest.raises(UserError) as error:
        create("model=vit_att", f"model.weights={path}")
    assert_one_line(error, "model.weights", path)
    assert not trace.exists()


def test_what_is_not_used_of_a_file_is_named(
    create: Callable[..., Backbone], weights: dict[str, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    write_with_decoder(load_file(weights["digits_vit"]), tmp_path / "weights.pth")
    create("model=vit_att", f"model.weights={tmp_path / 'weights.pth'}")
    assert f"model.weights: 2 tensors of {tmp_path / 'weights.pth'} are not used, such as decoder.weight" in caplog.text


def test_a_namespace_in_a_file_is_named(create: Callable[..., Backbone], tmp_path: Path) -> None:
    """As the checkpoints of many repositories have one, of the arguments of their training."""
    torch.save({"model": {}, "args": argparse.Namespace(lr=0.1)}, tmp_path / "weights.pth")
    with pytest.raises(UserError) as error:
        create("model=vit_att", f"model.weights={tmp_path / 'weights.pth'}")
    assert_one_line(error, "model.weights", "refers to argparse.Namespace too", "torch.save(torch.load(")


def test_old_names_and_those_of_the_hub_are_those_of_today() -> None:
    assert backbone_name(ModelConfig(backbone="vit_base_patch16_224_in21k")) == "vit_base_patch16_224.augreg_in21k"
    for name in ("timm/vit_tiny_patch16_224.augreg_in21k", "hf-hub:timm/vit_tiny_patch16_224.augreg_in21k"):
        assert backbone_name(ModelConfig(backbone=name)) == "vit_tiny_patch16_224.augreg_in21k"


@pytest.mark.parametrize("name", ["local-dir:FOLDER", "hf-hub:nobody/nothing", "nobody:x/y"])
def test_models_that_are_not_there(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*_: object, **__: object) -> None:
        raise OSError("there is no network")

    monkeypatch.setattr("recast_exp.models.elsewhere.hf_hub_download", offline)
    with pytest.raises(RecastError) as error:
        backbone_name(ModelConfig(backbone=name.replace("FOLDER", str(tmp_path))))
    assert_one_line(error, "model.backbone: expected")


def test_a_model_from_a_folder(create: Callable[..., Backbone], tmp_path: Path) -> None:
    stock = timm.create_model("vit_tiny_patch16_224", num_classes=0, img_size=32, depth=2, reg_tokens=1)
    save_for_hf(stock, tmp_path, model_args={"img_size": 32, "depth": 2, "reg_tokens": 1})
    network = create("model=vit_att", f"model.backbone=local-dir:{tmp_path}", "model.img_size=null").network
    expected = stock.state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in network.state_dict().items())


def test_weights_of_a_folder_are_looked_at(create: Callable[..., Backbone], tmp_path: Path) -> None:
    stock = timm.create_model("vit_tiny_patch16_224", num_classes=0, img_size=32, depth=2)
    save_for_hf(stock, tmp_path, model_args={"img_size": 32, "depth": 2})
    typed = ("model=vit_att", f"model.backbone=local-dir:{tmp_path}", "model.img_size=null")
    for state, says in (
        ({"zzz": torch.zeros(10**6)}, "lacks"),
        ({"zzz": torch.zeros(3)}, "expected a model of the size of its weights"),
        (stock.state_dict() | {"norm.bias": torch.full((192,), torch.nan)}, "finite"),
    ):
        save_file(state, tmp_path / "model.safetensors")
        with pytest.raises(UserError) as error:
            create(*typed)
        assert_one_line(error, "model.backbone: expected", says, tmp_path)
    for path in tmp_path.glob("*model.*"):
        path.unlink()
    with pytest.raises(MissingInputError) as missing:
        create(*typed)
    assert_one_line(missing, "model.backbone: expected model.safetensors or pytorch_model.bin in", "got neither")


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of `hf-hub:owner/name` in a cache of the hub's client, as it lays it out; there is no network."""
    for name, value in (("HF_HUB_CACHE", str(tmp_path)), ("HF_HUB_OFFLINE", True)):
        monkeypatch.setattr(huggingface_hub.constants, name, value)
    commit, root = "0" * 40, tmp_path / "models--owner--name"
    folder = root / "snapshots" / commit
    for made in (folder, root / "refs"):
        made.mkdir(parents=True)
    (root / "refs" / "main").write_text(commit)
    return folder


def test_a_repository_of_the_hub_is_looked_at(create: Callable[..., Backbone], repository: Path) -> None:
    stock = timm.create_model("vit_tiny_patch16_224", num_classes=0, img_size=32, depth=2, reg_tokens=1)
    save_for_hf(stock, repository, model_args={"img_size": 32, "depth": 2, "reg_tokens": 1})
    typed = ("model=vit_att", "model.backbone=hf-hub:owner/name", "model.img_size=null")
    network, expected = create(*typed).network, stock.state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in network.state_dict().items())
    save_file(
        {name: tensor for name, tensor in expected.items() if name != "norm.bias"}, repository / "model.safetensors"
    )
    with pytest.raises(UserError) as error:
        create(*typed)
    assert_one_line(error, "model.backbone: expected", "hf-hub:owner/name", "lacks 1 tensors, such as norm.bias")
    for path in repository.glob("*model.*"):
        path.unlink()
    with pytest.raises(MissingInputError) as missing:
        create(*typed)
    assert_one_line(missing, "model.backbone: expected the pretrained weights of hf-hub:owner/name")


def test_a_damaged_backbone_of_the_cache_is_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = []

    def train(name: str, recipe: object) -> nn.Module:
        made.append(name)
        return nn.Linear(2, 2)

    monkeypatch.setattr(pretrain, "_pretrain", train)
    path = pretrained_weights("digits_vit", tmp_path)
    assert pretrained_weights("digits_vit", tmp_path) == path and len(made) == 1
    content = path.read_bytes()
    for number, damaged in enumerate((content[:40], content[:-1] + bytes([content[-1] ^ 4])), 2):
        path.write_bytes(damaged)
        pretrained_weights("digits_vit", tmp_path)
        assert len(made) == number and load_file(path).keys() == {"weight", "bias"}


def test_arguments_of_timm(create: Callable[..., Backbone], compose: Compose) -> None:
    options = ("model=vit_att", "model.backbone=vit_tiny_patch16_224", "model.pretrained=false", "model.img_size=32")
    network = create(*options, "model.arguments.reg_tokens=4", "model.arguments.init_values=0.1").network
    assert network.reg_token.shape == (1, 4, 192) and float(network.blocks[0].ls1.gamma[0]) == pytest.approx(0.1)
    for argument, expected in (
        ("reg_token=4", "model.arguments.reg_token: unknown argument of vit_tiny_patch16_224; it takes reg_tokens"),
        ("in_chans=1", "model.arguments.in_chans: expected 3"),
        ("num_classes=3", "model.arguments.num_classes: expected an argument without a key of its own"),
    ):
        settings = compose(*options, f"model.arguments.{argument}")
        with pytest.raises(UserError) as error:
            check_model(settings.model, settings.recast, settings.mimicry, settings.adapter)
        assert_one_line(error, expected)


def without(state: dict[str, Tensor]) -> Any:
    return {name: tensor for name, tensor in state.items() if name != "blocks.3.mlp.fc1.weight"}


def with_more(state: dict[str, Tensor]) -> Any:
    return {**state, "blocks.12.mlp.fc1.weight": torch.ones(2, 2)}


def with_other_shape(state: dict[str, Tensor]) -> Any:
    return {**state, "blocks.3.mlp.fc1.weight": torch.ones(5, 96)}


def other_architecture(state: dict[str, Tensor]) -> Any:
    return timm.create_model("digits_resnet", num_classes=0).state_dict()


def no_state(state: dict[str, Tensor]) -> Any:
    return {"epoch": 3, "weights": state}


def no_mapping(state: dict[str, Tensor]) -> Any:
    return [3, "weights"]


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (without, ("lacks 1", "blocks.3.mlp.fc1.weight")),
        (with_more, ("1 unknown", "blocks.12.mlp.fc1.weight")),
        (with_other_shape, ("other shapes", "blocks.3.mlp.fc1.weight")),
        (other_architecture, ("VisionTransformer",)),
        (no_state, ()),
        (no_mapping, ()),
    ],
)
def test_files_that_do_not_fit_are_refused_in_one_line(
    change: Callable[..., Any],
    expected: tuple[str, ...],
    create: Callable[..., Backbone],
    weights: dict[str, Path],
    tmp_path: Path,
) -> None:
    torch.save(change(load_file(weights["digits_vit"])), tmp_path / "weights.pth")
    with pytest.raises(UserError) as error:
        create("model=vit_att", f"model.weights={tmp_path / 'weights.pth'}")
    assert_one_line(error, "model.weights", tmp_path / "weights.pth", *expected)
    assert not isinstance(error.value, MissingInputError)


@pytest.mark.parametrize("suffix", ["safetensors", "pth", "npz"])
@pytest.mark.parametrize(
    "content", [b"", b"not a file of weights", bytes(range(256)) * 5], ids=["empty", "text", "bytes"]
)
def test_unreadable_files_are_refused_in_one_line(
    suffix: str, content: bytes, create: Callable[..., Backbone], tmp_path: Path
) -> None:
    path = tmp_path / f"weights.{suffix}"
    path.write_bytes(content)
    with pytest.raises(UserError) as error:
        create("model=vit_att", f"model.weights={path}")
    assert_one_line(error, "model.weights", path)


def test_npz_for_a_model_that_has_none_and_a_file_that_is_not_there(
    create: Callable[..., Backbone], tmp_path: Path
) -> None:
    np.savez(tmp_path / "weights.npz", a=np.ones(3))
    with pytest.raises(UserError) as error:
        create("model=resnet", f"model.weights={tmp_path / 'weights.npz'}")
    assert_one_line(error, "model.weights", ".npz", ".safetensors")
    with pytest.raises(MissingInputError) as error:
        create("model=resnet", f"model.weights={tmp_path / 'nowhere.pth'}")
    assert_one_line(error, "model.weights", tmp_path / "nowhere.pth")


# Names


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("vit_smal_patch16_224", ("expected a timm model, got 'vit_smal_patch16_224'", "vit_small_patch16_224")),
        ("resnet34.a1_in2k", ("one of the tags", "for resnet34, got 'a1_in2k'", "a1_in1k")),
        ("digits_vit.some_tag", ("expected no tag", "for digits_vit, got 'some_tag'")),
    ],
)
def test_unknown_names_get_near_matches(name: str, expected: tuple[str, ...], create: Callable[..., Backbone]) -> None:
    with pytest.raises(UserError) as error:
        create("model=recast", f"model.backbone={name}")
    assert_one_line(error, "model.backbone", *expected)


def test_models_without_pretrained_weights_say_so_before_they_are_made(
    create: Callable[..., Backbone], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(timm, "create_model", None)
    with pytest.raises(UserError) as error:
        create("model=recast", "model.backbone=vit_giant_patch14_224")
    assert_one_line(error, "model.backbone", "vit_giant_patch14_224", "model.weights", "model.pretrained=false")


@pytest.mark.parametrize("offline_mode", [True, False])
def test_without_a_network_one_line_says_both_ways_and_nothing_is_tried_again(
    offline_mode: bool, create: Callable[..., Backbone], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy", "HF_HUB_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(hub, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(hub, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(hub, "HF_HUB_OFFLINE", offline_mode)
    tried: list[object] = []

    def unreachable(address: object, *args: object, **options: object) -> None:
        tried.append(address)
        raise OSError("no network")

    monkeypatch.setattr(socket, "create_connection", unreachable)
    with pytest.raises(MissingInputError) as error:
        create("model=recast", "model.backbone=resnet18.a1_in1k")
    assert_one_line(error, "model.backbone", "resnet18.a1_in1k", "connect to the network", "model.weights=FILE")
    assert len(tried) == (0 if offline_mode else 1)
    assert hub.HF_HUB_OFFLINE is offline_mode


# Input


@pytest.mark.parametrize(
    ("name", "size"),
    [("vit_small_patch16_224.augreg_in21k_ft_in1k", 224), ("resnet34.a1_in1k", 224), ("efficientnet_b1", 240)],
)
def test_input_is_what_timm_records_of_the_weights(name: str, size: int, create: Callable[..., Backbone]) -> None:
    spec = create("model=recast", f"model.backbone={name}", "model.pretrained=false").input
    recorded = timm.get_pretrained_cfg(name)
    assert spec.size == size == recorded.input_size[-1]
    assert (spec.mean, spec.std) == (recorded.mean, recorded.std)
    assert (spec.crop_pct, spec.interpolation) == (recorded.crop_pct, recorded.interpolation)


def test_vit_and_resnet_do_not_want_the_same_input(create: Callable[..., Backbone]) -> None:
    names = ("vit_small_patch16_224.augreg_in21k_ft_in1k", "resnet34.a1_in1k")
    first, second = (create("model=recast", f"model.backbone={name}", "model.pretrained=false").input for name in names)
    assert (first.mean, first.std) == ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    assert (second.mean, second.std) == (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)


def test_input_can_be_overridden(create: Callable[..., Backbone]) -> None:
    spec = create(
        "model=resnet", "model.pretrained=false", "model.mean=[0.1,0.2,0.3]", "model.std=[0.4]", "model.img_size=24"
    ).input
    assert (spec.size, spec.mean, spec.std) == (24, (0.1, 0.2, 0.3), (0.4, 0.4, 0.4))


def test_position_embeddings_are_resampled_to_another_input_size(
    create: Callable[..., Backbone], weights: dict[str, Path]
) -> None:
    backbone = create("model=vit_att", f"model.weights={weights['digits_vit']}", "model.img_size=32")
    network, state = backbone.network, load_file(weights["digits_vit"])
    position = network.state_dict()["pos_embed"]
    assert position.shape == (1, 1 + 8 * 8, 96)
    old = state.pop("pos_embed")
    assert all(torch.equal(network.state_dict()[name], tensor) for name, tensor in state.items())
    assert torch.equal(position[:, 0], old[:, 0])
    # The same picture in more pixels: shrunk again, it is nearly the old one.
    shrunk = nn.functional.interpolate(position[:, 1:].reshape(1, 8, 8, 96).permute(0, 3, 1, 2), size=4, mode="area")
    correlation = torch.corrcoef(
        torch.stack([shrunk.flatten(), old[:, 1:].reshape(1, 4, 4, 96).permute(0, 3, 1, 2).flatten()])
    )
    assert correlation[0, 1] > 0.9
    with torch.no_grad():
        assert network.eval()(torch.randn(2, 3, 32, 32)).shape == (2, 96)
    assert backbone.input.size == 32


# Fingerprint and random weights


def test_fingerprint_follows_every_bit_and_every_name(create: Callable[..., Backbone]) -> None:
    backbone = create("model=vit_att", "model.pretrained=false")
    network = backbone.network
    assert fingerprint(network) == backbone.fingerprint
    with torch.no_grad():
        value = network.blocks[7].mlp.fc2.bias[3:4]
        kept = value.clone()
        for other in (torch.nextafter(kept, torch.ones(1)), -kept):
            value.copy_(other)
            assert fingerprint(network) != backbone.fingerprint
        value.copy_(kept)
    assert fingerprint(network) == backbone.fingerprint
    network.norm.register_buffer("more", torch.zeros(0))
    assert fingerprint(network) != backbone.fingerprint


def test_random_weights_are_the_same_in_every_run_and_warn(
    create: Callable[..., Backbone], caplog: pytest.LogCaptureFixture
) -> None:
    found = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        found.append(create("model=vit_att", "model.pretrained=false", f"seed={seed}").fingerprint)
    assert found[0] == found[1]
    assert "model.pretrained=false" in caplog.text


@pytest.mark.parametrize("name", EMBEDDED)
def test_embedded_backbones_are_stock_architectures(name: str) -> None:
    network = timm.create_model(name, num_classes=0)
    assert type(network).__module__.startswith("timm.models.")
    assert type(timm.create_model(name, num_classes=7).get_classifier()) is nn.Linear
    blocks = {"digits_vit": "blocks", "digits_resnet": "layer3"}[name]
    assert len(network.get_submodule(blocks)) == {"digits_vit": 12, "digits_resnet": 6}[name]


# Pretraining here


def features(network: nn.Module, experiment: Experiment, split: str) -> tuple[Tensor, Tensor]:
    data = experiment.data()
    images, labels = zip(*(data.datasets[split][0, i] for i in range(len(data.datasets[split]))), strict=True)
    with torch.no_grad():
        return network.eval()(data.normalize(torch.stack(images))), torch.tensor(labels)


def nearest_mean_accuracy(network: nn.Module, experiment: Experiment) -> float:
    """Without training anything: each test image gets the class whose training images it is nearest to on average."""
    train, labels = features(network, experiment, "train")
    means = torch.stack([train[labels == label].mean(0) for label in labels.unique()])
    test, targets = features(network, experiment, "test")
    return (torch.cdist(test, means).argmin(1) == targets).float().mean().item()


@pytest.mark.slow
def test_pretraining_gives_a_good_backbone_once(compose: Compose, monkeypatch: pytest.MonkeyPatch) -> None:
    cfg = compose("model=resnet", "dataset.part=source")
    experiment = Experiment.open(cfg)
    assert nearest_mean_accuracy(experiment.backbone.network, experiment) > 0.97
    untrained = create_backbone(compose("model=resnet", "model.pretrained=false").model).network
    assert nearest_mean_accuracy(untrained, experiment) < 0.93
    monkeypatch.setattr(pretrain, "_pretrain", None)
    assert Experiment.open(cfg).backbone.fingerprint == experiment.backbone.fingerprint


def test_pretraining_is_deterministic_and_addressed_by_its_recipe(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = pretrain.RECIPES["digits_resnet"] | {"epochs": 4, "channels": [8, 8, 8, 8]}
    monkeypatch.setitem(pretrain.RECIPES, "digits_resnet", recipe)
    files = []
    for number in range(2):
        torch.manual_seed(number)
        state = torch.get_rng_state()
        files.append(pretrained_weights("digits_resnet", tmp_path / str(number)))
        assert torch.equal(torch.get_rng_state(), state)
    assert files[0].name == files[1].name
    assert files[0].read_bytes() == files[1].read_bytes()
    untrained = timm.create_model("digits_resnet", num_classes=0)
    monkeypatch.setattr(pretrain, "_pretrain", lambda name, recipe: untrained)
    for change in ({"epochs": 5}, {"lr": 0.1}, {"seed": 1}):
        monkeypatch.setitem(pretrain.RECIPES, "digits_resnet", recipe | change)
        assert pretrained_weights("digits_resnet", tmp_path / "0").name != files[0].name


# Real weights


@pytest.mark.slow
@pytest.mark.parametrize(
    ("file", "options"),
    [
        (
            "vit_small_patch16_224_dinov2_derived.safetensors",
            [
                "model=vit_att_mlp",
                f"model.mean={list(IMAGENET_DEFAULT_MEAN)}",
                f"model.std={list(IMAGENET_DEFAULT_STD)}",
            ],
        ),
        ("efficientnet_lite0_imagenet1k.safetensors", ["model=recast", "model.backbone=efficientnet_lite0"]),
    ],
)
def test_real_weights(file: str, options: list[str], create: Callable[..., Backbone], compose: Compose) -> None:
    path = SHARED / file
    if not path.is_file():
        pytest.skip(f"{path} is not there")
    backbone_options = (
        [] if "model.backbone" in " ".join(options) else ["model.backbone=vit_small_patch16_224.augreg_in21k_ft_in1k"]
    )
    cfg = compose(*options, *backbone_options, f"model.weights={path}")
    network = create_backbone(cfg.model).network
    images = torch.randn(2, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        network.reset_classifier(10)
        expected = network.eval()(images)
        groups = find_groups(network, targets=cfg.recast.targets, num_groups=cfg.recast.num_groups)
        inject(network, mimic(network, groups))
        logits = network(images)
        assert (logits - expected).abs().max() <= 1e-5 * expected.abs().max()
        assert torch.equal(merge(network)(images), logits)
        stock = timm.create_model(cfg.model.backbone, num_classes=10).eval()
        stock.load_state_dict(network.state_dict(), strict=True)
        assert torch.equal(stock(images), logits)


@pytest.mark.parametrize(
    ("typed", "words"),
    [
        (
            "recast.num_groups=99",
            "recast.num_groups: expected at most 12 (the layers of blocks.attn.qkv), got 99; leave it out for pairs",
        ),
        (
            "recast.num_templates=5",
            "recast.num_templates: expected at most 2 (the layers of the group blocks.attn.qkv.0), got 5; leave it out",
        ),
        ("recast.targets=[nope.*]", "recast.targets: expected patterns over the layers of VisionTransformer"),
    ],
)
def test_groups_are_checked_without_weights(
    typed: str, words: str, compose: Compose, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("recast_exp.models.backbones.load_file", None)
    fine, wrong = compose("model=vit_att"), compose("model=vit_att", typed)
    check_model(fine.model, fine.recast, fine.mimicry, fine.adapter)
    with pytest.raises(UserError, match=re.escape(words)):
        check_model(wrong.model, wrong.recast, wrong.mimicry, wrong.adapter)


def test_patches_that_overlap_leave_nothing_out() -> None:
    check_size(ModelConfig(backbone="pvt_v2_b0", img_size=64, pretrained=False))  # patches of 7 pixels, 4 apart
    with pytest.raises(UserError, match="expected a multiple of 16, the patch size of vit_tiny_patch16_224, got 225"):
        check_size(ModelConfig(backbone="vit_tiny_patch16_224", img_size=225, pretrained=False))


def test_weights_that_repeat_a_number_are_not_made_of_it(tmp_path: Path) -> None:
    torch.save({"head.weight": torch.zeros(1, dtype=torch.float16).expand(10**7, 10**6)}, tmp_path / "w.pth")
    network = timm.create_model("digits_vit", num_classes=0)
    with pytest.raises(UserError, match=r"expected tensors with all their numbers, got head\.weight without"):
        load_weights(network, tmp_path / "w.pth", "model.weights")
