"""A whole `RecastModel` on disk: a folder, or a zip file of it.

    model.json             the backbone, the templates and the tasks by the names of their files; written last
    HASH.safetensors       the templates; the backbone's other weights; a task file for each task

Files are named by their content, so saving again writes only what is new, and an interrupted save leaves the old model.
"""

from __future__ import annotations

import contextlib
import hashlib
import re
import tempfile
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NotRequired, TypeAlias, TypedDict

import torch
from msgspec import Meta
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from recast_exp import __version__, schemas
from recast_exp.errors import MissingInputError, UserError, first_line
from recast_exp.files import replacing, write_json, writing
from recast_exp.models import task_file
from recast_exp.models.computation import mismatch
from recast_exp.models.create import check_name, create_network, numbers_of
from recast_exp.models.timm_model import timm_model
from recast_exp.models.weights import content_hash
from recast_exp.recast import Banks
from recast_exp.recast.grouping import layer_module
from recast_exp.recast.inject import BANKS
from recast_exp.runs.task_header import InputRecord
from recast_exp.tasks import library
from recast_exp.tasks.construction import Parts
from recast_exp.torch_state import seeded

if TYPE_CHECKING:
    from recast_exp.tasks.model import RecastModel

FORMAT = 1
RECORD = "model.json"
_NAME = re.compile(r"[0-9a-f]{64}")
_LARGEST_RATIO = 20
"""Of what a zip file unpacks to, to its own size: weights hardly compress."""
_REWRITTEN = ".parametrizations.weight."
_COEFFICIENTS = f"{_REWRITTEN}original"


_Hash: TypeAlias = Annotated[str, Meta(pattern="^[0-9a-f]{64}$")]
_Dtype: TypeAlias = Annotated[str, Meta(pattern="^(float32|float16|bfloat16|float64)$")]
_Count: TypeAlias = Annotated[int, Meta(ge=1, lt=2**16)]


class _Versioned(TypedDict):
    format: int


class _Record(_Versioned):
    version: str
    backbone: str
    img_size: _Count | None
    fingerprint: str
    width: _Count
    dtype: _Dtype
    templates_dtype: NotRequired[_Dtype]  # without it, that of the other weights
    input: InputRecord
    bank: _Hash
    weights: _Hash
    tasks: dict[str, _Hash]


def save(model: RecastModel, path: Path) -> None:
    """Write a model: into a folder, or into a zip file where the path ends with `.zip`.

    Raises:
        UserError: If the backbone is not a timm model, or not as timm makes it by its name.
    """
    _check_named(model)
    if path.suffix == ".zip":
        with writing(path), tempfile.TemporaryDirectory() as folder, replacing(path) as temporary:
            _save(model, Path(folder))
            with zipfile.ZipFile(temporary, "w") as archive:
                for file in sorted(Path(folder).iterdir()):
                    archive.write(file, file.name)
    else:
        with writing(path):
            path.mkdir(parents=True, exist_ok=True)
            _save(model, path)


def _check_named(model: RecastModel) -> None:
    """Refuse a backbone that `load` could not make again from what the record says of it."""
    if model.input is None:
        raise UserError(f"model: expected a timm model, which a file can name, got {model.backbone}")
    network = model._trunk.network
    _dtype(_rest(network))
    with torch.device("meta"):
        plain = create_network(model.backbone, model.input.size)
    found = {
        name: tensor.shape
        for name, tensor in network.state_dict().items()
        if name.partition(".")[0] != BANKS and _REWRITTEN not in name
    }
    found |= {f"{name}.weight": layer_module(network, name).weight.shape for name in model._trunk.layers}
    expected = {name: tensor.shape for name, tensor in plain.state_dict().items()}
    different = sorted(found.keys() ^ expected.keys()) or [name for name in found if found[name] != expected[name]]
    if different:
        other: str | None = f"it differs in {different[0]}"
    else:
        timm_model(plain).reset_classifier(0)
        other = mismatch(plain, {}, network)
    if other:
        raise UserError(
            f"model: expected {model.backbone} as timm makes it by this name, got another: {other}, so that it could "
            "not be loaded again; save its tasks (save_task) and make it yourself"
        )


def _save(model: RecastModel, folder: Path) -> None:
    assert model.input is not None
    trunk = model._trunk
    before = _named(folder)
    bank_file = folder / f"{trunk.banks.hash}.safetensors"
    if not library.has_bank(bank_file, trunk.banks):
        trunk.banks.save(bank_file)
    rest = _rest(trunk.network)
    weights = content_hash(rest)
    weights_file = folder / f"{weights}.safetensors"
    if not _is_whole(weights_file, weights):
        with replacing(weights_file) as temporary:
            save_file(rest, temporary)
    tasks = {}
    with tempfile.TemporaryDirectory(dir=folder, prefix=".") as own:
        for name in model.tasks:
            written = model.save_task(name, Path(own) / "task.safetensors")
            tasks[name] = hashlib.sha256(written.read_bytes()).hexdigest()
            written.replace(folder / f"{tasks[name]}.safetensors")
    record: _Record = {
        "format": FORMAT,
        "version": __version__,
        "backbone": model.backbone,
        "img_size": model.input.size,
        "fingerprint": trunk.weights,
        "width": trunk.width,
        "dtype": _name_of(_dtype(rest)),
        "templates_dtype": _name_of(trunk.start.dtype),
        "input": task_file.input_record(model.input),
        "bank": trunk.banks.hash,
        "weights": weights,
        "tasks": tasks,
    }
    write_json(folder / RECORD, record)
    for name in before - {record["bank"], weights, *tasks.values()}:
        (folder / f"{name}.safetensors").unlink(missing_ok=True)


def _named(folder: Path) -> set[str]:
    """The files that an earlier model in the folder consists of; others are not ours."""
    try:
        record = schemas.decode(folder / RECORD, _Record)
    except ValueError:  # there is none, or it is damaged
        return set()
    return {record["weights"], *record["tasks"].values()}  # a bank may serve task files, too


def _is_whole(file: Path, weights: str) -> bool:
    """Whether a file holds these weights."""
    try:
        return file.is_file() and bool(_weights(file, weights))
    except UserError:
        return False


def load(cls: type[RecastModel], path: Path, backbone: str | None = None) -> RecastModel:
    """Read a model of `save`.

    Args:
        cls: Its class.
        path: The folder, or the zip file.
        backbone: Its backbone, which has to be named where it is not one of timm's own.

    Raises:
        MissingInputError: If there is none at the path, or one of its files is missing.
        UserError: If a file is damaged or not what the record says.
    """
    if not path.exists():
        raise MissingInputError(f"{path}: expected a folder or zip file of RecastModel.save, got nothing")
    with _unpacked(path) as folder:
        record = _read(folder / RECORD, path)
        _check_backbone(record["backbone"], backbone, path)
        banks = Banks.load(_file(folder, record["bank"], path), record["bank"])
        dtype = getattr(torch, record["dtype"])
        templates = getattr(torch, record.get("templates_dtype", record["dtype"]))
        rest = _weights(_file(folder, record["weights"], path), record["weights"])
        _check_size(record, rest, banks, path)
        with seeded(0):  # its first weights are replaced
            network = create_network(record["backbone"], record["img_size"]).to(dtype)
        spec = task_file.input_of_record(record["input"])
        model = cls(Parts(network, banks, record["width"], record["backbone"], record["fingerprint"], spec))
        _fill(network, rest, path)
        if templates != torch.float32:  # as they are where a model is converted before it has some
            model.to(templates)
        for name, digest in record["tasks"].items():
            file = _file(folder, digest, path)
            if (found := hashlib.sha256(file.read_bytes()).hexdigest()) != digest:
                raise UserError(f"{file}: expected the content {digest[:16]}…, got {found[:16]}…")
            model.load_task(file, name)
    return model


@contextlib.contextmanager
def _unpacked(path: Path) -> Iterator[Path]:
    if path.is_dir():
        yield path
        return
    with tempfile.TemporaryDirectory() as folder:
        try:
            with zipfile.ZipFile(path) as archive:
                # Nothing else is in such a file, and nothing leaves the folder
                members = [
                    member
                    for member in archive.infolist()
                    if member.filename == RECORD
                    or (member.filename.endswith(".safetensors") and _NAME.fullmatch(member.filename[:-12]))
                ]
                size, packed = sum(member.file_size for member in members), path.stat().st_size
                if size > _LARGEST_RATIO * packed:
                    raise zipfile.BadZipFile(f"it holds {size:,} bytes in {packed:,}")
                for member in members:
                    archive.extract(member, folder)
        except Exception as error:  # a damaged archive can raise anything
            raise UserError(
                f"{path}: expected a zip file of RecastModel.save, got another file ({first_line(error)})"
            ) from error
        yield Path(folder)


def _read(file: Path, path: Path) -> _Record:
    if not file.is_file():
        raise MissingInputError(f"{path}: expected {RECORD} of RecastModel.save in it, got none")
    try:
        version = schemas.decode(file, _Versioned)["format"]
        if version > FORMAT:
            raise UserError(
                f"{path}: has format {version}, this version reads up to {FORMAT}; update recast_exp to read it"
            )
        record = schemas.decode(file, _Record)
    except UserError:
        raise
    except ValueError as error:
        raise UserError(f"{path}: expected the {RECORD} of RecastModel.save, got a damaged one ({error})") from error
    return record


def _check_backbone(recorded: str, named: str | None, path: Path) -> None:
    if named is not None and named != recorded:
        raise UserError(f"backbone: expected {recorded}, that of {path}, or None, got {named!r}")
    if named is None and ":" in recorded:  # hf-hub:OWNER/NAME, local-dir:FOLDER
        raise UserError(
            f"{path}: its backbone is {recorded}, a repository or a folder, which no file may choose; if you trust it, "
            f"load it with backbone={recorded!r}"
        )
    check_name(recorded)


def _file(folder: Path, digest: str, path: Path) -> Path:
    file = folder / f"{digest}.safetensors"
    if not file.is_file():
        raise MissingInputError(f"{path}: expected the file {file.name}, which its {RECORD} names, got none")
    return file


def _rest(network: nn.Module) -> dict[str, Tensor]:
    """What templates do not hold: the tensors of a network but templates and coefficients, each once."""
    kept: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in network.state_dict().items():
        own = name.partition(".")[0] != BANKS and not name.endswith(_COEFFICIENTS)
        if own and tensor.data_ptr() not in seen:
            seen.add(tensor.data_ptr())
            kept[name] = tensor.detach().cpu().contiguous()
    return kept


def _dtype(tensors: Mapping[str, Tensor]) -> torch.dtype:
    """The one dtype of weights, which `load` gives to all.

    Raises:
        UserError: If there are several.
    """
    found = {tensor.dtype for tensor in tensors.values() if tensor.is_floating_point()}
    if len(found) != 1:
        listed = ", ".join(sorted(map(_name_of, found)))
        raise UserError(f"model: expected weights of one dtype, got {listed}; convert it (model.float()) to save it")
    return found.pop()


def _name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _weights(file: Path, expected: str) -> dict[str, Tensor]:
    try:
        tensors = load_file(file)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{file}: expected a safetensors file, got a damaged one ({error})") from error
    if (found := content_hash(tensors)) != expected:
        raise UserError(f"{file}: expected the content {expected[:16]}…, got {found[:16]}…")
    return tensors


def _check_size(record: _Record, rest: Mapping[str, Tensor], banks: Banks, path: Path) -> None:
    """Refuse a backbone that is far larger than the files: to make it takes memory, and a record names any."""
    size = numbers_of(record["backbone"], record["img_size"])
    rewritten = sum(len(group.layers) * banks.templates[group.name][0].numel() for group in banks.groups)
    held = sum(tensor.numel() for tensor in rest.values()) + rewritten
    if size is not None and size > 2 * held:  # some models have tensors under two names
        raise UserError(
            f"{path}: expected the weights of its backbone, got others: {record['backbone']} has {size:,} parameters, "
            f"the files {held:,}"
        )


def _fill(network: nn.Module, tensors: Mapping[str, Tensor], path: Path) -> None:
    live = _rest(network)
    different = sorted(set(live) ^ set(tensors)) or [n for n in live if live[n].shape != tensors[n].shape]
    if different:
        raise UserError(f"{path}: expected the weights of its backbone, got others; they differ in {different[0]}")
    for name, tensor in tensors.items():
        if tensor.is_floating_point() != live[name].is_floating_point() or not tensor.isfinite().all():
            raise UserError(f"{path}: expected finite numbers of the type of its backbone, got others in {name}")
    network.load_state_dict(tensors, strict=False)
