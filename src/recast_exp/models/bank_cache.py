"""The cache of template banks: files named by content hash, with an index by backbone, weights and settings.

One bank serves all runs with the same backbone, weights and settings, whatever their seed or dataset.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, TypedDict

from msgspec import Meta
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn

from recast_exp import schemas
from recast_exp.config.schema import MimicryConfig, RecastConfig
from recast_exp.errors import RecastError, UserError, section
from recast_exp.files import alone_at, json_hash, user_path, write_json
from recast_exp.models.backbones import Backbone
from recast_exp.models.weights import content_hash
from recast_exp.plugins import SOLVERS
from recast_exp.recast import Banks, Group, find_groups, mimic
from recast_exp.recast.grouping import layer_module
from recast_exp.recast.solvers import check_options, options_of
from recast_exp.recast.templates import kind_of

log = logging.getLogger(__name__)


class _Entry(TypedDict):
    """A file of the index."""

    hash: Annotated[str, Meta(pattern="^[0-9a-f]{64}$")]
    settings: dict[str, Any]


@dataclass(frozen=True, eq=False)
class Material:
    """What templates are made of, apart from the backbone's weights.

    Attributes:
        differences: For `recast.templates=tasks`, what each task has changed: layer → [rows, ...].
        images: For `mimicry=calibrated`, preprocessed images [N, 3, H, W].
    """

    differences: Sequence[Mapping[str, Tensor]] = ()
    images: Tensor | None = None


def groups_of(network: nn.Module, recast: RecastConfig) -> list[Group]:
    """The groups of layers of a network that a configuration asks for; as `find_groups`, whose arguments it holds."""
    return find_groups(
        network,
        targets=recast.targets,
        num_groups=recast.num_groups,
        num_templates=recast.num_templates if recast.templates != "tasks" else len(recast.tasks) or None,
        granularity=recast.granularity,
        last_blocks=recast.last_blocks,
        templates=recast.templates,
        mixing=recast.mixing,
    )


def bank_for(
    backbone: Backbone,
    recast: RecastConfig,
    mimicry: MimicryConfig,
    cache: Path,
    given: str | None = None,
    material: Material | None = None,
) -> tuple[Banks, Path]:
    """The template banks of a backbone: from a file, from the cache, or made now and added to the cache.

    Args:
        backbone: The backbone; it is not changed.
        recast: How its layers are grouped.
        mimicry: How templates and coefficients are found.
        cache: The folder of the cache.
        given: A file of banks (`bank=FILE`), instead of the cache.
        material: What templates are made of, apart from the backbone; None for nothing.

    Returns:
        The banks, and the file that holds them.

    Raises:
        UserError: If a given bank belongs to other weights or other groups.
    """
    material = material or Material()
    with section("recast."):
        groups = groups_of(backbone.network, recast)
    if recast.templates == "tasks":
        groups = changed_by(groups, material.differences)
    if given:
        path = user_path(given)
        with section("bank: "):
            banks = Banks.load(path)
        _check_given(banks, path, groups, backbone, recast)
        return banks, path
    settings = _settings(backbone, recast, mimicry, material)
    index = cache / "banks" / "index" / f"{json_hash([settings, [asdict(group) for group in groups]], 32)}.json"
    if known := _cached(index, cache):
        return known
    with alone_at(index):
        if known := _cached(index, cache):  # another job has made it since
            return known
        banks = _mimic(backbone, groups, recast, mimicry, settings, material)
        path = bank_path(cache, banks.hash)
        banks.save(path)
        write_json(index, {"hash": banks.hash, "settings": settings})
        return banks, path


def changed_by(groups: Sequence[Group], differences: Sequence[Mapping[str, Tensor]]) -> list[Group]:
    """The groups of a single layer that any task has changed.

    Raises:
        UserError: If they have changed none.
    """
    changed = [group for group in groups if any(group.layers[0] in task for task in differences)]
    if not changed:
        raise UserError(
            "recast.targets: expected layers that one of recast.tasks has changed, got none; leave recast.targets out"
        )
    return changed


def _cached(index: Path, cache: Path) -> tuple[Banks, Path] | None:
    """The bank of an entry of the index, and its file; None where it is missing or damaged."""
    if not index.is_file():
        return None
    try:
        content_hash = schemas.decode(index, _Entry)["hash"]
        path = bank_path(cache, content_hash)
        return Banks.load(path, content_hash), path
    except (RecastError, ValueError) as error:
        log.warning("The cached template bank cannot be used (%s); it is made again", error)
        return None


def bank_path(cache: Path, content_hash: str) -> Path:
    """Where the cache keeps the bank with a content hash."""
    return cache / "banks" / f"{content_hash}.safetensors"


def _settings(
    backbone: Backbone,
    recast: RecastConfig,
    mimicry: MimicryConfig,
    material: Material,
) -> dict[str, object]:
    """All that a bank depends on, apart from the groups."""
    own: dict[str, object] = {}
    if recast.templates != "layers":
        own = {"templates": recast.templates, "mixing": kind_of(recast.templates, recast.mixing)[1]}
    if recast.template_dtype != "float32":
        own["template_dtype"] = recast.template_dtype
    if material.differences:
        own["tasks"] = [content_hash(task) for task in material.differences]
    if material.images is not None:
        own["images"] = content_hash({"images": material.images})
        own["arguments"] = backbone.arguments  # which decide what the network computes for them
    return own | {
        "backbone": backbone.name,
        "fingerprint": backbone.fingerprint,
        "num_coefficient_sets": recast.num_coefficient_sets,
        "mimicry": {"name": mimicry.name, "seed": mimicry.seed, **_options(mimicry)},
    }


def _options(mimicry: MimicryConfig) -> dict[str, object]:
    """The solver's options: the keys of the section that it takes, and `mimicry.options`. None is the default."""
    with section("mimicry."):
        check_options(mimicry.name, mimicry.options)
        names = options_of(SOLVERS.load(mimicry.name))
    shared = {name: getattr(mimicry, name) for name in names if hasattr(mimicry, name)}
    return shared | mimicry.options


def _mimic(
    backbone: Backbone,
    groups: list[Group],
    recast: RecastConfig,
    mimicry: MimicryConfig,
    settings: dict[str, object],
    material: Material,
) -> Banks:
    options: dict[str, Any] = {name: value for name, value in _options(mimicry).items() if value is not None}

    def run(progress: Callable[[], None] = lambda: None) -> Banks:
        return mimic(
            backbone.network,
            groups,
            solver=mimicry.name,
            num_sets=recast.num_coefficient_sets,
            seed=mimicry.seed,
            templates=recast.templates,
            mixing=recast.mixing,
            differences=material.differences,
            images=material.images,
            template_dtype=recast.template_dtype,
            settings=settings,
            progress=progress,
            **options,
        )

    solver = SOLVERS.load(mimicry.name)
    if recast.templates != "layers" or not hasattr(solver, "num_steps"):
        return run()
    columns = (
        TextColumn("Neural Mimicry"),
        BarColumn(),
        TextColumn("{task.completed}/{task.total}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, transient=True) as progress:
        total = 0
        for group in groups:
            weight = layer_module(backbone.network, group.layers[0]).weight.detach()
            total += solver.num_steps(weight.expand(len(group.layers), *weight.shape), **options)
        task = progress.add_task("", total=total)
        return run(lambda: progress.advance(task))


def check_kind(banks: Banks, path: str | Path, recast: RecastConfig) -> None:
    """Refuse banks whose templates make weights in another way than a configuration asks for.

    Raises:
        UserError: One line.
    """
    kind, mixing = kind_of(recast.templates, recast.mixing)
    asked, got = (kind.ADDED, mixing, recast.template_dtype), (banks.added, banks.mixing, banks.dtype)
    if asked != got:
        raise UserError(
            f"bank: expected templates as recast.templates={recast.templates}, recast.mixing={mixing} and "
            f"recast.template_dtype={recast.template_dtype} ask for, got {path} with "
            f"{'templates added to the weights' if banks.added else 'templates that rebuild the weights'}, mixing "
            f"{banks.mixing} and dtype {banks.dtype}"
        )


def _check_given(banks: Banks, path: Path, groups: list[Group], backbone: Backbone, recast: RecastConfig) -> None:
    fingerprint = banks.settings.get("fingerprint")
    if fingerprint != backbone.fingerprint:
        raise UserError(
            f"bank: expected a bank of this backbone's weights ({backbone.fingerprint[:16]}…), got {path}, which was "
            f"made from {banks.settings.get('backbone')} with other weights ({str(fingerprint)[:16]}…)"
        )
    check_kind(banks, path, recast)
    if banks.groups != tuple(groups):
        raise UserError(
            f"bank: expected the groups that recast.* asks for ({len(groups)}, such as {groups[0]}), got {path}, which "
            f"has other groups ({len(banks.groups)}, such as {banks.groups[0]})"
        )
