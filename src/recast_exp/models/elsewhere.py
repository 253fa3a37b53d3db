"""Models of folders and of the Hugging Face Hub. Others have written their `config.json`: it is checked whole first."""

from __future__ import annotations

import dataclasses
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any, Literal, NotRequired, TypeAlias, TypedDict, TypeVar

import timm
from huggingface_hub import hf_hub_download
from msgspec import Meta
from timm.models import PretrainedCfg, parse_model_name

from recast_exp.errors import MissingInputError, UserError, first_line
from recast_exp.files import user_path
from recast_exp.models.arguments import check_arguments
from recast_exp.runs.task_header import CropPct, Interpolation, Mean, Std
from recast_exp.schemas import checked, parse, read_regular

CONFIG = "config.json"

T = TypeVar("T")

_LARGEST = 16 * 2**20
"""Bytes of a config. One with the names of all classes of ImageNet-21k takes an eighth of that."""


def is_elsewhere(name: str) -> bool:
    """Whether a model comes from a repository of the Hugging Face Hub or from a folder (`hf-hub:…`, `local-dir:…`)."""
    return bool(parse_model_name(name)[0])


def local_folder(name: str) -> Path | None:
    """The folder of `local-dir:FOLDER`; None for other names."""
    source, where = parse_model_name(name)
    return user_path(where) if source == "local-dir" else None


def timm_name(name: str) -> str:
    """The name for timm, which takes `~` for a folder of that name."""
    return name if (folder := local_folder(name)) is None else f"local-dir:{folder}"


_Count: TypeAlias = Annotated[int, Meta(ge=0, lt=2**31)]
_Names: TypeAlias = str | list[str] | None
_Shape: TypeAlias = list[_Count] | None
_Size: TypeAlias = Annotated[list[_Count], Meta(min_length=3, max_length=3)]


class _Weights(TypedDict, total=False):
    """What is used of `pretrained_cfg`."""

    input_size: _Size
    test_input_size: _Size | None
    min_input_size: _Size | None
    fixed_input_size: bool
    mean: Mean
    std: Std
    crop_pct: CropPct
    crop_mode: Literal["center", "squash", "border"]
    interpolation: Interpolation
    num_classes: _Count | None
    pool_size: _Shape
    test_pool_size: _Shape
    first_conv: _Names
    classifier: _Names


class _Arguments(TypedDict, total=False):
    img_size: _Count | list[_Count] | None
    num_classes: _Count


class _File(TypedDict):
    """A `config.json`. What else it has informs readers."""

    architecture: str
    num_classes: NotRequired[_Count | None]
    model_args: NotRequired[dict[str, Any]]
    pretrained_cfg: NotRequired[dict[str, Any]]


def config_file(name: str) -> Path:
    """The `config.json` of a model of a folder or of the Hub.

    Raises:
        MissingInputError: If there is none.
    """
    if (folder := local_folder(name)) is not None:
        if not (folder / CONFIG).is_file():
            raise MissingInputError(f"model.backbone: expected a folder with a timm model's {CONFIG}, got {folder}")
        return folder / CONFIG
    repository, _, revision = parse_model_name(name)[1].partition("@")
    try:
        return Path(hf_hub_download(repository, CONFIG, revision=revision or None))
    except Exception as error:  # those of the Hub's client, and of the one for HTTP below it
        raise MissingInputError(
            f"model.backbone: expected a repository with a timm model, got {name} ({first_line(error)})"
        ) from error


def architecture(name: str) -> str:
    """The name by which timm knows the model of a folder or of the Hub, once its whole `config.json` is checked.

    Raises:
        UserError: If timm could not make a model of it, or should not. One line.
        MissingInputError: If there is none.
    """
    path = config_file(name)
    try:
        return _architecture(parse(read_regular(path, _LARGEST).decode(), dict[str, Any]))
    except (OSError, ValueError) as error:
        raise UserError(f"model.backbone: expected the {CONFIG} of a timm model, got {path} ({error})") from error


def _architecture(content: dict[str, Any]) -> str:
    """As `architecture`, of the content of a file.

    Raises:
        ValueError: What is wrong, with the entry.
    """
    file = checked(content, _File)
    found = file["architecture"]
    if not timm.is_model(found):
        near = get_close_matches(found, timm.list_models(), n=3)
        hint = f"; did you mean {', '.join(near)}?" if near else ""
        raise ValueError(f"architecture: expected one that timm knows, got {found[:80]!r}{hint}")
    arguments = file.get("model_args", {})
    check_arguments(arguments, "model_args.")
    size = _within("model_args", arguments, _Arguments).get("img_size")
    if size is not None:
        _check_side("model_args.img_size", size if isinstance(size, list) else [size, size], 2)
    if "pretrained_cfg" in file:
        weights, place, known = file["pretrained_cfg"], "pretrained_cfg", _KNOWN
    else:  # as timm wrote it at first
        weights, place, known = content, "", _KNOWN | {"num_features", "labels"}
    if unknown := sorted(weights.keys() - known):
        near = get_close_matches(unknown[0], known, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise ValueError(f"{place or 'without pretrained_cfg'}: unknown entry {unknown[0][:80]!r}{hint}")
    if shape := _within(place, weights, _Weights).get("input_size"):
        _check_side(f"{place}.input_size".removeprefix("."), shape, 3)
    return found


_KNOWN = frozenset(field.name for field in dataclasses.fields(PretrainedCfg))
"""Entries of `pretrained_cfg`; timm takes no others."""


def _within(place: str, values: dict[str, Any], schema: type[T]) -> T:
    try:
        return checked(values, schema)
    except ValueError as error:
        raise ValueError(f"{place}.{error}".removeprefix(".")) from error


def _check_side(place: str, shape: list[int], length: int) -> None:
    """Refuse a size that a task file could not record."""
    expected = [3, shape[-1], shape[-1]][-length:] if shape else None
    if shape != expected or not 8 <= shape[-1] <= 4096:
        raise ValueError(
            f"{place}: expected {'[3, n, n]' if length == 3 else 'n or [n, n]'} with 8 ≤ n ≤ 4096, got {shape}"
        )
