"""From a task file to a model: read it, find or make its templates, and build the model on the pretrained backbone.

`recast_exp` offers `load_task` and `apply_task` under its own name. A bank of the closed form is made again from the
pretrained weights; one of another solver lies next to the file, or in the cache.
"""

from __future__ import annotations

import dataclasses
import logging
import unicodedata
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from recast_exp import adapters, schemas
from recast_exp.adapters import Adapter
from recast_exp.config.fields import range_problem
from recast_exp.config.schema import Config, ModelConfig
from recast_exp.data.preprocessing import InputSpec
from recast_exp.errors import MissingInputError, RecastError, UserError, check_integer, first_line, one_line, section
from recast_exp.files import cache_folder, user_path
from recast_exp.models import task_file
from recast_exp.models.adapted import AdaptedModel, assemble
from recast_exp.models.bank_cache import bank_path
from recast_exp.models.computation import mismatch, stock
from recast_exp.models.timm_model import timm_model
from recast_exp.models.weights import content_hash, fingerprint
from recast_exp.recast import Banks, Group, Origin, TemplateCombination, remake
from recast_exp.recast.inject import BANKS
from recast_exp.runs import hub
from recast_exp.runs.task_header import FROZEN, UNGROUPED, TaskRecord

log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Task:
    """A task file that has been read.

    Attributes:
        path: The file.
        backbone: timm name of the backbone, with the tag of its pretrained weights where it is known.
        classes: Names of the classes, in the order of the logits.
        input: The images that the model expects: size in pixels, mean and standard deviation of the channels.
        adapter: The adapter with its options; `NoAdapter()` for none.
        bank: `Banks.hash` of the template bank; None for a task without templates.
        tensors: Name → tensor, as stored: `coefficients` [M], `head/head.weight` [C, D], …
        settings: What trained of the model, and whether BatchNorm's running statistics moved.
        fingerprint: sha256 of the weights that the task was trained on.
        seed: Seed of the run.
        groups: The layers that share templates.
        origin: How these templates were made; None where that is not known.
        metrics: What was measured of the task, by name (`test/accuracy`), where the file says so.
        record: All that the file says of itself.
    """

    path: Path
    backbone: str
    classes: tuple[str, ...]
    input: InputSpec
    adapter: Adapter
    bank: str | None
    tensors: dict[str, Tensor] = field(repr=False)
    settings: ModelConfig = field(repr=False)
    fingerprint: str
    seed: int
    groups: tuple[Group, ...] = field(repr=False)
    origin: Origin | None
    metrics: dict[str, float]
    record: TaskRecord = field(repr=False)

    @property
    def relative(self) -> dict[str, Tensor]:
        """Layer → the weights of its group in it, [B, L]: W'[l] = Σ_j A[l, j] W[j]; 1 and 0 before training.

        L is the size of the group, in the order of its layers; B the number of blocks of rows. The values are those of
        the file, which does not depend on how templates are mixed. A file of format 1 has none.
        """
        return task_file.relative_form(self.tensors, self.record)


@torch.inference_mode(False)
def load_task(path: str | Path) -> Task:
    """Read a task file, of `save_task` or of a run of the command line.

    Args:
        path: The file, or its address on the Hugging Face Hub: `hf://owner/name`.

    Raises:
        MissingInputError: If there is no such file.
        UserError: If it is damaged, not a task file of this version, or names an adapter that is not installed.

    Example:
        >>> import timm
        >>> from recast_exp import apply_task, load_task
        >>> task = load_task("outputs/birds/task.safetensors")  # doctest: +SKIP
        >>> model = apply_task(timm.create_model(task.backbone, pretrained=True), task)  # doctest: +SKIP
    """
    path = hub.local(path)
    tensors, record = task_file.read_task(path)
    try:
        config, backbone = record["config"], record["backbone"]
        settings = _model_of(config)
        adapter = adapters.from_config(config.get("adapter") or {"name": "none"})
        with section(f"task: {path}: input."):
            spec = task_file.input_of_record(record["input"])
        seed = config.get("seed", Config.seed)
        with section(f"task: {path}: "):
            check_integer("seed", seed, 0, 2**32)
    except RecastError:
        raise
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise UserError(f"task: expected the record of a task in {path}, got another ({one_line(error)})") from error
    groups, origin = task_file.groups_and_origin(record)
    return Task(
        path=path,
        backbone=backbone["name"],
        classes=tuple(unicodedata.normalize("NFC", name) for name in record["classes"]),
        input=spec,
        adapter=adapter,
        bank=record["bank"],
        tensors=tensors,
        settings=settings,
        fingerprint=backbone["fingerprint"],
        seed=seed,
        groups=tuple(groups),
        origin=origin,
        metrics=dict(record.get("metrics", {})),
        record=record,
    )


def _model_of(config: Mapping[str, object]) -> ModelConfig:
    """What a record says of the model.

    Raises:
        ValueError: If an entry is unknown, of another type, or out of its range.
    """
    given = schemas.checked(config.get("model", {}), dict[str, Any])
    fields = {each.name: each for each in dataclasses.fields(ModelConfig)}
    if unknown := [name for name in given if name not in fields]:
        raise ValueError(f"model.{unknown[0][:80]} is unknown")
    settings = schemas.checked(given, ModelConfig)
    for name, each in fields.items():
        if problem := range_problem(f"model.{name}", each, getattr(settings, name)):
            raise ValueError(problem)
    return settings


@torch.inference_mode(False)
def apply_task(model: nn.Module, task: Task | str | Path, *, banks: Banks | str | Path | None = None) -> nn.Module:
    """Give a plain timm model the head, templates, adapter and trained parameters of a task, in place.

    Args:
        model: The backbone that the task was trained on: a fresh timm model with the same pretrained weights.
        task: The task, or its file.
        banks: Its template bank, or the file of it. None looks next to the task file, then in the cache of the command
            line.

    Returns:
        The same model, in evaluation mode: images [N, 3, H, W] → logits [N, classes]. The task's parameters can train
        on; all others are frozen.

    Raises:
        MissingInputError: If the template bank is in none of these places.
        UserError: If the model has other weights or layers than the task was trained on, computes otherwise with them
            (another number of heads, another activation), or is not a plain timm model. After such an error, create
            the model again.

    Example:
        >>> import timm
        >>> from recast_exp import apply_task, load_task
        >>> task = load_task("outputs/birds/task.safetensors")  # doctest: +SKIP
        >>> model = apply_task(timm.create_model(task.backbone, pretrained=True), task)  # doctest: +SKIP
        >>> task.classes[model(images).argmax(-1)[0]]  # doctest: +SKIP
    """
    _check_plain(model)
    task = task if isinstance(task, Task) else load_task(task)
    timm_model(model).reset_classifier(0)
    restore(model, task, banks=banks)
    return model.eval()


def restore(
    network: nn.Module, task: Task, *, banks: Banks | str | Path | None = None, cache: Path | None = None
) -> AdaptedModel:
    """Build the model of a task on a backbone, in place.

    Args:
        network: The plain timm model without a classifier.
        task: The task.
        banks: As of `apply_task`.
        cache: The folder of the cache; None is that of the user.

    Raises:
        MissingInputError: As of `apply_task`.
        UserError: As of `apply_task`.
    """
    if not task.fingerprint.startswith((FROZEN, UNGROUPED)):
        check_weights(task, fingerprint(network))
    found = banks_of(task, network, banks, cache)
    check_computation(task, network)
    adapted = assemble(network, task.settings, task.adapter, found, len(task.classes), task.seed)
    if task.fingerprint.startswith(FROZEN):
        check_weights(task, f"{FROZEN}{frozen_fingerprint(adapted)}")
    elif task.fingerprint.startswith(UNGROUPED):
        check_weights(task, f"{UNGROUPED}{ungrouped_fingerprint(adapted)}")
    else:
        adapted.backbone = task.fingerprint
    task_file.copy_into(adapted, task_file.for_banks(task.tensors, task.record, found))
    return adapted


def banks_of(
    task: Task, network: nn.Module, given: Banks | str | Path | None = None, cache: Path | None = None
) -> Banks | None:
    """The templates of a task: given, next to its file, in the cache, or made again from the pretrained weights.

    Args:
        task: The task.
        network: The backbone with its pretrained weights.
        given: The banks, or the file of them.
        cache: The folder of the cache; None is that of the user.

    Returns:
        The banks; None for a task without templates. Those that were made again may differ from the task's own in their
        last bits: `task_file.for_banks` finds the coefficients for them.

    Raises:
        MissingInputError: If they are in none of these places and cannot be made again.
        UserError: If the backbone has other weights, or those given are other banks.
    """
    if task.bank is None:
        return None
    if isinstance(given, Banks):
        if given.hash != task.bank:
            raise UserError(f"banks: expected those of {task.path}, {task.bank[:16]}…, got {given.hash[:16]}…")
        return given
    if given is not None:
        with section("bank: "):
            return Banks.load(user_path(given), task.bank)
    folder = cache_folder(None) if cache is None else cache
    for path in _bank_files(task, folder):
        try:
            with section("bank: "):
                return Banks.load(path, task.bank)
        except UserError as error:
            if not _can_be_made(task):
                raise
            log.warning("The template bank cannot be used (%s); it is made again", error)
    check_bank(task, folder)
    assert task.origin is not None
    return _remade(task, network, task.origin)


def check_bank(task: Task, cache: Path) -> None:
    """Refuse a task whose templates are neither at hand nor can be made again.

    Args:
        task: The task.
        cache: The folder of the cache.

    Raises:
        MissingInputError: One line that says where they may be.
    """
    if task.bank is not None and not _can_be_made(task) and not _bank_files(task, cache):
        raise MissingInputError(
            f"bank: expected the template bank {task.bank[:16]}… of {task.path}, got neither "
            f"{task.path.parent / f'{task.bank}.safetensors'} nor a file in {cache}; pass its file "
            f"({task.bank[:16]}….safetensors in the cache where it was trained) as bank=FILE, or as banks in Python"
        )


def _can_be_made(task: Task) -> bool:
    return task.origin is not None and task.origin.repeatable


def _bank_files(task: Task, cache: Path) -> list[Path]:
    """The files that may hold the templates of a task, nearest first."""
    assert task.bank is not None
    places = task.path.parent / f"{task.bank}.safetensors", bank_path(cache, task.bank)
    return [path for path in places if path.is_file()]


def _remade(task: Task, network: nn.Module, origin: Origin) -> Banks:
    """The templates of a task, made again as its file says.

    Raises:
        UserError: If they would not be those of the file's coefficients, or the backbone has other layers or weights.
    """
    expected = origin.num_sets * sum(
        len(group.layers) * group.num_blocks * group.num_templates for group in task.groups
    )
    vector = task.tensors.get(task_file.COEFFICIENTS)
    if vector is None or vector.numel() != expected:  # before anything of that size is made
        got = "none" if vector is None else f"{vector.numel():,}"
        raise UserError(f"task: expected {expected:,} coefficients in {task.path}, as its groups say, got {got}")
    try:
        with section(f"task: {task.path}: "):
            return remake(network, task.groups, origin)
    except RecastError:
        raise
    except RuntimeError as error:  # of torch, about shapes
        raise UserError(
            f"task: expected groups of layers that {task.backbone} has in {task.path}, got others ({first_line(error)})"
        ) from error


def _check_plain(model: nn.Module) -> None:
    check_timm(model)
    check_unadapted(model)
    if any(parametrize.is_parametrized(module) for module in model.modules()):
        raise UserError("model: expected a plain timm model, got one whose weights are computed; create a fresh one")


def check_unadapted(model: nn.Module) -> None:
    """Refuse a model that has templates or an adapter already.

    Raises:
        UserError: One line.
    """
    if adapters.injected(model) or any(isinstance(module, TemplateCombination) for module in model.modules()):
        raise UserError("model: expected a plain timm model, got one with templates or an adapter; create a fresh one")


def check_timm(model: nn.Module) -> None:
    """Refuse what is not a timm model, or has no values.

    Raises:
        UserError: One line.
    """
    if not all(hasattr(model, name) for name in ("get_classifier", "reset_classifier", "num_classes")):
        raise UserError(f"model: expected a timm model, got {type(model).__name__}, which has no reset_classifier")
    if any(tensor.is_meta for tensor in model.state_dict().values()):
        raise UserError("model: expected weights with values, got a model on the meta device")


def check_computation(task: Task, network: nn.Module) -> None:
    """Refuse a model that computes otherwise with the same weights than the one that a task was trained on.

    Args:
        task: The task.
        network: The model that it is to go with, without a classifier.

    Raises:
        UserError: If they differ in a number that no weight shows, such as that of heads, or in an activation.
    """
    arguments = task.settings.arguments
    recorded = task.record.get("computation")
    if recorded is None and not arguments and task.fingerprint.startswith((FROZEN, UNGROUPED)):
        return  # a file of `save_task` that does not tell
    plain = stock(task.settings)
    if plain is not None and (other := mismatch(plain, recorded or {}, network)):
        made = f"timm made with {arguments}" if arguments else f"computes as {task.backbone} of timm"
        made = made if not recorded else "computes as the one that was trained"
        raise UserError(
            f"model: expected one that {made}, for {task.path}, got another: {other}; pass "
            f"{'**task.settings.arguments' if arguments else 'the same arguments'} to timm"
        )


def check_weights(task: Task, got: str) -> None:
    """Refuse a task that was trained on other weights.

    Args:
        task: The task.
        got: The fingerprint of the weights that it is to go with.

    Raises:
        UserError: If they are others.
    """
    if got != task.fingerprint:
        raise UserError(
            f"model: expected {task.backbone} with the weights that {task.path} was trained on "
            f"({_short(task.fingerprint)}), got other weights ({_short(got)}); pass the same file as model.weights"
        )


def _short(fingerprint: str) -> str:
    return f"{fingerprint.rpartition(':')[2][:16]}…"


def frozen_fingerprint(adapted: AdaptedModel) -> str:
    """sha256 over all tensors of a model that are not the task's: of format 1."""
    return _digest(adapted, lambda name: True)


def ungrouped_fingerprint(adapted: AdaptedModel) -> str:
    """sha256 over the weights of a model that the task has neither trained nor put into templates.

    Those in templates have a hash of their own, `Origin.weights`.
    """
    brought = {tensor.data_ptr() for tensor in adapted.fixed_tensors().values()}
    state = adapted.network.state_dict()
    return _digest(adapted, lambda name: name.partition(".")[0] != BANKS and state[name].data_ptr() not in brought)


def _digest(adapted: AdaptedModel, counts: Callable[[str], bool]) -> str:
    of_task = {tensor.data_ptr() for tensor in adapted.task_tensors().values() if tensor.numel()}
    return content_hash(
        {
            name: tensor
            for name, tensor in adapted.network.state_dict().items()
            if counts(name) and tensor.data_ptr() not in of_task and not name.endswith("num_batches_tracked")
        }
    )
