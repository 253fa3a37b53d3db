"""Which layers share templates: found in the model itself, by name, shape and stage.

A *stage* is a container of numbered blocks (`blocks`, `layer3`, `stages.2.blocks`, `s3` with b1, b2, …). Layers at the
same place in the blocks of one stage, with weights of the same shape, can share a template bank. They are divided into
groups of consecutive layers, whose sizes differ by at most one.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from fnmatch import fnmatchcase

from torch import nn
from torch.nn.utils import parametrize

from recast_exp.errors import UnknownNameError, UserError, check_integer, check_type
from recast_exp.recast.templates import coefficients_of, kind_of

GRANULARITIES = ("layer", "projection", "head", "row")
MIN_BLOCK_ROWS = 64  # granularity=head where there are no heads (MLP, convolutions): the head size of common ViTs


@dataclass(frozen=True)
class Group:
    """Consecutive layers that share one template bank; a single layer, where each has templates of its own.

    Attributes:
        name: Stage, place in the block and number of the group, such as `blocks.attn.qkv.0`. Where a stage has layers
            of two shapes at one place, the shape comes before the number: `stages.1.conv.40x20x3x3.0`.
        layers: Names of the layers in the model, in order.
        num_templates: Number n of coefficients in a block: that of the templates, or of the entries of a mixer.
        num_blocks: Number B of blocks of rows with coefficients of their own.
    """

    name: str
    layers: tuple[str, ...]
    num_templates: int
    num_blocks: int


def find_groups(
    model: nn.Module,
    *,
    targets: str | Iterable[str] | None = None,
    num_groups: int | None = None,
    num_templates: int | None = None,
    granularity: str = "layer",
    last_blocks: int | None = None,
    templates: str = "layers",
    mixing: str | None = None,
) -> list[Group]:
    """Group the Linear and Conv2d layers of a model (arXiv 2411.16870). The model is not changed.

    Args:
        model: Any model with numbered blocks, such as timm's; the classifier of a timm model is left out.
        targets: Glob patterns over layer names, or a single one; None takes every layer that has a partner.
        num_groups: Number of groups for each stage and place; None makes groups of two layers, and one of three where
            the number of layers is odd.
        num_templates: Number n of templates of each group, or of directions; None is the number of its layers, which is
            exact, or what the kind of templates usually has.
        granularity: The part of a weight that has coefficients of its own: `layer`, `projection`, `head` or
            `row`.
        last_blocks: Take only layers of this number of blocks, counted from the end of the model; None takes all.
        templates: Where templates come from, a name in `recast_exp.plugins.TEMPLATES`: `layers`, `random`, `singular`,
            `basis`, `tasks`. Pass the same to `mimic`.
        mixing: How coefficients and templates make a weight; None is the first way of the kind of templates.

    Returns:
        The groups, in the model's order.

    Raises:
        UserError: If nothing can be grouped, a pattern matches nothing, or a number does not fit the layers found.

    Example:
        >>> import timm
        >>> from recast_exp import find_groups
        >>> model = timm.create_model("vit_tiny_patch16_224")
        >>> groups = find_groups(model, targets=["*.attn.qkv"])
        >>> groups[0].name, groups[0].layers
        ('blocks.attn.qkv.0', ('blocks.0.attn.qkv', 'blocks.1.attn.qkv'))
    """
    check_type("model", model, nn.Module, "a network")
    numbers = {"num_groups": num_groups, "num_templates": num_templates, "last_blocks": last_blocks}
    for argument, number in numbers.items():
        if number is not None:
            check_integer(argument, number, 1)
    if granularity not in GRANULARITIES:
        raise UserError(f"granularity: expected one of {', '.join(GRANULARITIES)}, got {granularity!r}")
    kind, mixing = kind_of(templates, mixing)
    columns = _columns(model)
    if last_blocks is not None:
        columns = _of_last_blocks(columns, last_blocks)
    if targets is not None:
        patterns = [targets] if isinstance(targets, str) else list(targets) if isinstance(targets, Iterable) else [None]
        if not all(isinstance(pattern, str) for pattern in patterns):
            raise UserError(f"targets: expected patterns over names of layers, got {targets!r}")
        _check_patterns(model, patterns, columns)
        columns = {
            place: chosen
            for place, layers in columns.items()
            if (chosen := [name for name in layers if any(fnmatchcase(name, pattern) for pattern in patterns)])
        }
    elif not kind.PER_LAYER:
        columns = {place: layers for place, layers in columns.items() if len(layers) > 1}
    if not columns:
        raise UserError(
            "targets: expected Linear or Conv2d layers of the same place and shape within a stage, got "
            f"{type(model).__name__}, which has nothing to group; choose another model"
        )
    groups = []
    for column, (_, _, shape), layers in zip(_names(columns), columns, columns.values(), strict=True):
        sizes = [1] * len(layers) if kind.PER_LAYER else _group_sizes(column, len(layers), num_groups)
        start = 0
        for index, size in enumerate(sizes):
            members = tuple(layers[start : start + size])
            start += size
            name = f"{column}.{index}"
            if num_templates is not None and num_templates > (most := kind.most(shape, size)):
                why = f"the layers of the group {name}" if templates == "layers" else f"templates={templates}, {name}"
                raise UserError(
                    f"num_templates: expected at most {most} ({why}), got {num_templates}; leave it out for the usual "
                    "number"
                )
            blocks = _num_blocks(model, members[0], granularity)
            count = coefficients_of(num_templates or kind.usual(shape, size, mixing), mixing)
            groups.append(Group(name, members, count, blocks))
    return groups


def check_distinct(groups: Sequence[Group]) -> None:
    """Refuse two groups of one name, whose templates would be mixed up, and a layer in two groups.

    Raises:
        UserError: One line.
    """
    for what, names in (
        ("names", [group.name for group in groups]),
        ("layers", [layer for group in groups for layer in group.layers]),
    ):
        if twice := [name for name, count in Counter(names).items() if count > 1]:
            raise UserError(
                f"groups: expected groups with {what} of their own, got {twice[0]} twice; find all groups in one call, "
                "or mimic and inject them one after the other"
            )


def layer_module(model: nn.Module, layer: str) -> nn.Linear | nn.Conv2d:
    """The Linear or Conv2d layer of a name.

    Raises:
        UnknownNameError: If the model has no such layer.
    """
    try:
        module = model.get_submodule(layer)
    except AttributeError:
        module = None
    if not isinstance(module, nn.Linear | nn.Conv2d):
        raise UnknownNameError(f"layer: expected a Linear or Conv2d of {type(model).__name__}, got {layer!r}")
    return module


def _names(columns: Iterable[tuple[str, str, tuple[int, ...]]]) -> list[str]:
    """`stage.place` of each column, with the shape of its weights only where two columns would have one name.

    Banks are found by these names, so a name depends on no more than it has to.
    """
    columns = list(columns)
    plain = Counter(f"{stage}.{place}" for stage, place, _ in columns)
    names: list[str] = []
    for stage, place, shape in columns:
        name = f"{stage}.{place}"
        if plain[name] > 1:
            name = f"{name}.{'x'.join(map(str, shape))}"
        while name in names:  # stages within stages: the place `3.conv` in `blocks`, and `conv` in `blocks.3`
            name = f"{name}_"
        names.append(name)
    return names


def _columns(model: nn.Module) -> dict[tuple[str, str, tuple[int, ...]], list[str]]:
    """Layers by (stage, place in the block, weight shape), in the model's order."""
    stages = {name for name, module in model.named_modules() if _is_stage(module)}
    classifier = classifier_modules(model)
    places = places_of_parameters(model)
    columns: dict[tuple[str, str, tuple[int, ...]], list[str]] = {}
    for name, module in model.named_modules():
        if not isinstance(module, nn.Linear | nn.Conv2d) or module in classifier:
            continue
        # A weight that is shared by two layers, or computed from other parameters, cannot be rewritten for one alone
        if parametrize.is_parametrized(module) or len(places.get(id(module.weight), [])) != 1:
            continue
        parts = name.split(".")
        # The deepest stage in which the layer lies inside a block, not as the block itself.
        for depth in range(len(parts) - 2, 0, -1):
            stage = ".".join(parts[:depth])
            if stage in stages:
                place = ".".join(parts[depth + 1 :])
                columns.setdefault((stage, place, tuple(module.weight.shape)), []).append(name)
                break
    return columns


def places_of_parameters(model: nn.Module) -> dict[int, list[str]]:
    """The names of each parameter, by its id; several where modules share it. A module in two places counts once."""
    places: dict[int, list[str]] = {}
    for name, module in model.named_modules():
        for own, parameter in module.named_parameters(recurse=False):
            places.setdefault(id(parameter), []).append(f"{name}.{own}")
    return places


def _of_last_blocks(
    columns: dict[tuple[str, str, tuple[int, ...]], list[str]], last_blocks: int
) -> dict[tuple[str, str, tuple[int, ...]], list[str]]:
    """The columns without the layers of earlier blocks; all where the model has no more blocks than that."""
    block_of = {
        name: ".".join(name.split(".")[: stage.count(".") + 2])
        for (stage, _, _), layers in columns.items()
        for name in layers
    }
    order = sorted(set(block_of.values()), key=_in_order)
    kept = set(order[-last_blocks:])
    found = {key: [name for name in layers if block_of[name] in kept] for key, layers in columns.items()}
    return {key: layers for key, layers in found.items() if layers}


def _in_order(block: str) -> list[tuple[str, int]]:
    """The place of a block in its model: `stages.2.blocks.10` comes after `stages.2.blocks.9`."""
    return [(stem, int(number or -1)) for stem, number in re.findall(r"(\D*)(\d*)\.?", block)]


def _is_stage(module: nn.Module) -> bool:
    """Whether all children are numbered alike: 0, 1, 2 or b1, b2, b3."""
    names = [name for name, _ in module.named_children()]
    stems = {re.fullmatch(r"(\D*)\d+", name) for name in names}
    return bool(names) and None not in stems and len({stem[1] for stem in stems if stem}) == 1


def numbered_blocks(model: nn.Module) -> list[str]:
    """The names of all blocks of the stages of a model, in its order."""
    stages = [(name, module) for name, module in model.named_modules() if _is_stage(module)]
    return [f"{name}.{child}" if name else child for name, module in stages for child, _ in module.named_children()]


def classifier_modules(model: nn.Module) -> set[nn.Module]:
    """The modules of a timm model's classifier; none for a model of another library."""
    get_classifier = getattr(model, "get_classifier", None)
    if get_classifier is None:
        return set()
    try:
        classifier = get_classifier()
    except AttributeError:  # those of a few models expect one, where there is none
        return set()
    heads = classifier if isinstance(classifier, tuple | list) else [classifier]
    return {module for head in heads if isinstance(head, nn.Module) for module in head.modules()}


def _check_patterns(
    model: nn.Module, targets: list[str], columns: dict[tuple[str, str, tuple[int, ...]], list[str]]
) -> None:
    names = [name for layers in columns.values() for name in layers]
    for pattern in targets:
        if not any(fnmatchcase(name, pattern) for name in names):
            places = sorted({f"*.{place}" for _, place, _ in columns})
            near = get_close_matches(pattern, places, n=3, cutoff=0.3) or places[:6]
            raise UserError(
                f"targets: expected patterns over the layers of {type(model).__name__} that can be grouped "
                f"({', '.join(near) or 'it has none'}), got {pattern!r}, which matches none"
            )


def _group_sizes(place: str, layers: int, num_groups: int | None) -> list[int]:
    count = num_groups or max(1, layers // 2)
    if count > layers:
        raise UserError(
            f"num_groups: expected at most {layers} (the layers of {place}), got {count}; leave it out for pairs"
        )
    small, larger = divmod(layers, count)
    return [small + 1] * larger + [small] * (count - larger)


def _num_blocks(model: nn.Module, layer: str, granularity: str) -> int:
    """B for a layer: the fused q, k, v (projection), every head's rows (head), every row (row), else one."""
    rows = layer_module(model, layer).weight.shape[0]
    parent, _, place = layer.rpartition(".")
    heads = getattr(model.get_submodule(parent), "num_heads", None)
    fused = 3 if place == "qkv" and rows % 3 == 0 else 1
    if granularity == "layer":
        return 1
    if granularity == "row":
        return int(rows)
    if granularity == "projection":
        return fused
    if (
        isinstance(heads, int)
        and rows % (fused * heads) == 0
        and (fused == 3 or place in {"q", "k", "v", "q_proj", "k_proj", "v_proj"})
    ):
        return fused * heads
    return max(blocks for blocks in range(1, max(1, rows // MIN_BLOCK_ROWS) + 1) if rows % blocks == 0)
