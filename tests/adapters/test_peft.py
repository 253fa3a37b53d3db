"""Methods of Hugging Face peft, by the rules that hold for all adapters."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import timm
import torch

from recast_exp import adapters
from recast_exp.adapters.peft import Peft, _takes_long
from recast_exp.config.schema import MimicryConfig, ModelConfig, RecastConfig
from recast_exp.errors import UnfitError, UserError
from recast_exp.models.adapted import AdaptedModel
from recast_exp.models.check import check_model
from recast_exp.recast import merge
from recast_exp.tasks.library import merge as library_merge
from support import task_files
from support.adapted import BASES, Make, create, logits, train
from support.helpers import assert_one_line


@pytest.mark.parametrize(
    ("method", "arguments"),
    [
        ("IA3", {}), ("OFT", {}), ("BOFT", {}), ("LOHA", {}), ("LOKR", {}), ("HIRA", {}), ("DELORA", {}),
        ("GRALORA", {}), ("FOURIERFT", {"n_frequency": 50}), ("C3A", {"block_size": 24}),
        ("MISS", {"r": 8}), ("RANDLORA", {}), ("LORA", {"r": 2, "use_rslora": True, "target_modules": ["fc1"]}),
        ("LORA", {"use_dora": True}), ("VERA", {"r": 16}), ("PVERA", {"r": 16}), ("TINYLORA", {}),
    ],
)  # fmt: skip
@pytest.mark.parametrize("base", BASES)
def test_methods_of_peft(make: Make, tmp_path: Path, method: str, arguments: dict[str, Any], base: str) -> None:
    def build() -> AdaptedModel:
        return make("peft", "vit", base, method=method, arguments=arguments)

    adapted = build()
    torch.testing.assert_close(logits(adapted.network), logits(make("none", "vit", base).network), rtol=1e-5, atol=1e-5)
    frozen = {key: tensor.clone() for key, tensor in adapted.network.state_dict().items()}
    task = {tensor.data_ptr() for tensor in adapted.task_tensors().values()}
    train(adapted)
    for kind in ("coefficients", "adapter"):
        assert all(parameter.grad is not None for _, parameter in adapted.parameters(kind))
    for key, tensor in adapted.network.state_dict().items():
        assert tensor.data_ptr() in task or torch.equal(tensor, frozen[key]), key
    task_files.write(tmp_path / "task.safetensors", adapted)
    other = build()
    task_files.read_into(other, tmp_path / "task.safetensors")
    expected = logits(adapted.network)
    assert torch.equal(logits(other.network), expected)
    merged = adapters.merge(merge(adapted.network))
    torch.testing.assert_close(logits(merged), expected, rtol=1e-4, atol=1e-4)
    create("vit", num_classes=5).load_state_dict(merged.state_dict(), strict=True)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"method": "LORAX"}, ("adapter.method: expected one of", "LORA", "got 'LORAX'")),
        ({"arguments": {"rr": 2}}, ("adapter.arguments.rr: unknown argument; LoraConfig takes", "lora_alpha")),
        ({"arguments": {"r": 0}}, ("peft's LORA refuses", "r")),
        ({"arguments": {"target_modules": ["nowhere"]}}, ("peft's LORA refuses", "nowhere")),
        ({"arguments": {"modules_to_save": ["head"]}}, ("adapter.arguments.modules_to_save: expected nothing", "head")),
        ({"arguments": {"bias": "all"}}, ("adapter.arguments.bias: expected none", "adapter=bitfit", "got 'all'")),
        ({"arguments": {"init_lora_weights": "pissa"}}, ("adapter.arguments.init_lora_weights: ", "got 'pissa'")),
        ({"arguments": {"init_lora_weights": "olora"}}, ("adapter.arguments.init_lora_weights: ", "got 'olora'")),
        ({"arguments": {"target_modules": ["qkv", "head"]}}, ("adapter.arguments.target_modules: ", "got head")),
        ({"arguments": {"inference_mode": True}}, ("adapter.arguments.inference_mode: expected false", "got true")),
        ({"arguments": {"r": object()}}, ("adapter.arguments.r: expected text, numbers, lists or mappings", "object")),
        ({"arguments": {"lora_alpha": math.inf}}, ("adapter.arguments.lora_alpha: expected a finite number, got inf",)),
    ],
)
def test_what_peft_refuses_is_one_line(make: Make, options: dict[str, Any], expected: tuple[str, ...]) -> None:
    with pytest.raises(UserError) as error:
        make("peft", "vit", "frozen", **options)
    assert_one_line(error, *expected)


def test_sets_and_tuples_are_kept_as_lists(make: Make, tmp_path: Path) -> None:
    given = {"target_modules": {"qkv", "fc1"}, "rank_pattern": {"fc1": 2}}
    assert Peft(arguments=given).arguments == {"target_modules": ["fc1", "qkv"], "rank_pattern": {"fc1": 2}}
    assert Peft(arguments={"target_modules": ("qkv",)}) == Peft(arguments={"target_modules": ["qkv"]})
    task_files.write(tmp_path / "task.safetensors", make("peft", "vit", "frozen", arguments=given))


@pytest.mark.parametrize("arguments", [{}, {"target_modules": ["qkv", "proj"]}])
def test_layers_that_are_never_called_are_refused(arguments: dict[str, Any]) -> None:
    options = {"img_size": 32, "depth": 2, "embed_dim": 24, "num_heads": 2}
    network = timm.create_model("beit_base_patch16_224", num_classes=3, **options)
    before = set(network.state_dict())
    with pytest.raises(UnfitError) as error:
        adapters.inject_adapter(network, Peft(arguments=arguments))
    assert_one_line(error, "adapter.arguments.target_modules: expected layers that Beit calls, got blocks.0.attn.qkv")
    assert set(network.state_dict()) == before
    assert adapters.inject_adapter(network, Peft(arguments={"target_modules": ["proj"]}))
    called = timm.create_model("beit_base_patch16_224", num_classes=3, qkv_bias=False, **options)
    assert adapters.inject_adapter(called, Peft(arguments=arguments))


def test_what_peft_cannot_merge_is_one_line() -> None:
    network = create("vit")
    adapters.inject_adapter(network, adapters.from_config({"name": "peft", "method": "LILY", "arguments": {"r": 2}}))
    with pytest.raises(UserError) as error:
        library_merge(network)
    assert_one_line(error, "adapter: expected a method that peft can merge, got lily")


@pytest.mark.parametrize(
    ("pattern", "long"),
    [
        (r".*\.(qkv|fc1)", False),
        (r"(.*\.)?blocks\.(\d+)\.attn\.qkv", False),
        (r"blocks\.([02468]|1[02])\.mlp\.fc[12]", False),
        (r"blocks\.\(a+\)+x", False),
        ("gaussian", False),
        ("(.+)+!", True),
        ("(a|a)*b", True),
        ("((ab)*c)+", True),
        ("(?:a?a?){9}", True),
        ("([^)]+)*x", True),
        (".*.*.*.*.*!", True),
    ],
)
def test_patterns_that_may_take_for_ever_are_refused(make: Make, pattern: str, long: bool) -> None:
    assert _takes_long(pattern) is long
    if long:
        with pytest.raises(UserError) as error:
            make("peft", "vit", "frozen", arguments={"target_modules": pattern})
        assert_one_line(error, "adapter.arguments.target_modules: expected a pattern without repeated groups")


@pytest.mark.parametrize("base", BASES)
def test_all_linear_layers_are_those_of_the_backbone(make: Make, base: str) -> None:
    adapted = make("peft", "vit", base, arguments={"target_modules": "all-linear"})
    paths = {name.split(".lora_")[0] for name in adapted.trainable["adapter"]}
    linear = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
    assert paths == {f"blocks.{block}.{name}" for block in (0, 1) for name in linear}


MODEL = ModelConfig(backbone="vit_tiny_patch16_224", method="frozen", pretrained=False, img_size=32)
RECAST = ModelConfig(backbone="vit_tiny_patch16_224", method="recast", pretrained=False, img_size=32)


def check(model: ModelConfig, method: str, **arguments: Any) -> None:
    recast = RecastConfig(targets=["*.attn.qkv"], num_groups=1)
    node = {"name": "peft", "method": method, "arguments": arguments}
    check_model(model, recast, MimicryConfig(name="closed_form"), node)


@pytest.mark.parametrize("method", ["ADAMSS", "UNILORA", "SHIRA", "FROD"])
def test_methods_that_need_values_are_checked_with_values(method: str) -> None:
    check(MODEL, method)


@pytest.mark.parametrize("method", ["HRA", "LORA"])
def test_what_cuts_coefficients_off_is_known_before_the_run(method: str) -> None:
    if method == "LORA":
        check(RECAST, method)
        return
    with pytest.raises(UnfitError) as error:
        check(RECAST, method)
    assert_one_line(error, "peft HRA", "coefficients get no gradient", "model=vit_frozen")
    check(MODEL, method)
