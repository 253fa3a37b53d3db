"""Many tasks on one backbone: switching, mixed batches, files, and what must not change."""

from __future__ import annotations

import copy
import json
import re
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from recast_exp import (
    SSF,
    AdaptFormer,
    BitFit,
    FiLM,
    HydraLoRA,
    LayerNormTuning,
    MeLo,
    MissingInputError,
    Peft,
    Piggyback,
    RecastConfig,
    RecastModel,
    UnfitError,
    UnknownNameError,
    UserError,
    adapters,
    apply_task,
    find_groups,
    inject,
    inject_adapter,
    load_task,
    merge,
    mimic,
    save_task,
)
from recast_exp.config.schema import ModelConfig
from recast_exp.models.backbones import create_backbone
from recast_exp.recast import merge as merge_templates
from recast_exp.recast import mixed as mixed_module
from recast_exp.runs.task_header import read_record
from support.running import run_stage

VIT = {"patch_size": 16, "img_size": 64, "embed_dim": 48, "depth": 4, "num_heads": 3}


def backbone() -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model("vit_tiny_patch16_224", num_classes=0, **VIT)


def vit(**recast: Any) -> RecastModel:
    return RecastModel.wrap(backbone(), recast=RecastConfig(targets=["*.attn.qkv", "*.mlp.fc1"], **recast))


@pytest.fixture
def images() -> Tensor:
    return torch.randn(6, 3, 64, 64, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def disturb(model: RecastModel, name: str, seed: int) -> None:
    """What training would do: every parameter of the task moves."""
    generator = torch.Generator().manual_seed(seed)
    with model.task(name):
        moved = [parameter for parameter in model.parameters() if parameter.requires_grad]
        assert sum(parameter.numel() for parameter in moved) == model.tasks[name].parameters + model.tasks[name].head
        for parameter in moved:
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))


def filled(model: RecastModel) -> dict[str, Tensor | None]:
    model.add_task("birds", ["crow", "wren", "owl"])
    model.add_task("signs", ["stop", "yield", "other"])
    model.add_task("melo", ["a", "b"], MeLo(rank=2))
    model.add_task("bias", 3, BitFit())
    for seed, name in enumerate(model.tasks):
        disturb(model, name, seed)
    return dict.fromkeys(model.tasks)


@torch.no_grad()
def outputs(model: RecastModel, images: Tensor) -> dict[str, Tensor]:
    found = {}
    for name in model.tasks:
        with model.task(name):
            found[name] = model(images)
    return found


# Switching


def test_switching_is_exact_to_the_bit(images: Tensor) -> None:
    model = vit()
    with torch.no_grad():
        plain = model(images)
    assert torch.allclose(plain, backbone().eval()(images), atol=1e-5)
    filled(model)
    first = outputs(model, images)
    assert len({tuple(logits.flatten().tolist()) for logits in first.values()}) == 4
    for name in ("signs", "bias", "birds", None, "melo", "birds", "bias"):
        model.set_task(name)
    second = outputs(model, images)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert model.active == "bias"
    with model.disable(), torch.no_grad():
        assert torch.equal(model(images), plain)
        assert model.active is None


def test_a_task_is_restored_after_an_exception() -> None:
    model = vit()
    filled(model)
    model.set_task("birds")
    with pytest.raises(RuntimeError, match="no"), model.task("melo"):
        assert model.active == "melo"
        raise RuntimeError("no")
    assert model.active == "birds"
    with pytest.raises(UnknownNameError, match=re.escape("got 'brds'; did you mean 'birds'?")), model.task("brds"):
        pass
    assert model.active == "birds"


def test_a_removed_task_is_gone(images: Tensor) -> None:
    model = vit()
    filled(model)
    with model.task("birds"):
        model.remove_task("birds")
        assert model.active is None
    assert list(model.tasks) == ["signs", "melo", "bias"]
    with pytest.raises(UnknownNameError, match="expected one of 'signs', 'melo', 'bias', got 'birds'"):
        model(images, tasks=["birds"] * 6)


@pytest.mark.parametrize("adapter", [None, MeLo(rank=2), LayerNormTuning()], ids=str)
def test_training_one_task_changes_no_other(images: Tensor, adapter: Any) -> None:
    model = vit()
    filled(model)
    before = outputs(model, images)
    with torch.no_grad(), model.disable():
        plain = model(images)
    model.add_task("new", 2, adapter)
    model.set_task("new")
    model.train()
    optimizer = torch.optim.AdamW([each for each in model.parameters() if each.requires_grad], lr=1e-2)
    losses = []
    for _ in range(5):
        loss = nn.functional.cross_entropy(model(images), torch.arange(6) % 2)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    model.eval()
    after = outputs(model, images)
    assert all(torch.equal(before[name], after[name]) for name in before)
    with torch.no_grad(), model.disable():
        assert torch.equal(model(images), plain)
    model.set_task("birds")
    assert all(parameter.grad is None for parameter in model.network.parameters() if parameter.requires_grad)


def test_adding_and_loading_leave_the_active_task_alone(images: Tensor, tmp_path: Path) -> None:
    model = vit()
    filled(model)
    path = model.save_task("signs", tmp_path / "signs.safetensors")
    model.set_task("birds")
    model(images).sum().backward()
    own = [parameter for parameter in model.parameters() if parameter.requires_grad]
    before = [(parameter.detach().clone(), parameter.grad) for parameter in own]
    model.add_task("other", 2, MeLo(rank=2))
    model.load_task(path, "again")
    for parameter, (value, gradient) in zip(own, before, strict=True):
        assert torch.equal(parameter, value)
        assert gradient is not None
        assert parameter.grad is gradient
    plain = vit()
    plain.add_task("other", 2, MeLo(rank=2))
    with torch.no_grad(), model.task("other"), plain.task("other"):
        assert torch.equal(model(images), plain(images))


@pytest.mark.parametrize("statistics", ["frozen", "update"])
@pytest.mark.parametrize("adapter", [None, MeLo(rank=2)], ids=str)
def test_running_statistics_of_the_backbone_stay(statistics: str, adapter: Any) -> None:
    torch.manual_seed(0)
    model = RecastModel.wrap(timm.create_model("resnet18", num_classes=0), recast=RecastConfig(targets=["*.conv2"]))
    model.add_task("first", 2)
    images = torch.randn(4, 3, 64, 64)
    with torch.no_grad(), model.task("first"):
        before = model(images)
    if adapter is not None:
        with pytest.raises(UnfitError):
            model.add_task("second", 2, adapter, batchnorm_statistics=statistics)
        assert list(model.tasks) == ["first"]
    else:
        model.add_task("second", 2, batchnorm_statistics=statistics)
        model.set_task("second")
        start = {name: buffer.clone() for name, buffer in model.network.named_buffers()}
        model.train()
        model(images)
        moved = any(not torch.equal(buffer, start[name]) for name, buffer in model.network.named_buffers())
        assert moved is (statistics == "update")
        model.eval()
    with torch.no_grad(), model.task("first"):
        assert torch.equal(model(images), before)


# Mixed batches


@pytest.mark.parametrize("granularity", ["layer", "projection", "head", "row"])
def test_a_mixed_batch_gives_what_single_tasks_give(images: Tensor, granularity: str) -> None:
    model = vit(granularity=granularity)
    filled(model)
    single = outputs(model, images)
    names = ["signs", "melo", "birds", "bias", "birds", "signs"]
    model.set_task("melo")
    with torch.no_grad():
        mixed = model(images, tasks=names)
    assert isinstance(mixed, list)
    for row, name in enumerate(names):
        torch.testing.assert_close(mixed[row], single[name][row], rtol=1e-5, atol=1e-5)
    assert model.active == "melo"
    with torch.no_grad():
        stacked = model(images[:2], tasks=["birds", "signs"])
    assert isinstance(stacked, Tensor)
    torch.testing.assert_close(stacked, torch.stack([single["birds"][0], single["signs"][1]]), rtol=1e-5, atol=1e-5)
    assert all("forward" not in vars(module) for module in model.modules())


@pytest.mark.parametrize(
    ("name", "targets"),
    [
        ("resnet18", ["layer*.conv2"]),
        ("swin_tiny_patch4_window7_224", ["*.attn.qkv"]),
        ("convnext_atto", ["*.mlp.fc1"]),
        ("mixer_s32_224", ["*.mlp_tokens.fc1"]),
    ],
)
def test_mixed_batches_on_other_architectures(name: str, targets: list[str]) -> None:
    torch.manual_seed(0)
    model = RecastModel.wrap(timm.create_model(name, num_classes=0), recast=RecastConfig(targets=targets))
    for number in range(3):
        model.add_task(str(number), 4)
        disturb(model, str(number), number)
    images = torch.randn(3, 3, 224, 224)
    single = outputs(model, images)
    with torch.no_grad():
        mixed = model(images, tasks=["2", "0", "1"])
    expected = torch.stack([single["2"][0], single["0"][1], single["1"][2]])
    torch.testing.assert_close(mixed, expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item())


@pytest.mark.parametrize("granularity", ["layer", "row"])
def test_weights_and_products_give_the_same(images: Tensor, granularity: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tasks with different numbers of images, so that some weights are multiplied together and some alone."""
    model = vit(granularity=granularity)
    for number in range(5):
        model.add_task(str(number), 3)
        disturb(model, str(number), number)
    single = outputs(model, images)
    order = [(name, row) for name, count in (("3", 1), ("0", 3), ("1", 1), ("4", 1), ("2", 2)) for row in range(count)]
    batch = torch.stack([images[row] for _, row in order])
    expected = torch.stack([single[name][row] for name, row in order])
    names = [name for name, _ in order]
    ways: list[str] = []
    for way in ("_with_weights", "_with_products"):
        made = getattr(mixed_module, way)
        monkeypatch.setattr(mixed_module, way, lambda *args, made=made, way=way: ways.append(way) or made(*args))
    for enough, way in ((1, "_with_weights"), (10**9, "_with_products")):
        monkeypatch.setattr(mixed_module, "WEIGHTS_FROM", enough)
        ways.clear()
        with torch.no_grad():
            mixed = model(batch, tasks=names)
        torch.testing.assert_close(mixed, expected, rtol=1e-5, atol=1e-5)
        # Through formulas that have a gradient
        inputs = batch.clone().requires_grad_(True)
        torch.testing.assert_close(model(inputs, tasks=names), expected, rtol=1e-5, atol=1e-5)
        assert set(ways) == {way}


def test_a_mixed_batch_has_the_gradients_of_single_tasks(images: Tensor) -> None:
    model = vit()
    filled(model)
    names = ["birds", "signs"]
    alone, together = (images[:2].clone().requires_grad_(True) for _ in range(2))
    for row, name in enumerate(names):
        with model.task(name):
            model(alone[row : row + 1]).square().sum().backward()
    model(together, tasks=names).square().sum().backward()
    assert alone.grad is not None and together.grad is not None
    torch.testing.assert_close(together.grad, alone.grad, rtol=1e-4, atol=1e-6)


def test_a_mixed_batch_in_bfloat16(images: Tensor) -> None:
    model = vit()
    filled(model)
    names = ["birds", "signs"] * 3
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        single = outputs(model, images)
        mixed = model(images, tasks=names)
    expected = torch.stack([single[name][row] for row, name in enumerate(names)])
    assert mixed.dtype == torch.float32
    torch.testing.assert_close(mixed, expected, rtol=0.05, atol=0.05)


@torch.no_grad()
def test_heads_keep_their_digits_in_bfloat16(images: Tensor) -> None:
    """A solved head may take the difference of large numbers."""
    model = vit()
    filled(model)
    for name in ("birds", "melo"):
        with model.task(name):
            with torch.autocast("cpu", torch.bfloat16):
                features, logits = model.network(images), model(images)
                (row, *_) = model(images, tasks=[name, *["signs"] * 5])
            assert torch.equal(logits, model.head(features.float()))
            assert row.dtype == torch.float32


@pytest.mark.parametrize(
    ("name", "targets", "options"),
    [
        ("beit_base_patch16_224", "*.qkv", {"depth": 2, "embed_dim": 24, "num_heads": 2, "img_size": 32}),
        ("eva02_tiny_patch14_224", "*.attn.*", {"depth": 2, "embed_dim": 24, "num_heads": 2, "img_size": 28}),
        ("swinv2_tiny_window8_256", "*.attn.qkv", {"depths": (2,), "embed_dim": 24, "num_heads": (2,), "img_size": 64}),
        ("nf_resnet26", "stages.0*conv2", {}),
        ("tf_efficientnet_b0", "*.conv_pwl", {}),
        ("vit_relpos_small_patch16_224", "*.mlp.fc1", {"depth": 2, "embed_dim": 24, "num_heads": 2, "img_size": 32}),
    ],
)
def test_a_mixed_batch_where_layers_compute_in_a_way_of_their_own(
    name: str, targets: str, options: dict[str, Any]
) -> None:
    """Each task has a pass of its own: a model may take weights itself, a layer standardise them or take no images."""
    torch.manual_seed(0)
    network = timm.create_model(name, num_classes=0, **options)
    with torch.no_grad():
        for path, parameter in network.named_parameters():
            if parameter.ndim > 1:
                nn.init.kaiming_normal_(parameter)
            elif "gain" in path or "gamma" in path or ("norm" in path and path.endswith("weight")):
                parameter.fill_(1.0)
    model = RecastModel.wrap(network.eval(), recast=RecastConfig(targets=[targets]))
    for task, factor in (("birds", 1.0), ("signs", 0.2)):
        model.add_task(task, 3)
        with model.task(task), torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad and parameter.ndim == 3:
                    parameter.add_(factor * torch.randn_like(parameter))
    size = options.get("img_size", 64)
    batch = torch.randn(4, 3, size, size, generator=torch.Generator().manual_seed(2))
    names = ["birds", "signs", "birds", "signs"]
    with torch.no_grad():
        alone = {}
        for task in ("birds", "signs"):
            with model.task(task):
                alone[task] = model(batch)
        expected = torch.stack([alone[task][row] for row, task in enumerate(names)])
        assert (alone["birds"] - alone["signs"]).abs().max() > 1e-3 * alone["birds"].abs().max()
        for active in (None, "signs"):
            model.set_task(active)
            for _ in range(2):
                torch.testing.assert_close(model(batch, tasks=names), expected, rtol=1e-4, atol=1e-6)


class TokensFirst(nn.Module):
    """Layers that take [tokens, images, channels]."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 32, 16, 16)
        self.layers = nn.ModuleList(nn.TransformerEncoderLayer(32, 2, 64, dropout=0.0) for _ in range(2))

    def forward(self, images: Tensor) -> Tensor:
        tokens = self.patches(images).flatten(2).permute(2, 0, 1)
        for layer in self.layers:
            tokens = layer(tokens)
        return tokens.mean(0)


@pytest.mark.parametrize("count", [2, 3, 4, 5])
def test_a_mixed_batch_where_images_are_not_the_first_dimension(images: Tensor, count: int) -> None:
    torch.manual_seed(0)
    model = RecastModel.wrap(TokensFirst(), width=32, recast=RecastConfig(targets=["*.linear1"]))
    for seed, name in enumerate("ab"):
        model.add_task(name, 3)
        disturb(model, name, seed)
    batch, names = images[:count, :, :32, :32], [*"abbab"][:count]
    single = outputs(model, batch)
    with torch.no_grad():
        mixed = model(batch, tasks=names)
    expected = torch.stack([single[name][row] for row, name in enumerate(names)])
    torch.testing.assert_close(mixed, expected, rtol=1e-5, atol=1e-5)


def test_images_that_are_not_finite_show_nothing_of_a_model(images: Tensor) -> None:
    model = vit()
    filled(model)
    names = ["birds", "signs"]
    spoilt = images[:2].clone()
    spoilt[0] = torch.nan
    with torch.no_grad():
        assert model(spoilt, tasks=names)[1].isfinite().all()
        assert model._trunk.mixable is None
        model(images[:2], tasks=names)
    assert model._trunk.mixable


class LeavesOut(nn.Module):
    """In training, the last images skip the layer."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(8, 8)) for _ in range(2))

    def forward(self, images: Tensor) -> Tensor:
        values = images.flatten(1)
        for block in self.blocks:
            count = max(1, len(values) - int(self.training))
            values = torch.cat([values[:count] + block(values[:count]), values[count:]])
        return values


def test_a_mixed_batch_in_which_layers_see_fewer_images() -> None:
    torch.manual_seed(0)
    model = RecastModel.wrap(LeavesOut(), width=8)
    for seed, name in enumerate("ab"):
        model.add_task(name, 3)
        disturb(model, name, seed)
    images = torch.randn(4, 2, 2, 2)
    model.train()
    with torch.no_grad():
        mixed = model(images, tasks=["a", "b", "a", "b"])
        for name in "ab":
            with model.task(name):
                torch.testing.assert_close(mixed["ab".index(name) :: 2], model(images["ab".index(name) :: 2]))


@pytest.mark.parametrize("training", [False, True])
def test_the_mode_is_that_of_all_tasks(images: Tensor, training: bool) -> None:
    """Whatever task was active when it was chosen."""
    torch.manual_seed(0)
    network = timm.create_model("vit_tiny_patch16_224", num_classes=0, drop_path_rate=0.5, pos_drop_rate=0.5, **VIT)
    model = RecastModel.wrap(network, recast=RecastConfig(targets=["*.attn.qkv"]))
    filled(model)
    names = ["birds", "signs"] * 3
    for first, then in (("birds", "melo"), ("melo", "birds"), (None, "bias")):
        model.set_task(first)
        model.train(not training)
        model.set_task(then)
        model.train(training)
        with torch.no_grad():
            assert torch.equal(model(images, tasks=names), model(images, tasks=names)) is not training
            for name in model.tasks:
                with model.task(name):
                    assert torch.equal(model(images), model(images)) is not training


def test_running_statistics_of_the_backbone_stay_in_mixed_batches() -> None:
    torch.manual_seed(0)
    model = RecastModel.wrap(timm.create_model("resnet18", num_classes=0), recast=RecastConfig(targets=["*.conv2"]))
    for name, statistics in (("first", "frozen"), ("second", "frozen"), ("third", "update")):
        model.add_task(name, 2, batchnorm_statistics=statistics)
    start = {name: buffer.clone() for name, buffer in model._trunk.network.named_buffers()}
    model.set_task("third")
    model.train()
    model(torch.randn(4, 3, 64, 64), tasks=["first", "second", "third", "third"])
    assert all(torch.equal(buffer, start[name]) for name, buffer in model._trunk.network.named_buffers())


def test_names_that_are_none(images: Tensor) -> None:
    model = vit()
    filled(model)
    wrong: list[Any] = [3, None, ["birds"], b"birds"]
    for name in wrong:
        for call in (model.remove_task, model.merge, lambda n: model.tasks[n], lambda n: model(images[:1], tasks=[n])):
            with pytest.raises(UnknownNameError, match=r"^task: expected one of 'birds'"):
                call(name)
    for tasks in ("birds", 3, {"birds": 1}):
        with pytest.raises(UserError, match=r"^tasks: expected a list"):
            model(images, tasks=tasks)  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"^tasks: expected a task, or a list"):
        model.predict(torch.zeros(20, 20, 3, dtype=torch.uint8), 3)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("classes", "line"),
    [
        (["caf\u00e9", "cafe\u0301"], "classes: expected different names, got 'cafe\u0301' twice, written in two ways"),
        ({"ant", "bee"}, "classes: expected a list of their names, got set"),
        (torch.arange(2), "classes: expected strings, got tensor(0)"),
        ([b"ant", b"bee"], "classes: expected strings, got b'ant'"),
        (["x", "\ud800"], "classes: expected text, got '\\ud800'"),
        (["x", "x"], "classes: expected different names, got 'x' twice"),
        ("abc", "classes: expected a list of their names, got str: 'abc'"),
    ],
)
def test_classes_that_are_none(classes: Any, line: str, tmp_path: Path) -> None:
    model = vit()
    with pytest.raises(UserError) as error:
        model.add_task("odd", classes)
    assert str(error.value).startswith(line)
    assert not model.tasks
    network = timm.create_model("vit_tiny_patch16_224", num_classes=2, **VIT).requires_grad_(False)
    with pytest.raises(UserError, match=r"^classes: "):
        save_task(network, tmp_path / "odd.safetensors", classes=classes if classes != "abc" else "ab")
    assert not list(tmp_path.iterdir())


def test_a_model_that_has_templates_or_an_adapter_already_is_not_wrapped() -> None:
    network = backbone().requires_grad_(False)
    inject(network, mimic(network, find_groups(network, targets=["*.attn.qkv"])))
    other = backbone().requires_grad_(False)
    inject_adapter(other, MeLo(rank=2))
    for given in (network, other):
        with pytest.raises(UserError, match=r"^model: expected a plain timm model, got one with"):
            RecastModel.wrap(given)
    with pytest.raises(UserError, match=r"^width: expected 48, the number of features of vit_tiny_patch16_224"):
        RecastModel.wrap(backbone(), width=999)
    for nothing in (None, "vit_tiny_patch16_224"):
        with pytest.raises(UserError, match=r"^model: expected a network \(from_timm takes a name\), got"):
            RecastModel.wrap(nothing)  # type: ignore[arg-type]


def test_a_model_that_is_not_wrapped_stays_as_it_was(images: Tensor) -> None:
    network = timm.create_model("vit_tiny_patch16_224", num_classes=5, **VIT)
    state = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    with torch.no_grad():
        before = network.eval()(images)
    network.train()
    refused: list[dict[str, Any]] = [{"recast": RecastConfig(targets=["*nothing*"])}, {"width": 7}, {"seed": -1}]
    for arguments in refused:
        with pytest.raises(UserError):
            RecastModel.wrap(network, **arguments)
        assert network.training and network.num_classes == 5
        assert network.state_dict().keys() == state.keys()
        with torch.no_grad():
            assert torch.equal(network.eval()(images), before)
        network.train()
    assert all(parameter.requires_grad for parameter in network.parameters())


def test_a_model_of_many_tasks_is_not_changed_as_one_of_one_task(images: Tensor) -> None:
    model = vit()
    filled(model)
    model.set_task("birds")
    before = outputs(model, images)
    whole = nn.Sequential(model)
    calls: list[Callable[[nn.Module], object]] = [
        merge,
        merge_templates,
        adapters.merge,
        lambda network: inject_adapter(network, SSF()),
        lambda network: inject(network, model._trunk.banks),
    ]
    for call in calls:
        for given in (model, whole):
            with pytest.raises(UserError, match=r"^(model|network): expected a network of one task, got a RecastModel"):
                call(given)
    after = outputs(model, images)
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_threads_take_turns(images: Tensor) -> None:
    model = vit()
    filled(model)
    single = outputs(model, images)
    wrong: list[str] = []

    def work(name: str) -> None:
        for _ in range(10):
            with model.task(name), torch.no_grad():
                if not torch.equal(model(images), single[name]):
                    wrong.append(name)

    threads = [threading.Thread(target=work, args=(name,)) for name in ("birds", "signs", "melo")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


# Copies, dtypes, sizes, memory formats


def test_tasks_switch_after_other_tensors_were_assigned(images: Tensor) -> None:
    model = vit()
    filled(model)
    before = outputs(model, images)
    for name in ("birds", "melo"):
        model.set_task(name)
        model.load_state_dict({path: tensor.clone() for path, tensor in model.state_dict().items()}, assign=True)
        after = outputs(model, images)
        assert all(torch.equal(before[task], after[task]) for task in before)
    of_trunk = {parameter.data_ptr() for parameter in model._trunk.network.parameters()}
    assert of_trunk & {parameter.data_ptr() for parameter in model._tasks["melo"].network.parameters()}
    network = model._trunk.network  # and where that is done to the backbone
    network.load_state_dict({path: tensor.clone() for path, tensor in network.state_dict().items()}, assign=True)
    after = outputs(model, images)
    assert all(torch.equal(before[task], after[task]) for task in before)


def test_tasks_switch_after_a_conversion_that_replaces_parameters(images: Tensor) -> None:
    model = vit()
    filled(model)
    before = outputs(model, images)
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    try:
        model.double().float()
    finally:
        torch.__future__.set_overwrite_module_params_on_conversion(False)
    after = outputs(model, images)
    assert all(torch.equal(before[task], after[task]) for task in before)


@pytest.mark.parametrize("options", [{}, {"templates": "random"}, {"template_dtype": "int8"}], ids=str)
def test_convolutions_with_templates_take_channels_last(options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    network = timm.create_model("resnet18", num_classes=0, channels=(8, 8, 16, 16))
    model = RecastModel.wrap(network, recast=RecastConfig(targets=["layer?.1.conv?"], **options))
    for seed, name in enumerate("ab"):
        model.add_task(name, 3)
        disturb(model, name, seed)
    images = torch.randn(2, 3, 32, 32)
    before = outputs(model, images)
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    images = images.to(memory_format=torch.channels_last)
    for name, logits in outputs(model, images).items():
        torch.testing.assert_close(logits, before[name], rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        mixed = model(images, tasks=["a", "b"])
    torch.testing.assert_close(mixed, torch.stack([before["a"][0], before["b"][1]]), rtol=1e-4, atol=1e-4)


def test_a_copy_is_a_model_of_its_own(images: Tensor) -> None:
    model = vit()
    filled(model)
    before = outputs(model, images)
    other = copy.deepcopy(model)
    for seed, name in enumerate(other.tasks):
        disturb(other, name, 10 + seed)
    after = outputs(model, images)
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert not torch.equal(outputs(other, images)["birds"], before["birds"])


def test_all_tasks_follow_the_dtype(images: Tensor) -> None:
    model = vit()
    filled(model)
    before = outputs(model, images)
    doubled = outputs(model.double(), images.double())
    for name, logits in doubled.items():
        assert logits.dtype == torch.float64
        torch.testing.assert_close(logits.float(), before[name], rtol=1e-4, atol=1e-4)
    mixed = model(images.double(), tasks=["birds", "signs"] * 3)
    assert mixed.dtype == torch.float64


def test_a_task_without_an_adapter_is_a_short_vector() -> None:
    model = vit()
    for number in range(50):
        model.add_task(str(number), 2)
    kept = [task.coefficients for task in model._tasks.values()]
    assert all(vector is not None and vector.numel() == 32 for vector in kept)
    assert all(task.own is None for task in model._tasks.values())
    assert model.tasks["0"].parameters == 32
    assert model.tasks["0"].bytes == 4 * (32 + 2 * 48 + 2)


def test_the_frozen_tensors_are_in_memory_once() -> None:
    model = vit()
    filled(model)
    of_trunk = {parameter.data_ptr() for parameter in model._trunk.network.parameters()}
    own = [
        parameter.numel()
        for parameter in model._tasks["melo"].own.parameters()  # type: ignore[union-attr]
        if parameter.data_ptr() not in of_trunk
    ]
    assert sum(own) == model.tasks["melo"].parameters


def test_a_compiled_model_is_compiled_once_for_each_number_of_classes(images: Tensor) -> None:
    model = vit()
    for name, classes in (("a", 3), ("b", 3), ("c", 5)):
        model.add_task(name, classes)
        disturb(model, name, classes)
    single = outputs(model, images)
    graphs = []

    def count(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    compiled = torch.compile(model, backend=count)
    for name, expected in (("a", 1), ("b", 1), ("c", 2), ("b", 2), ("a", 2), ("c", 2)):
        model.set_task(name)
        with torch.no_grad():
            torch.testing.assert_close(compiled(images), single[name], rtol=1e-5, atol=1e-5)
        assert len(graphs) == expected
    torch._dynamo.reset()


class Interrupted(nn.Module):
    """A model of several graphs."""

    def __init__(self, vit: nn.Module) -> None:
        super().__init__()
        self.vit = vit

    def forward(self, images: Tensor) -> Tensor:
        tokens = self.vit.patch_embed(images)
        for block in self.vit.blocks:
            torch._dynamo.graph_break()
            tokens = block(tokens)
        return tokens.mean(1)


@pytest.mark.parametrize(
    ("adapter", "broken"),
    [
        (SSF(), False),
        (SSF(), True),
        (FiLM(), False),
        (HydraLoRA(rank=2), False),
        (AdaptFormer(width=4), False),
        (MeLo(rank=2), True),
    ],
    ids=str,
)
def test_a_compiled_model_has_the_adapter_of_each_task(images: Tensor, adapter: Any, broken: bool) -> None:
    config = RecastConfig(targets=["*.mlp.fc1"])  # so that MeLo, which takes qkv, works by hooks
    torch.manual_seed(0)
    network = timm.create_model("vit_tiny_patch16_224", num_classes=0, **{**VIT, "depth": 2})
    if broken:
        network = Interrupted(network)
    model = RecastModel.wrap(network, recast=config, width=48 if broken else None)
    for seed, (name, own) in enumerate((("plain", None), ("one", adapter), ("two", adapter))):
        model.add_task(name, 3, own)
        disturb(model, name, seed)
    single = outputs(model, images)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager")
    for name in ("plain", "one", "two", "plain"):
        model.set_task(name)
        with torch.no_grad():
            torch.testing.assert_close(compiled(images), single[name], rtol=1e-5, atol=1e-5)
    torch._dynamo.reset()


def test_a_merged_task_has_layers_of_stock_classes(images: Tensor) -> None:
    model = vit()
    model.add_task("pets", 3, SSF())
    disturb(model, "pets", 1)
    merged = model.merge("pets")
    stock = timm.create_model("vit_tiny_patch16_224", num_classes=3, **VIT)
    assert [type(module) for module in merged.modules()] == [type(module) for module in stock.modules()]
    with torch.no_grad():
        torch.testing.assert_close(merged(images), outputs(model, images)["pets"], rtol=1e-4, atol=1e-5)


# Merging and files


@pytest.mark.parametrize("adapter", [None, MeLo(rank=2), BitFit(), Piggyback()], ids=str)
def test_a_merged_task_is_a_stock_timm_model(images: Tensor, adapter: Any) -> None:
    model = vit()
    model.add_task("pets", ["cat", "dog"], adapter)
    disturb(model, "pets", 3)
    expected = outputs(model, images)["pets"]
    merged = model.merge("pets")
    stock = timm.create_model("vit_tiny_patch16_224", num_classes=2, **VIT).eval()
    stock.load_state_dict(merged.state_dict())
    with torch.no_grad():
        torch.testing.assert_close(stock(images), expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(outputs(model, images)["pets"], expected)


@pytest.mark.parametrize(
    "adapter", [None, MeLo(rank=2), LayerNormTuning(), Peft(arguments={"target_modules": ["fc2"]})], ids=str
)
def test_a_task_file_goes_to_another_model(images: Tensor, tmp_path: Path, adapter: Any) -> None:
    model = vit()
    model.add_task("pets", ["cat", "dog"], adapter)
    disturb(model, "pets", 3)
    expected = outputs(model, images)["pets"]
    path = model.save_task("pets", tmp_path / "deep" / "pets.safetensors")
    other = vit()
    other.add_task("first", 3)
    other.set_task("first")
    assert other.load_task(path) == "pets"
    assert other.active == "first"
    assert other.load_task(path, "again") == "again"
    found = outputs(other, images)
    assert torch.equal(found["pets"], expected)
    assert torch.equal(found["again"], expected)
    assert other.tasks["pets"].classes == ("cat", "dog")
    # The functions of the library read it as well
    task = load_task(path)
    applied = apply_task(backbone(), task)
    with torch.no_grad():
        torch.testing.assert_close(applied(images), expected, rtol=1e-5, atol=1e-5)


def test_files_that_are_refused(images: Tensor, tmp_path: Path) -> None:
    model = vit()
    filled(model)
    path = model.save_task("birds", tmp_path / "birds.safetensors")
    model.set_task("signs")
    before = outputs(model, images)

    def refused(text: str, file: Path = path, into: RecastModel = model, error: type[Exception] = UserError) -> None:
        names = list(into.tasks)
        with pytest.raises(error, match=re.escape(text)) as caught:
            into.load_task(file, "new")
        assert "\n" not in str(caught.value)
        assert list(into.tasks) == names

    with pytest.raises(UserError, match="expected one that no task has, got 'birds'"):
        model.load_task(path)
    refused("does not exist", tmp_path / "none.safetensors", error=MissingInputError)
    torch.manual_seed(5)
    other = timm.create_model("vit_tiny_patch16_224", num_classes=0, **VIT)
    refused(
        "was trained on other weights",
        into=RecastModel.wrap(other, recast=RecastConfig(targets=["*.attn.qkv", "*.mlp.fc1"])),
    )
    refused("make the model with the same RecastConfig", into=vit(num_groups=1))
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(path.read_bytes()[:-100])
    refused("cut short", cut)

    def changed(name: str, **tensors: Tensor) -> Path:
        record = {key: value for key, value in read_record(path).items() if key != "checksum"}
        save_file({**load_file(path), **tensors}, tmp_path / name, {"recast_exp": json.dumps(record)})
        return tmp_path / name

    bad = changed("nan.safetensors", **{"head/head.bias": torch.full((3,), torch.nan)})
    refused("values in head/head.bias that are not finite numbers", bad)
    bad = changed("shape.safetensors", coefficients=torch.zeros(3))
    refused("expected coefficients [", bad)
    assert model.active == "signs"
    after = outputs(model, images)
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("templates", [False, True])
def test_a_task_of_the_functions_is_taken(images: Tensor, tmp_path: Path, templates: bool) -> None:
    model = backbone().eval()
    banks = mimic(model, find_groups(model, targets=["*.attn.qkv", "*.mlp.fc1"])) if templates else None
    model.reset_classifier(2)  # type: ignore[operator]
    model.requires_grad_(False)
    if banks is not None:
        inject(model, banks)
    inject_adapter(model, LayerNormTuning() if templates else MeLo(rank=2))
    model.get_classifier().requires_grad_(True)  # type: ignore[operator]
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
        expected = model(images)
    path = save_task(model, tmp_path / "pets.safetensors", banks=banks, classes=["a", "b"])
    other = vit()
    other.load_task(path)
    found = outputs(other, images)["pets"]
    if templates:
        assert torch.equal(found, expected)
    else:  # the weights of the other model are rebuilt from templates
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_the_task_of_a_run_is_taken(tiny: Any, tmp_path: Path) -> None:
    """With the templates that the run has found for itself; random weights are the same everywhere."""
    typed = (
        "model=vit_att",
        "model.pretrained=false",
        "adapter=melo",
        "trainer.accelerator=cpu",
        "trainer.max_epochs=1",
    )
    run_stage(tiny(*typed, "dataset.max_per_class=4", "probe=false"), tmp_path)
    task = load_task(tmp_path / "task.safetensors")
    options = {"pretrained": False, "img_size": task.input.size}
    model = RecastModel.from_timm(task.backbone, recast=RecastConfig(targets=["*.attn.qkv"]), **options)
    model.load_task(tmp_path / "task.safetensors", "digits")
    stock = create_backbone(ModelConfig(backbone=task.backbone, **options)).network
    applied = apply_task(stock, task)
    digits = torch.randn(3, 3, task.input.size, task.input.size)
    with torch.no_grad():
        torch.testing.assert_close(outputs(model, digits)["digits"], applied(digits))
    assert model.tasks["digits"].classes == task.classes
    assert model.tasks["digits"].fingerprint == task.fingerprint


# Wrong requests


def test_a_name_in_other_characters_is_the_same_name() -> None:
    model = vit()
    model.add_task("v\u00f6gel", 2)  # ö as one character, and as two
    with pytest.raises(UserError, match=r"^name: expected one that no task has, got '.*', other characters"):
        model.add_task("vo\u0308gel", 2)


def test_wrong_requests() -> None:
    model = vit()
    model.add_task("birds", 2)
    for call, text in (
        (lambda: model.add_task("birds", 2), "name: expected one that no task has, got 'birds'"),
        (lambda: model.add_task("none", []), "classes: expected at least one, got none"),
        (lambda: model.add_task("none", 2, batchnorm_statistics="moving"), "expected frozen or update, got 'moving'"),
        (
            lambda: model(torch.zeros(2, 3, 64, 64), tasks=["birds"]),
            "tasks: expected 2 names, one for each image, got 1",
        ),
        (lambda: RecastModel.wrap(nn.Sequential(nn.Linear(3, 3))), "width: expected the number of features"),
        (lambda: RecastModel.from_timm("vit_tyni"), "expected a timm model, got 'vit_tyni'"),
        (
            lambda: RecastModel.wrap(timm.create_model("deit_tiny_distilled_patch16_224", **VIT)),
            "expected a model with one linear classifier",
        ),
    ):
        with pytest.raises(UserError, match=re.escape(text)) as caught:
            call()
        assert "\n" not in str(caught.value)
    assert list(model.tasks) == ["birds"]


def test_a_model_of_ones_own() -> None:
    torch.manual_seed(0)

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(8, 8)) for _ in range(4))

        def forward(self, images: Tensor) -> Tensor:
            values = images.flatten(1)
            for block in self.blocks:
                values = values + block(values).relu()
            return values

    model = RecastModel.wrap(Net(), width=8)
    model.add_task("one", 3)
    model.add_task("two", 3)
    disturb(model, "two", 1)
    images = torch.randn(2, 2, 2, 2)
    single = outputs(model, images)
    with torch.no_grad():
        mixed = model(images, tasks=["two", "one"])
    torch.testing.assert_close(mixed, torch.stack([single["two"][0], single["one"][1]]))
    for call in (lambda: model.merge("one"), lambda: model.save_task("one", "x.safetensors")):
        with pytest.raises(UserError, match="expected a timm model"):
            call()


def test_a_state_dict_holds_the_active_task_alone() -> None:
    """As the documentation says; `save` keeps all."""
    model, other = vit(), vit()
    for each in (model, other):
        each.add_task("a", 2)
        each.add_task("b", 3)
    model.set_task("b")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.5 if parameter.requires_grad else 0)
    model.set_task("a")
    other.set_task("a")
    other.load_state_dict(model.state_dict())
    images = torch.ones(1, 3, 64, 64)
    assert torch.equal(other.eval()(images), model.eval()(images))
    with model.task("b"), other.task("b"):
        assert not torch.equal(other(images), model(images))
