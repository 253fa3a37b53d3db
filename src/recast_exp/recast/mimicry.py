"""Neural Mimicry: templates and coefficients that rebuild a model's weights, made from the weights, and made again."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from types import ModuleType, NoneType
from typing import Any

import torch
from torch import Tensor, nn

from recast_exp.errors import UnknownNameError, UserError, check_integer, check_type
from recast_exp.plugins import SOLVERS, TEMPLATES
from recast_exp.recast.bank import Banks, Origin, check_dtype, templates_shape
from recast_exp.recast.formulas import Mimicked, first_coefficients
from recast_exp.recast.grouping import Group, check_distinct, layer_module
from recast_exp.recast.solvers import check_options, needs_images
from recast_exp.recast.templates import kind_of, rank_of
from recast_exp.recast.weights import reference, weights_hash

BATCH = 64
"""Images at once, through the layers that are calibrated."""

MAX_SETS = 1000
"""The most sets of coefficients, as of the key `recast.num_coefficient_sets`."""


@torch.inference_mode(False)  # whatever the caller's mode, so that coefficients can train
@torch.no_grad()
def mimic(
    model: nn.Module,
    groups: Iterable[Group],
    *,
    solver: str = "closed_form",
    num_sets: int = 2,
    seed: int = 42,
    templates: str = "layers",
    mixing: str | None = None,
    differences: Sequence[Mapping[str, Tensor]] = (),
    template_dtype: str = "float32",
    images: Tensor | None = None,
    settings: dict[str, object] | None = None,
    progress: Callable[[], None] = lambda: None,
    **options: object,
) -> Banks:
    """Neural Mimicry (arXiv 2411.16870): find templates and coefficients that rebuild a model's weights.

    Needs no data. The model is not changed, and neither are torch's generators. Templates of other kinds than `layers`
    are added to the frozen weights; no solver is needed for them.

    Args:
        model: The pretrained model, of any dtype and on any device but meta.
        groups: Groups of its layers, from `find_groups` with the same `templates` and `mixing`.
        solver: A name in `recast_exp.plugins.SOLVERS`: `closed_form`, `gradient`, `autoencoder` or one of another
            package.
        num_sets: Number K of sets of coefficients, which are averaged.
        seed: Seed of the solver, or of random templates, from 0 to 2³² - 1; each group has its own, derived from it.
        templates: Where templates come from, a name in `recast_exp.plugins.TEMPLATES`.
        mixing: How coefficients and templates make a weight; None is the first way of the kind of templates.
        differences: For `templates=tasks`, what each task has changed: layer → [rows, ...]. A layer that is missing has
            not been changed.
        template_dtype: What the templates are rounded to and kept as: `float32`, `bfloat16` or `int8`.
        images: Preprocessed images [N, 3, H, W], without labels, for `solver=calibrated`.
        settings: A record of the origin of the weights, kept with the banks; JSON-able.
        progress: Called after each step of an iterating solver, or after each group of a pass.
        options: Options of the solver, the keyword arguments of its `solve`.

    Returns:
        Templates [n, rows, ...] of each group and coefficients [K, B, n] of each layer, float32 on the CPU. With as
        many templates as layers, they rebuild the weights to within rounding; those that are added to the weights leave
        them as they are.

    Raises:
        UnknownNameError: If there is no such solver, it has no such option, or the model has no such layer.
        UserError: If the model is on the meta device, two groups have one name or share a layer, `num_sets` is not
            between 1 and 1000, there is no such kind of templates, all weights of a group are 0, or the solver needs
            images.

    Example:
        >>> import timm
        >>> from recast_exp import find_groups, mimic
        >>> model = timm.create_model("vit_tiny_patch16_224")
        >>> banks = mimic(model, find_groups(model, targets=["*.attn.qkv"]))
        >>> banks.coefficients["blocks.0.attn.qkv"].shape  # K sets, B blocks, n templates
        torch.Size([2, 1, 2])
    """
    kind, mixing = kind_of(templates, mixing)
    if solver not in (solvers := SOLVERS.names()):
        raise UnknownNameError(f"solver: expected one of {', '.join(solvers)}, got {solver!r}")
    check_options(solver, options)
    check_type("images", images, (Tensor, NoneType), "preprocessed images [N, 3, H, W] or None")
    check_type("settings", settings, (dict, NoneType), "a dictionary or None")
    check_type("differences", differences, (list, tuple), "a list of mappings from layers to tensors")
    for of_task in differences:
        check_type("differences", of_task, Mapping, "mappings from layers to tensors")
    check_dtype(template_dtype)
    check_integer("num_sets", num_sets, 1, MAX_SETS + 1)
    check_integer("seed", seed, 0, 2**32)
    if isinstance(groups, Group) or not isinstance(groups, Iterable):
        raise UserError(f"groups: expected a list of them, as find_groups gives it, got {type(groups).__name__}")
    groups = tuple(groups)
    if not groups:
        raise UserError("groups: expected at least one, got none")
    if templates == "tasks" and not differences:
        raise UserError("differences: expected those of at least one task with templates=tasks, got none")
    for group in groups:
        _check_sound(model, group, templates)
    check_distinct(groups)
    for group in groups:
        _check_number(model, group, templates, mixing)
    stacked = (torch.stack([reference(model, layer) for layer in group.layers]) for group in groups)
    if templates == "layers":
        if needs_images(solver):
            _check_images(images, solver)
        found = _solved(groups, stacked, solver, num_sets, seed, progress, options)
        for group, each in zip(groups, found, strict=True):
            _check_solved(model, group, each, solver, num_sets)
        if images is not None and needs_images(solver):
            found = _refined(model, groups, found, solver, images, seed, progress, options)
    else:
        found = [
            _made(
                group, weights, kind, mixing, num_sets,
                _of_layer(group, weights[0], differences) if templates == "tasks" else (seed + index) % 2**32,
            )
            for index, (group, weights) in enumerate(zip(groups, stacked, strict=True))
        ]  # fmt: skip
    for group, each in zip(groups, found, strict=True):
        if not each.templates.count_nonzero():
            raise UserError(
                f"model: expected weights to make templates of, got only zeros in {', '.join(group.layers)}; load "
                "pretrained weights, or leave these layers out of the targets"
            )
    coefficients = {
        layer: own
        for group, each in zip(groups, found, strict=True)
        for layer, own in zip(group.layers, each.coefficients.unbind(0), strict=True)
    }
    made = {group.name: each.templates for group, each in zip(groups, found, strict=True)}
    made_by = solver if templates == "layers" else templates
    chosen = dict(options) if mixing == kind.MIXINGS[0] else {**options, "mixing": mixing}
    origin = Origin(made_by, seed, num_sets, chosen, weights_hash(model, coefficients))
    return Banks(groups, made, coefficients, settings or {}, origin, kind.ADDED, mixing).rounded_to(template_dtype)


def _solved(
    groups: Sequence[Group],
    stacked: Iterable[Tensor],
    solver: str,
    num_sets: int,
    seed: int,
    progress: Callable[[], None],
    options: Mapping[str, Any],
) -> list[Mimicked]:
    """What a solver finds for the weights [L, rows, ...] of each group."""
    solve, own = SOLVERS.load(solver).solve, dict(options)
    if needs_images(solver):  # which has its options, and calls `progress`, when it goes on
        own, progress = {}, lambda: None
    found = []
    for index, (group, weights) in enumerate(zip(groups, stacked, strict=True)):
        with torch.enable_grad():
            found.append(
                solve(
                    weights,
                    group.num_templates,
                    num_sets,
                    group.num_blocks,
                    seed=(seed + index) % 2**32,
                    progress=progress,
                    **own,
                )
            )
    return found


def _refined(
    model: nn.Module,
    groups: Sequence[Group],
    found: Sequence[Mimicked],
    solver: str,
    images: Tensor,
    seed: int,
    progress: Callable[[], None],
    options: Mapping[str, Any],
) -> list[Mimicked]:
    """What a solver makes of it with images, on a copy of the model in float32."""
    network = copy.deepcopy(model).float().eval()
    device = next(network.parameters()).device

    def batches() -> Iterator[Tensor]:
        return iter(torch.split(images.to(device, torch.float32), BATCH))

    starts = [(group.layers, each) for group, each in zip(groups, found, strict=True)]
    refined: list[Mimicked] = SOLVERS.load(solver).refine(
        network, starts, batches, seed=seed, progress=progress, **options
    )
    return refined


def _made(
    group: Group, weights: Tensor, kind: ModuleType, mixing: str, num_sets: int, source: int | Tensor
) -> Mimicked:
    """Templates of another kind, from a seed or from the differences that tasks have made, and how they start."""
    rank = rank_of(group.num_templates, mixing)
    given = {"seed": source} if isinstance(source, int) else {"differences": source}
    made: Tensor = kind.make(weights, rank, mixing, **given)
    expected = templates_shape(group, weights[0].shape, mixing)
    if tuple(made.shape) != expected:
        raise UserError(
            f"groups: expected those of find_groups with the same templates and mixing, got {group.name} with "
            f"{group.num_templates} coefficients ({list(made.shape)} instead of {list(expected)})"
        )
    return Mimicked(made, first_coefficients(len(weights), num_sets, group.num_blocks, group.num_templates, mixing))


def _check_images(images: object, solver: str) -> None:
    """Refuse what are no preprocessed images; whether the model takes their size shows the first pass."""
    expected = f"images: expected preprocessed images [N, 3, H, W] of finite numbers with solver={solver}"
    if not isinstance(images, Tensor):
        raise UserError(f"{expected}, got {'None' if images is None else type(images).__name__}")
    if images.dim() != 4 or images.shape[1] != 3 or not images.numel() or not images.is_floating_point():
        raise UserError(f"{expected}, got {images.dtype} {list(images.shape)}")
    if images.is_meta or images.layout != torch.strided:
        raise UserError(f"{expected}, got a tensor {'without values' if images.is_meta else 'that is sparse'}")
    if bad := [number for number, image in enumerate(images) if not torch.isfinite(image).all()]:
        raise UserError(f"{expected}, got NaN or infinity in image {bad[0]}")


def _check_sound(model: nn.Module, group: Group, templates: str) -> None:
    """Refuse what `find_groups` would not have found."""
    if not isinstance(group, Group) or not (group.name and isinstance(group.name, str) and group.layers):
        raise UserError(f"groups: expected those of find_groups, got {group!r}")
    check_integer(f"num_templates of {group.name}", group.num_templates, 1)
    check_integer(f"num_blocks of {group.name}", group.num_blocks, 1)
    shapes = {tuple(layer_module(model, layer).weight.shape) for layer in group.layers}
    if len(shapes) > 1:
        raise UserError(f"groups: expected layers of one shape in {group.name}, got {sorted(shapes)}")
    if (rows := shapes.pop()[0]) % group.num_blocks:
        raise UserError(f"groups: expected blocks that divide the {rows} rows of {group.name}, got {group.num_blocks}")
    if templates == "tasks" and len(group.layers) > 1:
        raise UserError(
            f"groups: expected one layer in each, as find_groups makes them for templates=tasks, got {group.name} with "
            f"{len(group.layers)}"
        )


def _check_number(model: nn.Module, group: Group, templates: str, mixing: str) -> None:
    """Refuse more templates than their kind takes, before they are made: a file may ask for any number."""
    most = kind_of(templates)[0].most(layer_module(model, group.layers[0]).weight.shape, len(group.layers))
    if (number := rank_of(group.num_templates, mixing)) > most:
        raise UserError(f"num_templates: expected at most {most} (templates={templates}, {group.name}), got {number}")


def _check_solved(model: nn.Module, group: Group, found: object, solver: str, num_sets: int) -> None:
    """Refuse what a solver of another package may have returned: other numbers of sets are other parameters."""
    count, shape = group.num_templates, tuple(layer_module(model, group.layers[0]).weight.shape)
    expected = {
        "templates": (count, *shape),
        "coefficients": (len(group.layers), num_sets, group.num_blocks, count),
    }
    if not isinstance(found, Mimicked):
        raise UserError(f"solver: expected {solver} to return a Mimicked, got {type(found).__name__}")
    for name, wanted in expected.items():
        if (got := tuple(getattr(found, name).shape)) != wanted:
            raise UserError(
                f"solver: expected {solver} to return {name} {list(wanted)} of {group.name}, got {list(got)}"
            )


def _of_layer(group: Group, weight: Tensor, differences: Sequence[Mapping[str, Tensor]]) -> Tensor:
    """What tasks have changed in the one layer of a group: [n, rows, ...]."""
    (layer,) = group.layers
    return torch.stack([task.get(layer, torch.zeros_like(weight)).float() for task in differences])


def remake(model: nn.Module, groups: Iterable[Group], origin: Origin) -> Banks:
    """Make templates once more, as they were made before.

    Args:
        model: The pretrained model; it is not changed.
        groups: The groups of its layers.
        origin: How their templates were made.

    Returns:
        Those templates; on another machine, their last bits may differ.

    Raises:
        UnknownNameError: If the model lacks one of the layers, or there is no such solver.
        UserError: If the layers have other weights.
    """
    groups = tuple(groups)
    found = weights_hash(model, (layer for group in groups for layer in group.layers))
    if found != origin.weights:
        raise UserError(
            f"model: expected the weights that the templates were made from ({origin.weights[:16]}…), got others "
            f"({found[:16]}…)"
        )
    origin.check()
    options = dict(origin.options)
    if origin.solver not in TEMPLATES.names():
        made = mimic(model, groups, solver=origin.solver, num_sets=origin.num_sets, seed=origin.seed, **options)
        return made.rounded_to(origin.dtype)
    mixing = options.pop("mixing", None)
    made = mimic(model, groups, templates=origin.solver, mixing=mixing, num_sets=origin.num_sets, seed=origin.seed)
    return made.rounded_to(origin.dtype)
