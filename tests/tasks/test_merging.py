"""Merging task files reversibly: what comes back, and what is reported."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import timm
import torch
from torch import Tensor, nn

from recast_exp import (
    BitFit,
    MeLo,
    UserError,
    apply_task,
    find_groups,
    inject,
    inject_adapter,
    load_task,
    merge_tasks,
    mimic,
    save_task,
)
from support.helpers import assert_one_line

VIT = {"img_size": 32, "depth": 3, "embed_dim": 24, "num_heads": 2}


def network(num_classes: int = 0) -> nn.Module:
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", num_classes=0, **VIT).eval().requires_grad_(False)
    torch.manual_seed(num_classes)
    model.reset_classifier(num_classes)
    return model


def images() -> Tensor:
    return torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def task(path: Path, kind: str, seed: int, num_classes: int = 3) -> tuple[Path, Tensor]:
    """A task file of a model whose parameters have moved, and the logits of that model."""
    model = network(num_classes)
    banks = None
    if kind == "coefficients":
        banks = mimic(model, find_groups(model, targets=["*.fc1"]))
        paths = inject(model, banks)
    else:
        paths = inject_adapter(model, MeLo(rank=2) if kind == "melo" else BitFit())
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name in paths.values():
            parameter = model.get_parameter(name)
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
        return save_task(model, path, banks=banks, classes=[f"c{n}" for n in range(num_classes)]), model(images())


@pytest.fixture
def tasks(tmp_path: Path) -> list[tuple[Path, Tensor]]:
    given = (("melo", 1, 3), ("coefficients", 2, 2), ("melo", 3, 4))
    return [task(tmp_path / f"{kind}{seed}.safetensors", kind, seed, count) for kind, seed, count in given]


def test_with_as_many_templates_as_tasks_each_comes_back(tasks: list[tuple[Path, Tensor]], tmp_path: Path) -> None:
    merged = merge_tasks(network(), [path for path, _ in tasks])
    assert merged.names == ("melo1", "coefficients2", "melo3")
    assert max(merged.errors) < 1e-5
    paths = merged.save(tmp_path / "merged")
    assert sorted(path.name for path in (tmp_path / "merged").iterdir()) == sorted(
        [*(path.name for path in paths), f"{merged.banks.hash}.safetensors"]
    )
    for path, (_, expected) in zip(paths, tasks, strict=True):
        found = apply_task(network(), path)
        torch.testing.assert_close(found(images()), expected, rtol=1e-4, atol=1e-4)
        assert path.stat().st_size < 8_000


def test_with_fewer_the_error_is_that_of_the_best_approximation(tasks: list[tuple[Path, Tensor]]) -> None:
    paths = [path for path, _ in tasks]
    errors = [merge_tasks(network(), paths, rank=rank).errors for rank in (1, 2, 3)]
    total = [sum(error**2 for error in row) for row in errors]
    assert total[0] > 0.1
    assert max(total[1:]) < 1e-9  # no layer has been changed by more than two
    merged = merge_tasks(network(), paths, rank=1)
    # Two tasks of different layers share nothing; the third one is as long as the first, and they are hardly alike
    similarity = merged.similarity
    assert torch.allclose(similarity.diagonal(), torch.ones(3, dtype=torch.float64))
    assert similarity[0, 1] == similarity[1, 2] == 0
    assert abs(similarity[0, 2]) < 0.5
    assert merged.errors[1] < 1e-5  # alone in its layers
    assert min(merged.averaged) > 0.5  # an average is nobody's change


def test_tasks_that_are_alike_share_one_template(tmp_path: Path) -> None:
    first, _ = task(tmp_path / "a.safetensors", "coefficients", 1)
    second, _ = task(tmp_path / "b.safetensors", "coefficients", 1)
    merged = merge_tasks(network(), [first, second], rank=1)
    assert max(merged.errors) < 1e-5
    assert merged.averaged == pytest.approx([0, 0], abs=1e-5)
    assert merged.similarity[0, 1] == pytest.approx(1)


def test_the_model_is_not_changed(tasks: list[tuple[Path, Tensor]]) -> None:
    model = network(5)
    before = copy.deepcopy(model.state_dict())
    merge_tasks(model, [path for path, _ in tasks])
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_what_cannot_be_merged(tasks: list[tuple[Path, Tensor]], tmp_path: Path) -> None:
    paths = [path for path, _ in tasks]
    bitfit, _ = task(tmp_path / "bitfit.safetensors", "bitfit", 1)

    def refused(expected: str, *given: Path, rank: int | None = None, model: nn.Module | None = None) -> None:
        with pytest.raises(UserError) as error:
            merge_tasks(model or network(), given, rank=rank)
        assert_one_line(error, expected)

    refused("tasks: expected at least two task files, got 1", paths[0])
    refused("rank: expected an integer ≥ 1 and < 3, got 3", *paths[:2], rank=3)
    refused("tasks: expected tasks that have changed weights of linear layers and convolutions alone", paths[0], bitfit)
    other = network()
    with torch.no_grad():
        other.get_parameter("blocks.0.attn.qkv.weight").mul_(2)
    refused("model: expected vit_tiny_patch16_224", *paths, model=other)


def test_what_was_merged_is_not_replaced_and_no_task_is_lost(tmp_path: Path) -> None:
    folders = [tmp_path / name for name in ("x y", "x", "w")]
    files = ["z", "y z", "z"]
    given = []
    for number, (folder, name) in enumerate(zip(folders, files, strict=True)):
        folder.mkdir()
        given.append(task(folder / f"{name}.safetensors", "melo", number)[0])
    before = given[0].read_bytes()
    merged = merge_tasks(network(), given, rank=1)
    paths = merged.save(tmp_path / "out")
    assert len({path for path in paths if path.is_file()}) == 3
    two = merge_tasks(network(), [given[0], given[2]], rank=1)
    alike = merge_tasks(network(), [task(tmp_path / f"{n}.safetensors", "melo", n)[0] for n in (1, 2)], rank=1)
    with pytest.raises(UserError, match=r"^folder: expected another one than that of the task files that were merged"):
        alike.save(tmp_path)
    assert given[0].read_bytes() == before
    with pytest.raises(UserError, match="cannot be written to"):
        two.save(given[0])


def test_tasks_to_merge_that_are_none(tmp_path: Path) -> None:
    path, _ = task(tmp_path / "a.safetensors", "melo", 1)
    other, _ = task(tmp_path / "b.safetensors", "melo", 2)
    for tasks in ("ab", None, path):
        with pytest.raises(UserError, match=r"^tasks: expected a list of task files"):
            merge_tasks(network(), tasks)  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"^tasks: expected each task file once"):
        merge_tasks(network(), [path, tmp_path / ".." / tmp_path.name / "a.safetensors"])
    loaded = merge_tasks(network(), [load_task(path), other], cache=str(tmp_path / "cache"))
    assert loaded.names == ("a", "b")
