"""Layers with coefficients for each image: both ways against a loop over images, for every kind of layer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from torch.nn.utils import parametrize

from recast_exp.errors import UserError
from recast_exp.recast import find_groups, inject, mimic
from recast_exp.recast.formulas import combine
from recast_exp.recast.mixed import keeps_apart, per_task

COUNTS = [2, 1, 3]


class Two(nn.Module):
    """Two layers of one shape."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.ModuleDict({"layer": layer}) for layer in layers])

    def forward(self, inputs: Tensor) -> Tensor:
        first, second = (block["layer"] for block in self.blocks)  # type: ignore[index]
        return second(F.gelu(first(inputs)))


def linears(bias: bool) -> Two:
    return Two(nn.Linear(6, 6, bias=bias), nn.Linear(6, 6, bias=bias))


def convolutions(bias: bool) -> Two:
    """With stride, padding, and padding that goes around."""
    circular = nn.Conv2d(6, 6, 3, padding=1, padding_mode="circular", bias=bias)
    return Two(nn.Conv2d(6, 6, 3, stride=2, padding=1, bias=bias), circular)


KINDS = {"linear": (linears, (4, 6)), "convolution": (convolutions, (6, 9, 9))}


def setting(kind: str, bias: bool, granularity: str) -> tuple[Two, dict[str, Tensor], Tensor]:
    """A model with templates, coefficients [S, K, B, n] of three tasks for each layer, and a batch of their images."""
    torch.manual_seed(0)
    make, shape = KINDS[kind]
    model = make(bias)
    banks = mimic(model, find_groups(model, targets=["blocks.*"], num_groups=1, granularity=granularity))
    inject(model, banks)
    coefficients = {
        name: torch.stack([start + 0.3 * torch.randn_like(start) for _ in COUNTS])
        for name, start in banks.coefficients.items()
    }
    return model.requires_grad_(False), coefficients, torch.randn(sum(COUNTS), *shape)


def loop(model: Two, coefficients: dict[str, Tensor], images: Tensor) -> Tensor:
    """Stock layers with the weights of one task after the other."""
    kind = "linear" if images.ndim == 3 else "convolution"
    rewritten = [model.get_submodule(name) for name in coefficients]
    plain = KINDS[kind][0](rewritten[0].bias is not None)
    outputs = []
    for task, batch in enumerate(torch.split(images, COUNTS)):
        state = {}
        for (name, each), layer in zip(coefficients.items(), rewritten, strict=True):
            templates = layer.get_submodule("parametrizations.weight.0").bank.templates
            state[f"{name}.weight"] = combine(each[task], templates)  # type: ignore[arg-type]
            if layer.bias is not None:
                state[f"{name}.bias"] = layer.bias  # type: ignore[assignment]
        outputs.append(torch.func.functional_call(plain, state, (batch,)))
    return torch.cat(outputs)


@pytest.mark.parametrize("way", ["weights", "products", None])
@pytest.mark.parametrize("granularity", ["layer", "row"])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_each_image_has_the_weights_of_its_task(
    kind: str, bias: bool, granularity: str, way: Literal["weights", "products"] | None
) -> None:
    model, coefficients, images = setting(kind, bias, granularity)
    expected = loop(model, coefficients, images)
    with torch.no_grad(), per_task(model, coefficients, COUNTS, way):
        found = model(images)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert all("forward" not in vars(module) for module in model.modules())


@pytest.mark.parametrize("kind", KINDS)
def test_two_blocks_of_rows(kind: str) -> None:
    """The fewest blocks that are more than one."""
    model, coefficients, images = setting(kind, True, "row")
    halves = {name: each[:, :, [0, 0, 0, 3, 3, 3]] for name, each in coefficients.items()}
    two = {name: each[:, :, [0, 3]] for name, each in coefficients.items()}
    for way in ("weights", "products"):
        with torch.no_grad(), per_task(model, halves, COUNTS, way):  # type: ignore[arg-type]
            expected = model(images)
        with torch.no_grad(), per_task(model, two, COUNTS, way):  # type: ignore[arg-type]
            torch.testing.assert_close(model(images), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("way", ["weights", "products"])
@pytest.mark.parametrize("kind", KINDS)
def test_coefficients_have_the_gradients_of_the_loop(kind: str, way: Literal["weights", "products"]) -> None:
    model, coefficients, images = setting(kind, True, "layer")
    for each in coefficients.values():
        each.requires_grad_(True)
    expected = torch.autograd.grad(loop(model, coefficients, images).square().sum(), list(coefficients.values()))
    with per_task(model, coefficients, COUNTS, way):
        loss = model(images).square().sum()
    found = torch.autograd.grad(loss, list(coefficients.values()))
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)


def test_products_in_half_precision_stay_in_it() -> None:
    model, coefficients, images = setting("linear", True, "row")
    model.to(torch.bfloat16)
    expected = loop(model.float(), coefficients, images)
    model.to(torch.bfloat16)
    with torch.no_grad(), per_task(model, coefficients, COUNTS, "products"):
        found = model(images.bfloat16())
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.float(), expected, rtol=0.1, atol=0.1)


def test_neighbouring_windows_of_an_image_are_its_own() -> None:
    model, coefficients, images = setting("linear", True, "layer")
    windows = images.reshape(2 * len(images), 2, 6)
    expected = loop(model, coefficients, images).reshape(windows.shape)
    for way in ("weights", "products"):
        with torch.no_grad(), per_task(model, coefficients, COUNTS, way):  # type: ignore[arg-type]
            torch.testing.assert_close(model(windows), expected, rtol=1e-4, atol=1e-5)


def test_a_layer_takes_what_costs_less(monkeypatch: pytest.MonkeyPatch) -> None:
    from recast_exp.recast import mixed

    model, coefficients, images = setting("linear", True, "layer")
    taken: list[str] = []
    for way in ("_with_weights", "_with_products"):
        made = getattr(mixed, way)
        monkeypatch.setattr(mixed, way, lambda *args, made=made, way=way: taken.append(way) or made(*args))
    with torch.no_grad():
        for vectors, way in ((32, "_with_weights"), (15, "_with_products")):
            taken.clear()
            with per_task(model, coefficients, COUNTS):
                model(torch.randn(len(images), vectors, 6))  # of 3 tasks with 2 images each, on average
            assert taken == [way] * 2


def test_a_convolution_takes_what_costs_less(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its vectors are the places of its input."""
    from recast_exp.recast import mixed

    torch.manual_seed(0)
    model = Two(nn.Conv2d(6, 6, 1), nn.Conv2d(6, 6, 1))
    banks = mimic(model, find_groups(model, targets=["blocks.*"], num_groups=1))
    inject(model, banks)
    coefficients = {name: torch.stack([start] * 3) for name, start in banks.coefficients.items()}
    taken: list[str] = []
    for way in ("_with_weights", "_with_products"):
        made = getattr(mixed, way)
        monkeypatch.setattr(mixed, way, lambda *args, made=made, way=way: taken.append(way) or made(*args))
    with torch.no_grad(), per_task(model, coefficients, COUNTS):
        for shape, way in (((4, 4), "_with_weights"), ((3, 5), "_with_products")):  # 16 and 15 places, 2 images a task
            taken.clear()
            model(torch.randn(sum(COUNTS), 6, *shape))
            assert taken == [way] * 2


@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_of_one_image(kind: str) -> None:
    model, coefficients, images = setting(kind, True, "layer")
    first = {name: each[:1] for name, each in coefficients.items()}
    with torch.no_grad():
        expected = loop(model, coefficients, images)[:1]
        with per_task(model, first, [1]):
            torch.testing.assert_close(model(images[:1]), expected, rtol=1e-4, atol=1e-5)


def test_a_convolution_of_one_channel() -> None:
    torch.manual_seed(0)
    model = Two(nn.Conv2d(1, 1, 3, padding=1), nn.Conv2d(1, 1, 3, padding=1))
    banks = mimic(model, find_groups(model, targets=["blocks.*"], num_groups=1))
    images = torch.randn(3, 1, 5, 5)
    with torch.no_grad():
        expected = model(images)
        inject(model, banks)
        coefficients = {name: torch.stack([start] * 2) for name, start in banks.coefficients.items()}
        with per_task(model, coefficients, [1, 2]):
            torch.testing.assert_close(model(images), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_templates_that_are_added(kind: str, bias: bool) -> None:
    torch.manual_seed(0)
    make, shape = KINDS[kind]
    model = make(bias)
    banks = mimic(model, find_groups(model, targets=["blocks.*"], num_groups=1, num_templates=2), templates="random")
    inject(model, banks)
    model.requires_grad_(False)
    coefficients = {name: torch.randn(3, *start.shape) for name, start in banks.coefficients.items()}
    images = torch.randn(sum(COUNTS), *shape)
    expected = []
    for task, batch in enumerate(torch.split(images, COUNTS)):
        plain = make(bias)
        plain.load_state_dict(
            {
                f"{name}.{each}": layer.bias if each == "bias" else layer.parametrizations.weight[0](own[task])  # type: ignore[union-attr, index, operator, misc]
                for name, own in coefficients.items()
                for layer in [model.get_submodule(name)]
                for each in (["weight", "bias"] if bias else ["weight"])
            }
        )
        expected.append(plain(batch).detach())
    with torch.no_grad(), per_task(model, coefficients, COUNTS):
        torch.testing.assert_close(model(images), torch.cat(expected), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"model": None}, "model: expected a network, got NoneType"),
        (
            {"model": linears(True)},
            "model: expected combinations of templates, as inject makes them, got blocks",
        ),
        ({"coefficients": [1]}, "coefficients: expected a mapping from layers to tensors, got list"),
        ({"coefficients": {"blocks.0.layer": 3}}, "coefficients of blocks.0.layer: expected a tensor .*, got int"),
        ({"coefficients": {"blocks.0.layer": torch.ones(2, 2, 1, 2)}}, r".*S = 3, .*, got \[2, 2, 1, 2\]"),
        ({"coefficients": {"blocks.0.layer": torch.ones(3, 2, 4, 2)}}, r".*a B that divides 6, .*, got \[3, 2, 4, 2\]"),
        ({"coefficients": {"blocks.0.layer": torch.ones(3, 2, 1, 3)}}, r".*n = 2, got \[3, 2, 1, 3\]"),
        ({"coefficients": {"blocks.0.layer": torch.ones(3, 0, 1, 2)}}, r".*n = 2, got \[3, 0, 1, 2\]"),
        ({"counts": 6}, "counts: expected a list of numbers of images, got int"),
        ({"counts": [6, 0, 0]}, "counts: expected an integer ≥ 1, got 0"),
        ({"way": "loop"}, "way: expected one of None, weights, products, got 'loop'"),
    ],
)
def test_what_cannot_be_computed_with_is_refused(changed: dict[str, object], says: str) -> None:
    model, coefficients, _ = setting("linear", True, "layer")
    arguments = {"model": model, "coefficients": coefficients, "counts": COUNTS, "way": None} | changed
    with pytest.raises(UserError, match=rf"^{says}"), per_task(**arguments):  # type: ignore[arg-type]
        pytest.fail("the block was entered")
    assert not any("forward" in vars(layer) for layer in model.modules())


@pytest.mark.parametrize("way", ["weights", "products"])
@pytest.mark.parametrize("templates", [None, "random"])
@pytest.mark.parametrize("kind", KINDS)
def test_inputs_that_are_no_multiple_of_the_images_are_refused(kind: str, templates: str | None, way: str) -> None:
    torch.manual_seed(0)
    make, shape = KINDS[kind]
    model = make(True)
    groups = find_groups(model, targets=["blocks.*"], num_groups=1, num_templates=2)
    banks = mimic(model, groups, **({"templates": templates} if templates else {}))  # type: ignore[arg-type]
    inject(model, banks)
    coefficients = {name: torch.stack([start] * 3) for name, start in banks.coefficients.items()}
    with torch.no_grad(), per_task(model, coefficients, COUNTS, way):  # type: ignore[arg-type]
        for wrong in (7, 5, 0):
            with pytest.raises(UserError, match=rf"^model: expected layers with a multiple of 6 .*, got {wrong} in bl"):
                model(torch.randn(wrong, *shape))


class Placed(nn.Module):
    """A layer between two others, with its input as `place` makes it; `back` makes [N, T, C] of it again."""

    def __init__(self, place: Callable[[Tensor], Tensor], back: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 6)
        self.place, self.back = place, back
        self.dropout = nn.Dropout(0.5)
        self.norm = nn.BatchNorm1d(6)

    def forward(self, images: Tensor) -> Tensor:
        tokens = self.back(self.layer(self.place(images))) + images
        tokens = self.dropout(tokens.softmax(1) @ tokens.mT @ tokens)  # as attention does
        return self.norm(tokens[:, 0])


@pytest.mark.parametrize(
    ("place", "back", "apart"),
    [
        (lambda x: x, lambda y: y, True),
        (lambda x: x.flatten(0, 1), lambda y: y.unflatten(0, (2, -1)), True),
        (lambda x: torch.zeros(2, 1, 6), lambda y: y, True),  # first tokens that are the same for all images
        (lambda x: x.transpose(0, 1), lambda y: y.transpose(0, 1), False),
        (lambda x: x.transpose(0, 1).flatten(0, 1), lambda y: y.unflatten(0, (-1, 2)).transpose(0, 1), False),
        (lambda x: torch.zeros(4, 6), lambda y: y, False),  # positions that all images share
        (lambda x: torch.zeros(5, 6), lambda y: y.mean(0), False),
        (lambda x: torch.zeros(6), lambda y: y, False),
        (lambda x: x, lambda y: torch.stack([y[0] + y[1], y[1]]), False),
        (lambda x: x, lambda y: torch.stack([y[0], y[0] + y[1]]), False),
    ],
    ids=["images", "rows", "learnt", "tokens", "windows", "shared", "odd", "vector", "to-first", "to-second"],
)
def test_whether_a_layer_keeps_images_apart(place: Any, back: Any, apart: bool) -> None:
    torch.manual_seed(0)
    model = Placed(place, back)
    model.layer.eval()
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    state = torch.get_rng_state()
    assert keeps_apart(model, ["layer"], torch.randn(2, 4, 6, generator=torch.Generator())) is apart
    assert model.training and model.dropout.training and not model.layer.training
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(buffer, before[name]) for name, buffer in model.named_buffers())
    assert all("forward" not in vars(module) for module in model.modules())


def test_a_layer_that_is_not_called_does_not_keep_images_apart() -> None:
    model = Placed(lambda x: x, lambda y: y)
    model.add_module("unused", nn.Linear(6, 6))
    assert not keeps_apart(model, ["layer", "unused"], torch.randn(2, 4, 6))


@pytest.mark.parametrize(
    "size", [(3,), (3, 1, 2), (3, 1, 1, 2, 1), (2, 1, 1, 2), (3, 0, 1, 2), (3, 1, 1, 3), (3, 1, 4, 2)]
)
def test_coefficients_of_another_shape_are_refused(size: tuple[int, ...]) -> None:
    model, coefficients, _ = setting("linear", True, "layer")
    name = next(iter(coefficients))
    assert coefficients[name].shape == (3, 2, 1, 2)
    with pytest.raises(UserError) as error, per_task(model, coefficients | {name: torch.zeros(size)}, COUNTS):
        pytest.fail("the block was entered")
    assert str(error.value) == (
        f"coefficients of {name}: expected [S, K, B, n] with S = 3, a B that divides 6, n = 2, got {list(size)}"
    )


@pytest.mark.parametrize("what", ["bias", "weight"])
def test_layers_with_parametrisations_of_others_are_refused(what: str) -> None:
    model = linears(bias=True)
    name = "blocks.0.layer"
    parametrize.register_parametrization(model.get_submodule(name), what, nn.Identity())
    with pytest.raises(UserError) as error, per_task(model, {name: torch.ones(1, 1, 1, 2)}, [1]):
        pytest.fail("the block was entered")
    assert str(error.value) == f"model: expected combinations of templates, as inject makes them, got {name} without"


def test_a_block_within_another_is_refused_and_the_outer_one_stays() -> None:
    model, coefficients, images = setting("linear", True, "layer")
    with torch.no_grad(), per_task(model, coefficients, COUNTS):
        before = model(images)
        with pytest.raises(UserError, match=r"within another per_task$"), per_task(model, coefficients, COUNTS):
            pytest.fail("the block was entered")
        torch.testing.assert_close(model(images), before, rtol=0, atol=0)
