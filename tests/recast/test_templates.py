"""Every kind of templates by the same rules, and the formulas of each."""

from __future__ import annotations

import copy
import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from recast_exp import MeLo, RecastConfig, RecastModel, UserError, apply_task, inject_adapter, load_task, save_task
from recast_exp.models.count import count
from recast_exp.plugins import SOLVERS, TEMPLATES
from recast_exp.recast import Banks, find_groups, inject, merge, mimic, remake
from recast_exp.recast.formulas import MIXINGS, OPEN, combine_factors, first_coefficients, rounded, unrounded
from recast_exp.recast.mixed import per_task
from recast_exp.recast.templates import coefficients_of, kind_of, rank_of
from recast_exp.recast.weights import weight_report
from recast_exp.tasks.library import _task_of
from support.helpers import assert_one_line

VIT = {"img_size": 32, "depth": 4, "embed_dim": 24, "num_heads": 2}
NETWORKS: dict[str, tuple[str, dict[str, Any]]] = {
    "vit": ("vit_tiny_patch16_224", VIT),
    "cnn": ("resnet18", {"channels": (8, 8, 16, 16), "zero_init_last": False}),
}
KINDS = [(name, mixing) for name in TEMPLATES.names() for mixing in TEMPLATES.load(name).MIXINGS]
OF_FACTORS = [pair for pair in KINDS if pair[1] != "sum"]


@functools.cache
def stock(kind: str) -> nn.Module:
    torch.manual_seed(0)
    name, options = NETWORKS[kind]
    model: nn.Module = timm.create_model(name, num_classes=3, **options).eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(4)
    for path, parameter in model.named_parameters():
        if path.endswith("bias"):  # timm's are zero, and zeros are not missed
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model


def images() -> Tensor:
    return torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def banks_of(kind: str, templates: str, mixing: str | None, *, num_sets: int = 2, **options: Any) -> Banks:
    model = stock(kind)
    groups = find_groups(model, templates=templates, mixing=mixing, **options)
    differences: list[dict[str, Tensor]] = []
    if templates == "tasks":
        generator = torch.Generator().manual_seed(5)
        for group in groups:
            weight = model.get_submodule(group.layers[0]).weight
            assert isinstance(weight, Tensor)
            differences = [
                (differences[task] if task < len(differences) else {})
                | {group.layers[0]: 0.1 * torch.randn(weight.shape, generator=generator)}
                for task in range(group.num_templates)
            ]
    return mimic(model, groups, templates=templates, mixing=mixing, differences=differences, num_sets=num_sets)


def injected(kind: str, banks: Banks) -> tuple[nn.Module, dict[str, nn.Parameter]]:
    model = copy.deepcopy(stock(kind))
    names = inject(model, banks)
    return model, {layer: model.get_parameter(path) for layer, path in names.items()}


@torch.no_grad()
def moved(parameters: dict[str, nn.Parameter], seed: int = 2) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in parameters.values():
        parameter += 0.1 * torch.randn(parameter.shape, generator=generator)


def test_the_names_of_kinds_and_of_solvers_are_different_as_a_record_holds_one_of_them() -> None:
    assert not {*TEMPLATES.names()} & {*SOLVERS.names()}
    assert all(kind_of(name)[1] in MIXINGS for name in TEMPLATES.names())
    assert [rank_of(coefficients_of(5, mixing), mixing) for mixing in MIXINGS] == [5] * 4


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("granularity", ["layer", "head", "row"])
@pytest.mark.parametrize(("templates", "mixing"), KINDS)
def test_it_changes_nothing_at_first_then_trains_and_merges(
    network: str, granularity: str, templates: str, mixing: str
) -> None:
    expected = stock(network)(images())
    banks = banks_of(network, templates, mixing, granularity=granularity)
    model, parameters = injected(network, banks)
    logits = model(images())
    if banks.added:
        assert torch.equal(logits, expected)
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)

    logits.square().sum().backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in parameters.values())
    frozen = [name for name, each in model.named_parameters() if each.requires_grad]
    assert len(frozen) == len(parameters)

    moved(parameters)
    changed = model(images())
    assert (changed - expected).abs().max() > 1e-4
    merged = merge(copy.deepcopy(model))
    assert torch.equal(merged(images()), changed)
    assert merged.state_dict().keys() == stock(network).state_dict().keys()


@pytest.mark.parametrize(("templates", "mixing"), KINDS)
def test_gradients_are_those_of_finite_differences(templates: str, mixing: str) -> None:
    generator = torch.Generator().manual_seed(0)
    banks = banks_of("vit", templates, mixing, targets=["*.attn.proj"])
    group = banks.groups[0]
    module = banks.bank(group, torch.device("cpu")).double()
    start = banks.coefficients[group.layers[0]].double()
    start = (start + 0.1 * torch.randn(start.shape, generator=generator, dtype=torch.float64)).requires_grad_()
    assert torch.autograd.gradcheck(lambda given: module.combine(given, 0, (24, 24)), (start,))


@pytest.mark.parametrize(("templates", "mixing"), KINDS)
def test_a_file_of_banks_and_of_a_task(tmp_path: Path, templates: str, mixing: str) -> None:
    banks = banks_of("vit", templates, mixing)
    banks.save(tmp_path / "bank.safetensors")
    loaded = Banks.load(tmp_path / "bank.safetensors", banks.hash)
    assert (loaded.added, loaded.mixing, loaded.origin) == (banks.added, banks.mixing, banks.origin)

    model, parameters = injected("vit", banks)
    moved(parameters)
    expected = model(images())
    path = save_task(model, tmp_path / "task.safetensors", banks=banks, classes=["a", "b", "c"])
    beside = [each.name for each in tmp_path.glob("*.safetensors")]
    # The bank goes along where it cannot be made from the weights
    assert (f"{banks.hash}.safetensors" in beside) == (templates == "tasks")
    task = load_task(path)
    assert torch.equal(apply_task(copy.deepcopy(stock("vit")), task)(images()), expected)
    counts = count(_task_of(model, banks), 0)
    assert counts["coefficients"] == sum(each.numel() for each in parameters.values()) == counts["task_specific"]
    assert counts["templates"] == sum(each.numel() for each in banks.templates.values())


@pytest.mark.parametrize(("templates", "mixing"), [pair for pair in KINDS if pair[0] != "tasks"])
def test_templates_are_made_again_from_the_weights_alone(templates: str, mixing: str) -> None:
    model = stock("vit")
    groups = find_groups(model, templates=templates, mixing=mixing)
    banks = mimic(model, groups, templates=templates, mixing=mixing, num_sets=3, seed=7)
    assert banks.origin is not None
    assert banks.origin.repeatable
    assert remake(stock("vit"), banks.groups, banks.origin).hash == banks.hash
    assert banks.origin.form == {"added": banks.added, "mixing": banks.mixing}


@torch.no_grad()
@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize(("templates", "mixing"), KINDS)
def test_a_mixed_batch_is_what_each_task_gives_alone(network: str, templates: str, mixing: str) -> None:
    banks = banks_of(network, templates, mixing)
    model, parameters = injected(network, banks)
    alone, found = [], []
    for seed in (1, 2, 3):
        for layer, parameter in parameters.items():
            parameter.copy_(banks.coefficients[layer])
        moved(parameters, seed)
        alone.append(model(images()))
        found.append({layer: parameter.clone() for layer, parameter in parameters.items()})
    vectors = {layer: torch.stack([each[layer] for each in found]) for layer in parameters}
    with per_task(model, vectors, [4, 4, 4]):
        together = model(images().repeat(3, 1, 1, 1))
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-4, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize(("templates", "mixing"), [pair for pair in KINDS if pair[0] != "tasks"])
def test_many_tasks_on_one_backbone(tmp_path: Path, templates: str, mixing: str) -> None:
    plain = timm.create_model("vit_tiny_patch16_224", num_classes=0, img_size=32).eval()
    model = RecastModel.wrap(copy.deepcopy(plain), recast=RecastConfig(templates=templates, mixing=mixing))
    for number, adapter in enumerate((None, None, MeLo(rank=2))):
        model.add_task(f"task{number}", 3, adapter)
        with model.task(f"task{number}"):
            moved({name: each for name, each in model.named_parameters() if each.requires_grad}, number)
    names = ["task2", "task0", "task1", "task0"]
    mixed = model(images(), tasks=names)
    for row, name in enumerate(names):
        with model.task(name):
            torch.testing.assert_close(mixed[row], model(images())[row], rtol=1e-4, atol=1e-4)
            assert torch.equal(model.merge(name)(images()), model(images()))
    with model.disable():
        torch.testing.assert_close(model(images()), plain(images()), rtol=1e-5, atol=1e-5)
    again = RecastModel.load(model.save(tmp_path / "model"))
    assert torch.equal(again(images(), tasks=names), mixed)


@pytest.mark.parametrize(("templates", "mixing"), KINDS)
def test_next_to_an_adapter_in_half_precision_and_copied(templates: str, mixing: str) -> None:
    banks = banks_of("vit", templates, mixing)
    model, parameters = injected("vit", banks)
    inject_adapter(model, MeLo(rank=2))
    moved(parameters)
    assert torch.equal(copy.deepcopy(model)(images()), model(images()))
    half = copy.deepcopy(model).bfloat16()
    torch.testing.assert_close(half(images().bfloat16()).float(), model(images()), rtol=0.1, atol=0.1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(model(images()).float(), model(images()).float(), rtol=0.1, atol=0.1)


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize(("templates", "mixing"), KINDS)
def test_a_rebuilt_weight_is_the_one_that_the_model_computes_with(network: str, templates: str, mixing: str) -> None:
    banks = banks_of(network, templates, mixing)
    model, parameters = injected(network, banks)
    moved(parameters)
    trained = dataclasses.replace(banks, coefficients={name: each.detach() for name, each in parameters.items()})
    report = weight_report(stock(network), trained)
    assert report.keys() == parameters.keys()
    for layer, found in report.items():
        before = stock(network).get_submodule(layer).weight
        after = model.get_submodule(layer).weight
        assert isinstance(before, Tensor)
        assert isinstance(after, Tensor)
        torch.testing.assert_close(trained.rebuilt(layer, before), after, rtol=1e-5, atol=1e-6)
        change = (after.double() - before.double()).flatten()
        assert found["relative_error"] == pytest.approx(float(change.norm() / before.double().norm()), rel=1e-3)
        assert found["max_error"] == pytest.approx(float(change.abs().max()), rel=1e-3)


# In fewer bits


@pytest.mark.parametrize("size", [1e-5, 1.0, 300.0])
@pytest.mark.parametrize("shape", [(3, 4, 50), (2, 4, 3, 5, 5), (4, 60)])
def test_the_scales_of_integers_follow_their_rows(shape: tuple[int, ...], size: float) -> None:
    templates = size * torch.randn(shape, generator=torch.Generator().manual_seed(0))
    values, scales = rounded(templates, "int8")
    assert scales is not None
    assert scales.shape == ((*shape[:2], *[1] * (len(shape) - 2)) if len(shape) > 2 else (4, 1))
    rows = templates.abs().flatten(min(2, len(shape) - 1)).amax(-1)
    assert ((scales.flatten(min(2, len(shape) - 1))[..., 0] * 127 / rows).log2().abs() < 1 / 64).all()
    assert torch.equal(scales, scales.bfloat16().float())  # eight binary digits
    error = (unrounded(values, scales) - templates).abs()
    assert (error <= scales / 2).all()
    assert int(values.abs().max()) >= 126


@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
@pytest.mark.parametrize(("templates", "mixing"), KINDS)
def test_templates_in_fewer_bits(tmp_path: Path, templates: str, mixing: str, dtype: str) -> None:
    whole = banks_of("vit", templates, mixing)
    banks = whole.rounded_to(dtype)
    bits = {"bfloat16": 16, "int8": 8}[dtype]
    numbers = sum(each.numel() for each in banks.templates.values())
    scales = sum(each.numel() for each in banks.scales.values())
    assert banks.template_bits == numbers * bits + 32 * scales
    assert bool(scales) == (dtype == "int8")
    for name, tensor in banks.templates.items():
        original = whole.templates[name]
        step = banks.scales[name] if dtype == "int8" else original.abs() / 128
        assert ((tensor - original).abs() <= step / 2 + 1e-12).all()

    # A file holds them as they are, and gives them back to the bit
    banks.save(tmp_path / "bank.safetensors")
    again = Banks.load(tmp_path / "bank.safetensors", banks.hash)
    assert (again.dtype, again.template_bits) == (dtype, banks.template_bits)
    assert all(torch.equal(again.templates[name], tensor) for name, tensor in banks.templates.items())
    assert banks.hash != whole.hash

    model, parameters = injected("vit", banks)
    kept = {each.templates.dtype for each in model.banks.values()}
    assert kept == {getattr(torch, dtype)}
    moved(parameters)
    expected = model(images())
    assert torch.equal(copy.deepcopy(model)(images()), expected)
    assert torch.equal(merge(copy.deepcopy(model))(images()), expected)
    path = save_task(model, tmp_path / "task.safetensors", banks=banks, classes=["a", "b", "c"])
    assert torch.equal(apply_task(copy.deepcopy(stock("vit")), load_task(path))(images()), expected)
    if templates != "tasks":
        assert banks.origin is not None
        assert remake(stock("vit"), banks.groups, banks.origin).hash == banks.hash


@pytest.mark.parametrize(("first", "second"), [("int8", "float32"), ("bfloat16", "float32"), ("int8", "bfloat16")])
def test_what_is_rounded_is_not_rounded_again(first: str, second: str) -> None:
    banks = banks_of("vit", "layers", None).rounded_to(first)
    assert banks.rounded_to(first) is banks
    with pytest.raises(UserError) as error:
        banks.rounded_to(second)
    assert_one_line(error, f"banks: expected float32 templates to round to {second}, got {first}")


def test_a_dtype_that_there_is_not() -> None:
    with pytest.raises(UserError) as error:
        mimic(stock("vit"), find_groups(stock("vit")), template_dtype="int4")
    assert_one_line(error, "template_dtype: expected one of float32, bfloat16, int8, got 'int4'")


def test_a_bank_file_with_scales_that_do_not_fit_is_refused(tmp_path: Path) -> None:
    banks = banks_of("vit", "layers", None).rounded_to("int8")
    name = banks.groups[0].name
    for wrong in (banks.scales[name][:, :1], -banks.scales[name], banks.scales[name] * torch.nan):
        path = tmp_path / "bank.safetensors"
        broken = dataclasses.replace(banks, scales=banks.scales | {name: banks.scales[name]})
        broken.scales[name] = wrong.expand_as(banks.scales[name]).contiguous() if wrong.shape[1] > 1 else wrong
        tensors = {f"templates/{each}": banks._kept(each)[0].contiguous() for each in banks.templates}
        tensors |= {f"coefficients/{each}": tensor.contiguous() for each, tensor in banks.coefficients.items()}
        tensors |= {f"scales/{each}": tensor.contiguous() for each, tensor in broken.scales.items()}
        banks.save(path)
        with safe_open(path, "pt") as file:
            metadata = file.metadata()
        save_file(tensors, path, metadata)
        with pytest.raises(UserError) as error:
            Banks.load(path)
        assert_one_line(error, "expected template banks, got a damaged or different file", "scales")


# Each kind's own formula


def test_singular_scales_are_factors_on_the_singular_values() -> None:
    banks = banks_of("vit", "singular", "scales", num_sets=1)
    model, parameters = injected("vit", banks)
    layer = "blocks.1.mlp.fc1"
    weight = stock("vit").get_submodule(layer).weight
    assert isinstance(weight, Tensor)
    left, values, right = torch.linalg.svd(weight, full_matrices=False)
    assert parameters[layer].shape == (1, 1, len(values))
    with torch.no_grad():
        parameters[layer][0, 0] = torch.linspace(-1, 1, len(values))
    expected = left @ torch.diag(values * (1 + torch.linspace(-1, 1, len(values)))) @ right
    torch.testing.assert_close(model.get_submodule(layer).weight, expected, rtol=1e-4, atol=1e-5)


def test_a_scale_of_minus_one_for_every_direction_of_a_basis_leaves_nothing_of_the_weight() -> None:
    banks = banks_of("vit", "basis", "scales", num_sets=1)
    model, parameters = injected("vit", banks)
    with torch.no_grad():
        for parameter in parameters.values():
            parameter.fill_(-1)
    for layer in parameters:
        assert model.get_submodule(layer).weight.abs().max() < 1e-5


def test_the_matrix_is_that_of_lora_xs() -> None:
    banks = banks_of("vit", "singular", "matrix", num_sets=1, num_templates=3)
    model, parameters = injected("vit", banks)
    layer = "blocks.2.attn.proj"
    weight = stock("vit").get_submodule(layer).weight
    assert isinstance(weight, Tensor)
    left, values, right = torch.linalg.svd(weight, full_matrices=False)
    signs = right.gather(1, right.abs().argmax(1, keepdim=True)).sign()[:3]  # as `directions_of` chooses them
    mixer = torch.randn(3, 3, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        parameters[layer].copy_(mixer.flatten())
    expected = weight + (left[:, :3] * values[:3] * signs.T) @ mixer @ (signs * right[:3])
    torch.testing.assert_close(model.get_submodule(layer).weight, expected, rtol=1e-4, atol=1e-5)


def test_the_gate_is_a_silu_that_starts_at_one() -> None:
    factors = torch.randn(2, 6 + 4, generator=torch.Generator().manual_seed(0))
    start = first_coefficients(1, 1, 1, 4, "gated")[0]
    assert start.flatten().tolist() == pytest.approx([OPEN, 0, 0, OPEN])
    assert not combine_factors(start, factors, 0, (6, 4), "gated").any()
    closed = torch.zeros_like(start)  # SiLU(0) = 0: what the layer has in the basis is gone
    torch.testing.assert_close(combine_factors(closed, factors, 0, (6, 4), "gated"), -factors[:, :6].T @ factors[:, 6:])


def test_how_many_templates_there_are_usually() -> None:
    """Of a group of square weights."""
    model = stock("vit")
    numbers = {
        (templates, mixing): find_groups(model, targets=["*.attn.proj"], templates=templates, mixing=mixing)[0]
        for templates, mixing in KINDS
    }
    width = model.get_submodule("blocks.0.attn.proj").weight.shape[0]  # type: ignore[union-attr, index]
    found = {pair: group.num_templates for pair, group in numbers.items()}
    assert found["layers", "sum"] == found["random", "sum"] == len(numbers["layers", "sum"].layers)
    assert found["singular", "scales"] == found["basis", "scales"] == width
    assert found["singular", "matrix"] == 4 * 4
    assert found["tasks", "sum"] == 1


def test_random_templates_are_as_long_as_the_weights_and_those_of_the_seed() -> None:
    banks = banks_of("vit", "random", None)
    for group in banks.groups:
        lengths = torch.stack([stock("vit").get_parameter(f"{layer}.weight").norm() for layer in group.layers])
        for template in banks.templates[group.name]:
            assert template.norm().item() == pytest.approx(lengths.mean().item(), rel=1e-5)
    model = stock("vit")
    other = mimic(model, find_groups(model, templates="random"), templates="random", seed=7)
    assert other.hash != banks.hash


@torch.no_grad()
def test_templates_of_tasks_are_what_these_have_changed(tmp_path: Path) -> None:
    paths = []
    for seed in (1, 2):
        model = timm.create_model("vit_tiny_patch16_224", num_classes=2, **VIT).eval().requires_grad_(False)
        model.load_state_dict(stock("vit").state_dict() | _head(2))
        trained = inject_adapter(model, MeLo(rank=2))
        moved({path: model.get_parameter(path) for path in trained.values()}, seed)
        paths.append(str(save_task(model, tmp_path / f"task{seed}.safetensors")))
    plain = copy.deepcopy(stock("vit"))
    config = RecastConfig(templates="tasks", tasks=paths, num_coefficient_sets=1)
    many = RecastModel.wrap(plain, recast=config)
    many.add_task("sum", 2)
    assert many.tasks["sum"].parameters == 2 * 4  # two tasks, and MeLo's layers alone
    many.set_task("sum")
    coefficients = [each for name, each in many.named_parameters() if each.requires_grad and "original" in name]
    for each in coefficients:
        each.copy_(torch.tensor([1.0, 0.0]))
    own = timm.create_model("vit_tiny_patch16_224", num_classes=2, **VIT)
    own.load_state_dict(stock("vit").state_dict() | _head(2))
    alone = apply_task(own, load_task(paths[0]))
    torch.testing.assert_close(many.network(images()), alone.forward_head(alone.forward_features(images()), True))


def _head(num_classes: int) -> dict[str, Tensor]:
    return {"head.weight": torch.zeros(num_classes, 24), "head.bias": torch.zeros(num_classes)}


# Refusals


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"templates": "nope"}, "templates: expected one of basis, layers, random, singular, tasks, got 'nope'"),
        ({"mixing": "gated"}, "mixing: expected sum with templates=layers, got 'gated'"),
        (
            {"templates": "random", "num_templates": 65},
            "num_templates: expected at most 64 (templates=random, blocks.attn.qkv.0), got 65",
        ),
        (
            {"templates": "singular", "num_templates": 25},
            "num_templates: expected at most 24 (templates=singular, blocks.attn.qkv.0), got 25",
        ),
    ],
)
def test_a_kind_that_is_not_there_or_takes_no_such_number(options: dict[str, Any], expected: str) -> None:
    with pytest.raises(UserError) as error:
        find_groups(stock("vit"), **options)
    assert_one_line(error, expected)


@pytest.mark.parametrize(("templates", "mixing"), [("random", None), *OF_FACTORS])
def test_groups_of_another_kind_are_refused(templates: str, mixing: str | None) -> None:
    model = stock("vit")
    groups = find_groups(model, num_groups=1, targets=["*.mlp.fc1"])
    make: Callable[[], Banks] = lambda: mimic(model, groups, templates=templates, mixing=mixing)  # noqa: E731
    if templates == "random":  # which has the same groups
        assert make().added
    elif mixing in ("matrix", "gated"):
        assert {len(each) for each in make().templates.values()} == {2}  # four coefficients: 2 × 2
    else:
        assert {len(each) for each in make().templates.values()} == {4}


def test_a_task_of_one_kind_does_not_go_into_a_model_of_another(tmp_path: Path) -> None:
    def wrapped(templates: str, seed: int = 42) -> RecastModel:
        plain = timm.create_model("vit_tiny_patch16_224", num_classes=0, **VIT)
        plain.load_state_dict({k: v for k, v in stock("vit").state_dict().items() if not k.startswith("head.")})
        return RecastModel.wrap(plain, recast=RecastConfig(templates=templates), seed=seed)

    first = wrapped("random")
    first.add_task("birds", 3)
    path = first.save_task("birds", tmp_path / "birds.safetensors")
    assert wrapped("random").load_task(path) == "birds"
    for other in (wrapped("layers"), wrapped("random", seed=1)):
        with pytest.raises(UserError) as error:
            other.load_task(path)
        assert_one_line(error, "task: ", "has coefficients for templates made by")
