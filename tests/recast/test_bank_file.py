"""Files of banks: what is written comes back, and each thing that may be wrong with one is named."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from recast_exp.errors import MissingInputError, UserError
from recast_exp.recast import Banks, find_groups, mimic
from recast_exp.recast.bank import Origin
from recast_exp.recast.weights import weights_hash

Change = Callable[[dict[str, Any], dict[str, Tensor]], object]
FIRST = "blocks.layer.0"


def banks() -> Banks:
    torch.manual_seed(0)
    model = nn.ModuleDict({"blocks": nn.ModuleList([nn.ModuleDict({"layer": nn.Linear(4, 6)}) for _ in range(4)])})
    return mimic(model, find_groups(model, granularity="row"), num_sets=2, seed=3)


def changed(tmp_path: Path, change: Change) -> Path:
    """A bank file whose record and tensors were changed; it records no hash."""
    path = tmp_path / "bank.safetensors"
    banks().save(path)
    with safe_open(path, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        ((key, text),) = file.metadata().items()
    record = json.loads(text)
    del record["hash"]
    change(record, tensors)
    save_file(tensors, path, {key: json.dumps(record)})
    return path


def test_what_is_written_comes_back(tmp_path: Path) -> None:
    ours = banks()
    ours.save(tmp_path / "bank.safetensors")
    for found in (Banks.load(tmp_path / "bank.safetensors"), Banks.load(changed(tmp_path, lambda *_: None), ours.hash)):
        assert found.groups == ours.groups
        assert found.origin == ours.origin and found.origin is not None
        assert found.settings == ours.settings
        assert found.hash == ours.hash
        for kind in ("templates", "coefficients"):
            own, read = getattr(ours, kind), getattr(found, kind)
            assert list(read) == list(own)
            assert all(torch.equal(read[name], own[name]) for name in own)


def scaled(name: str, change: Callable[[Tensor], Tensor]) -> Change:
    return lambda _, tensors: tensors.update({name: change(tensors[name])})


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda record, _: record.update(format=99), "format 99, where this version reads up to"),
        (lambda _, tensors: tensors.update(more=torch.ones(2)), "the tensor 'more' belongs to no group"),
        (lambda _, tensors: tensors.pop(f"templates/{FIRST}"), f"expected the tensor 'templates/{FIRST}'"),
        (lambda _, tensors: tensors.pop("coefficients/blocks.1.layer"), "'coefficients/blocks.1.layer' of template"),
        (scaled(f"templates/{FIRST}", torch.zeros_like), f"the templates of {FIRST} are all 0"),
        (scaled(f"templates/{FIRST}", lambda each: each * float("nan")), f"the templates of {FIRST} hold NaN"),
        (scaled(f"templates/{FIRST}", lambda each: each[:1]), rf"the templates of {FIRST} are torch.float32 of shape"),
        (scaled(f"templates/{FIRST}", lambda each: each[..., None]), f"the templates of {FIRST} are torch.float32"),
        (scaled(f"templates/{FIRST}", Tensor.double), f"the templates of {FIRST} are torch.float64"),
        (scaled(f"templates/{FIRST}", lambda each: each[:, :5].clone()), "6 blocks do not divide the 5 rows"),
        (scaled("coefficients/blocks.0.layer", lambda each: each[:1]), "the coefficients of blocks.0.layer are"),
        (scaled("coefficients/blocks.0.layer", lambda each: each[..., :1].clone()), "the coefficients of blocks.0.l"),
        (scaled("coefficients/blocks.0.layer", lambda each: each.flatten()), "the coefficients of blocks.0.layer are"),
        (scaled("coefficients/blocks.0.layer", lambda each: each / 0), "the coefficients of blocks.0.layer hold NaN"),
        (lambda record, _: record["groups"][0].update(num_templates=0), f"the templates of {FIRST} are"),
        (lambda record, _: record["groups"][0].update(num_blocks=0), f"the templates of {FIRST} are"),
    ],
)
def test_what_is_wrong_is_named(tmp_path: Path, change: Change, expected: str) -> None:
    path = changed(tmp_path, change)
    with pytest.raises(UserError) as error:
        Banks.load(path)
    assert expected in str(error.value)
    assert str(error.value).startswith(f"{path}: ")


def test_another_bank_than_the_one_wanted(tmp_path: Path) -> None:
    ours, path = banks(), tmp_path / "bank.safetensors"
    with pytest.raises(MissingInputError, match=f"^{path}: expected a file of template banks, got none; build one"):
        Banks.load(path)
    ours.save(path)
    with pytest.raises(UserError, match=f"expected the content 0000000000000000…, got {ours.hash[:16]}…; coefficients"):
        Banks.load(path, "0" * 64)
    save_file({"weight": torch.ones(3)}, path)
    with pytest.raises(UserError, match="expected template banks, got a safetensors file that holds none"):
        Banks.load(path)


def test_an_origin_says_how_its_templates_make_a_weight() -> None:
    Origin("random", 0, 1, {}, "0" * 64).check()
    with pytest.raises(UserError, match=r"^mixing: expected .*, got 'nope'"):
        Origin("random", 0, 1, {"mixing": "nope"}, "0" * 64).check()


@pytest.mark.parametrize("templates", ["layers", "singular"])
def test_banks_without_values_have_the_shapes_of_those_with_them(templates: str) -> None:
    torch.manual_seed(0)
    model = nn.ModuleDict({"blocks": nn.ModuleList([nn.ModuleDict({"layer": nn.Linear(4, 6)}) for _ in range(4)])})
    groups = find_groups(model, templates=templates)
    whole = mimic(model, groups, templates=templates, num_sets=3)
    empty = Banks.without_values(model, iter(groups), 3, whole.added, whole.mixing)
    assert (empty.groups, empty.added, empty.mixing) == (whole.groups, whole.added, whole.mixing)
    for kind in ("templates", "coefficients"):
        own, found = getattr(whole, kind), getattr(empty, kind)
        assert list(found) == list(own)
        assert all(found[name].shape == own[name].shape for name in own)
        assert all(tensor.is_meta for tensor in found.values())
    assert Banks.without_values(model, find_groups(model)).coefficients["blocks.0.layer"].shape == (1, 1, 2)
    plain = Banks.without_values(model, find_groups(model))
    assert (plain.added, plain.mixing) == (False, "sum")


def test_the_record_of_recasts_own_templates_has_no_entries_of_other_kinds(tmp_path: Path) -> None:
    """So that earlier versions read it."""
    found: list[set[str]] = []
    path = changed(tmp_path, lambda record, _: found.append(set(record)))
    assert found == [{"format", "groups", "settings", "origin"}]
    assert Banks.load(path).dtype == "float32"


def test_integers_of_convolutions_have_a_scale_for_each_row_and_none_is_zero(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.ModuleDict({"blocks": nn.ModuleList([nn.ModuleDict({"c": nn.Conv2d(3, 4, 2)}) for _ in range(2)])})
    ours = mimic(model, find_groups(model), template_dtype="int8")
    path = tmp_path / "bank.safetensors"
    ours.save(path)
    read = Banks.load(path)
    assert read.hash == ours.hash
    scales = ours.scales["blocks.c.0"]
    assert torch.equal(read.scales["blocks.c.0"], scales) and scales.shape == (2, 4, 1, 1, 1)
    scales[0, 0] = 0
    ours.save(path)
    with pytest.raises(UserError, match=r"the scales of blocks\.c\.0 are"):
        Banks.load(path)


def test_the_hash_of_weights_is_half_of_a_sha256() -> None:
    model = nn.Linear(3, 2)
    own = hashlib.sha256(b" (2, 3)" + model.weight.detach().numpy().tobytes()).hexdigest()
    assert weights_hash(model, [""]) == own[:32]


def test_coefficients_without_dimensions_are_refused() -> None:
    ours = banks()
    scalars = {layer: torch.tensor(1.0) for layer in ours.coefficients}
    with pytest.raises(UserError, match=r"expected \[K, B, n\] = \[0, 6, 2\], got \[\]$"):
        ours.relative(scalars)


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=re.escape(str(tmp_path))):
        banks().save(tmp_path)
