"""A whole `RecastModel` on disk: to the bit, without a download, and nothing damaged is taken."""

from __future__ import annotations

import copy
import json
import re
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from recast_exp import MeLo, MissingInputError, RecastConfig, RecastModel, UserError, apply_task, load_task
from recast_exp.models.weights import content_hash

VIT: dict[str, Any] = {"img_size": 32, "depth": 2, "embed_dim": 24, "num_heads": 2}


@pytest.fixture
def images() -> Tensor:
    return torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch) -> RecastModel:
    """A small backbone that timm creates by its name alone, with three tasks."""

    def small(name: str, **options: Any) -> nn.Module:
        made: nn.Module = create(name, **{**VIT, **options})
        return made

    create = timm.create_model
    monkeypatch.setattr("recast_exp.models.create.timm.create_model", small)
    made = RecastModel.from_timm(
        "vit_tiny_patch16_224", pretrained=False, img_size=32, recast=RecastConfig(targets=["*.attn.qkv"])
    )
    made.add_task("pets", ["cat", "dog"])
    made.add_task("a/b ü", 3, adapter=MeLo(rank=2))
    made.add_task("birds", 2)
    return moved(made)


@torch.no_grad()
def outputs(model: RecastModel, images: Tensor) -> dict[str, Tensor]:
    found = {}
    for name in (None, *model.tasks):
        with model.task(name):
            found[str(name)] = model(images)
    return found


def test_tasks_that_were_added_with_one_adapter_do_not_share_its_options(
    model: RecastModel, images: Tensor, tmp_path: Path
) -> None:
    adapter = MeLo(rank=4, alpha=4.0)
    for name in ("c", "d"):
        model.add_task(name, 2, adapter=adapter)
        with model.task(name), torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.1 * torch.randn_like(parameter))
    adapter.alpha = 16.0
    with model.task("c"):
        model.tasks["c"].adapter.truncate(model.network, 2)  # type: ignore[attr-defined]
    assert [model.tasks[name].adapter.found() for name in "cd"] == [{"ranks": [2, 2], "rank_gates": False}, {}]
    expected, loaded = outputs(model, images), RecastModel.load(model.save(tmp_path / "zoo"))
    assert all(torch.equal(found, expected[name]) for name, found in outputs(loaded, images).items())


@pytest.mark.parametrize("name", ["folder", "file.zip"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_is_restored_to_the_bit(
    name: str, dtype: torch.dtype, model: RecastModel, images: Tensor, tmp_path: Path
) -> None:
    model.to(dtype)
    images = images.to(dtype)
    expected = outputs(model, images)
    assert model.save(tmp_path / name) == tmp_path / name
    state = torch.get_rng_state()
    loaded = RecastModel.load(tmp_path / name)
    assert torch.equal(torch.get_rng_state(), state)
    assert loaded.active is None and not loaded.training
    found = outputs(loaded, images)
    assert list(found) == ["None", "pets", "a/b ü", "birds"]
    assert all(torch.equal(found[task], expected[task]) for task in expected)
    assert {task: loaded.tasks[task].classes for task in loaded.tasks} == {
        task: model.tasks[task].classes for task in model.tasks
    }
    assert loaded.tasks["pets"].fingerprint == model.tasks["pets"].fingerprint


@torch.no_grad()
def moved(model: RecastModel) -> RecastModel:
    for name in model.tasks:
        with model.task(name):
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.1 * torch.randn_like(parameter))
    return model


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("templates", ["layers", "random"])
def test_a_model_of_a_converted_backbone_is_restored_to_the_bit(
    templates: str, dtype: torch.dtype, model: RecastModel, images: Tensor, tmp_path: Path
) -> None:
    """Its templates and coefficients are float32."""
    network = timm.create_model("vit_tiny_patch16_224", num_classes=0).to(dtype)
    made = RecastModel.wrap(network, recast=RecastConfig(targets=["*.attn.qkv"], templates=templates))
    made.add_task("pets", 2)
    made.add_task("birds", 2, adapter=MeLo(rank=2))
    expected = outputs(moved(made), images.to(dtype))
    found = outputs(RecastModel.load(made.save(tmp_path)), images.to(dtype))
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("way", [["half", "float"], ["bfloat16", "half"], ["double"]], ids=str)
@pytest.mark.parametrize("active", [None, "pets", "a/b ü"])
def test_a_model_that_was_converted_is_restored_to_the_bit(
    active: str | None, way: list[str], model: RecastModel, images: Tensor, tmp_path: Path
) -> None:
    model.set_task(active)
    for name in way:
        getattr(model, name)()
    moved(model)
    images = images.to(model.head.weight.dtype if active else next(model.parameters()).dtype)  # type: ignore
    expected = outputs(model, images)
    found = outputs(RecastModel.load(model.save(tmp_path)), images)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_weights_of_several_dtypes_are_not_saved(model: RecastModel, tmp_path: Path) -> None:
    model.network.norm.bfloat16()  # type: ignore[operator, union-attr]
    with pytest.raises(UserError, match=r"^model: expected weights of one dtype, got bfloat16, float32; convert it"):
        model.save(tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_saving_again_writes_what_is_new_and_removes_what_is_not_there(
    model: RecastModel, images: Tensor, tmp_path: Path
) -> None:
    model.save(tmp_path)
    before = {path.name: path.stat().st_mtime_ns for path in tmp_path.glob("*.safetensors")}
    assert len(before) == 5  # templates, other weights, three tasks
    model.remove_task("birds")
    model.add_task("cars", 2)
    model.save(tmp_path)
    after = {path.name: path.stat().st_mtime_ns for path in tmp_path.glob("*.safetensors")}
    assert len(after) == 5 and len(set(after) & set(before)) == 4
    record = json.loads((tmp_path / "model.json").read_text())
    for name in (record["bank"], record["weights"]):
        assert after[f"{name}.safetensors"] == before[f"{name}.safetensors"]
    assert list(RecastModel.load(tmp_path).tasks) == ["pets", "a/b ü", "cars"]


def test_a_save_that_is_interrupted_leaves_the_old_model(
    model: RecastModel, images: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model.save(tmp_path)
    expected = outputs(model, images)
    model.add_task("cars", 2)

    def full(*_: Any) -> None:
        raise OSError("No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("recast_exp.tasks.model_file.write_json", full)
        with pytest.raises(UserError, match="No space"):
            model.save(tmp_path)
    found = outputs(RecastModel.load(tmp_path), images)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def change(**entries: Any) -> Callable[[Path], None]:
    def changed(folder: Path) -> None:
        record = json.loads((folder / "model.json").read_text())
        (folder / "model.json").write_text(json.dumps(record | entries))

    return changed


def damage(which: str) -> Callable[[Path], None]:
    def damaged(folder: Path) -> None:
        path = folder / f"{json.loads((folder / 'model.json').read_text())[which]}.safetensors"
        path.write_bytes(path.read_bytes()[:-4] + b"\x01\x02\x03\x04")

    return damaged


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (lambda folder: (folder / "model.json").write_text("[" * 100_000), "a damaged one"),
        (lambda folder: (folder / "model.json").unlink(), "expected model.json of RecastModel.save in it, got none"),
        (change(format=99), "has format 99"),
        (change(bank="../../somewhere"), "a damaged one"),
        (change(weights="0" * 64), "expected the file 000"),
        (change(tasks={"pets": "1" * 64}), "expected the file 111"),
        (change(tasks=[]), "a damaged one"),
        (change(backbone="vit_tyni"), "expected a timm model, got 'vit_tyni'"),
        (change(dtype="int8"), "a damaged one"),
        (damage("bank"), "is damaged: its content is not that of the hash it records"),
        (damage("weights"), "expected the content"),
    ],
    ids=range(11),
)
def test_what_is_damaged_is_refused(
    harm: Callable[[Path], None], message: str, model: RecastModel, tmp_path: Path
) -> None:
    model.save(tmp_path)
    harm(tmp_path)
    with pytest.raises((UserError, MissingInputError), match=re.escape(message)) as error:
        RecastModel.load(tmp_path)
    assert "\n" not in str(error.value)


def test_no_model(tmp_path: Path) -> None:
    with pytest.raises(MissingInputError, match="got nothing"):
        RecastModel.load(tmp_path / "nowhere")
    (tmp_path / "x.zip").write_bytes(b"no zip file")
    with pytest.raises(UserError, match="expected a zip file"):
        RecastModel.load(tmp_path / "x.zip")


def test_a_zip_file_writes_nowhere_else(model: RecastModel, tmp_path: Path) -> None:
    path = model.save(tmp_path / "model.zip")
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("../outside.safetensors", b"x")
        archive.writestr("more.py", b"x")
    assert list(RecastModel.load(path).tasks) == list(model.tasks)
    assert [file.name for file in tmp_path.iterdir()] == ["model.zip"]


def test_a_model_that_no_file_can_name_is_not_saved(tmp_path: Path) -> None:
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.Sequential(*(nn.Sequential(nn.Linear(4, 4), nn.ReLU()) for _ in range(2)))

        def forward(self, values: Tensor) -> Tensor:
            found: Tensor = self.blocks(values)
            return found

    with pytest.raises(UserError, match="expected a timm model, which a file can name, got Own"):
        RecastModel.wrap(Own(), width=4).save(tmp_path / "model")


@pytest.mark.parametrize(
    "other",
    [{"embed_dim": 24, "num_heads": 2}, {"depth": 2}, {"init_values": 0.1}, {"num_heads": 6}, {"act_layer": "relu"}],
    ids=str,
)
def test_a_model_that_its_name_does_not_tell_is_not_saved(other: dict[str, Any], tmp_path: Path) -> None:
    """It could not be loaded again."""
    made = RecastModel.wrap(timm.create_model("vit_tiny_patch16_224", img_size=32, **other))
    made.add_task("pets", 2)
    with pytest.raises(UserError, match=r"^model: expected vit_tiny_\S+ as timm .* could not be loaded again"):
        made.save(tmp_path / "model")
    assert list(tmp_path.iterdir()) == []
    assert made.save_task("pets", tmp_path / "pets.safetensors").is_file()


def test_a_model_that_was_made_in_inference_mode_goes_on_outside(tmp_path: Path, images: Tensor) -> None:
    network = timm.create_model("vit_tiny_patch16_224", **VIT)
    stock = copy.deepcopy(network)
    with torch.inference_mode():
        made = RecastModel.wrap(network)
        made.add_task("pets", 2, adapter=MeLo(rank=2))
        made.add_task("birds", 3)
        assert [len(row) for row in made(images[:2], tasks=["pets", "birds"])] == [2, 3]
    for name in made.tasks:
        made.set_task(name)
        made(images).sum().backward()
    path = made.save_task("pets", tmp_path / "pets.safetensors")
    with torch.inference_mode():
        made.load_task(path, "again")
        plain = apply_task(stock, load_task(path))
    made.set_task("again")
    made(images).sum().backward()
    plain.requires_grad_(True)(images).sum().backward()


def test_a_model_that_was_loaded_in_inference_mode_can_train(
    model: RecastModel, images: Tensor, tmp_path: Path
) -> None:
    path = model.save(tmp_path / "model")
    with torch.inference_mode():
        loaded = RecastModel.load(path)
    for name in loaded.tasks:
        loaded.set_task(name)
        loaded(images).sum().backward()
        assert all(parameter.grad is not None for parameter in loaded.parameters() if parameter.requires_grad)


def test_files_of_others_in_the_folder_stay(model: RecastModel, tmp_path: Path) -> None:
    others = {
        "task.safetensors": b"a run's own",
        f"{'0' * 64}.safetensors": b"a bank of other task files",
        "x": b"text",
    }
    for name, content in others.items():
        (tmp_path / name).write_bytes(content)
    model.save(tmp_path)
    model.remove_task("pets")
    model.save(tmp_path)
    assert all((tmp_path / name).read_bytes() == content for name, content in others.items())
    assert len(list(tmp_path.glob("*.safetensors"))) == 2 + 4  # the others, templates, weights, two tasks
    assert list(RecastModel.load(tmp_path).tasks) == ["a/b ü", "birds"]


def test_a_task_that_has_diverged_is_not_written_over_a_good_model(
    model: RecastModel, images: Tensor, tmp_path: Path
) -> None:
    expected = outputs(model, images)
    model.save(tmp_path / "model")
    path = model.save_task("birds", tmp_path / "birds.safetensors")
    before = {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}
    with model.task("birds"), torch.no_grad():
        model.head.weight.fill_(torch.nan)  # type: ignore[union-attr, operator]
    for save in (lambda: model.save(tmp_path / "model"), lambda: model.save_task("birds", path)):
        with pytest.raises(UserError, match=r"^task: expected finite numbers, got NaN or infinity in head/"):
            save()
    assert {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()} == before
    found = outputs(RecastModel.load(tmp_path / "model"), images)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("part", ["templates", "weights"])
def test_saving_again_mends_what_is_damaged(part: str, model: RecastModel, images: Tensor, tmp_path: Path) -> None:
    expected = outputs(model, images)
    model.save(tmp_path)
    record = json.loads((tmp_path / "model.json").read_text())
    file = tmp_path / f"{record['bank' if part == 'templates' else 'weights']}.safetensors"
    file.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(UserError):
        RecastModel.load(tmp_path)
    model.save(tmp_path)
    found = outputs(RecastModel.load(tmp_path), images)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("place", ["folder", "file/x", "x" * 250, "", "a\0b"])
def test_places_that_cannot_be_written_to(place: str, model: RecastModel, tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("x")
    path = tmp_path / place if place else Path()
    if len(place) == 250:
        assert model.save_task("pets", path).is_file()
        return
    with pytest.raises(UserError, match="cannot be written to"):
        model.save_task("pets", path)
    with pytest.raises(UserError, match=r"^expected a path, got 3"):
        model.save_task("pets", 3)  # type: ignore[arg-type]


@pytest.mark.parametrize("backbone", ["hf-hub:evil/x", "local-dir:/etc"])
def test_a_model_chooses_no_repository_and_no_folder(backbone: str, model: RecastModel, tmp_path: Path) -> None:
    model.save(tmp_path)
    name = json.loads((tmp_path / "model.json").read_text())["backbone"]
    with pytest.raises(UserError, match=f"^backbone: expected {name}, that of .*, got 'other'"):
        RecastModel.load(tmp_path, backbone="other")
    assert RecastModel.load(tmp_path, backbone=name).backbone == name
    change(backbone=backbone)(tmp_path)
    with pytest.raises(UserError, match=f"if you trust it, load it with backbone='{backbone}'"):
        RecastModel.load(tmp_path)


def test_a_backbone_far_larger_than_the_files_is_not_made(
    model: RecastModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model.save(tmp_path)
    change(backbone="vit_huge_patch14_224", img_size=None)(tmp_path)
    monkeypatch.undo()  # timm makes models of their own sizes again
    monkeypatch.setattr("recast_exp.tasks.model_file.create_network", None)
    with pytest.raises(UserError, match=r"vit_huge_patch14_224 has 630,764,800 parameters, the files [\d,]+$"):
        RecastModel.load(tmp_path)


@pytest.mark.parametrize("change_weights", [lambda tensor: tensor.fill_(float("nan")), lambda tensor: tensor.int()])
def test_weights_that_no_model_has_are_refused(
    change_weights: Callable[[Tensor], Tensor], model: RecastModel, tmp_path: Path
) -> None:
    model.save(tmp_path)
    record = json.loads((tmp_path / "model.json").read_text())
    tensors = load_file(tmp_path / f"{record['weights']}.safetensors")
    name = next(iter(tensors))
    tensors[name] = change_weights(tensors[name].clone())
    changed = content_hash(tensors)
    save_file(tensors, tmp_path / f"{changed}.safetensors")
    change(weights=changed)(tmp_path)
    with pytest.raises(UserError, match=f"expected finite numbers of the type of its backbone, got others in {name}"):
        RecastModel.load(tmp_path)


def test_a_backbone_with_a_second_head_is_refused() -> None:
    """Its logits are those of two heads, which one Linear on its features does not give."""
    with pytest.raises(UserError, match=r"^model: expected one whose logits are those of its classifier, .* aux_head"):
        RecastModel.wrap(timm.create_model("volo_d1_224", img_size=64))
