"""Template banks: all templates and coefficients of a model, how they were made, and the file that holds them."""

from __future__ import annotations

import functools
import hashlib
import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from types import NoneType
from typing import Annotated, Any, Literal, NotRequired, TypedDict

import torch
from msgspec import Meta
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from recast_exp.errors import MissingInputError, UnknownNameError, UserError, check_type, first_line
from recast_exp.files import replacing, user_path, writing
from recast_exp.plugins import TEMPLATES
from recast_exp.recast.combination import TemplateBank
from recast_exp.recast.formulas import (
    DTYPES,
    combine,
    from_relative,
    relative,
    rounded,
    unrounded,
)
from recast_exp.recast.grouping import Group, layer_module
from recast_exp.recast.solvers import check_options
from recast_exp.recast.templates import kind_of, rank_of
from recast_exp.schemas import parse

RECORD = "recast_exp_bank"
FORMAT = 1


class _Record(TypedDict):
    """What the metadata of a bank's file holds; without `hash` and `origin` before version 0.1.

    `added` and `mixing` are missing where they have their defaults.
    """

    format: Annotated[int, Meta(ge=1)]
    groups: list[Group]
    settings: dict[str, Any]
    origin: NotRequired[Origin | None]
    hash: NotRequired[str]
    dtype: NotRequired[Literal["float32", "bfloat16", "int8"]]
    added: NotRequired[bool]
    mixing: NotRequired[Literal["sum", "scales", "matrix", "gated"]]


class Form(TypedDict):
    """How templates make a weight: the arguments of `Banks` of the same names."""

    added: bool
    mixing: str


REBUILDING = Form(added=False, mixing="sum")
"""The form of RECAST's own templates."""

_REPEATABLE = ("closed_form", "random", "singular", "basis")


@dataclass(frozen=True)
class Origin:
    """How templates were made, so that `remake` can make them again from the same weights.

    Attributes:
        solver: Name of the solver, or of a kind of templates that needs none (`random`, `singular`, …).
        seed: Its seed.
        num_sets: Number K of sets of coefficients.
        options: Options of the solver; `mixing` of a kind of templates.
        weights: The first half of the sha256 of the weights of all grouped layers, in float32.
        dtype: To which the templates were rounded (`formulas.DTYPES`).
    """

    solver: str
    seed: int
    num_sets: int
    options: dict[str, Any]
    weights: str
    dtype: str = "float32"

    @property
    def repeatable(self) -> bool:
        """Whether any machine makes the same templates to within rounding, in a moment, from the weights alone."""
        return self.solver in _REPEATABLE

    def check(self) -> None:
        """Refuse options that its solver, or its kind of templates, does not take.

        Raises:
            UserError: One line.
        """
        if self.solver in TEMPLATES.names():
            if others := [name for name in self.options if name != "mixing"]:
                raise UserError(f"options.{others[0]}: expected at most mixing for templates={self.solver}")
            _ = self.form
        else:
            check_options(self.solver, self.options)

    @property
    def form(self) -> Form:
        """How these templates make a weight.

        Raises:
            UserError: If there is no such kind of templates, or it is not mixed so.
        """
        if self.solver not in TEMPLATES.names():
            return REBUILDING
        mixing = self.options.get("mixing")
        kind, mixing = kind_of(self.solver, mixing if mixing is None else str(mixing))
        return Form(added=kind.ADDED, mixing=mixing)


def check_dtype(dtype: object) -> None:
    """Refuse a name that templates cannot be kept as.

    Raises:
        UserError: One line.
    """
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise UserError(f"template_dtype: expected one of {', '.join(DTYPES)}, got {dtype!r}")


@dataclass(frozen=True, eq=False)
class Banks:
    """Templates and mimicked coefficients of all groups of one model.

    Attributes:
        groups: The groups, in the model's order.
        templates: Group name → [n, rows, ...], or factors [r, L · rows + columns]; float32.
        coefficients: Layer name → [K, B, n], float32.
        settings: Where the weights come from: backbone, fingerprint, mimicry. JSON-able; not part of `hash`.
        origin: How they were made; None for banks of an earlier version. Not part of `hash`.
        added: Whether the templates are added to the frozen weights, or rebuild them.
        mixing: How coefficients and templates make a weight (the `MIXINGS` of its kind).
        dtype: In which the templates are kept, in files and in a model (`formulas.DTYPES`); `templates` are rounded to
            what it can hold.
        scales: Group name → scales of templates that are kept as integers.

    Raises:
        UserError: If one is of another type; `check` looks at what is in them.
    """

    groups: tuple[Group, ...]
    templates: dict[str, Tensor] = field(repr=False)
    coefficients: dict[str, Tensor] = field(repr=False)
    settings: dict[str, object]
    origin: Origin | None = None
    added: bool = False
    mixing: str = "sum"
    dtype: str = "float32"
    scales: dict[str, Tensor] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        """Check the types; banks are made in programs, too."""
        check_type("groups", self.groups, (tuple, list), "those of find_groups")
        for group in self.groups:
            check_type("groups", group, Group, "those of find_groups")
        for name in ("templates", "coefficients", "scales"):
            check_type(name, getattr(self, name), dict, "a dictionary of tensors")
        check_type("settings", self.settings, dict, "a dictionary")
        check_type("origin", self.origin, (Origin, NoneType), "an Origin or None")
        check_type("added", self.added, bool, "True or False")
        check_type("mixing", self.mixing, str, "a string")
        check_dtype(self.dtype)

    @functools.cached_property
    def hash(self) -> str:
        """sha256 of groups, templates and coefficients, bit for bit."""
        groups = [asdict(group) for group in self.groups]
        kind: list[object] = [self.added, self.mixing] if self.has_own_kind else []
        kind += [self.dtype] if self.dtype != "float32" else []
        digest = hashlib.sha256(json.dumps([*groups, *kind]).encode())
        for tensors in (self.templates, self.coefficients):
            for name, tensor in sorted(tensors.items()):
                digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
                digest.update(tensor.detach().cpu().contiguous().numpy().data)
        return digest.hexdigest()

    @property
    def has_own_kind(self) -> bool:
        """Whether the templates are not those of RECAST, which rebuild weights and have a relative form."""
        return self.added or self.mixing != "sum"

    def bank(self, group: Group, device: torch.device) -> TemplateBank:
        """A copy of the templates of a group, as a module."""
        values, scales = self._kept(group.name)
        scales = None if scales is None else scales.to(device, copy=True)
        return TemplateBank(values.to(device, copy=True), self.mixing, scales)

    def _kept(self, group: str) -> tuple[Tensor, Tensor | None]:
        """The templates of a group as they are kept, and their scales if they have some."""
        templates, scales = self.templates[group], self.scales.get(group)
        if self.dtype == "float32":
            return templates, None
        return (templates if scales is None else torch.round(templates / scales)).to(DTYPES[self.dtype]), scales

    def rounded_to(self, dtype: str) -> Banks:
        """The same banks with templates in fewer bits.

        Args:
            dtype: `float32`, `bfloat16` or `int8`.

        Raises:
            UserError: If it is another, or the templates are rounded to another already: rounded twice, they are none
                that can be made again from the weights.
        """
        check_dtype(dtype)
        if dtype == self.dtype:
            return self
        if self.dtype != "float32":
            raise UserError(
                f"banks: expected float32 templates to round to {dtype}, got {self.dtype}; make them with mimic(…, "
                f"template_dtype={dtype!r})"
            )
        kept = {name: rounded(templates, dtype) for name, templates in self.templates.items()}
        return replace(
            self,
            templates={name: unrounded(*each) for name, each in kept.items()},
            scales={name: scales for name, (_, scales) in kept.items() if scales is not None},
            dtype=dtype,
            origin=self.origin and replace(self.origin, dtype=dtype),
        )

    @property
    def template_bits(self) -> int:
        """The size of all templates, with their scales."""
        own = sum(each.numel() * DTYPES[self.dtype].itemsize for each in self.templates.values())
        return 8 * (own + sum(each.numel() * 4 for each in self.scales.values()))

    def rebuilt(self, layer: str, weight: Tensor | None = None) -> Tensor:
        """The weight [rows, ...] of a layer as the bank makes it; float32.

        Args:
            layer: The layer.
            weight: Its pretrained weight, to which the templates are added; RECAST's own need none.

        Raises:
            UnknownNameError: If no group has this layer.
        """
        group = next((group for group in self.groups if layer in group.layers), None)
        if group is None:
            raise UnknownNameError(f"layer: expected one of the banks' groups, got {layer!r}")
        if weight is None:
            if self.has_own_kind:
                raise UserError("weight: expected the pretrained weight, as the templates are added to it, got None")
            return combine(self.coefficients[layer], self.templates[group.name])
        bank = self.bank(group, weight.device)
        made = bank.combine(self.coefficients[layer], group.layers.index(layer), weight.shape)
        return weight.float() + made if self.added else made

    @classmethod
    def without_values(
        cls, model: nn.Module, groups: Iterable[Group], num_sets: int = 1, added: bool = False, mixing: str = "sum"
    ) -> Banks:
        """Banks on the meta device, for a model of these groups."""
        groups = tuple(groups)
        templates: dict[str, Tensor] = {}
        coefficients: dict[str, Tensor] = {}
        with torch.device("meta"):
            for group in groups:
                shape = layer_module(model, group.layers[0]).weight.shape
                templates[group.name] = torch.empty(templates_shape(group, shape, mixing))
                coefficients |= {
                    layer: torch.empty(num_sets, group.num_blocks, group.num_templates) for layer in group.layers
                }
        return cls(groups, templates, coefficients, {}, added=added, mixing=mixing)

    def relative(self, coefficients: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Express layers by the pretrained weights of their group: W'[l] = Σ_j A[l, j] W[j].

        Args:
            coefficients: Layer name → [K, B, n], for all layers; K may be another than that of the banks.

        Returns:
            Layer name → its row A[l] as [B, L], float64; see `formulas.relative`. For n = L, it has 1 for the layer
            itself and 0 for the others before training.

        Raises:
            UserError: If a layer is missing, or a shape is another.
        """
        return self._by_group("coefficients", coefficients, "[K, B, n]", relative)

    def from_relative(self, shares: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The coefficients [K, B, n] of each layer for these templates: the inverse of `relative`.

        Args:
            shares: Layer name → [B, L], for all layers.

        Raises:
            UserError: If a layer is missing, or a shape is another.
        """
        return self._by_group("shares", shares, "[B, L]", from_relative)

    def _check(self) -> None:
        """Refuse tensors that do not fit their groups, or that no model can be made of.

        Raises:
            ValueError: One line.
        """
        if not self.groups:
            raise ValueError("there is no group")
        sets = {tensor.shape[0] for tensor in self.coefficients.values() if tensor.ndim}
        for group in self.groups:
            bank = self.templates[group.name]
            dims = (3, 5) if self.mixing == "sum" else (2,)
            rank = rank_of(group.num_templates, self.mixing)
            fits = bank.ndim in dims and len(bank) == rank > 0 < group.num_blocks
            _check_tensor(f"the templates of {group.name}", bank, fits)
            if self.mixing == "sum" and len(bank[0]) % group.num_blocks:
                raise ValueError(f"{group.num_blocks} blocks do not divide the {len(bank[0])} rows of {group.name}")
            if not bank.any():
                raise ValueError(f"the templates of {group.name} are all 0")
            for layer in group.layers:
                found = self.coefficients[layer]
                fits = found.ndim == 3 and found.shape[1:] == (group.num_blocks, group.num_templates) and len(sets) == 1
                _check_tensor(f"the coefficients of {layer}", found, fits)

    def check(self) -> None:
        """Refuse banks that no file could hold and no model could be made of.

        Raises:
            UserError: One line.
        """
        try:
            self._check()
        except KeyError as error:
            raise UserError(f"banks: expected templates and coefficients of every group, got none of {error}") from None
        except ValueError as error:
            raise UserError(f"banks: expected templates and coefficients that fit their groups, but {error}") from None

    def _by_group(
        self, name: str, values: Mapping[str, Tensor], dims: str, formula: Callable[[Tensor, Tensor], Tensor]
    ) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        check_type(name, values, Mapping, "a mapping from layers to tensors")
        if missing := [layer for layer in self.coefficients if layer not in values]:
            raise UserError(f"{name}: expected those of every layer of the banks, got none of {missing[0]}")
        for group in self.groups:
            sizes = {"B": group.num_blocks, "n": group.num_templates, "L": len(group.layers)}
            for layer in group.layers:
                check_type(f"{name} of {layer}", values[layer], Tensor, f"a tensor {dims}")
                shape = values[layer].shape
                sizes["K"] = shape[0] if shape else 0
                expected = [sizes[each] for each in dims.strip("[]").split(", ")]
                if list(shape) != expected or 0 in shape:
                    raise UserError(f"{name} of {layer}: expected {dims} = {expected}, got {list(shape)}")
            given, start = (
                torch.stack([kind[layer] for layer in group.layers]) for kind in (values, self.coefficients)
            )
            found |= dict(zip(group.layers, formula(given.cpu(), start.cpu()), strict=True))
        return found

    def save(self, path: str | Path) -> None:
        """Write all banks to a safetensors file, atomically.

        Args:
            path: The file; an old one is replaced.

        Raises:
            UserError: If tensors do not fit the groups or are not finite, or the file cannot be written.
        """
        self.check()
        tensors = {f"templates/{name}": self._kept(name)[0] for name in self.templates}
        tensors |= {f"scales/{name}": tensor for name, tensor in self.scales.items()}
        tensors |= {f"coefficients/{name}": tensor for name, tensor in self.coefficients.items()}
        record = {
            "format": FORMAT,
            "groups": [asdict(group) for group in self.groups],
            "settings": self.settings,
            "origin": asdict(self.origin) if self.origin else None,
            "hash": self.hash,
            **({"added": self.added, "mixing": self.mixing} if self.has_own_kind else {}),
            **({"dtype": self.dtype} if self.dtype != "float32" else {}),
        }
        try:
            text = json.dumps(record)
        except (TypeError, ValueError) as error:
            raise UserError(f"settings: expected what JSON can hold, got {first_line(error)}") from error
        with writing(path), replacing(user_path(path)) as temporary:
            save_file(
                {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()},
                temporary,
                {RECORD: text},
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
            dtype = record.get("dtype", "float32")
            kept = {group.name: tensors.pop(f"templates/{group.name}") for group in groups}
            scales = {group.name: tensors.pop(f"scales/{group.name}") for group in groups} if dtype == "int8" else {}
            _check_kept(kept, scales, dtype)
            templates = {name: unrounded(tensor, scales.get(name)) for name, tensor in kept.items()}
            coefficients = {layer: tensors.pop(f"coefficients/{layer}") for group in groups for layer in group.layers}
            if tensors:
                raise ValueError(f"the tensor {next(iter(tensors))[:80]!r} belongs to no group")
            banks = cls(
                groups,
                templates,
                coefficients,
                record["settings"],
                record.get("origin"),
                record.get("added", False),
                record.get("mixing", "sum"),
                dtype,
                scales,
            )
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


def _check_kept(kept: Mapping[str, Tensor], scales: Mapping[str, Tensor], dtype: str) -> None:
    """Refuse templates that are not of the dtype that a record says, or whose scales do not fit.

    Raises:
        ValueError: One line.
    """
    for name, tensor in kept.items():
        if tensor.dtype != DTYPES[dtype]:
            raise ValueError(f"the templates of {name} are {tensor.dtype} of shape {tuple(tensor.shape)}")
        if (scale := scales.get(name)) is not None:
            rows = min(2, tensor.ndim - 1)
            expected = (*tensor.shape[:rows], *[1] * (tensor.ndim - rows))
            _check_tensor(f"the scales of {name}", scale, tuple(scale.shape) == expected and bool((scale > 0).all()))


def _check_tensor(what: str, tensor: Tensor, fits: bool) -> None:
    if tensor.dtype != torch.float32 or not fits or not tensor.numel():
        raise ValueError(f"{what} are {tensor.dtype} of shape {tuple(tensor.shape)}")
    if not torch.isfinite(tensor).all():
        raise ValueError(f"{what} hold NaN or infinity")


def templates_shape(group: Group, shape: Sequence[int], mixing: str) -> tuple[int, ...]:
    """The shape of a group's templates, or of their factors.

    Args:
        group: The group.
        shape: Shape of the weight of each of its layers.
        mixing: How coefficients and templates make a weight.
    """
    if mixing == "sum":
        return group.num_templates, *shape
    return rank_of(group.num_templates, mixing), len(group.layers) * shape[0] + math.prod(shape[1:])
