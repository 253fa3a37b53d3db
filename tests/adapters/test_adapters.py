"""Every adapter of the registry by the same rules, on RECAST models and on plain frozen ones; and its numbers."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from omegaconf import OmegaConf
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from recast_exp import adapters
from recast_exp.adapters import check_adapter, from_config, inject_adapter, names
from recast_exp.adapters._base import NORMS
from recast_exp.adapters.adaptformer import Bottleneck
from recast_exp.adapters.melo import LowRank, MeLo
from recast_exp.adapters.piggyback import Mask, Piggyback
from recast_exp.config.schema import ModelConfig
from recast_exp.errors import UserError
from recast_exp.models.adapted import AdaptedModel, assemble
from recast_exp.models.count import count
from recast_exp.models.task_file import apply_task, load_task, save_task
from recast_exp.recast import find_groups, merge, mimic
from support.helpers import assert_one_line

ROOT = Path(__file__).parents[2]
NETWORKS = {
    "vit": ("vit_tiny_patch16_224", {"img_size": 32, "depth": 2, "embed_dim": 24, "num_heads": 2}, ["*.attn.qkv"]),
    "cnn": ("resnet18", {"channels": (8, 8, 16, 16)}, ["layer?.1.conv?"]),
}
FITS = {
    "vit": {"adaptformer", "bitfit", "film", "last_block", "layernorm", "melo", "none", "peft", "piggyback"},
    "cnn": {"bitfit", "clr", "film", "last_block", "layernorm", "none", "peft", "piggyback"},
}
PAIRS = [(name, kind) for kind, fitting in FITS.items() for name in sorted(fitting)]
BASES = ("recast", "frozen")
Enliven = Callable[..., nn.Module]


@pytest.fixture(scope="module")
def stock(enliven: Enliven) -> dict[str, nn.Module]:
    """The backbones, all weights redrawn."""
    return {
        kind: enliven(timm.create_model(name, num_classes=0, **options))
        for kind, (name, options, _) in NETWORKS.items()
    }


@pytest.fixture(scope="module")
def make(stock: dict[str, nn.Module]) -> Callable[..., AdaptedModel]:
    def make(name: str, kind: str, base: str, **options: Any) -> AdaptedModel:
        network = copy.deepcopy(stock[kind])
        targets = NETWORKS[kind][2]
        banks = mimic(network, find_groups(network, targets=targets, num_groups=1)) if base == "recast" else None
        adapter = from_config({"name": name, **options})
        return assemble(network, ModelConfig(method=base), adapter, banks, num_classes=5, seed=3)

    return make


def images() -> Tensor:
    return torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def logits(network: nn.Module) -> Tensor:
    return network.eval()(images())


def train(adapted: AdaptedModel, steps: int = 2, lr: float = 0.05) -> None:
    """A few steps on what trains, as the training loop takes them."""
    network = adapted.network.eval()
    optimizer = torch.optim.SGD([p for p in network.parameters() if p.requires_grad], lr=lr)
    for _ in range(steps):
        optimizer.zero_grad()
        F.cross_entropy(network(images()), torch.tensor([0, 1, 2, 3])).backward()
        optimizer.step()


# The registry


def test_every_adapter_has_a_preset_with_its_own_defaults() -> None:
    presets = {path.stem: OmegaConf.load(path) for path in (ROOT / "conf" / "adapter").glob("*.yaml")}
    assert set(presets) == set(names())
    for name, preset in presets.items():
        node = OmegaConf.to_container(preset)
        assert isinstance(node, dict)
        options = dict(node.get("adapter", node))
        assert options.pop("name") == name
        assert options == dataclasses.asdict(adapters.load(name)())
        assert all(field.metadata["help"] for field in dataclasses.fields(adapters.load(name)))


@pytest.mark.parametrize("kind", NETWORKS)
def test_what_does_not_fit_is_refused_with_what_does(kind: str) -> None:
    name, options, _ = NETWORKS[kind]

    def create() -> nn.Module:
        with torch.device("meta"):
            return timm.create_model(name, num_classes=0, **options)

    for adapter in names():
        if adapter in FITS[kind]:
            check_adapter(create, from_config({"name": adapter}))
        else:
            with pytest.raises(UserError) as error:
                check_adapter(create, from_config({"name": adapter}))
            listed = str(error.value).rpartition("choose one of ")[2].split(", ")
            assert set(listed) == FITS[kind]
            assert_one_line(error, f"adapter: {adapter} does not fit", "it needs")


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"name": "melow"}, ("adapter.name: expected one of", "melo", "got 'melow'")),
        ({"name": "melo", "rnak": 3}, ("adapter.rnak: unknown option; adapter=melo takes rank, alpha",)),
        ({"name": "melo", "rank": 0}, ("adapter.rank: expected ", " ≥ 1, got 0")),
        ({"name": "melo", "rank": "four"}, ("adapter.rank: expected ", " ≥ 1, got 'four'")),
        ({"name": "melo", "alpha": -1.0}, ("adapter.alpha: expected a number > 0, got -1.0",)),
        ({"name": "clr", "kernel_size": 4}, ("adapter.kernel_size: expected an odd integer, got 4",)),
        ({"name": "piggyback", "start": 1e-3}, ("adapter.start: expected a number above threshold=0.005, got 0.001",)),
        ({"name": "bitfit", "rank": 3}, ("adapter.rank: unknown option; adapter=bitfit takes no options",)),
    ],
)
def test_wrong_options(options: dict[str, Any], expected: tuple[str, ...]) -> None:
    with pytest.raises(UserError) as error:
        from_config(OmegaConf.create(options))
    assert_one_line(error, *expected)


# The same rules for all


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize(("name", "kind"), PAIRS)
def test_it_changes_nothing_at_first(make: Any, name: str, kind: str, base: str) -> None:
    assert torch.equal(logits(make(name, kind, base).network), logits(make("none", kind, base).network))


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize(("name", "kind"), PAIRS)
def test_what_is_declared_trains_and_nothing_else(make: Any, name: str, kind: str, base: str) -> None:
    adapted = make(name, kind, base)
    task = {tensor.data_ptr() for tensor in adapted.task_tensors().values()}
    before = {key: tensor.clone() for key, tensor in adapted.network.state_dict().items()}
    train(adapted)
    for key, tensor in adapted.network.state_dict().items():
        moved = not torch.equal(tensor, before[key])
        assert moved == (tensor.data_ptr() in task), key
    assert bool(adapted.trainable.get("coefficients")) == (base == "recast")
    for kind_of in ("coefficients", "adapter", "head"):
        for path in adapted.trainable.get(kind_of, {}).values():
            assert adapted.network.get_parameter(path).grad is not None


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize(("name", "kind"), PAIRS)
def test_a_task_file_brings_the_same_logits(make: Any, tmp_path: Path, name: str, kind: str, base: str) -> None:
    adapted = make(name, kind, base)
    train(adapted)
    save_task(tmp_path / "task.safetensors", adapted.file_tensors(), {"format": 1, "config": {}})
    other = make(name, kind, base)
    apply_task(other, load_task(tmp_path / "task.safetensors")[0])
    assert torch.equal(logits(other.network), logits(adapted.network))
    apply_task(other, make(name, kind, base).task_tensors())  # and back, as a checkpoint would
    assert torch.equal(logits(other.network), logits(make(name, kind, base).network))


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize(("name", "kind"), PAIRS)
def test_merging_leaves_the_logits(make: Any, stock: Any, name: str, kind: str, base: str) -> None:
    adapted = make(name, kind, base)
    train(adapted)
    expected = logits(adapted.network)
    network = adapters.merge(merge(adapted.network))
    torch.testing.assert_close(logits(network), expected, rtol=1e-5, atol=1e-5)
    if name in ("melo", "peft", "piggyback", "none", "bitfit", "layernorm", "last_block"):
        plain = timm.create_model(NETWORKS[kind][0], num_classes=5, **NETWORKS[kind][1])
        plain.load_state_dict(network.state_dict(), strict=True)
        torch.testing.assert_close(logits(plain), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize(("name", "kind"), PAIRS)
def test_a_deep_copy_stands_alone(make: Any, name: str, kind: str, base: str) -> None:
    adapted = make(name, kind, base)
    twin = dataclasses.replace(adapted, network=copy.deepcopy(adapted.network))
    before = logits(adapted.network)
    train(twin)
    trained = logits(twin.network)
    assert torch.equal(logits(adapted.network), before)
    assert not torch.equal(trained, before)
    adapters.merge(merge(adapted.network))
    assert torch.equal(logits(twin.network), trained)


@pytest.mark.parametrize(("name", "kind"), PAIRS)
def test_bfloat16(make: Any, name: str, kind: str) -> None:
    adapted = make(name, kind, "recast")
    train(adapted)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        rough = adapted.network(images())
    exact = logits(adapted.network)
    assert (rough.float() - exact).norm() < 0.05 * exact.norm()
    with torch.autocast("cpu", torch.bfloat16):
        F.cross_entropy(adapted.network(images()), torch.tensor([0, 1, 2, 3])).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in adapted.network.parameters() if p.requires_grad)


@pytest.mark.parametrize(("name", "kind"), [pair for pair in PAIRS if pair[1] == "vit" or pair[0] == "clr"])
def test_it_compiles_as_a_whole(make: Any, name: str, kind: str) -> None:
    adapted = make(name, kind, "recast")
    train(adapted)
    network = adapted.network.eval()
    torch.compiler.reset()
    compiled = torch.compile(network, backend="eager", fullgraph=True)
    expected, found = network(images()), compiled(images())
    torch.testing.assert_close(found, expected)
    found.sum().backward()
    assert all(p.grad is not None for p in network.parameters() if p.requires_grad)


@pytest.mark.parametrize(("name", "kind"), [pair for pair in PAIRS if pair[1] == "vit" or pair[0] == "clr"])
def test_it_is_exported_merged_or_as_modules(make: Any, name: str, kind: str) -> None:
    adapted = make(name, kind, "recast")
    train(adapted)
    expected = logits(adapted.network)
    merged = adapters.merge(merge(adapted.network)).eval()
    program = torch.export.export(merged, (images(),))
    with torch.no_grad():
        torch.testing.assert_close(program.module()(images()), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("method", "arguments"),
    [
        ("IA3", {}), ("OFT", {}), ("BOFT", {}), ("LOHA", {}), ("LOKR", {}), ("HIRA", {}), ("DELORA", {}),
        ("GRALORA", {}),
        ("MISS", {"r": 8}), ("RANDLORA", {}), ("LORA", {"r": 2, "use_rslora": True, "target_modules": ["fc1"]}),
        ("LORA", {"use_dora": True}), ("VERA", {"r": 16}), ("PVERA", {"r": 16}), ("TINYLORA", {}),
    ],
)  # fmt: skip
@pytest.mark.parametrize("base", BASES)
def test_methods_of_peft(make: Any, tmp_path: Path, method: str, arguments: dict[str, Any], base: str) -> None:
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
    save_task(tmp_path / "task.safetensors", adapted.file_tensors(), {"format": 1, "config": {}})
    other = build()
    apply_task(other, load_task(tmp_path / "task.safetensors")[0])
    expected = logits(adapted.network)
    assert torch.equal(logits(other.network), expected)
    merged = adapters.merge(merge(adapted.network))
    torch.testing.assert_close(logits(merged), expected, rtol=1e-4, atol=1e-4)
    plain = timm.create_model(NETWORKS["vit"][0], num_classes=5, **NETWORKS["vit"][1])
    plain.load_state_dict(merged.state_dict(), strict=True)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"method": "LORAX"}, ("adapter.method: expected one of", "LORA", "got 'LORAX'")),
        ({"arguments": {"rr": 2}}, ("adapter.arguments.rr: unknown argument; LoraConfig takes", "lora_alpha")),
        ({"arguments": {"r": 0}}, ("peft's LORA refuses", "r")),
        ({"arguments": {"target_modules": ["nowhere"]}}, ("peft's LORA refuses", "nowhere")),
    ],
)
def test_what_peft_refuses_is_one_line(make: Any, options: dict[str, Any], expected: tuple[str, ...]) -> None:
    with pytest.raises(UserError) as error:
        make("peft", "vit", "frozen", **options)
    assert_one_line(error, *expected)


# Numbers


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize(("name", "kind"), PAIRS)
def test_what_trains_is_counted(make: Any, name: str, kind: str, base: str) -> None:
    adapted = make(name, kind, base)
    counts = count(adapted, 0)
    trained = sum(parameter.numel() for parameter in adapted.network.parameters() if parameter.requires_grad)
    assert counts["task_specific"] + counts["head"] == trained
    assert sum(sum(kinds.values()) for kinds in counts["layers"].values()) == trained
    norms = [module for module in adapted.network.modules() if isinstance(module, NORMS)]
    assert counts["adapter_norm"] == sum(
        p.numel() for module in norms for p in module.parameters(recurse=False) if p.requires_grad
    )


@pytest.mark.parametrize(
    ("network", "name", "options", "expected"),
    [
        ("vit_small_patch16_224", "melo", {"rank": 1}, 18_432),
        ("vit_small_patch16_224", "melo", {"rank": 4}, 4 * 18_432),
        ("vit_base_patch16_224", "melo", {}, 147_456),
        ("vit_small_patch16_224", "adaptformer", {}, 595_200),
        ("vit_base_patch16_224", "adaptformer", {}, 1_189_632),
        ("vit_small_patch16_224", "adaptformer", {"width": 2, "scale": 2.0}, 23_064),
        ("resnet34", "clr", {"train_norm": False}, 68_544),
        ("resnet34", "clr", {"train_norm": False, "downsample": True}, 76_608),
        ("resnet34", "clr", {}, 68_544 + 17_024),
        ("resnet34", "piggyback", {}, 21_267_648),
        ("vit_small_patch16_224", "bitfit", {}, 51_456),
        ("vit_small_patch16_224", "layernorm", {}, 19_200),
        ("resnet34", "layernorm", {}, 17_024),
        ("vit_small_patch16_224", "film", {}, 19_200),
        ("vit_small_patch16_224", "last_block", {}, 1_774_464 + 768),
    ],
)
def test_numbers_that_train(network: str, name: str, options: dict[str, Any], expected: int) -> None:
    with torch.device("meta"):
        model = timm.create_model(network, num_classes=0)
        found = inject_adapter(model, from_config({"name": name, **options}))
    assert sum(model.get_parameter(path).numel() for path in found.values()) == expected


def test_the_count_tells_norms_and_bits_apart(make: Any) -> None:
    counts = count(make("clr", "cnn", "recast"), 0)
    norms = count(make("layernorm", "cnn", "recast"), 0)["adapter"]
    assert counts["adapter_norm"] == norms
    assert counts["adapter"] == norms + count(make("clr", "cnn", "recast", train_norm=False), 0)["adapter"]
    counts = count(make("piggyback", "cnn", "frozen"), 0)
    assert counts["task_bits"] == counts["adapter"] == counts["task_specific"]


def test_masks_take_a_bit_in_the_file(make: Any, tmp_path: Path) -> None:
    adapted = make("piggyback", "cnn", "frozen")
    save_task(tmp_path / "task.safetensors", adapted.file_tensors(), {"format": 1, "config": {}})
    bits = count(adapted, 0)["task_bits"]
    size = (tmp_path / "task.safetensors").stat().st_size
    assert bits / 8 <= size <= bits / 8 + 12_000  # names, record and head


# Against independent implementations


def test_melo_is_loras_updates_of_queries_and_values() -> None:
    torch.manual_seed(0)
    layer, adapter, x = nn.Linear(8, 24), LowRank(8, rank=3, scale=0.5), torch.randn(2, 5, 8)
    nn.init.normal_(adapter.b)
    q, k, v = (F.linear(x, w, b) for w, b in zip(layer.weight.chunk(3), layer.bias.chunk(3), strict=True))
    q = q + 0.5 * (x @ adapter.a[0].T) @ adapter.b[0].T
    v = v + 0.5 * (x @ adapter.a[1].T) @ adapter.b[1].T
    torch.testing.assert_close(adapter.on_output(layer, (x,), layer(x)), torch.cat([q, k, v], -1))
    merged = F.linear(x, adapter(layer.weight), layer.bias)
    torch.testing.assert_close(merged, torch.cat([q, k, v], -1))


@pytest.mark.parametrize("added_to", ["output", "weight"])
def test_melo_trains_as_pefts_lora_on_split_projections(added_to: str) -> None:
    """The same first numbers, three steps of Adam: the same updates, outputs and merged weights."""
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    fused, adapter, x = nn.Linear(8, 24), LowRank(8, rank=3, scale=2.0), torch.randn(2, 5, 8)
    fused.requires_grad_(False)
    split = nn.ModuleDict({name: nn.Linear(8, 8) for name in "qkv"})
    for part, weight, bias in zip(split.values(), fused.weight.chunk(3), fused.bias.chunk(3), strict=True):
        part.weight.data, part.bias.data = weight.clone(), bias.clone()
    lora = peft.inject_adapter_in_model(peft.LoraConfig(r=3, lora_alpha=6, target_modules=["q", "v"]), split)
    for name, a in zip("qv", adapter.a, strict=True):
        lora[name].lora_A["default"].weight.data = a.detach().clone()

    def ours() -> Tensor:
        if added_to == "weight":
            return F.linear(x, adapter(fused.weight), fused.bias)
        return adapter.on_output(fused, (x,), fused(x))

    def theirs() -> Tensor:
        return torch.cat([lora[name](x) for name in "qkv"], -1)

    target = torch.randn(2, 5, 24)
    for forward, module in ((ours, adapter), (theirs, lora)):
        optimizer = torch.optim.Adam([p for p in module.parameters() if p.requires_grad], lr=0.01)
        for _ in range(3):
            optimizer.zero_grad()
            F.mse_loss(forward(), target).backward()
            optimizer.step()
    assert adapter.b.abs().max() > 0.01
    torch.testing.assert_close(ours(), theirs())
    for name, a, b in zip("qv", adapter.a, adapter.b, strict=True):
        torch.testing.assert_close(a, lora[name].lora_A["default"].weight)
        torch.testing.assert_close(b, lora[name].lora_B["default"].weight)
        lora[name].merge()
    theirs_merged = torch.cat([lora["q"].weight, lora["k"].weight, lora["v"].weight])
    torch.testing.assert_close(adapter(fused.weight), theirs_merged)


def test_adaptformer_adds_to_the_residual_before_the_norm(make: Any) -> None:
    """One block, computed by the formula."""
    adapted = make("adaptformer", "vit", "frozen", width=3, scale=0.7)
    block: Any = adapted.network.get_submodule("blocks.1").eval()
    adapter: Bottleneck = block.adaptformer
    nn.init.normal_(adapter.up.weight)
    nn.init.normal_(adapter.down.bias)
    x = torch.randn(2, 5, 24)
    found = block(x)
    x = x + block.attn(block.norm1(x))
    bottleneck = torch.relu(x @ adapter.down.weight.T + adapter.down.bias) @ adapter.up.weight.T + adapter.up.bias
    mlp = block.mlp.fc2(
        block.mlp.act(block.mlp.fc1(F.layer_norm(x, (24,), block.norm2.weight, block.norm2.bias, 1e-6)))
    )
    torch.testing.assert_close(found, x + mlp + 0.7 * bottleneck)


def test_clr_convolves_each_channel_by_itself(make: Any) -> None:
    adapted = make("clr", "cnn", "frozen")
    layer: Any = adapted.network.get_submodule("layer1.0.conv2")
    kernel = nn.init.normal_(layer.clr.conv.weight)
    x = torch.randn(2, 8, 6, 6)
    plain = F.conv2d(x, layer.weight, padding=1)
    expected = torch.cat([F.conv2d(plain[:, i : i + 1], kernel[i : i + 1], padding=1) for i in range(8)], 1)
    torch.testing.assert_close(layer(x), expected)


def test_piggybacks_gradient_goes_straight_through() -> None:
    torch.manual_seed(0)
    weight = torch.randn(4, 3, requires_grad=True)
    mask = Mask(weight.detach(), start=1e-2, threshold=5e-3)
    with torch.no_grad():
        mask.mask[0, 0] = 4e-3  # below the threshold
    masked = mask(weight)
    binary = torch.ones(4, 3).index_put((torch.tensor([0]), torch.tensor([0])), torch.tensor(0.0))
    assert torch.equal(masked, weight * binary)
    gradient = torch.randn(4, 3)
    masked.backward(gradient)
    assert torch.equal(mask.mask.grad, gradient * weight.detach())
    assert torch.equal(weight.grad, gradient * binary)


def test_masks_flip_in_training_at_the_canonical_rate(make: Any) -> None:
    """Adam moves a mask by about its rate in a step: after 60 steps of 1e-4, many are 5e-3 below their start."""
    adapted = make("piggyback", "vit", "frozen")
    masks = [parameter for _, parameter in adapted.parameters("adapter")]
    optimizer = torch.optim.Adam([{"params": masks, "lr": 1e-4}])
    network = adapted.network.eval()
    for _ in range(60):
        optimizer.zero_grad()
        F.cross_entropy(network(images()), torch.tensor([0, 1, 2, 3])).backward()
        optimizer.step()
    flipped = sum(int((mask <= 5e-3).sum()) for mask in masks) / sum(mask.numel() for mask in masks)
    assert 0.02 < flipped < 0.6


def test_masks_of_a_reported_epoch_before_the_first_flip_are_no_reason_for_a_higher_rate() -> None:
    remark = Piggyback().remark
    assert "raise the learning rate" in remark({"adapter/masked": 0.0}, {"adapter/masked": 0.0})
    text = remark({"adapter/masked": 0.0}, {"adapter/masked": 0.25})
    assert "25.0 %" in text and "raise" not in text
    assert remark({"adapter/masked": 0.1}, {"adapter/masked": 0.1}) == ""
    assert remark({}, {}) == ""  # of a run that began with an older version
    assert MeLo().remark({}, {}) == ""


def test_piggyback_masks_what_the_coefficients_make(make: Any) -> None:
    adapted = make("piggyback", "vit", "recast")
    layer: Any = adapted.network.get_submodule("blocks.0.attn.qkv")
    before = layer.weight.detach().clone()
    path = adapted.trainable["adapter"]["blocks.0.attn.qkv"]
    with torch.no_grad():
        adapted.network.get_parameter(path)[:5] = 0.0
        adapted.network.get_parameter(adapted.trainable["coefficients"]["blocks.0.attn.qkv"]).mul_(2)
    assert (layer.weight[:5] == 0).all()
    torch.testing.assert_close(layer.weight[5:], 2 * before[5:])
