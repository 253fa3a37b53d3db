"""Which layers share templates, on small nets whose right answer is plain to see."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

from recast_exp.errors import UserError
from recast_exp.recast import Group, find_groups, inject, mimic
from recast_exp.recast.grouping import _num_blocks, classifier_modules, numbered_blocks


class Block(nn.Module):
    def __init__(self, width: int, own: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.shared = nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.ReLU(), nn.Linear(2 * width, width))
        self.own = nn.Linear(width, own)


class Net(nn.Module):
    """Stages of blocks; `own` has another shape in each block."""

    def __init__(self, *depths: int) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 1)
        self.stages = nn.ModuleList(nn.Sequential(*(Block(8, 1 + i) for i in range(depth))) for depth in depths)
        self.head = nn.Sequential(*(nn.Sequential(nn.Linear(8, 8)) for _ in range(2)))

    def get_classifier(self) -> nn.Module:
        return self.head


def layers(groups: Sequence[Group]) -> list[list[str]]:
    return [list(group.layers) for group in groups]


def one_line(error: pytest.ExceptionInfo[UserError], *expected: object) -> None:
    message = str(error.value)
    assert "\n" not in message
    for text in expected:
        assert str(text) in message, message


@pytest.mark.parametrize(
    ("pattern", "near"),
    [("*.shred", "*.shared, *.own)"), ("xyz", "*.mlp.0, *.mlp.2, *.own, *.shared)"), ("*.mlp.1", "*.mlp.2, *.mlp.0")],
)
def test_a_pattern_without_layers_is_told_the_nearest_places(pattern: str, near: str) -> None:
    with pytest.raises(UserError) as error:
        find_groups(Net(2, 3), targets=[pattern])
    one_line(
        error, f"targets: expected patterns over the layers of Net that can be grouped ({near}", f"got {pattern!r}"
    )


class Attention(nn.Module):
    """Projections under every name that timm gives them, of 12 rows for 4 heads but where said."""

    def __init__(self) -> None:
        super().__init__()
        self.num_heads = 4
        for name in ("q", "k", "v", "q_proj", "k_proj", "v_proj", "proj"):
            self.add_module(name, nn.Linear(5, 12))
        self.qkv = nn.Linear(5, 36)


@pytest.mark.parametrize("place", ["q", "k", "v", "q_proj", "k_proj", "v_proj"])
def test_each_projection_is_divided_by_heads(place: str) -> None:
    model = nn.Sequential(Attention())
    assert _num_blocks(model, f"0.{place}", "head") == 4
    assert _num_blocks(model, f"0.{place}", "projection") == 1
    model[0].num_heads = 5  # which do not divide 12 rows
    assert _num_blocks(model, f"0.{place}", "head") == 1


def test_fused_projections_are_divided_in_three_and_other_layers_are_not() -> None:
    model = nn.Sequential(Attention())
    assert [_num_blocks(model, f"0.{place}", "projection") for place in ("qkv", "proj")] == [3, 1]
    assert [_num_blocks(model, f"0.{place}", "head") for place in ("qkv", "proj")] == [12, 1]
    assert [_num_blocks(model, f"0.{place}", "row") for place in ("qkv", "proj")] == [36, 12]
    model[0].num_heads, model[0].qkv = 2, nn.Linear(5, 33)
    assert _num_blocks(model, "0.qkv", "head") == 1
    model[0].qkv = nn.Linear(5, 16)  # no multiple of three, as with shared keys and values
    assert _num_blocks(model, "0.qkv", "projection") == 1
    assert _num_blocks(model, "0.qkv", "head") == 1


def test_both_classifiers_of_a_distilled_model_are_none_of_its_layers() -> None:
    model = timm.create_model("deit_tiny_distilled_patch16_224", num_classes=3)
    assert classifier_modules(model) == {model.head, model.head_dist}
    assert classifier_modules(nn.Linear(2, 2)) == set()


def test_the_blocks_of_all_stages_in_their_order() -> None:
    blocks = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    assert numbered_blocks(blocks) == ["0", "1"]
    assert numbered_blocks(nn.ModuleDict({"norm": nn.LayerNorm(2), "blocks": blocks})) == ["blocks.0", "blocks.1"]


def test_layers_of_one_place_and_shape_within_a_stage_are_grouped_and_nothing_else() -> None:
    groups = find_groups(Net(2, 3))
    expected = [
        [f"stages.{stage}.{block}.{place}" for block in range(depth)]
        for stage, depth in enumerate((2, 3))
        for place in ("shared", "mlp.0", "mlp.2")
    ]
    assert sorted(layers(groups)) == sorted(expected)
    assert [group.num_templates for group in groups] == [len(group.layers) for group in groups]
    assert len({group.name for group in groups}) == len(groups)


@pytest.mark.parametrize("depth", range(2, 9))
def test_by_default_pairs_and_one_group_of_three_where_odd(depth: int) -> None:
    sizes = [len(group.layers) for group in find_groups(Net(depth), targets=["*.shared"])]
    assert sizes == [2 + depth % 2] + [2] * (depth // 2 - 1)


@pytest.mark.parametrize(("depth", "num_groups"), [(7, 1), (7, 2), (7, 3), (7, 5), (7, 7), (12, 5), (12, 6)])
def test_groups_are_consecutive_and_differ_by_at_most_one(depth: int, num_groups: int) -> None:
    groups = find_groups(Net(depth), targets=["*.shared"], num_groups=num_groups)
    sizes = [len(group.layers) for group in groups]
    assert len(sizes) == num_groups
    assert max(sizes) - min(sizes) <= 1
    assert list(chain(*layers(groups))) == [f"stages.0.{block}.shared" for block in range(depth)]


def test_targets_are_globs_over_layer_names() -> None:
    model = Net(4, 2)
    assert layers(find_groups(model, targets=["stages.1.*.mlp.?"])) == [
        ["stages.1.0.mlp.0", "stages.1.1.mlp.0"],
        ["stages.1.0.mlp.2", "stages.1.1.mlp.2"],
    ]
    assert layers(find_groups(model, targets=["stages.0.[!0].shared"], num_groups=1)) == [
        ["stages.0.1.shared", "stages.0.2.shared", "stages.0.3.shared"]
    ]


@pytest.mark.parametrize(
    ("name", "blocks"),
    [
        ("vit_tiny_patch16_224", ["blocks.9", "blocks.10", "blocks.11"]),  # in the order of numbers, not of letters
        ("resnet26", ["layer3.1", "layer4.0", "layer4.1"]),
        ("convnext_atto", ["stages.2.blocks.5", "stages.3.blocks.0", "stages.3.blocks.1"]),
    ],
)
def test_the_last_blocks_alone_can_be_taken(name: str, blocks: list[str]) -> None:
    with torch.device("meta"):
        model = timm.create_model(name)
    layers = [layer for group in find_groups(model, last_blocks=3) for layer in group.layers]
    assert {block for block in blocks if any(layer.startswith(f"{block}.") for layer in layers)} >= set(blocks[1:])
    assert all(layer.startswith(tuple(f"{block}." for block in blocks)) for layer in layers)
    every = [group.layers for group in find_groups(model)]
    assert [group.layers for group in find_groups(model, last_blocks=100)] == every
    with pytest.raises(UserError, match=r"^last_blocks: expected an integer ≥ 1, got 0"):
        find_groups(model, last_blocks=0)


@pytest.mark.parametrize("num_templates", [1, 2])
def test_num_templates_is_taken_over(num_templates: int) -> None:
    groups = find_groups(Net(6), num_groups=2, num_templates=num_templates)
    assert {group.num_templates for group in groups} == {num_templates}


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"num_templates": 3}, ("num_templates: expected at most 2", "the group stages.0.shared.1", "got 3; leave it")),
        ({"num_groups": 6}, ("num_groups: expected at most 5 (the layers of stages.0.shared), got 6; leave it out",)),
        ({"targets": ["*.shard"]}, ("targets: expected patterns over the layers of Net", "'*.shard'", "*.shared")),
        ({"targets": ["*.shared", "*.qkv"]}, ("targets: ", "'*.qkv'")),
        ({"targets": ["head.*"]}, ("targets: ", "'head.*'")),
        ({"targets": ["stem"]}, ("targets: ", "'stem'")),
        ({"num_templates": 0}, ("num_templates: expected an integer ≥ 1, got 0",)),
        ({"num_groups": -1}, ("num_groups: expected an integer ≥ 1, got -1",)),
        ({"granularity": "column"}, ("granularity: expected one of layer, projection, head, row, got 'column'",)),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_what_does_not_fit_is_refused_in_one_line(options: dict[str, Any], expected: tuple[str, ...]) -> None:
    with pytest.raises(UserError) as error:
        find_groups(Net(5), **options)
    one_line(error, *expected)
    assert str(error.value).startswith(f"{next(iter(options))}: ")


@pytest.mark.parametrize("model", [Net(1, 1), nn.Sequential(nn.Linear(2, 2)), timm.create_model("test_resnet")])
def test_a_model_with_nothing_to_group_is_refused(model: nn.Module) -> None:
    with pytest.raises(UserError) as error:
        find_groups(model)
    one_line(error, "targets: expected", "nothing to group", type(model).__name__)


def test_tied_and_rewritten_weights_are_left_alone() -> None:
    model = Net(4)
    model.stages[0][3].shared.weight = model.stages[0][0].shared.weight
    inputs = torch.randn(2, 8)

    def outputs() -> Tensor:
        return torch.stack([block.shared(inputs) for block in model.stages[0]])

    expected = outputs()
    groups = find_groups(model, targets=["*.shared"], num_groups=1)
    assert layers(groups) == [["stages.0.1.shared", "stages.0.2.shared"]]
    inject(model, mimic(model, groups))
    torch.testing.assert_close(outputs(), expected)
    assert not any(layer.endswith("shared") for group in find_groups(model) for layer in group.layers)


class TwoShapes(nn.Module):
    """A stage whose blocks have wide and narrow layers at one place; `same` is alike in all."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*(nn.Module() for _ in range(5)))
        for number, block in enumerate(self.blocks):
            block.mixed = nn.Linear(8, 4 if number % 2 else 8)
            block.same = nn.Linear(8, 8)

    def forward(self, inputs: Tensor) -> Tensor:
        for block in self.blocks:
            inputs = (
                inputs + block.same(inputs) + nn.functional.pad(mixed := block.mixed(inputs), (0, 8 - mixed.shape[-1]))
            )
        return inputs


@torch.no_grad()
def test_two_shapes_at_one_place_have_banks_of_their_own() -> None:
    model, inputs = TwoShapes(), torch.randn(3, 8)
    expected = model(inputs)
    groups = find_groups(model, num_groups=1)
    assert {group.name: len(group.layers) for group in groups} == {
        "blocks.mixed.8x8.0": 3,
        "blocks.same.0": 5,  # only a name that would be there twice has the shape in it
        "blocks.mixed.4x8.0": 2,
    }
    inject(model, mimic(model, groups))
    torch.testing.assert_close(model(inputs), expected)
    only = find_groups(TwoShapes(), targets=["blocks.[13].mixed"])
    assert [group.name for group in only] == ["blocks.mixed.0"]


@pytest.mark.parametrize(
    "name", ["ghostnet_050", "ghostnetv2_100", "gcvit_xxtiny", "gcvit_tiny", "resnet50", "swin_tiny_patch4_window7_224"]
)
def test_groups_of_architectures_have_names_of_their_own(name: str) -> None:
    with torch.device("meta"):
        groups = find_groups(timm.create_model(name))
    assert len({group.name for group in groups}) == len(groups)


def test_stages_within_stages_have_names_of_their_own() -> None:
    model = nn.Module()
    model.blocks = nn.Sequential(*(nn.Module() for _ in range(2)), nn.Sequential(*(nn.Module() for _ in range(2))))
    for block in model.blocks[:2]:
        block.add_module("2", nn.ModuleDict({"conv": nn.Linear(4, 4)}))
        block.other = nn.ReLU()
    for block in model.blocks[2]:
        block.conv = nn.Linear(4, 4)
    groups = find_groups(model)
    assert layers(groups) == [["blocks.0.2.conv", "blocks.1.2.conv"], ["blocks.2.0.conv", "blocks.2.1.conv"]]
    assert [group.name for group in groups] == ["blocks.2.conv.4x4.0", "blocks.2.conv.4x4_.0"]


def test_containers_may_count_with_a_stem() -> None:
    stage = nn.Module()
    for number in (1, 2):
        stage.add_module(f"b{number}", Block(8, number))
    model = nn.Module()
    model.s1 = stage
    assert layers(find_groups(model, targets=["*.shared"])) == [["s1.b1.shared", "s1.b2.shared"]]


def attention(rows: int, heads: int = 2, name: str = "qkv") -> nn.Module:
    """Two blocks of attention as timm names it."""
    model = nn.Module()
    model.blocks = nn.Sequential(nn.Module(), nn.Module())
    for block in model.blocks:
        block.attn = nn.Module()
        block.attn.num_heads = heads
        block.attn.add_module(name, nn.Linear(8, rows))
    return model


@pytest.mark.parametrize(
    ("rows", "name", "granularity", "blocks"),
    [
        (24, "qkv", "layer", 1),
        (24, "qkv", "projection", 3),
        (24, "qkv", "head", 6),
        (8, "q", "projection", 1),
        (8, "q", "head", 2),
        (256, "proj", "projection", 1),
        (256, "proj", "head", 4),
        (100, "proj", "head", 1),
        (100, "proj", "row", 100),
    ],
)
def test_granularity_decides_the_blocks(rows: int, name: str, granularity: str, blocks: int) -> None:
    (group,) = find_groups(attention(rows, name=name), granularity=granularity)
    assert group.num_blocks == blocks


def test_blocks_are_the_rows_of_a_projection_and_of_a_head() -> None:
    """Disturbing one block's coefficients moves that projection's, or head's, rows alone."""
    for granularity, blocks in (("projection", 3), ("head", 6), ("row", 24)):
        model = attention(24)
        banks = mimic(model, find_groups(model, granularity=granularity))
        inject(model, banks)
        qkv = model.blocks[0].attn.qkv
        before = qkv.weight.detach().clone()
        qkv.parametrizations.weight.original.data[:, 1] += 1
        moved = (qkv.weight - before).abs().amax(dim=1) > 1e-3
        assert moved.nonzero().flatten().tolist() == list(range(24 // blocks, 2 * 24 // blocks))


def test_a_single_pattern_is_a_list_of_one() -> None:
    with torch.device("meta"):
        vit = timm.create_model("vit_tiny_patch16_224")
    assert find_groups(vit, targets="*.attn.qkv") == find_groups(vit, targets=["*.attn.qkv"])
