"""Check that a model can be made: timm knows its backbone, which has layers to group and a place for the adapter."""

from __future__ import annotations

import dataclasses
import functools
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import nn

from recast_exp.adapters import Adapter, NoAdapter, check_adapter, from_config, inject_adapter
from recast_exp.config.schema import MimicryConfig, ModelConfig, RecastConfig
from recast_exp.errors import RecastError, UnfitError, UserError, first_line, section
from recast_exp.models.adapted import assemble
from recast_exp.models.bank_cache import groups_of
from recast_exp.models.create import backbone_name, blueprint, input_of
from recast_exp.models.features import classifier
from recast_exp.models.loading import check_bank, load_task
from recast_exp.models.task_file import COEFFICIENTS, FIXED, RELATIVE, groups_and_origin
from recast_exp.models.timm_model import timm_model
from recast_exp.recast import Banks, Group, inject
from recast_exp.recast.bank import REBUILDING
from recast_exp.recast.solvers import check_options
from recast_exp.recast.templates import kind_of

log = logging.getLogger(__name__)


def check_model(
    model: ModelConfig, recast: RecastConfig, mimicry: MimicryConfig, adapter: Mapping[str, object]
) -> None:
    """Refuse a backbone that timm does not know, that has no layers to group, or that has no place for the adapter.

    No weights are loaded.

    Args:
        model: The model.
        recast: How its layers are grouped, if they are.
        mimicry: How the templates are found.
        adapter: Name and options of the adapter.

    Raises:
        UserError: One line with the nearest names, or with the layers that can be grouped.
        UnfitError: If the adapter does not fit the backbone.
    """
    backbone_name(model)
    check_size(model)
    chosen = from_config(adapter)
    if model.method == "recast":
        with section("mimicry."):
            check_options(mimicry.name, mimicry.options)
    if model.method != "recast" and isinstance(chosen, NoAdapter):
        return
    if (network := _blueprint(model)) is None:
        return
    check_adapter(functools.partial(blueprint, model), chosen)
    groups = []
    if model.method == "recast":
        with section("recast."):
            groups = groups_of(network, recast)
    if not isinstance(chosen, NoAdapter):
        _check_gradients(model, recast, groups, chosen)


def _check_gradients(model: ModelConfig, recast: RecastConfig, groups: list[Group], adapter: Adapter) -> None:
    """Refuse an adapter that cuts coefficients or its own parameters off: training would stop at its first step."""
    network = blueprint(model).requires_grad_(False)
    trained: dict[str, dict[str, nn.Parameter]] = {}

    def note(kind: str, paths: Mapping[str, str]) -> None:
        # Now: an adapter may give coefficients another name
        trained[kind] = {name: network.get_parameter(path) for name, path in paths.items()}

    templates, mixing = kind_of(recast.templates, recast.mixing)
    banks = Banks.without_values(network, groups, added=templates.ADDED, mixing=mixing)
    note("coefficients", inject(network, banks) if groups else {})
    try:
        with torch.device("meta"):
            note("adapter", inject_adapter(network, adapter))
        size = input_of(network, model).size
        output = network.eval()(torch.empty(1, 3, size, size, device="meta")).sum()
        parameters = [parameter for kind in trained.values() for parameter in kind.values()]
        gradients = iter(torch.autograd.grad(output, parameters, allow_unused=True))
    except UnfitError:  # known from the first pass
        raise
    except Exception as error:  # not all compute without values; the first step of training looks again
        log.debug("%s cannot be tried on the meta device (%s)", adapter.name, error)
        return
    for kind, names in trained.items():
        if without := [name for name in names if next(gradients) is None]:
            raise UnfitError(cut_off(adapter, kind, without, frozen=not groups))


def cut_off(adapter: Adapter, kind: str, names: Sequence[str], *, frozen: bool) -> str:
    """The line for parameters that get no gradient.

    Args:
        adapter: The adapter, with which they get none.
        kind: Their kind: `coefficients` or `adapter`.
        names: Their names.
        frozen: Whether the backbone has no templates.
    """
    advice = "another adapter" if frozen else "the adapter on a frozen model (model=vit_frozen), or another adapter"
    return (
        f"adapter: with {adapter.label}, {len(names)} parameter(s) of kind {kind} get no gradient, such as {names[0]}; "
        f"use {advice}"
    )


def check_task(path: Path, cache: Path | None = None) -> None:
    """Refuse a task file that is damaged, or whose tensors are not those of a model that its record describes.

    Args:
        path: The file.
        cache: The folder of the cache, to look for its templates; None if they are given.

    Raises:
        UserError: One line.
        MissingInputError: If there is no such file, or no file of its templates.
    """
    task = load_task(path)
    if cache is not None and task.origin is not None:  # else the configuration says how they were made
        check_bank(task, cache)
    settings = dataclasses.replace(task.settings, img_size=task.input.size)
    with section(f"task: {path}: "):
        check_size(settings)
    if (network := _blueprint(settings)) is None:
        return
    groups, origin = groups_and_origin(task.record)
    layers = {name for name, _ in network.named_modules()}
    try:
        with section(f"task: {path}: templates."):
            if origin and origin.repeatable:  # or it is not made again
                origin.check()
            form = origin.form if origin else REBUILDING
        with torch.device("meta"):
            banks = Banks.without_values(network, groups, **form) if groups else None
            adapted = assemble(network, task.settings, task.adapter, banks, len(task.classes), task.seed)
            packed = set(adapted.packers())
            expected = {
                name: tensor.shape
                for name, tensor in adapted.task_tensors().items()
                if name not in packed and not name.startswith(f"{COEFFICIENTS}/")
            }
    except RecastError:
        raise
    except Exception as error:  # not all can be made without values; what loads the file looks again
        log.debug("%s cannot be tried on the meta device (%s)", path, error)
        return
    found = {name: (list(tensor.shape), tensor.is_floating_point()) for name, tensor in task.tensors.items()}
    wrong = [
        f"{name} is {found.get(name, ('missing',))[0]}{' of integers' if name in found and not found[name][1] else ''}"
        for name, shape in expected.items()
        if found.get(name) != (list(shape), True)
    ]
    known = {*expected, *packed, COEFFICIENTS, RELATIVE}
    if not groups:  # format 1: a tensor for each layer
        known |= {f"{COEFFICIENTS}/{layer}" for layer in layers}
    wrong += [f"{name} is too many" for name in found if name not in known and not name.startswith(FIXED)]
    if wrong:
        raise UserError(
            f"task: expected the parameters of {task.backbone} for {len(task.classes)} classes in {path}, got others: "
            f"{wrong[0]}"
        )


def check_size(model: ModelConfig) -> None:
    """Refuse an input size that the backbone does not take, or of which it would leave out a part without a word.

    Raises:
        UserError: One line with a size that it takes.
    """
    if model.img_size is None or (network := _blueprint(model)) is None:
        return
    name, size = model.backbone, model.img_size
    embed = getattr(network, "patch_embed", None)
    patch = getattr(embed, "patch_size", None)
    if tuple(getattr(getattr(embed, "proj", None), "stride", patch) or ()) != patch:
        patch = None  # patches that overlap leave nothing out
    for length in patch if isinstance(patch, tuple) else ():
        if isinstance(length, int) and size % length:
            raise UserError(
                f"model.img_size: expected a multiple of {length}, the patch size of {name}, got {size}; "
                f"{size // length * length or length} is one"
            )
    if (reason := _refused(network.eval(), size)) is None:
        return
    own = input_of(network, dataclasses.replace(model, img_size=None)).size
    # A few models do not compute without values at all; a model's own size is right
    if own != size and _refused(network.eval(), own) is None:
        raise UserError(f"model.img_size: expected a size that {name} takes, such as {own}, got {size} ({reason})")


def smallest_group(model: ModelConfig, recast: RecastConfig) -> Group | None:
    """The group with the fewest layers; None where the model cannot be made without values.

    Raises:
        UserError: If there is nothing to group. One line.
    """
    if (network := _blueprint(model)) is None:
        return None
    return min(groups_of(network, recast), key=lambda group: len(group.layers))


def check_images(model: ModelConfig, size: int) -> None:
    """Refuse images of a size that a backbone, made for its own, does not take.

    Raises:
        UserError: One line.
    """
    if (network := _blueprint(model)) is not None and (reason := _refused(network.eval(), size)) is not None:
        raise UserError(f"input.size: expected {model.img_size}, that of {model.backbone}, got {size} ({reason})")


def _refused(network: nn.Module, size: int) -> str | None:
    """Why a network on the meta device, in its mode, does not take an input size; None if it does."""
    try:
        with torch.no_grad():
            network(torch.empty(1, 3, size, size, device="meta"))
    except Exception as error:
        return first_line(error)
    return None


def check_classifier(model: ModelConfig) -> None:
    """Refuse a backbone whose classifier a solved head cannot replace, such as the two of a distilled model.

    Raises:
        UserError: One line with what takes such a backbone.
    """
    if (network := _blueprint(model)) is not None:
        with torch.device("meta"):
            timm_model(network).reset_classifier(2)
        classifier(network)


def check_single_images(model: ModelConfig, batch_size: int, devices: int) -> None:
    """Refuse batches of one image on a device if a normalisation takes statistics of one value of a channel in it.

    Args:
        model: The model.
        batch_size: Images of a batch, less than two for each device.
        devices: Number of devices, which share a batch.

    Raises:
        UserError: One line.
    """
    if (network := _blueprint(model)) is None:
        return
    with torch.device("meta"):
        adapted = assemble(network, model, NoAdapter(), None, 2, 0)
    network.train()
    adapted.hold_statistics()
    reason = _refused(network, input_of(network, model).size)
    if reason is not None and reason.startswith("Expected more than 1 value per channel"):  # torch's own words
        raise UserError(
            f"dataset.batch_size: expected at least {2 * devices}, as a normalisation layer of {model.backbone} that "
            f"trains sees one value per channel in an image and cannot take statistics of it, got {batch_size}"
        )


def _blueprint(model: ModelConfig) -> nn.Module | None:
    """As `blueprint`; None where it has to be checked later, as the model cannot be made without values."""
    try:
        return blueprint(model)
    except RecastError:
        raise
    except Exception as error:  # the constructors of a few models compute with their weights
        log.debug("%s cannot be created on the meta device (%s); it is checked later", model.backbone, error)
        return None
