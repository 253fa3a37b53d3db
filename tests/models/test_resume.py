"""A model that starts in the middle gives the logits and the gradients of one that starts at its images."""

from __future__ import annotations

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.nn import functional

from recast_exp.models.resume import find
from support.helpers import rows_know_no_others

FAMILIES = {
    "vit_tiny_patch16_224": ("blocks.9", {"img_size": 32}),
    "eva02_tiny_patch14_224": ("blocks.9", {"img_size": 28}),  # rotary positions come beside the tokens
    "deit_tiny_distilled_patch16_224": ("blocks.9", {"img_size": 32}),
    "resnet18": ("layer3.1", {}),
    "convnext_atto": ("stages.2.blocks.3", {}),
    "swin_tiny_patch4_window7_224": ("layers.2.blocks.3", {"img_size": 32, "window_size": 1, "drop_path_rate": 0.0}),
    "regnetx_002": ("s4.b3", {}),
}


def create(name: str, **options: object) -> nn.Module:
    torch.manual_seed(0)
    model: nn.Module = timm.create_model(name, num_classes=5, **options)
    return model.eval().requires_grad_(False)


@pytest.mark.parametrize("name", FAMILIES)
def test_the_same_logits_and_gradients_from_the_block_on(name: str) -> None:
    block, options = FAMILIES[name]
    size = options.get("img_size", 32)
    model = create(name, **options)
    trained = [*model.get_submodule(block).requires_grad_(True).parameters()]
    found = find(model, size)
    assert found is not None
    assert found.block == block
    images = torch.randn(4, 3, size, size)
    whole = model(images)
    expected = torch.autograd.grad(whole.square().sum(), trained)
    activations = found.before(images)
    assert not activations.requires_grad
    logits = found.after(activations, size)
    assert torch.equal(logits, whole)
    gradients = torch.autograd.grad(logits.square().sum(), trained)
    assert all(torch.equal(one, other) for one, other in zip(gradients, expected, strict=True))


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "eva02_tiny_patch14_224"])
def test_the_inputs_of_a_block_of_a_vit_do_not_depend_on_the_batch(name: str) -> None:
    options = FAMILIES[name][1]
    model = create(name, **options)
    model.get_submodule("blocks.6").requires_grad_(True)
    found = find(model, options["img_size"])
    assert found is not None
    images = torch.randn(11, 3, options["img_size"], options["img_size"])
    parts = torch.cat([found.before(part) for part in images.split(4)])
    if rows_know_no_others():
        assert torch.equal(parts, found.before(images))
    else:
        torch.testing.assert_close(parts, found.before(images), rtol=1e-4, atol=1e-5)


def test_what_trains_before_the_blocks_or_in_the_first_leaves_nothing_to_gain() -> None:
    model = create("vit_tiny_patch16_224", img_size=32)
    model.get_parameter("cls_token").requires_grad_(True)
    assert find(model, 32) is None
    model = create("vit_tiny_patch16_224", img_size=32)
    model.get_parameter("blocks.0.norm1.weight").requires_grad_(True)
    assert find(model, 32) is None


def test_where_only_the_head_trains_the_last_block_is_the_start() -> None:
    model = create("vit_tiny_patch16_224", img_size=32)
    model.get_submodule("head").requires_grad_(True)
    found = find(model, 32)
    assert found is not None
    assert found.block == "blocks.11"


def test_nothing_random_lies_before_the_start() -> None:
    model = create("vit_tiny_patch16_224", img_size=32, drop_path_rate=0.1)
    model.get_submodule("blocks.9").requires_grad_(True)
    found = find(model.train(), 32)
    assert found is not None
    assert found.block == "blocks.1"  # the rate of the first block is 0
    assert model.training
    dropout = create("vit_tiny_patch16_224", img_size=32, pos_drop_rate=0.1)
    dropout.get_submodule("blocks.9").requires_grad_(True)
    assert find(dropout, 32) is None


@pytest.mark.parametrize("fused", [True, False])
def test_dropout_of_attention_is_random_though_its_module_may_not_run(
    fused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("timm.layers.config._USE_FUSED_ATTN", int(fused))
    model = create("vit_tiny_patch16_224", img_size=32, attn_drop_rate=0.3)
    model.get_submodule("blocks.9").requires_grad_(True)
    assert find(model, 32) is None


class InTraining(nn.Module):
    """A block without a module of dropout that does something else in training."""

    def __init__(self, chance: float) -> None:
        super().__init__()
        self.chance = chance

    def forward(self, features: Tensor) -> Tensor:
        return functional.dropout(features, self.chance, self.training)


@pytest.mark.parametrize("chance", [0.1, 1.0])  # the second draws no number
def test_what_differs_in_training_comes_after_the_start(chance: float) -> None:
    model = nn.Sequential()
    blocks = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1), InTraining(chance), nn.Conv2d(4, 4, 1), nn.Flatten()
    model.blocks = nn.Sequential(*blocks)
    model.requires_grad_(False).blocks[3].requires_grad_(True)
    found = find(model, 8)
    assert found is not None
    assert found.block == "blocks.2"


def test_the_search_draws_no_number_from_the_callers_generators() -> None:
    model = create("vit_tiny_patch16_224", img_size=32, drop_path_rate=0.1)
    model.get_submodule("blocks.9").requires_grad_(True)
    before = torch.get_rng_state()
    find(model, 32)
    assert torch.equal(torch.get_rng_state(), before)


class Around(nn.Module):
    """A model whose end takes more from its beginning than the block's input."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 4, 4)
        self.blocks = nn.ModuleList([nn.Conv2d(4, 4, 1) for _ in range(3)])
        self.head = nn.Linear(4, 5)

    def forward(self, images: Tensor) -> Tensor:
        start = features = self.stem(images)
        for block in self.blocks:
            features = block(features)
        logits: Tensor = self.head((features + start).mean((2, 3)))
        return logits


def test_a_connection_around_the_block_is_noticed() -> None:
    model = Around().requires_grad_(False)
    model.blocks[2].requires_grad_(True)
    assert find(model, 8) is None
