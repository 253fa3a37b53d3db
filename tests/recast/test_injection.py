"""Injection into real architectures, and merging back: the model must compute what it did, through the templates."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from torch.nn.utils import parametrize

from recast_exp.errors import UserError
from recast_exp.recast import find_groups, inject, merge, mimic
from recast_exp.recast.combination import TemplateBank

TOLERANCE = 1e-5
SMALL = {"embed_dim": 96, "num_heads": 3}
# Family: timm name, input size, what makes it small.
FAMILIES: dict[str, tuple[str, int, dict[str, Any]]] = {
    "vit": ("vit_small_patch16_224", 32, {"img_size": 32, **SMALL}),
    "vit_wide": ("vit_tiny_patch16_224", 32, {"img_size": 32}),
    "deit": ("deit_tiny_patch16_224", 32, {"img_size": 32, **SMALL}),
    "deit_distilled": ("deit_tiny_distilled_patch16_224", 32, {"img_size": 32, **SMALL}),
    "deit3": ("deit3_small_patch16_224", 32, {"img_size": 32, **SMALL}),
    "dinov2": ("vit_small_patch14_dinov2", 28, {"img_size": 28, **SMALL}),
    "dinov2_registers": ("vit_small_patch14_reg4_dinov2", 28, {"img_size": 28, **SMALL}),
    "eva02": ("eva02_tiny_patch14_224", 28, {"img_size": 28}),
    "swin": ("swin_tiny_patch4_window7_224", 64, {"img_size": 64, "embed_dim": 24, "num_heads": (1, 2, 4, 8)}),
    "pvt_v2": ("pvt_v2_b0", 64, {}),
    "poolformer": ("poolformer_s12", 64, {}),
    "convnext": ("convnext_atto", 64, {}),
    "convnext_v2": ("convnextv2_atto", 64, {}),
    "regnet_x": ("regnetx_002", 64, {}),
    "regnet_y": ("regnety_002", 64, {}),
    "efficientnet": ("efficientnet_b0", 64, {}),
    "efficientnet_lite": ("efficientnet_lite0", 64, {}),
    "mobilenet_v2": ("mobilenetv2_050", 64, {}),
    "mobilenet_v3": ("mobilenetv3_small_050", 64, {}),
    "resnet_basic": ("resnet18", 64, {}),
    "resnet_bottleneck": ("resnet26", 32, {}),
    "resnext": ("resnext26ts", 64, {}),
    # Two shapes of weights at one place of a stage
    "ghostnet": ("ghostnet_050", 64, {}),
    "gcvit": ("gcvit_xxtiny", 64, {"img_size": 64}),
}
Enliven = Callable[..., nn.Module]


def create(family: str, enliven: Enliven) -> tuple[nn.Module, Tensor]:
    name, size, options = FAMILIES[family]
    model = enliven(timm.create_model(name, num_classes=10, **options))
    return model, torch.randn(3, 3, size, size, generator=torch.Generator().manual_seed(1))


def distance(logits: Tensor, expected: Tensor) -> float:
    return ((logits - expected).abs().max() / expected.abs().max()).item()


def trained(model: nn.Module, names: dict[str, str]) -> list[nn.Parameter]:
    """Let the coefficients train, and nothing else."""
    model.requires_grad_(False)
    return [model.get_parameter(name).requires_grad_() for name in names.values()]


def vit(enliven: Enliven, **options: Any) -> tuple[nn.Module, dict[str, str], Tensor]:
    """A small ViT with templates in all its attention and MLP layers, and images."""
    model, images = create("dinov2", enliven)
    banks = mimic(model, find_groups(model, targets=["*.qkv", "*.fc?"], **options))
    return model, inject(model, banks), images


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_mimicry_is_exact_and_merging_gives_stock_timm_back(family: str, enliven: Enliven) -> None:
    model, images = create(family, enliven)
    expected = model(images)
    names = sorted(model.state_dict())
    banks = mimic(model, find_groups(model))
    coefficients = inject(model, banks)

    assert distance(model(images), expected) <= TOLERANCE
    assert list(coefficients) == [layer for group in banks.groups for layer in group.layers]

    # Every bank is in use: disturbing any one template shows.
    for number, (group, bank) in enumerate(zip(banks.groups, model.banks.values(), strict=True)):
        template = bank.templates[number % group.num_templates]
        saved = template.clone()
        template += template.std() * torch.randn(template.shape, generator=torch.Generator().manual_seed(2))
        assert distance(model(images), expected) > 100 * TOLERANCE, group
        template.copy_(saved)

    logits = model(images)
    assert merge(model) is model
    assert torch.equal(model(images), logits)
    assert sorted(model.state_dict()) == names
    name, _, options = FAMILIES[family]
    stock = timm.create_model(name, num_classes=10, **options).eval()
    stock.load_state_dict(model.state_dict(), strict=True)
    assert torch.equal(stock(images), logits)


@torch.no_grad()
@pytest.mark.parametrize("granularity", ["projection", "head", "row"])
@pytest.mark.parametrize("family", ["vit", "swin", "convnext", "resnet_basic", "eva02"])
def test_finer_granularity_is_exact_too(family: str, granularity: str, enliven: Enliven) -> None:
    model, images = create(family, enliven)
    expected = model(images)
    groups = find_groups(model, granularity=granularity)
    inject(model, mimic(model, groups, num_sets=3))
    assert distance(model(images), expected) <= TOLERANCE
    if granularity != "projection":
        assert max(group.num_blocks for group in groups) > 1


@torch.no_grad()
def test_fewer_templates_than_layers_lose_something(enliven: Enliven) -> None:
    model, images = create("vit", enliven)
    expected = model(images)
    inject(model, mimic(model, find_groups(model, num_templates=1)))
    assert distance(model(images), expected) > 0.01


def test_mimicry_leaves_the_model_alone(enliven: Enliven) -> None:
    model, _ = create("vit", enliven)
    before = copy.deepcopy(model.state_dict())
    mimic(model, find_groups(model))
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert list(before) == list(model.state_dict())


def test_templates_are_once_in_the_state_dict_and_frozen(enliven: Enliven) -> None:
    model, names, _ = vit(enliven, num_groups=2)
    state = model.state_dict()
    templates = [name for name in state if "templates" in name]
    assert len(templates) == 3 * 2
    assert all(name.startswith("banks.") for name in templates)
    sizes = {parameter.data_ptr(): parameter.numel() for parameter in model.parameters()}
    assert sum(tensor.numel() for tensor in state.values()) == sum(sizes.values())
    assert not any(model.get_parameter(name).requires_grad for name in templates)
    assert set(names.values()) <= set(state)


def test_the_pretrained_weights_are_released(enliven: Enliven) -> None:
    model, _, _ = vit(enliven)
    for name, parameter in model.named_parameters():
        assert parameter.untyped_storage().nbytes() == parameter.numel() * parameter.element_size(), name
    assert sum(parameter.numel() for name, parameter in model.named_parameters() if ".original" in name) == 3 * 12 * 4


def test_injection_refuses_banks_of_another_model_and_changes_nothing(enliven: Enliven) -> None:
    banks = mimic(model := create("vit", enliven)[0], find_groups(model, targets=["*.attn.qkv"]))
    for family, what in (
        ("vit_wide", r"^banks: .* shape \(576, 192\) for the layer blocks.0.attn.qkv of .*, got \(288, 96\)$"),
        ("resnet_basic", r"^layer: expected a Linear or Conv2d of ResNet, got 'blocks.0.attn.qkv'$"),
    ):
        other, _ = create(family, enliven)
        names = list(other.state_dict())
        with pytest.raises(UserError, match=what):
            inject(other, banks)
        assert list(other.state_dict()) == names


def test_injection_refuses_banks_that_were_changed_and_changes_nothing(enliven: Enliven) -> None:
    model, _ = create("vit", enliven)
    banks = mimic(model, find_groups(model, targets=["*.attn.qkv"]))
    next(iter(banks.templates.values()))[0, 0, 0] = torch.nan
    names = list(model.state_dict())
    with pytest.raises(UserError, match=r"^banks: expected templates and coefficients that fit their groups, but "):
        inject(model, banks)
    assert list(model.state_dict()) == names


@torch.no_grad()
def test_a_merged_copy_leaves_the_original_working(enliven: Enliven) -> None:
    model, names, images = vit(enliven)
    expected = model(images)
    twin, merged = copy.deepcopy(model), merge(copy.deepcopy(model))
    assert torch.equal(merged(images), expected)
    assert torch.equal(model(images), expected)
    # Copy and original still rebuild their weights, each from templates of its own.
    for one, other in ((model, twin), (twin, model)):
        before = other(images)
        next(iter(one.banks.values())).templates.mul_(2.0)
        one.get_parameter(next(iter(names.values()))).add_(0.1)
        assert torch.equal(other(images), before)
        assert distance(one(images), expected) > 0.01
    for one in (model, twin):
        logits = one(images)
        assert torch.equal(merge(one)(images), logits)


@torch.no_grad()
def test_a_second_injection_adds_its_banks(enliven: Enliven) -> None:
    model, images = create("vit", enliven)
    expected = model(images)
    names: dict[str, str] = {}
    # The last one finds groups of the same names as the first
    for targets in (["blocks.[0-5].attn.qkv"], ["*.mlp.fc1"], ["blocks.?.attn.qkv", "blocks.1?.attn.qkv"]):
        names |= inject(model, mimic(model, find_groups(model, targets=targets, num_groups=1)))
    assert len(names) == 24
    assert distance(model(images), expected) <= TOLERANCE
    banks = ["blocks-attn-qkv-0", "blocks-mlp-fc1-0", "blocks-attn-qkv-0-2"]
    assert [name for name in model.state_dict() if name.startswith("banks.")] == [f"banks.{b}.templates" for b in banks]
    twin, state = copy.deepcopy(model), copy.deepcopy(model.state_dict())
    for parameter in twin.parameters():
        parameter.zero_()
    twin.load_state_dict(state)
    assert torch.equal(twin(images), model(images))
    model.double()
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float64}
    assert distance(model(images.double()), expected) <= TOLERANCE
    logits = model(images.double())
    assert torch.equal(merge(model)(images.double()), logits)
    assert not hasattr(model, "banks")


def test_a_layer_is_rewritten_once(enliven: Enliven) -> None:
    model, _ = create("vit", enliven)
    banks = mimic(model, find_groups(model, targets=["*.attn.qkv"]))
    inject(model, banks)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(UserError, match=r"^banks: expected .*, got blocks.0.attn.qkv, .* parametrised already; merge"):
        inject(model, banks)
    assert list(model.state_dict()) == list(before)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_groups_of_two_calls_are_not_mixed_up(enliven: Enliven) -> None:
    model, images = create("vit", enliven)
    with torch.no_grad():
        expected = model(images)
    halves = [find_groups(model, targets=targets) for targets in (["blocks.[0-5].attn.qkv"], ["*.attn.qkv"])]
    same_name = [halves[0][0], dataclasses.replace(halves[1][5], name=halves[0][0].name)]
    same_layer = [halves[0][0], dataclasses.replace(halves[1][0], name="another")]
    for groups, what in ((same_name, "names .*, got blocks.attn.qkv.0"), (same_layer, "layers .*, got blocks.0.attn")):
        with pytest.raises(UserError, match=rf"^groups: expected groups with {what}.* twice; find all"):
            mimic(model, groups)
    banks = mimic(model, halves[0])
    for groups in (same_name, same_layer):
        with pytest.raises(UserError, match=r"^groups: expected groups"):
            inject(model, dataclasses.replace(banks, groups=tuple(groups)))
    inject(model, banks)
    inject(model, mimic(model, find_groups(model, targets=["blocks.[6-9].attn.qkv"])))
    with torch.no_grad():
        assert distance(model(images), expected) <= TOLERANCE
    with pytest.raises(UserError, match=r"^num_sets: expected an integer ≥ 1 and < 1001, got 0$"):
        mimic(model, halves[0], num_sets=0)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_second_injection_into_a_model_of_any_dtype_or_on_meta(dtype: torch.dtype, enliven: Enliven) -> None:
    model, images = create("vit", enliven)
    model, images = model.to(dtype), images.to(dtype)
    expected, skeleton = model(images), copy.deepcopy(model).to("meta")
    names: dict[str, str] = {}
    for targets in (["*.attn.qkv"], ["*.mlp.fc1"]):
        banks = mimic(model, find_groups(model, targets=targets, num_groups=1))
        names |= inject(model, banks)
        inject(skeleton, banks)
    assert distance(model(images), expected) <= max(TOLERANCE, 4 * torch.finfo(dtype).eps)
    templates = [name for name in model.state_dict() if name.startswith("banks.")]
    assert templates == ["banks.blocks-attn-qkv-0.templates", "banks.blocks-mlp-fc1-0.templates"]
    skeleton.load_state_dict(model.state_dict(), assign=True)
    assert torch.equal(skeleton(images), model(images))
    on_meta = copy.deepcopy(model).to("meta")
    assert all(on_meta.get_parameter(name).is_meta for name in (*templates, *names.values()))


@torch.no_grad()
def test_after_merging_the_same_layers_can_be_injected_again(enliven: Enliven) -> None:
    model, images = create("vit", enliven)
    expected = model(images)
    groups = find_groups(model, targets=["*.attn.qkv"])
    for _ in range(2):
        inject(model, mimic(model, groups))
        assert len(model.banks) == len(groups)
        merge(model)
    assert distance(model(images), expected) <= TOLERANCE


def test_banks_of_one_name_are_counted(enliven: Enliven) -> None:
    model, images = create("vit", enliven)
    with torch.no_grad():
        expected = model(images)
    for first in (0, 2, 4):
        groups = find_groups(model, targets=[f"blocks.[{first}{first + 1}].attn.qkv"])
        inject(model, mimic(model, groups))
    assert list(model.banks) == ["blocks-attn-qkv-0", "blocks-attn-qkv-0-2", "blocks-attn-qkv-0-3"]
    with torch.no_grad():
        assert distance(model(images), expected) <= TOLERANCE


def test_a_bias_that_is_parametrised_does_not_matter(enliven: Enliven) -> None:
    model, images = create("vit", enliven)
    banks = mimic(model, find_groups(model, targets=["*.attn.qkv"]))
    for layer in (model.blocks[0].attn.qkv, model.blocks[0].mlp.fc1):
        parametrize.register_parametrization(layer, "bias", nn.Identity())
    with torch.no_grad():
        expected = model(images)
        inject(model, banks)
        assert distance(model(images), expected) <= TOLERANCE
        merge(model)
        assert distance(model(images), expected) <= TOLERANCE
    assert not parametrize.is_parametrized(model.blocks[0].attn.qkv, "weight")
    assert parametrize.is_parametrized(model.blocks[0].attn.qkv, "bias")


def test_an_attribute_of_the_model_is_not_overwritten(enliven: Enliven) -> None:
    model, _ = create("vit", enliven)
    model.banks = nn.Linear(2, 2)
    with pytest.raises(UserError, match=r"^model: expected one without an attribute 'banks', .*VisionTransformer$"):
        inject(model, mimic(model, find_groups(model)))
    assert isinstance(merge(model).banks, nn.Linear)
    assert not hasattr(model.blocks[0].attn.qkv, "parametrizations")


# Types and devices


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("family", ["vit", "resnet_basic"])
def test_a_model_of_another_dtype_computes_as_before(family: str, dtype: torch.dtype, enliven: Enliven) -> None:
    model, images = create(family, enliven)
    model, images = model.to(dtype), images.to(dtype)
    with torch.no_grad():
        expected = model(images)
    banks = mimic(model, find_groups(model))
    weights = {layer: model.get_submodule(layer).weight.detach().clone() for layer in banks.coefficients}
    names = inject(model, banks)
    for layer, weight in weights.items():
        rebuilt = model.get_submodule(layer).weight
        assert rebuilt.dtype == dtype
        torch.testing.assert_close(rebuilt, weight, rtol=2 * torch.finfo(dtype).eps, atol=1e-6)
    assert {model.get_parameter(name).dtype for name in names.values()} == {torch.float32}
    coefficients = trained(model, names)
    logits = model(images)
    assert logits.dtype == dtype
    assert distance(logits, expected) <= max(TOLERANCE, 4 * torch.finfo(dtype).eps)
    logits.float().square().sum().backward()
    assert all(each.grad.dtype == torch.float32 and each.grad.abs().max() > 0 for each in coefficients)
    with torch.no_grad():
        assert torch.equal(merge(model)(images), logits)
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    assert all(parameter.grad is None for parameter in model.parameters())


@torch.no_grad()
def test_the_dtype_of_the_weight_follows_the_model(enliven: Enliven) -> None:
    model, _, images = vit(enliven)
    expected = model(images)
    for dtype in (torch.float64, torch.bfloat16, torch.float32):
        assert model.to(dtype)(images.to(dtype)).dtype == dtype
        assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    assert distance(model(images), expected) < 0.1  # as far as bfloat16 has rounded everything
    assert model.double().to("cpu")(images.double()).dtype == torch.float64  # a move changes no dtype
    model, images = create("dinov2", enliven)
    names = inject(model.bfloat16(), mimic(model, find_groups(model)))
    assert model.float()(images).dtype == torch.float32
    qkv = model.blocks[0].attn.qkv
    qkv.weight = target = torch.randn_like(qkv.weight)
    assert model.get_parameter(names["blocks.0.attn.qkv"]).dtype == torch.float32
    assert (qkv.weight - target).norm() < target.norm()


@torch.no_grad()
def test_assigning_a_weight_of_bfloat16_leaves_coefficients_in_float32(enliven: Enliven) -> None:
    model, _ = create("dinov2", enliven)
    names = inject(model.bfloat16(), mimic(model, find_groups(model, targets=["*.attn.qkv"])))
    qkv, other = model.blocks[0].attn.qkv, model.blocks[1].attn.qkv
    qkv.weight = other.weight.clone()
    torch.testing.assert_close(qkv.weight, other.weight, rtol=0.02, atol=1e-3)
    assert model.get_parameter(names["blocks.0.attn.qkv"]).dtype == torch.float32


@torch.no_grad()
def test_a_model_on_the_meta_device_takes_a_state_dict(enliven: Enliven) -> None:
    model, images = create("vit", enliven)
    banks = mimic(model, find_groups(model))
    name, _, options = FAMILIES["vit"]
    with torch.device("meta"):
        skeleton = timm.create_model(name, num_classes=10, **options).eval()
    with pytest.raises(UserError, match=r"^model: expected weights with values, got the layer .* on the meta device$"):
        mimic(skeleton, banks.groups)
    assert inject(skeleton, banks) == inject(model, banks)
    assert all(parameter.is_meta for parameter in skeleton.parameters())
    skeleton.load_state_dict(model.state_dict(), assign=True)
    assert torch.equal(skeleton(images), model(images))


def test_bfloat16_autocast_rebuilds_the_weight_in_float32(enliven: Enliven) -> None:
    model, names, images = vit(enliven)
    coefficients = trained(model, names)
    qkv = model.blocks[0].attn.qkv
    weight = qkv.weight.detach()
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(images)
        assert logits.dtype == torch.bfloat16
        assert qkv.weight.dtype == torch.float32
        assert torch.equal(qkv.weight, weight)
    logits.float().square().sum().backward()
    assert all(each.grad.dtype == torch.float32 and each.grad.abs().max() > 0 for each in coefficients)


@pytest.mark.parametrize("granularity", ["layer", "projection"])
def test_assigning_a_weight_projects_it_onto_the_templates(granularity: str, enliven: Enliven) -> None:
    model, _, images = vit(enliven, granularity=granularity)
    qkv, other = model.blocks[0].attn.qkv, model.blocks[1].attn.qkv
    templates = model.banks["blocks-attn-qkv-0"].templates
    before = templates.clone()
    with torch.no_grad():
        qkv.weight = other.weight.clone()  # of the same group: in the span of the templates
        torch.testing.assert_close(qkv.weight, other.weight)
        target = torch.randn_like(qkv.weight)
        qkv.weight = target
        blocks = 3 if granularity == "projection" else 1
        residual = (target - qkv.weight).reshape(blocks, -1).double()
        assert 0.5 * target.norm() < residual.norm() < target.norm()
        products = torch.einsum("bm,nbm->bn", residual, templates.reshape(2, blocks, -1).double())
        assert products.abs().max() < 1e-3 * residual.norm() * templates.norm()
        assert torch.isfinite(model(images)).all()
    assert torch.equal(templates, before)


def test_assigning_a_weight_to_a_layer_whose_templates_are_added(enliven: Enliven) -> None:
    """The change is projected onto the templates."""
    model, _ = create("vit", enliven)
    groups = find_groups(model, targets=["*.attn.qkv"], templates="random", num_templates=3)
    inject(model, mimic(model, groups, templates="random"))
    layer, bank = model.blocks[0].attn.qkv, model.banks["blocks-attn-qkv-0"]
    with torch.no_grad():
        target = layer.weight + 0.3 * bank.templates[1]
        layer.weight = target
        torch.testing.assert_close(layer.weight, target, rtol=1e-4, atol=1e-6)
    model, _ = create("vit", enliven)
    groups = find_groups(model, targets=["*.attn.qkv"], templates="singular")
    inject(model, mimic(model, groups, templates="singular"))
    with pytest.raises(UserError, match=r"^weight: a layer with mixing=scales takes none of another model; merge"):
        model.blocks[0].attn.qkv.weight = target


def test_a_bank_sums_its_templates_if_nothing_else_is_said() -> None:
    bank = TemplateBank(torch.tensor([[[1.0, 2.0]], [[3.0, 5.0]]]))
    assert torch.equal(bank.combine(torch.tensor([[[2.0, 10.0]]]), 0, (1, 2)), torch.tensor([[32.0, 54.0]]))


# Gradients


def test_gradients_of_all_coefficients_match_finite_differences(enliven: Enliven) -> None:
    options = {"img_size": 16, "patch_size": 8, "embed_dim": 12, "depth": 4, "num_heads": 2, "num_classes": 3}
    model = enliven(timm.models.VisionTransformer(**options, init_values=1.0))
    banks = mimic(model, find_groups(model, granularity="projection"))
    names = inject(model, banks)
    model.double()
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(4, 3, 16, 16, generator=generator, dtype=torch.float64)
    labels = torch.tensor([0, 1, 2, 1])

    def loss(**values: Tensor) -> Tensor:
        state = {names[layer.replace("-", ".")]: value for layer, value in values.items()}
        return F.cross_entropy(torch.func.functional_call(model, state, (images,)), labels)

    start = {name.replace(".", "-"): model.get_parameter(path).detach().clone() for name, path in names.items()}
    values = {name: value.requires_grad_() for name, value in start.items()}
    gradients = torch.autograd.grad(loss(**values), list(values.values()))
    step = 1e-6
    with torch.no_grad():
        for (name, value), slope in zip(values.items(), gradients, strict=True):
            for index in range(value.numel()):
                moved = torch.zeros(value.numel(), dtype=torch.float64)
                moved[index] = step
                ahead, behind = (loss(**(values | {name: value + sign * moved.view_as(value)})) for sign in (1, -1))
                numeric = (ahead - behind) / (2 * step)
                torch.testing.assert_close(slope.flatten()[index], numeric, rtol=1e-5, atol=1e-8, msg=name)
    assert min(slope.abs().max() for slope in gradients) > 1e-5


class Recast(nn.Module):
    """The RECAST layer by itself, as one would write it down from the paper."""

    def __init__(self, templates: Tensor, coefficients: Tensor, bias: Tensor) -> None:
        super().__init__()
        self.templates, self.bias = templates, bias
        self.coefficients = nn.Parameter(coefficients.clone())

    def forward(self, inputs: Tensor) -> Tensor:
        weight = torch.einsum("kn,nio->kio", self.coefficients[:, 0], self.templates).mean(0)
        return inputs @ weight.T + self.bias


def test_training_follows_an_independent_implementation() -> None:
    torch.manual_seed(0)

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.Sequential(*(nn.Sequential(nn.Linear(8, 8), nn.Tanh()) for _ in range(4)))

        def forward(self, inputs: Tensor) -> Tensor:
            return self.blocks(inputs)

    ours = Net()
    biases = [block[0].bias.detach().clone() for block in ours.blocks]
    banks = mimic(ours, find_groups(ours, num_groups=2))
    names = inject(ours, banks)
    members = [(group.name, layer) for group in banks.groups for layer in group.layers]
    independent = [
        Recast(banks.templates[group], banks.coefficients[layer], bias)
        for (group, layer), bias in zip(members, biases, strict=True)
    ]
    theirs = nn.Sequential(*(nn.Sequential(layer, nn.Tanh()) for layer in independent))
    parameters = [trained(ours, names), [layer.coefficients for layer in independent]]
    inputs, targets = torch.randn(16, 8), torch.rand(16, 8)
    for model, own in zip((ours, theirs), parameters, strict=True):
        optimizer = torch.optim.Adam(own, lr=0.05)
        for _ in range(3):
            optimizer.zero_grad()
            F.mse_loss(model(inputs), targets).backward()
            optimizer.step()
    for mine, other, first in zip(*parameters, banks.coefficients.values(), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-6)
        assert (mine - first).abs().min() > 0.05
    with torch.no_grad():
        torch.testing.assert_close(ours(inputs), theirs(inputs))


@pytest.mark.parametrize("solver", ["gradient", "autoencoder"])
def test_all_solvers_reach_injection_through_the_same_interface(solver: str, enliven: Enliven) -> None:
    model, images = create("dinov2", enliven)
    ticks: list[int] = []
    groups = find_groups(model, targets=["*.attn.qkv"], num_groups=2)
    banks = mimic(model, groups, solver=solver, num_sets=3, steps=2, progress=partial(ticks.append, 1))
    assert len(ticks) == 2 * len(groups)
    assert all(value.shape == (3, 1, 6) for value in banks.coefficients.values())
    names = inject(model, banks)
    with torch.no_grad():
        for layer, path in names.items():
            assert torch.equal(model.get_parameter(path), banks.coefficients[layer])
            assert torch.equal(model.get_submodule(layer).weight, banks.rebuilt(layer))
        assert torch.isfinite(model(images)).all()
