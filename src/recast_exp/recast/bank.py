"""Template banks: the modules that rebuild weights, and the file that holds all banks of a model."""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NotRequired, TypedDict

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from recast_exp.errors import MissingInputError, UserError
from recast_exp.files import replacing, user_path
from recast_exp.recast.formulas import combine, cosine_similarity, from_relative, project, relative, relative_error
from recast_exp.recast.grouping import Group, layer_module
from recast_exp.schemas import parse

RECORD = "recast_exp_bank"
FORMAT = 1


class _Record(TypedDict):
    """What the metadata of a bank's file holds; without `hash` and `origin` before version 0.1."""

    format: int
    groups: list[Group]
    settings: dict[str, Any]
    origin: NotRequired[Origin | None]
    hash: NotRequired[str]


class TemplateBank(nn.Module):
    """The frozen templates that the layers of one group share.

    Args:
        templates: [n, rows, ...], float32.
    """

    def __init__(self, templates: Tensor) -> None:
        super().__init__()
        self.templates = nn.Parameter(templates, requires_grad=False)


class TemplateCombination(nn.Module):
    """Parametrisation of a weight by its coefficients: `original` *is* the coefficients [K, B, n].

    The reference to the bank is not registered here: the bank is registered once, at the model, and appears once in
    the state dict however many layers share it.

    Args:
        bank: The templates.
        num_sets: Number K of sets of coefficients.
        num_blocks: Number B of blocks of rows.
        dtype: Dtype of the weight. It follows the model: `model.half()` changes it, as it changes the templates.
    """

    def __init__(self, bank: TemplateBank, num_sets: int, num_blocks: int, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self._bank = (bank,)
        self.num_sets = num_sets
        self.num_blocks = num_blocks
        self.dtype = dtype

    @property
    def bank(self) -> TemplateBank:
        """The templates."""
        return self._bank[0]

    def forward(self, coefficients: Tensor) -> Tensor:
        """Rebuild the weight [rows, ...] from coefficients [K, B, n]."""
        return combine(coefficients, self.bank.templates).to(self.dtype)

    def right_inverse(self, weight: Tensor) -> Tensor:
        """The coefficients [K, B, n] whose weight is nearest to an assigned one [rows, ...], by least squares."""
        templates = self.bank.templates
        return project(weight.to(templates.dtype), templates, self.num_sets, self.num_blocks)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> TemplateCombination:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.dtype = fn(torch.empty(0, dtype=self.dtype)).dtype
        return self


@dataclass(frozen=True)
class Origin:
    """How templates were made, so that `remake` can make them again from the same weights.

    Attributes:
        solver: Name of the solver.
        seed: Its seed.
        num_sets: Number K of sets of coefficients.
        options: Options of the solver.
        weights: The first half of the sha256 of the weights of all grouped layers, in float32.
    """

    solver: str
    seed: int
    num_sets: int
    options: dict[str, Any]
    weights: str

    @property
    def repeatable(self) -> bool:
        """Whether any machine makes the same templates to within rounding, in a moment: those of the closed form."""
        return self.solver == "closed_form"


@dataclass(frozen=True, eq=False)
class Banks:
    """Templates and mimicked coefficients of all groups of one model.

    Attributes:
        groups: The groups, in the model's order.
        templates: Group name → [n, rows, ...], float32.
        coefficients: Layer name → [K, B, n], float32.
        settings: Where the weights come from: backbone, fingerprint, mimicry. JSON-able; not part of `hash`.
        origin: How they were made; None for banks of an earlier version. Not part of `hash`.
    """

    groups: tuple[Group, ...]
    templates: dict[str, Tensor] = field(repr=False)
    coefficients: dict[str, Tensor] = field(repr=False)
    settings: dict[str, object]
    origin: Origin | None = None

    @functools.cached_property
    def hash(self) -> str:
        """sha256 of groups, templates and coefficients, bit for bit."""
        digest = hashlib.sha256(json.dumps([asdict(group) for group in self.groups]).encode())
        for kind in (self.templates, self.coefficients):
            for name, tensor in sorted(kind.items()):
                digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
                digest.update(tensor.detach().cpu().contiguous().numpy().data)
        return digest.hexdigest()

    def rebuilt(self, layer: str) -> Tensor:
        """The weight [rows, ...] of a layer, rebuilt from the bank; float32."""
        group = next(group for group in self.groups if layer in group.layers)
        return combine(self.coefficients[layer], self.templates[group.name])

    def relative(self, coefficients: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Express layers by the pretrained weights of their group: W'[l] = Σ_j A[l, j] W[j].

        Args:
            coefficients: Layer name → [K, B, n], for all layers.

        Returns:
            Layer name → its row A[l] as [B, L], float64; see `formulas.relative`. For n = L, it has 1 for the layer
            itself and 0 for the others before training.
        """
        return self._by_group(coefficients, relative)

    def from_relative(self, shares: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The coefficients [K, B, n] of each layer for these templates: the inverse of `relative`.

        Args:
            shares: Layer name → [B, L], for all layers.
        """
        return self._by_group(shares, from_relative)

    def _check(self) -> None:
        """Refuse tensors that do not fit their groups, or that no model can be made of.

        Raises:
            ValueError: One line.
        """
        sets = {tensor.shape[0] for tensor in self.coefficients.values() if tensor.ndim}
        for group in self.groups:
            bank = self.templates[group.name]
            fits = bank.ndim in (3, 5) and len(bank) == group.num_templates > 0 < group.num_blocks
            _check_tensor(f"the templates of {group.name}", bank, fits)
            if len(bank[0]) % group.num_blocks:
                raise ValueError(f"{group.num_blocks} blocks do not divide the {len(bank[0])} rows of {group.name}")
            if not bank.any():
                raise ValueError(f"the templates of {group.name} are all 0")
            for layer in group.layers:
                found = self.coefficients[layer]
                fits = found.ndim == 3 and found.shape[1:] == (group.num_blocks, group.num_templates) and len(sets) == 1
                _check_tensor(f"the coefficients of {layer}", found, fits)

    def _by_group(self, values: Mapping[str, Tensor], formula: Callable[[Tensor, Tensor], Tensor]) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        for group in self.groups:
            given, start = (
                torch.stack([kind[layer] for layer in group.layers]) for kind in (values, self.coefficients)
            )
            found |= dict(zip(group.layers, formula(given.cpu(), start.cpu()), strict=True))
        return found

    def save(self, path: str | Path) -> None:
        """Write all banks to a safetensors file, atomically.

        Args:
            path: The file; an old one is replaced.
        """
        tensors = {f"templates/{name}": tensor for name, tensor in self.templates.items()}
        tensors |= {f"coefficients/{name}": tensor for name, tensor in self.coefficients.items()}
        record = {
            "format": FORMAT,
            "groups": [asdict(group) for group in self.groups],
            "settings": self.settings,
            "origin": asdict(self.origin) if self.origin else None,
            "hash": self.hash,
        }
        with replacing(user_path(path)) as temporary:
            save_file(
                {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()},
                temporary,
                {RECORD: json.dumps(record)},
            )

    @classmethod
    def load(cls, path: str | Path, expected_hash: str | None = None) -> Banks:
        """Read a bank file.

        Args:
            path: The file.
            expected_hash: `hash` of the banks that the file must hold; None accepts any.

        Raises:
            MissingInputError: If there is no such file.
            UserError: If it is damaged, not a bank file, or its content is not the expected one.
        """
        path = user_path(path)
        if not path.is_file():
            raise MissingInputError(
                f"{path}: expected a file of template banks, got none; build one with stage=reconstruct"
            )
        try:
            with safe_open(path, framework="pt") as file:
                text = (file.metadata() or {}).get(RECORD)
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise UserError(f"{path}: expected a safetensors file, got a damaged or different one ({error})") from error
        if text is None:
            raise UserError(f"{path}: expected template banks, got a safetensors file that holds none")
        try:
            record = parse(text, _Record)
            if record["format"] > FORMAT:
                raise ValueError(f"format {record['format']}, where this version reads up to {FORMAT}")
            groups = tuple(record["groups"])
            # The file sorts its tensors by name, which puts block 10 before block 2.
            templates = {group.name: tensors.pop(f"templates/{group.name}") for group in groups}
            coefficients = {layer: tensors.pop(f"coefficients/{layer}") for group in groups for layer in group.layers}
            if tensors:
                raise ValueError(f"the tensor {next(iter(tensors))[:80]!r} belongs to no group")
            banks = cls(groups, templates, coefficients, record["settings"], record.get("origin"))
            banks._check()
        except KeyError as error:
            raise UserError(f"{path}: expected the tensor {error} of template banks, got none") from error
        except ValueError as error:
            raise UserError(f"{path}: expected template banks, got a damaged or different file ({error})") from error
        # Banks of earlier versions record none
        if "hash" in record and record["hash"] != banks.hash:
            raise UserError(f"{path} is damaged: its content is not that of the hash it records; build it again")
        if expected_hash is not None and banks.hash != expected_hash:
            raise UserError(
                f"{path}: expected the content {expected_hash[:16]}…, got {banks.hash[:16]}…; coefficients mean "
                "nothing without their own templates"
            )
        return banks


def _check_tensor(what: str, tensor: Tensor, fits: bool) -> None:
    if tensor.dtype != torch.float32 or not fits or not tensor.numel():
        raise ValueError(f"{what} are {tensor.dtype} of shape {tuple(tensor.shape)}")
    if not torch.isfinite(tensor).all():
        raise ValueError(f"{what} hold NaN or infinity")


def reference(model: nn.Module, layer: str) -> Tensor:
    """The layer's own weight [rows, ...], detached, float32 on the CPU.

    Raises:
        UnknownNameError: If the model has no such layer.
        UserError: If its weight is no dense tensor of finite floating-point numbers.
    """
    weight = layer_module(model, layer).weight.detach()
    if weight.is_meta:
        raise UserError(f"model: expected weights with values, got the layer {layer} on the meta device")
    if weight.layout != torch.strided or not weight.is_floating_point():
        raise UserError(
            f"model: expected dense weights of floating-point numbers, got {weight.dtype} in {layer} ({weight.layout})"
        )
    weight = weight.to("cpu", torch.float32)
    if not torch.isfinite(weight).all():
        raise UserError(f"model: expected finite weights, got NaN or infinity in {layer}; load them again")
    return weight


def weights_hash(model: nn.Module, layers: Iterable[str]) -> str:
    """The first 32 digits of the sha256 of the weights of layers in float32, whatever the model's dtype.

    Raises:
        UnknownNameError: If the model lacks one of the layers.
    """
    digest = hashlib.sha256()
    for layer in layers:
        weight = reference(model, layer)
        digest.update(f"{layer} {tuple(weight.shape)}".encode())
        digest.update(weight.contiguous().numpy().data)
    return digest.hexdigest()[:32]


def weight_report(original: nn.Module, banks: Banks) -> dict[str, dict[str, float]]:
    """For each layer, `relative_error`, `max_error` (absolute) and `cosine_similarity` of the rebuilt weight."""
    report = {}
    for group in banks.groups:
        for layer in group.layers:
            weight, rebuilt = reference(original, layer)[None], banks.rebuilt(layer)[None]
            report[layer] = {
                "relative_error": relative_error(rebuilt, weight).item(),
                "max_error": (rebuilt - weight).abs().max().item(),
                "cosine_similarity": cosine_similarity(rebuilt, weight).item(),
            }
    return report
