"""Training from kept activations: the same results, to the bit where the processor lets them be, with less work."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from recast_exp.training.loop import FitResult, fit
from recast_exp.training.module import TaskModule
from recast_exp.training.trainer import quiet
from support.helpers import rows_know_no_others

Build = Callable[..., Any]
LAST = ("model=vit_mlp", "recast.last_blocks=2", "recast.num_groups=1", "optimizer.coefficients_lr=0.05")
SOLVED = ("training=through_head", "head=ridge", "training.splits=2")
FEW = ("dataset.max_per_class=8", "trainer.max_epochs=4", "trainer.limit_batches=null")
RUNS = {
    "joint": (*LAST, "dataset.transform=none"),
    "views": (*LAST, "dataset.views=2"),
    "through a head": (*LAST, *SOLVED, "dataset.transform=none"),
    "episodes": (*LAST, *SOLVED, "dataset.transform=none", "training.images=12", "training.classes=3"),
    "last block": ("model=vit_frozen", "adapter=last_block", "dataset.views=3"),
    "head": ("model=vit_frozen", "dataset.transform=none", "optimizer.lr=0.05"),
    "best": (*LAST, "dataset.transform=none", "select=best"),
    "bf16": (*LAST, "dataset.transform=none", "trainer.precision=bf16-mixed"),
}


@pytest.fixture(autouse=True)
def without_hints() -> Iterator[None]:
    with quiet():
        yield


def trained(build: Build, *overrides: str, run_dir: Path | None = None) -> tuple[FitResult, dict[str, Tensor], int]:
    """The result, the task, and how many images the first block has seen."""
    run = build(*FEW, *overrides)
    seen = 0

    def count(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        nonlocal seen
        seen += len(inputs[0])

    run.adapted.network.get_submodule("blocks.0").register_forward_pre_hook(count)
    result = fit(run.recipe, run.adapted, run.data, run_dir=run_dir)
    return result, run.adapted.task_tensors(), seen


def rows(result: FitResult) -> list[dict[str, float]]:
    return [{name: value for name, value in row.items() if name != "seconds"} for row in result.history]


@pytest.mark.parametrize("name", RUNS)
def test_the_same_to_the_bit(name: str, build: Build) -> None:
    kept, tensors, seen = trained(build, *RUNS[name])
    computed, expected, all_images = trained(build, *RUNS[name], "trainer.activations_mb=0")
    exact = rows_know_no_others()
    for one, other in zip(rows(kept), rows(computed), strict=True):
        assert one == (other if exact else pytest.approx(other, rel=1e-3))
    assert tensors.keys() == expected.keys()
    for key in expected:
        torch.testing.assert_close(tensors[key], expected[key], rtol=0 if exact else 1e-2, atol=0 if exact else 1e-3)
    assert seen < all_images  # each image once, and one blank image for each batch


def test_a_view_takes_its_turn(build: Build) -> None:
    """Two views: epochs 0 and 2 see the same images, and epoch 1 others."""
    data = build(*FEW, "dataset.views=2").data
    sampled = [data.datasets["train"].batch([(epoch, 5)], alter=True)[0] for epoch in range(3)]
    assert torch.equal(sampled[0], sampled[2])
    assert not torch.equal(sampled[0], sampled[1])


@pytest.mark.parametrize(
    "overrides",
    [
        LAST,  # each epoch alters the images anew
        (*LAST, "dataset.transform=none", "trainer.activations_mb=1"),
        ("model=vit_mlp", "dataset.transform=none"),
        ("model=vit_full", "dataset.transform=none"),
    ],
    ids=["altered", "too large", "first block", "full"],
)
def test_otherwise_a_step_starts_at_the_images(
    overrides: tuple[str, ...], build: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = []
    step = TaskModule.training_step

    def note(self: TaskModule, *rest: Any) -> Tensor:
        found.append(self.resumable)
        return step(self, *rest)

    monkeypatch.setattr(TaskModule, "training_step", note)
    trained(build, *overrides, *(["dataset.max_per_class=100"] if "trainer.activations_mb=1" in overrides else []))
    assert found
    assert set(found) == {None}


def test_a_run_that_goes_on_is_that_of_one_that_was_not_stopped(build: Build, tmp_path: Path) -> None:
    whole = trained(build, *RUNS["views"])
    trained(build, *RUNS["views"], "trainer.max_epochs=3", "scheduler=constant", run_dir=tmp_path)
    undisturbed = trained(build, *RUNS["views"], "scheduler=constant")
    went_on = trained(build, *RUNS["views"], "scheduler=constant", run_dir=tmp_path)
    assert rows(went_on[0]) == rows(undisturbed[0])
    assert all(torch.equal(went_on[1][key], undisturbed[1][key]) for key in undisturbed[1])
    assert len(rows(whole[0])) == 4
