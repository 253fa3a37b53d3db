"""What a task file or an interrupted run fixes of the configuration: adopt it, and refuse what contradicts it."""

from __future__ import annotations

import copy
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import yaml  # type: ignore[import-untyped, unused-ignore]
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from recast_exp import errors
from recast_exp.config import grammar, keys
from recast_exp.config.fields import Role
from recast_exp.errors import MissingInputError, UserError, one_line
from recast_exp.runs import layout
from recast_exp.runs.task_header import read_record
from recast_exp.schemas import check_yaml

BEFORE = {"background": "drop", "orient": False}
"""How images were decoded by versions that did not record it."""


def adopt(content: Mapping[str, object], task: str | Path, *, other_images: bool = False) -> dict[str, object]:
    """A configuration with what a task file was trained with in the place of its own values.

    Args:
        content: A composed configuration as nested mappings.
        task: The task file.
        other_images: Whether the dataset stays that of the configuration.

    Raises:
        MissingInputError: If there is no such task file.
        UserError: If it is not a task file of this version.
    """
    adopted = copy.deepcopy(dict(content))
    for key, value in recorded(task, other_images=other_images).items():
        node = adopted
        *sections, name = key.split(".")
        for section in sections:
            inner = node.setdefault(section, {})
            assert isinstance(inner, dict), key
            node = inner
        node[name] = value
    return adopted


def recorded(task: str | Path, *, other_images: bool = False) -> dict[str, object]:
    """The dotted keys, and their values, that a task file was trained with; of a file of the library, no dataset.

    Args:
        task: The task file.
        other_images: Whether to leave out the dataset.

    Raises:
        MissingInputError: If there is no such task file.
        UserError: If it is not a task file of this version, or holds a key that this version does not know or that does
            not describe the model: a file must not choose a tracker, a folder or a download.
    """
    record = read_record(task)
    found: dict[str, object] = dict(keys.leaves(record["config"]))
    for key in found:
        if key not in keys.FIELDS:
            raise UserError(f"task: {task} holds the key {key}, which this version does not know")
        if not keys.is_recorded(key):
            raise UserError(f"task: {task} sets {key}; a task file may only describe the model, so it is not used")
    # Images are always decoded as those were that the task has learnt from; files of earlier versions do not say how
    images = {f"dataset.{key}": record["input"].get(key, value) for key, value in BEFORE.items()}
    of_dataset = not other_images and "dataset.name" in found
    if record["format"] > 1:
        found = keys.with_defaults(found)
    return {key: value for key, value in found.items() if of_dataset or not key.startswith("dataset.")} | images


def dataset_of(task: str | Path) -> str | None:
    """The dataset that a task file was trained on; None for a file of the library, which names none.

    Raises:
        MissingInputError: If there is no such task file.
        UserError: If it is not a task file of this version.
    """
    name = dict(keys.leaves(read_record(task)["config"])).get("dataset.name")
    return name if isinstance(name, str) else None


def contradictions(
    asked: Mapping[str, object],
    task: str | Path,
    typed: Iterable[str],
    chosen: Mapping[str, tuple[str, Mapping[str, object]]],
    *,
    other_images: bool = False,
) -> Iterator[str]:
    """Compare what the user asked for with what the task file was trained with.

    Args:
        asked: Dotted key → value, before adoption.
        task: The task file.
        typed: Keys that the user set.
        chosen: The groups that the user chose an option of: the option, and the dotted keys that it sets.
        other_images: Whether the dataset may be another.

    Yields:
        One line for each key or group that differs.

    Raises:
        MissingInputError: If there is no such task file.
        UserError: If it is not a task file of this version.
    """
    record = recorded(task, other_images=other_images)
    differing = {key for key, value in record.items() if keys.whole(key, asked.get(key)) != keys.whole(key, value)}

    def line(key: str, got: str, leave_out: str) -> str:
        expected = keys.shown(record[key])
        return (
            f"{key}: expected {expected}, with which the task file {task} was trained, got {got}; leave {leave_out} out"
        )

    typed = list(typed)
    backbone = str(record.get("model.backbone"))
    if ":" in backbone and "model.backbone" not in typed:  # hf-hub:OWNER/NAME, local-dir:FOLDER
        yield (
            f"model.backbone: the task file {task} was trained on {backbone}, a repository or a folder, which no file "
            f"may choose; if you trust it, add model.backbone={backbone}"
        )
    for key in dict.fromkeys(keys.mapping_of(key) or key for key in typed):
        if key in differing:
            yield line(key, keys.shown(asked.get(key)), "it")
    for group, (option, content) in chosen.items():
        # An option's own value may be overridden by another group's that the user did not choose: either may match
        differ = [key for key, value in content.items() if key in differing and value != record[key]]
        own = [key for key in differ if key not in typed and keys.role_of(key) is not Role.NAME]
        named = next((key for key in (group, f"{group}.name") if key in own), None)
        if named:
            yield line(named, keys.shown(content[named]), f"{group}={option}")
        elif own:
            what = ", ".join(f"{key}={keys.shown(record[key])}" for key in own)
            yield (
                f"{group}: expected {what}, with which the task file {task} was trained, got {option}; leave "
                f"{group}={option} out"
            )


def resumed_overrides(folder: Path) -> list[str]:
    """The overrides that a run was started with.

    Raises:
        MissingInputError: If the folder is not that of a run.
        UserError: If one of them sets a key of Hydra, which could write files anywhere, or holds an interpolation.
    """
    for name in ("config.yaml", "overrides.yaml"):
        try:
            there = (folder / ".hydra" / name).is_file()
        except OSError as error:
            raise UserError(f"resume: {folder / '.hydra'} cannot be read ({error.strerror})") from error
        if not there:
            raise MissingInputError(f"resume: {folder} is not the folder of a run: .hydra/{name} is not there")
    _check_links(folder)
    path = folder / ".hydra" / "overrides.yaml"
    saved = _load(path)
    if not isinstance(saved, list):
        raise UserError(f"resume: {path} holds no list; expected the overrides that the run was started with")
    found = grammar.without_start(map(str, saved))
    for text in found:
        override = grammar.parse(text)
        key = override.key_or_group if override else ""
        if override is None or override.package is not None or re.split("[./]", key)[0] == "hydra":
            raise UserError(f"resume: {path} holds {text[:80]!r}; expected key=value with a key of recast_exp")
        # Hydra's grammar takes away backslashes and quotes
        if "${" in re.sub(r"[\\'\"]", "", text):
            raise UserError(f"resume: {path} holds {text[:80]!r}, an interpolation; expected plain values")
        if key == "search":
            raise UserError(f"resume: {path} holds {text[:80]!r}; expected its keys one by one (search.trial=0)")
        if key == "search.storage" and not _is_beside(folder, str(override.value())):
            raise UserError(
                f"resume: {path} holds {text[:80]!r}; expected {layout.STORAGE} beside the folders of the trials; go "
                "on with the command of the search"
            )
    configuration = _load(folder / ".hydra" / "config.yaml")
    if isinstance(configuration, dict) and "training" not in configuration:
        found.insert(0, "training=joint")  # all that older versions could do, whatever is the default now
    return found


def _is_beside(folder: Path, storage: str) -> bool:
    """Whether the storage of a search is the one of the search that a trial's folder belongs to."""
    beside = folder.absolute().parent / layout.STORAGE
    return not beside.is_symlink() and Path(storage).absolute().resolve() == beside.resolve()


def _check_links(folder: Path) -> None:
    """Refuse links in place of what a run writes: it would write elsewhere.

    Raises:
        UserError: If there is one.
    """
    for root, folders, files in os.walk(folder):
        for path in (Path(root) / name for name in (*folders, *files)):
            if path.is_symlink():
                raise UserError(
                    f"resume: expected the files of a run in {folder}, got {path.relative_to(folder)}, a link to "
                    f"{path.readlink()}; put that in its place"
                )
        if Path(root) == folder and layout.WANDB in folders:
            folders.remove(layout.WANDB)  # which links to its newest run; a run that goes on makes a new one there


def merged(started: Iterable[str], typed: Iterable[str]) -> list[str]:
    """Put what the user typed over what a run was started with; the later of two values of one key counts."""
    last: dict[str, str] = {}
    for text in (*started, *typed):
        override = grammar.parse(text)
        last[override.get_key_element() if override else text] = text
    return list(last.values())


def differences(content: Mapping[str, object], folder: Path) -> Iterator[str]:
    """Compare a composed configuration with the one that the run in `folder` was started with.

    Args:
        content: The configuration as nested mappings, interpolations as they stand.
        folder: Folder of the run.

    Yields:
        One line for each key on which results depend and that differs.

    Raises:
        MissingInputError: If the folder is not that of a run.
        UserError: If its configuration cannot be read.
    """
    saved = _load(folder / ".hydra" / "config.yaml")
    if not isinstance(saved, dict):
        raise UserError(f"resume: {folder / '.hydra' / 'config.yaml'} is not the configuration of a run")
    different = keys.differences(dict(keys.leaves(saved)), dict(keys.leaves(content)))
    for key, (before, after) in different.items():
        yield (
            f"{key}: expected {keys.shown(before)}, with which the run in {folder} was started, got "
            f"{keys.shown(after)}; resume with the original settings"
        )


def _load(path: Path) -> Iterable[object] | None:
    with errors.section("resume: "):
        check_yaml(path)
    try:
        return OmegaConf.to_container(OmegaConf.load(path), resolve=False)
    except (yaml.YAMLError, OSError, ValueError, OmegaConfBaseException) as error:
        raise UserError(f"resume: {path} cannot be read: {one_line(error)}") from None
