"""Task files and bank files, and the numbers that are reported of a model."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from recast_exp.adapters import NoAdapter
from recast_exp.config.schema import Config
from recast_exp.data.preprocessing import InputSpec
from recast_exp.errors import MissingInputError, UserError
from recast_exp.files import cache_folder
from recast_exp.models import bank_cache as bank_store
from recast_exp.models.adapted import assemble
from recast_exp.models.backbones import create_backbone
from recast_exp.models.bank_cache import bank_for
from recast_exp.models.count import count
from recast_exp.models.loading import load_task
from recast_exp.models.task_file import (
    copy_into,
    for_banks,
    input_of_record,
    input_record,
    read_task,
    relative_form,
    write_task,
)
from recast_exp.models.weights import content_hash
from recast_exp.recast import Banks, find_groups, mimic

Build = Callable[..., Any]
Compose = Callable[..., Config]
Bank = Callable[..., tuple[Banks, Path]]


def assert_one_line(error: pytest.ExceptionInfo[UserError], *expected: object) -> None:
    message = str(error.value)
    assert "\n" not in message
    for text in expected:
        assert str(text) in message, message


def copied(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in tensors.items()}


def equal(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


# Counts: by the papers' architectures, from the options under conf/


@pytest.mark.parametrize(
    ("overrides", "coefficients", "banks", "templates"),
    [
        (["model=vit_att"], 48, 6, 12 * 3 * 384**2),
        (["model=vit_mlp"], 96, 12, 12 * 8 * 384**2),
        (["model=vit_att_mlp"], 144, 18, 12 * 11 * 384**2),
        (["model=vit_att", "recast.granularity=projection"], 144, 6, 12 * 3 * 384**2),
        (["model=vit_att", "recast.granularity=head"], 48 * 3 * 6, 6, 12 * 3 * 384**2),
        (["model=vit_mlp", "recast.granularity=head"], 48 * (4 * 6 + 6), 12, 12 * 8 * 384**2),
        (["model=vit_mlp", "recast.granularity=row"], 48 * (4 * 384 + 384), 12, 12 * 8 * 384**2),
        (["model=vit_att", "recast.num_coefficient_sets=1"], 24, 6, 12 * 3 * 384**2),
        (["model=vit_att", "recast.num_groups=3", "recast.num_templates=2"], 48, 3, 6 * 3 * 384**2),
        (
            ["model=vit_att", "recast.num_groups=5", "recast.num_templates=null"],
            2 * (9 + 9 + 4 * 3),
            5,
            12 * 3 * 384**2,
        ),
        (["model=resnet"], 168, 8, 9 * 2 * (2 * 64**2 + 3 * 128**2 + 5 * 256**2 + 2 * 512**2)),
        (["model=resnet", "model.backbone=resnet18"], 16, 8, 9 * 2 * (64**2 + 128**2 + 256**2 + 512**2)),
        (["model=vit_frozen"], 0, 0, 0),
        (["model=resnet_frozen"], 0, 0, 0),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_counts(overrides: list[str], coefficients: int, banks: int, templates: int, compose: Compose) -> None:
    name = "resnet34" if overrides[0].startswith("model=resnet") else "vit_small_patch16_224"
    cfg = compose(f"model.backbone={name}", *overrides, "model.pretrained=false")
    network = timm.create_model(cfg.model.backbone, num_classes=0)
    whole = sum(parameter.numel() for parameter in network.parameters())
    found = None
    if cfg.model.method == "recast":
        found = mimic(network, bank_store.groups_of(network, cfg.recast), num_sets=cfg.recast.num_coefficient_sets)
    counts = count(assemble(network, cfg.model, NoAdapter(), found, 67, cfg.seed), 1234)
    head = 67 * (network.num_features + 1)
    assert len(found.groups if found else ()) == banks
    expected = {
        "coefficients": coefficients,
        "adapter": 0,
        "buffers": 0,
        "backbone_trained": 0,
        "task_specific": coefficients,
        "head": head,
        "templates": templates,
        "task_bits": 32 * coefficients,
        "task_file_bytes": 1234,
    }
    assert {key: counts[key] for key in expected} == expected
    grouped = sum(
        len(group.layers) * found.templates[group.name][0].numel() for group in (found.groups if found else ())
    )
    assert counts["frozen"] == whole - grouped
    assert counts["total"] == whole - grouped + templates + head + coefficients
    layers = counts["layers"]
    assert sum(layer.get("coefficients", 0) for layer in layers.values()) == coefficients
    assert sum(layer.get("head", 0) for layer in layers.values()) == head


@pytest.mark.parametrize(("update", "buffers"), [(False, 0), (True, 2 * 4800)])
def test_counts_of_full_fine_tuning_and_of_running_statistics(update: bool, buffers: int, compose: Compose) -> None:
    mode = "update" if update else "frozen"
    cfg = compose("model=resnet_full", "model.backbone=resnet18", f"model.batchnorm_statistics={mode}")
    network = timm.create_model("resnet18", num_classes=0)
    whole = sum(parameter.numel() for parameter in network.parameters())
    counts = count(assemble(network, cfg.model, NoAdapter(), None, 5, cfg.seed), 0)
    assert (counts["backbone_trained"], counts["buffers"]) == (whole, buffers)
    assert counts["task_specific"] == whole + buffers
    assert counts["frozen"] == 0
    assert counts["total"] == whole + buffers + 5 * 513
    assert counts["task_bits"] == 32 * (whole + buffers)


def test_running_statistics_of_a_resnet34_are_the_numbers_that_nobody_counted(compose: Compose) -> None:
    cfg = compose("model=resnet", "model.backbone=resnet34", "model.batchnorm_statistics=update")
    network = timm.create_model("resnet34", num_classes=0)
    counts = count(assemble(network, cfg.model, NoAdapter(), None, 5, cfg.seed), 0)
    assert counts["buffers"] == 17024


# Task files


@pytest.fixture
def task(build: Build, tmp_path: Path) -> tuple[Any, Path]:
    """A model with odd numbers in its task, and their file."""
    run = build("model=resnet", "model.batchnorm_statistics=update")
    generator = torch.Generator().manual_seed(1)
    for tensor in run.adapted.task_tensors().values():
        tensor.copy_(torch.randn(tensor.shape, generator=generator))
    run.adapted.task_tensors()["head/fc.bias"][:3] = torch.tensor([-0.0, 1e-42, 3e38])
    path = tmp_path / "ä task=1.safetensors"
    write_task(path, run.adapted, run.experiment.record(run.adapted, {"test/accuracy": 0.5}))
    return run, path


def test_a_task_file_is_read_back_to_the_bit(task: tuple[Any, Path], build: Build) -> None:
    run, path = task
    tensors, record = read_task(path)
    other = build("model=resnet", "model.batchnorm_statistics=update")
    assert not equal(other.adapted.task_tensors(), tensors)
    copy_into(other.adapted, for_banks(tensors, record, run.adapted.banks))
    for name, tensor in run.adapted.task_tensors().items():
        assert torch.equal(other.adapted.task_tensors()[name].view(torch.int32), tensor.view(torch.int32)), name
    assert {name.partition("/")[0] for name in tensors} == {"coefficients", "relative", "head", "buffers"}
    assert len(record.pop("checksum")) == 64
    assert record == json.loads(json.dumps(run.experiment.record(run.adapted, {"test/accuracy": 0.5})))
    assert [file.name for file in path.parent.iterdir()] == [path.name]


@pytest.mark.parametrize(
    ("dtype", "written"),
    [(torch.float64, torch.float64), (torch.float32, torch.float32), (torch.bfloat16, torch.float32)],
)
def test_coefficients_are_written_whole(dtype: torch.dtype, written: torch.dtype, task: tuple[Any, Path]) -> None:
    run, path = task
    run.adapted.network.to(dtype)
    record = run.experiment.record(run.adapted, {"test/accuracy": 0.5})
    write_task(path, run.adapted, record)
    tensors, _ = read_task(path)
    of_layers = [tensor for name, tensor in run.adapted.task_tensors().items() if name.startswith("coefficients/")]
    assert tensors["coefficients"].dtype == written
    expected = torch.cat([tensor.detach().flatten() for tensor in of_layers]).to(written)
    assert len(expected) > 0
    assert torch.equal(tensors["coefficients"], expected)


def test_no_flipped_bit_passes(task: tuple[Any, Path], tmp_path: Path) -> None:
    """A file whose length or header still fits, with any one bit wrong: among the numbers, names or the record."""
    whole = task[1].read_bytes()
    read_task(task[1])
    header = 8 + int.from_bytes(whole[:8], "little")
    generator = random.Random(0)
    places = [*range(8), *generator.sample(range(8, header), 150), *generator.sample(range(header, len(whole)), 50)]
    for place in places:
        flipped = bytearray(whole)
        flipped[place] ^= 1 << generator.randrange(8)
        (tmp_path / "flipped.safetensors").write_bytes(flipped)
        with pytest.raises(UserError) as caught:
            load_task(tmp_path / "flipped.safetensors")
        assert len(str(caught.value).splitlines()) == 1, place


def test_the_record_says_all_that_a_task_needs(task: tuple[Any, Path]) -> None:
    run, path = task
    with safe_open(path, "pt") as file:
        record = json.loads(file.metadata()["recast_exp"])
    assert record["bank"] == run.adapted.banks.hash
    assert record["backbone"] == {"name": "digits_resnet", "fingerprint": run.experiment.backbone.fingerprint}
    assert record["classes"] == ["5", "6", "7", "8", "9"]
    assert record["input"]["size"] == 16
    assert record["input"]["mean"] == [0.5, 0.5, 0.5]
    config = record["config"]
    assert config["model"]["name"] == "resnet"
    assert "adapter" not in config  # none, as by default
    assert config["dataset"]["name"] == "digits"
    assert record["metrics"] == {"test/accuracy": 0.5}
    assert "weights" not in config["model"]  # a path on this machine


def test_the_relative_form_is_kept_and_the_templates_record_has_only_what_is_not_usual(task: tuple[Any, Path]) -> None:
    run, path = task
    tensors, record = read_task(path)
    banks = run.adapted.banks
    assert len(tensors["relative"]) == sum(group.num_blocks * len(group.layers) ** 2 for group in banks.groups)
    shares = relative_form(tensors, record)
    assert torch.equal(torch.cat([shares[layer].flatten() for layer in banks.coefficients]), tensors["relative"])
    assert relative_form({}, record) == {}
    assert record["templates"].keys() == {"groups", "solver", "seed", "num_sets", "weights"}


def test_a_task_goes_with_other_templates_of_the_same_groups(task: tuple[Any, Path]) -> None:
    run, path = task
    banks = run.adapted.banks
    with torch.no_grad():
        turned = {name: tensor.flip(0) for name, tensor in banks.templates.items()}
        swapped = {name: tensor.flip(-1) for name, tensor in banks.coefficients.items()}
    other = dataclasses.replace(banks, templates=turned, coefficients=swapped)
    assert other.hash != banks.hash
    own, found = (for_banks(*read_task(path), each) for each in (banks, other))
    for layer in banks.coefficients:
        name = f"coefficients/{layer}"
        torch.testing.assert_close(found[name].mean(0).flip(-1).float(), own[name].mean(0), rtol=1e-4, atol=1e-4)


def test_the_checksum_covers_record_and_tensors_in_any_order(task: tuple[Any, Path], tmp_path: Path) -> None:
    path, other = task[1], tmp_path / "other.safetensors"
    with safe_open(path, "pt") as file:
        record = json.loads(file.metadata()["recast_exp"])
    tensors = load_file(path)

    def write(record: dict[str, Any]) -> None:
        save_file(tensors, other, {"recast_exp": json.dumps(record)})

    write(dict(reversed(record.items())))
    assert equal(read_task(other)[0], tensors)
    write(record | {"classes": [*record["classes"][:-1], "another"]})
    with pytest.raises(UserError, match="is damaged: its content is not that of its checksum"):
        read_task(other)
    text = json.dumps({name: record[name] for name in sorted(record) if name != "checksum"}, sort_keys=True)
    assert record["checksum"] == hashlib.sha256((text + content_hash(tensors)).encode()).hexdigest()


def renamed(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.replace("layer1.1.conv1", "layer1.9.conv1"): tensor for name, tensor in tensors.items()}


def cut_shape(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return tensors | {"head/fc.weight": tensors["head/fc.weight"][:4]}


def fewer(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in tensors.items() if name != "buffers/bn1.running_mean"}


def more(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return tensors | {"adapter/x": torch.ones(1)}


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (renamed, "coefficients/layer1.1.conv1"),
        (cut_shape, "head/fc.weight"),
        (fewer, "buffers/bn1.running_mean"),
        (more, "adapter/x"),
    ],
)
def test_numbers_of_another_model_are_refused_and_change_nothing(
    change: Callable[..., dict[str, Tensor]], named: str, task: tuple[Any, Path]
) -> None:
    run, _ = task
    before = copied(run.adapted.task_tensors())
    other = change({name: torch.zeros_like(tensor) for name, tensor in before.items()})
    with pytest.raises(UserError) as error:
        copy_into(run.adapted, other)
    assert_one_line(error, "task", named)
    assert equal(run.adapted.task_tensors(), before)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-3])


def cut_header(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:40])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def foreign(path: Path) -> None:
    save_file({"weight": torch.ones(3)}, path)


def foreign_record(path: Path) -> None:
    save_file({"weight": torch.ones(3)}, path, {"recast_exp": "[3]", "recast_exp_bank": "[3]"})


def no_json(path: Path) -> None:
    save_file({"weight": torch.ones(3)}, path, {"recast_exp": "{", "recast_exp_bank": "{"})


def newer(path: Path) -> None:
    with safe_open(path, "pt") as file:
        metadata = {name: json.dumps(json.loads(text) | {"format": 3}) for name, text in file.metadata().items()}
    save_file(load_file(path), path, metadata)


def empty_record(path: Path) -> None:
    save_file({"weight": torch.ones(3)}, path, {"recast_exp": "{}", "recast_exp_bank": '{"format": 1}'})


DAMAGES = [cut, cut_header, empty, foreign, foreign_record, empty_record, no_json, newer]


@pytest.mark.parametrize("damage", DAMAGES)
def test_files_that_are_no_task_files_are_refused_in_one_line(
    damage: Callable[[Path], None], task: tuple[Any, Path]
) -> None:
    _, path = task
    damage(path)
    content = path.read_bytes()
    with pytest.raises(UserError) as error:
        read_task(path)
    assert_one_line(error, "task", path)
    assert not isinstance(error.value, MissingInputError)
    assert path.read_bytes() == content


def test_the_preprocessing_of_a_record_is_that_which_was_written() -> None:
    spec = InputSpec(32, (0.1, 0.2, 0.3), (0.4, 0.5, 0.6), 0.9, "bilinear", squash=True)
    assert input_of_record(json.loads(json.dumps(input_record(spec)))) == spec


def test_a_task_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(MissingInputError) as error:
        read_task(tmp_path / "nowhere")
    assert_one_line(error, "task", tmp_path / "nowhere")


# Bank files


@pytest.fixture
def banks() -> Banks:
    torch.manual_seed(0)
    network = timm.create_model("digits_vit", num_classes=0)
    return mimic(network, find_groups(network, num_groups=6), settings={"backbone": "digits_vit", "fingerprint": "ä"})


def flip(tensor: Tensor, bit: int) -> None:
    tensor[(0,) * tensor.dim()].view(torch.int32).bitwise_xor_(1 << bit if bit < 31 else -(1 << 31))


def test_a_bank_file_is_read_back_to_the_bit(banks: Banks, tmp_path: Path) -> None:
    path = tmp_path / "bank.safetensors"
    banks.save(path)
    loaded = Banks.load(path, banks.hash)
    assert loaded.groups == banks.groups
    assert loaded.settings == banks.settings
    assert equal(loaded.templates, banks.templates)
    assert equal(loaded.coefficients, banks.coefficients)


@pytest.mark.parametrize("bit", [0, 22, 31])
@pytest.mark.parametrize("kind", ["templates", "coefficients"])
def test_the_hash_follows_every_bit(kind: str, bit: int, banks: Banks, tmp_path: Path) -> None:
    tensors = copied(getattr(banks, kind))
    flip(tensors[list(tensors)[-1]], bit)
    other = dataclasses.replace(banks, **{kind: tensors})
    assert other.hash != banks.hash
    path = tmp_path / "bank.safetensors"
    other.save(path)
    with pytest.raises(UserError) as error:
        Banks.load(path, banks.hash)
    assert_one_line(error, "bank", path, banks.hash[:16], other.hash[:16])
    flip(tensors[list(tensors)[-1]], bit)
    assert dataclasses.replace(banks, **{kind: tensors}).hash == banks.hash


def test_the_hash_follows_the_groups_and_the_names_but_not_the_settings(banks: Banks) -> None:
    first, *others = banks.groups
    groups = (dataclasses.replace(first, layers=first.layers[::-1]), *others)
    coefficients = dict(zip(banks.coefficients, reversed(banks.coefficients.values()), strict=True))
    assert dataclasses.replace(banks, groups=groups).hash != banks.hash
    assert dataclasses.replace(banks, coefficients=coefficients).hash != banks.hash
    assert dataclasses.replace(banks, settings={}).hash == banks.hash


@pytest.mark.parametrize("damage", DAMAGES)
def test_files_that_are_no_banks_are_refused_in_one_line(
    damage: Callable[[Path], None], banks: Banks, tmp_path: Path
) -> None:
    path = tmp_path / "bank.safetensors"
    banks.save(path)
    damage(path)
    with pytest.raises(UserError) as error:
        Banks.load(path)
    assert_one_line(error, "bank", path)


# The cache of banks


@pytest.fixture
def bank(tiny: Compose, tmp_path: Path) -> Callable[..., tuple[Banks, Path]]:
    """The bank of a configuration, from a cache of the test's own."""

    def bank(*overrides: str) -> tuple[Banks, Path]:
        settings = tiny("model=vit_att", *overrides)
        backbone = create_backbone(settings.model)
        return bank_for(backbone, settings.recast, settings.mimicry, tmp_path, settings.bank)

    return bank


@pytest.fixture
def solved(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """One number for each time that a bank is made."""
    made: list[int] = []

    def counted(*args: Any, **kwargs: Any) -> Banks:
        made.append(1)
        return mimic(*args, **kwargs)

    monkeypatch.setattr(bank_store, "mimic", counted)
    return made


def test_one_bank_serves_all_seeds_and_each_setting_has_its_own(bank: Bank, solved: list[int], tmp_path: Path) -> None:
    first, path = bank("seed=1")
    again, same = bank("seed=2", "dataset.batch_size=8")
    assert (again.hash, same, len(solved)) == (first.hash, path, 1)
    assert path.name == f"{first.hash}.safetensors"
    hashes = {first.hash}
    others = ["recast.num_templates=1", "recast.num_groups=4", "recast.num_coefficient_sets=1", "mimicry.seed=7"]
    for number, override in enumerate([*others, "recast.granularity=head", "recast.targets=['*.fc1']"], start=2):
        banks, _ = bank(override)
        hashes.add(banks.hash)
        assert len(solved) == len(hashes) == number
    assert len(list((tmp_path / "banks").glob("*.safetensors"))) == len(hashes)


def test_other_weights_get_a_bank_of_their_own(bank: Bank, solved: list[int], tmp_path: Path) -> None:
    first, _ = bank()
    second, _ = bank("model.pretrained=false")
    assert first.hash != second.hash
    assert len(solved) == 2


@pytest.mark.parametrize("damage", [*DAMAGES, Path.unlink])
@pytest.mark.parametrize("part", ["bank", "index"])
def test_a_damaged_cache_is_made_anew(
    part: str, damage: Callable[[Path], None], bank: Bank, solved: list[int], tmp_path: Path
) -> None:
    first, path = bank()
    (index,) = (tmp_path / "banks" / "index").glob("*.json")
    if part == "index" and damage is newer:
        index.write_text("{}")
    else:
        damage(path if part == "bank" else index)
    again, same = bank()
    assert (again.hash, same, len(solved)) == (first.hash, path, 2)
    assert Banks.load(path, first.hash).hash == first.hash


def test_a_given_bank_is_used_if_it_belongs_to_the_backbone(bank: Bank, solved: list[int], tmp_path: Path) -> None:
    _, path = bank()
    given = tmp_path / "my bank=1.safetensors"
    path.rename(given)
    solved.clear()
    banks, used = bank(f"bank={given}")
    assert (banks.hash, used, solved) == (path.stem, given, [])
    with pytest.raises(UserError) as error:
        bank(f"bank={given}", "model.pretrained=false")
    assert_one_line(error, "bank", given, "other weights")
    with pytest.raises(UserError) as error:
        bank(f"bank={given}", "recast.num_groups=4")
    assert_one_line(error, "bank", given, "other groups")


def test_a_failed_write_leaves_the_old_file(
    banks: Banks, task: tuple[Any, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "new" / "bank.safetensors"
    banks.save(path)
    content = path.read_bytes()

    def full(tensors: Any, file: Path, metadata: Any) -> None:
        file.write_bytes(b"half a")
        raise OSError("No space left on device")

    monkeypatch.setattr("recast_exp.recast.bank.save_file", full)
    monkeypatch.setattr("recast_exp.models.task_file.save_file", full)
    for write in (banks.save, lambda path: write_task(path, task[0].adapted, {})):
        with pytest.raises((OSError, UserError), match="No space"):
            write(path)
        assert path.read_bytes() == content
        assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_a_reader_of_the_old_file_is_not_disturbed_by_a_write(banks: Banks, tmp_path: Path) -> None:
    path = tmp_path / "new" / "bank.safetensors"
    banks.save(path)
    content = path.read_bytes()
    with path.open("rb") as reader:
        dataclasses.replace(banks, settings={}).save(path)
        assert path.read_bytes() != content
        assert reader.read() == content


def test_a_bank_comes_back_in_the_order_of_the_model(tmp_path: Path) -> None:
    model = timm.create_model("digits_vit", num_classes=0)
    banks = mimic(model, find_groups(model, targets=["*.attn.qkv"]))
    banks.save(tmp_path / "bank.safetensors")
    assert list(Banks.load(tmp_path / "bank.safetensors").coefficients) == [f"blocks.{i}.attn.qkv" for i in range(12)]


def test_a_cache_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"cache_dir: .* cannot be written to"):
        cache_folder(str(tmp_path / "file" / "cache"))
