"""What the functions of the method say of arguments that cannot be used: one line, and a model that is unchanged."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import nn

import recast_exp
from recast_exp import MeLo, TemplateBank, inject_adapter
from recast_exp.errors import UserError
from recast_exp.recast import Banks, find_groups, inject, merge, mimic

QKV = ["*.attn.qkv"]


def vit() -> nn.Module:
    return timm.create_model("vit_tiny_patch16_224", depth=2, embed_dim=24, num_heads=3, img_size=32)


def with_weight(change: Callable[[torch.Tensor], torch.Tensor]) -> nn.Module:
    model = vit()
    layer = model.get_submodule("blocks.1.attn.qkv")
    layer.weight = nn.Parameter(change(layer.weight.detach()), requires_grad=False)
    return model


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({"num_groups": 1.5}, "num_groups: expected an integer ≥ 1, got 1.5"),
        ({"num_groups": 0}, "num_groups: expected an integer ≥ 1, got 0"),
        ({"num_groups": True}, "num_groups: expected an integer ≥ 1, got True"),
        ({"num_templates": 0}, "num_templates: expected an integer ≥ 1, got 0"),
        ({"last_blocks": -1}, "last_blocks: expected an integer ≥ 1, got -1"),
        ({"granularity": "x"}, "granularity: expected one of layer, projection, head, row, got 'x'"),
    ],
)
def test_groups(arguments: dict[str, Any], expected: str) -> None:
    with pytest.raises(UserError) as error:
        find_groups(vit(), **arguments)
    assert str(error.value) == expected


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({"num_sets": 1.5}, "num_sets: expected an integer ≥ 1 and < 1001, got 1.5"),
        ({"seed": -1}, "seed: expected an integer ≥ 0 and < 4294967296, got -1"),
        ({"seed": "x"}, "seed: expected an integer ≥ 0 and < 4294967296, got 'x'"),
        ({"groups": []}, "groups: expected at least one, got none"),
    ],
)
def test_mimicry(arguments: dict[str, Any], expected: str) -> None:
    model = vit()
    with pytest.raises(UserError) as error:
        mimic(model, **{"groups": find_groups(model, targets=QKV), **arguments})
    assert str(error.value) == expected


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda weight: weight.index_fill(0, torch.tensor([3]), torch.nan), "expected finite weights, got NaN"),
        (lambda weight: weight.index_fill(1, torch.tensor([0]), torch.inf), "expected finite weights, got NaN or inf"),
        (
            lambda weight: weight.to(torch.complex64),
            "expected dense weights of floating-point numbers, got torch.co",
        ),
        (lambda weight: weight.to(torch.int8), "expected dense weights of floating-point numbers, got torch.int8"),
        (lambda weight: weight.to_sparse(), "expected dense weights of floating-point numbers, got torch.float32"),
        (lambda weight: weight.to("meta"), "expected weights with values, got the layer blocks.1.attn.qkv on the meta"),
    ],
)
def test_weights(change: Callable[[torch.Tensor], torch.Tensor], expected: str) -> None:
    groups = find_groups(vit(), targets=QKV)
    with pytest.raises(UserError, match=expected) as error:
        mimic(with_weight(change), groups)
    assert "blocks.1.attn.qkv" in str(error.value)
    assert "\n" not in str(error.value)


def test_a_weight_that_is_computed_from_others_is_left_alone() -> None:
    model = vit()
    banks = mimic(model, find_groups(model, targets=QKV))
    with pytest.warns(FutureWarning):
        nn.utils.weight_norm(model.get_submodule("blocks.0.attn.qkv"))
    with pytest.raises(UserError, match=r"^banks: expected .*, got blocks\.0\.attn\.qkv, whose weight is computed"):
        inject(model, banks)
    assert not hasattr(model, "banks")
    assert {group.layers for group in find_groups(model, targets=["*.qkv", "*.fc1"])} == {
        ("blocks.1.attn.qkv",),
        ("blocks.0.mlp.fc1", "blocks.1.mlp.fc1"),
    }


def test_weights_made_in_inference_mode() -> None:
    with torch.inference_mode():
        model = vit()
    banks = mimic(model, find_groups(model, targets=QKV))
    with pytest.raises(UserError, match=r"^model: expected weights that can change, got blocks\.0\.attn\.qkv, made"):
        inject(model, banks)
    assert not hasattr(model, "banks")


@pytest.mark.parametrize("solver", ["closed_form", "gradient"])
def test_a_model_that_was_rewritten_in_inference_mode_can_train(solver: str) -> None:
    model, plain = vit(), vit()
    plain.load_state_dict(model.state_dict())
    options = {"steps": 2} if solver == "gradient" else {}
    with torch.inference_mode():
        names = inject(model, mimic(model, find_groups(model, targets=QKV), solver=solver, **options))
    model(torch.ones(1, 3, 32, 32)).sum().backward()
    assert all(model.get_parameter(name).grad is not None for name in names.values())
    with torch.inference_mode():
        merge(model)
    model.requires_grad_(True)(torch.ones(1, 3, 32, 32)).sum().backward()
    assert model.state_dict().keys() == plain.state_dict().keys()


def test_layers_that_banks_do_not_have() -> None:
    model = vit()
    banks = mimic(model, find_groups(model, targets=QKV))
    with pytest.raises(UserError, match=r"^layer: expected one of the banks' groups, got 'nowhere'$"):
        banks.rebuilt("nowhere")
    some = {"blocks.0.attn.qkv": banks.coefficients["blocks.0.attn.qkv"]}
    with pytest.raises(UserError, match=r"^coefficients: expected those of every .*, got none of blocks\.1\.attn"):
        banks.relative(some)


def test_a_weight_that_has_two_places_stays_whole() -> None:
    model = vit()
    banks = mimic(model, find_groups(model, targets=QKV))
    model.get_submodule("blocks.1.attn.qkv").weight = model.get_submodule("blocks.0.attn.qkv").weight
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(UserError, match=r"whose weight has several places: blocks\.0\.attn\.qkv\.weight, blocks\.1"):
        inject(model, banks)
    assert before.keys() == model.state_dict().keys()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_weights_that_are_all_zero_make_no_templates() -> None:
    model = vit()
    for block in (0, 1):
        nn.init.zeros_(model.get_submodule(f"blocks.{block}.attn.qkv").weight)
    for kind in ("layers", "random"):
        with pytest.raises(UserError, match=r"^model: expected weights .*, got only zeros in blocks\.0\.attn\.qkv"):
            mimic(model, find_groups(model, targets=QKV, templates=kind), templates=kind)


def test_no_flipped_bit_of_a_bank_passes(tmp_path: Path) -> None:
    model = vit()
    path = tmp_path / "bank.safetensors"
    mimic(model, find_groups(model, targets=QKV)).save(path)
    whole = path.read_bytes()
    Banks.load(path)
    generator = random.Random(0)
    start = 8 + int.from_bytes(whole[:8], "little")
    for _ in range(40):
        flipped = bytearray(whole)
        flipped[generator.randrange(start, len(whole))] ^= 1 << generator.randrange(8)
        path.write_bytes(flipped)
        with pytest.raises(UserError, match="is damaged: its content is not that of the hash"):
            Banks.load(path)


THINGS: list[Any] = [None, 3, "x", [], {}, object(), torch.zeros(2), [None]]


def _banks() -> Banks:
    model = vit()
    return mimic(model, find_groups(model, targets=QKV))


def _fields(name: str) -> Callable[[Any], object]:
    return lambda thing: dataclasses.replace(_banks(), **{name: thing}).check()


@pytest.mark.parametrize(
    ("name", "use", "accepted"),
    [
        ("model", lambda thing: find_groups(thing), []),
        ("model", lambda thing: inject(thing, _banks()), []),
        ("model", lambda thing: merge(thing), []),
        ("network", lambda thing: inject_adapter(thing, MeLo()), []),
        ("banks", lambda thing: inject(vit(), thing), []),
        ("banks", lambda thing: recast_exp.save_task(vit(), "t.safetensors", banks=thing), [None]),
        ("name", lambda thing: recast_exp.RecastModel.from_timm(thing, pretrained=False), ["x"]),
        ("templates", lambda thing: TemplateBank(thing), []),
        ("scales", lambda thing: TemplateBank(torch.ones(2, 3, 4), "sum", thing), [None]),
        *(
            (name, lambda thing, name=name: mimic(vit(), find_groups(vit(), targets=QKV), **{name: thing}), accepted)
            for name, accepted in (
                ("images", [None]), ("settings", [None, {}]), ("differences", [[]]), ("template_dtype", [])
            )
        ),
        *((name, _fields(name), []) for name in ("groups", "templates", "coefficients", "added", "mixing")),
        ("settings", _fields("settings"), [{}]),
        ("scales", _fields("scales"), [{}]),
        ("origin", _fields("origin"), [None]),
        ("template_dtype", _fields("dtype"), []),
        ("coefficients", lambda thing: _banks().relative(thing), []),
        ("shares", lambda thing: _banks().from_relative(thing), []),
        ("coefficients", lambda thing: _banks().relative(dict.fromkeys(_banks().coefficients, thing)), []),
        ("shares", lambda thing: _banks().from_relative(dict.fromkeys(_banks().coefficients, thing)), []),
    ],
)  # fmt: skip
def test_arguments_of_another_type(
    name: str, use: Callable[[Any], object], accepted: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for thing in THINGS:
        if any(thing is each or (type(thing) is type(each) and thing == each) for each in accepted):
            continue
        if isinstance(thing, torch.Tensor) and torch.Tensor in map(type, accepted):
            continue
        if name in ("images", "templates", "scales") and isinstance(thing, torch.Tensor):
            continue  # what is in a tensor is looked at where it is used
        with pytest.raises(UserError) as error:
            use(thing)
        assert len(error.value.lines) == 1
        assert str(error.value).startswith((f"{name}", "banks: expected templates and coefficients", "mixing"))
    assert not list(tmp_path.iterdir())


def test_settings_that_json_cannot_hold_are_not_written(tmp_path: Path) -> None:
    banks = dataclasses.replace(_banks(), settings={"of": object()})
    with pytest.raises(UserError, match=r"^settings: expected what JSON can hold, got .*not JSON serializable$"):
        banks.save(tmp_path / "bank.safetensors")
    assert not list(tmp_path.iterdir())


def test_a_value_that_is_a_book_is_cut() -> None:
    with pytest.raises(UserError) as error:
        find_groups(vit(), granularity="x" * 10**5)
    assert str(error.value).startswith("granularity: expected one of layer, projection, head, row, got 'xxx")
    assert "more characters" in str(error.value)
    assert len(str(error.value)) < 2100
