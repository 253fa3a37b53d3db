"""A batch of many tasks in one forward pass: in each rewritten layer, each image has coefficients of its own.

With n templates T[i] shared by a layer's group, the layer computes for an image x of the task t

    W(t) x = (Σ_i c_i(t) · T[i]) x = Σ_i T[i] (c_i(t) · x)

Either way gives the same result. The first makes the weight of a task and multiplies the images of that task with it;
a few weights at a time are in memory. Its cost grows with the tasks in the batch: n operations for each entry of a
weight. The second needs no weight: n products with the templates serve all images, whatever their tasks. Its cost does
not depend on the tasks: n times the layer. A weight is cheaper to make than a further product as soon as a task has
some dozens of vectors in the batch, which the patches of one image are.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from torch.nn.utils import parametrize

from recast_exp.errors import UserError, check_integer, check_type
from recast_exp.recast.combination import TemplateCombination
from recast_exp.recast.formulas import combine
from recast_exp.recast.grouping import layer_module

WAYS = None, "weights", "products"
WEIGHTS_FROM = 32  # vectors of a task in a layer's input from which its weight is made; benchmarks/many_tasks.py
WEIGHTS_FROM_ELSEWHERE = 2048  # the same on a GPU, where many small operations cost more than a large one


_COMBINATION = "parametrizations.weight.0"
"""Where `inject` puts the combination of a layer."""


@dataclass(frozen=True)
class _Tasks:
    """The coefficients of the tasks in one layer, and the number of images of each.

    Attributes:
        coefficients: [S, K, B, n].
        counts: The numbers of images of the S tasks, which follow one another in the batch.
        way: "weights" or "products"; None for the cheaper one.
    """

    coefficients: Tensor
    counts: Sequence[int]
    way: Literal["weights", "products"] | None


@contextlib.contextmanager
def per_task(
    model: nn.Module,
    coefficients: Mapping[str, Tensor],
    counts: Sequence[int],
    way: Literal["weights", "products"] | None = None,
) -> Iterator[set[str]]:
    """Within the block, the layers of a model use the coefficients of each image's task.

    Some models take the weight of a layer themselves instead of calling it (BEiT's attention, say). Nothing can be put
    in its place then, so what was computed is right only if every layer was called.

    The images of a task follow one another. The batch of a layer's input may be a multiple of the images: windows, say,
    as long as those of an image are neighbours (`keeps_apart` finds out). Not for several threads at once.

    Args:
        model: A model that `inject` has changed.
        coefficients: Layer → [S, K, B, n] for S tasks.
        counts: The number of images of each task, at least 1.
        way: "weights" or "products"; None takes for each layer the one that costs less.

    Yields:
        The names of the layers that have been called, in the end.

    Raises:
        UserError: If a layer computes in a way of its own, such as one with standardised weights, or its weight is no
            combination of templates, or if the coefficients of a layer are those of another number of tasks; within the
            block, if the batch of a layer's input is no multiple of the images.
    """
    check_type("model", model, nn.Module, "a network")
    check_type("coefficients", coefficients, Mapping, "a mapping from layers to tensors")
    check_type("counts", counts, Sequence, "a list of numbers of images")
    for count in counts:
        check_integer("counts", count, 1)
    if way not in WAYS:
        raise UserError(f"way: expected one of {', '.join(map(str, WAYS))}, got {way!r}")
    layers = {name: layer_module(model, name) for name in coefficients}
    for name, layer in layers.items():
        _check_tasks(name, layer, coefficients[name], len(counts))
    if others := [name for name, layer in layers.items() if not mixable(layer)]:
        kind = type(layers[others[0]]).__mro__[1].__name__
        raise UserError(
            f"model: expected layers that compute as torch's Linear or Conv2d, got {others[0]} ({kind}); compute the "
            "images of each task apart"
        )
    called: set[str] = set()
    try:
        for name, layer in layers.items():
            tasks = _Tasks(coefficients[name], counts, way)
            if _combination(layer).base is None:
                compute = functools.partial(_forward, layer, _templates(layer), tasks)
            else:
                compute = functools.partial(_with_changes, layer, tasks)
            # An instance's attribute, which hides the method of its class
            vars(layer)["forward"] = functools.partial(_noted, called, name, sum(counts), compute)
        yield called
    finally:
        for layer in layers.values():
            vars(layer).pop("forward", None)


def _check_tasks(name: str, layer: nn.Module, coefficients: Tensor, tasks: int) -> None:
    is_parametrized = parametrize.is_parametrized(layer, "weight")
    if not is_parametrized or not isinstance(layer.get_submodule(_COMBINATION), TemplateCombination):
        raise UserError(f"model: expected combinations of templates, as inject makes them, got {name} without")
    if "forward" in vars(layer):
        raise UserError(f"model: expected layers with a forward of their class, got {name} within another per_task")
    own = _combination(layer)
    check_type(f"coefficients of {name}", coefficients, Tensor, "a tensor [S, K, B, n]")
    tasks_found, sets, blocks, number = coefficients.shape if coefficients.ndim == 4 else (0, 0, 0, 0)
    rows, n = own.shape[0], own.num_coefficients
    if tasks_found != tasks or not sets or not blocks or rows % blocks or number != n:
        raise UserError(
            f"coefficients of {name}: expected [S, K, B, n] with S = {tasks}, a B that divides {rows}, n = {n}, got "
            f"{list(coefficients.shape)}"
        )


def mixable(layer: nn.Module) -> bool:
    """Whether a layer computes as torch's Linear or Conv2d does, so that something else can compute in its place."""
    return type(layer).forward in (nn.Linear.forward, nn.Conv2d.forward)


@torch.compiler.disable  # type: ignore[untyped-decorator]
@torch.no_grad()
def keeps_apart(model: nn.Module, layers: Sequence[str], images: Tensor) -> bool:
    """Whether what layers compute for an image goes into the features of this image alone, as `per_task` needs it.

    It does not where the first dimension of a layer's input is not that of the images: with tokens first, say, or for
    relative positions, which all images share. Two images show it: NaN in the half of each layer's output that would be
    one image's must not reach the features of the other.

    Args:
        model: A model, which is in evaluation mode meanwhile.
        layers: Names of its layers, all of them `mixable`.
        images: Two finite images.

    Returns:
        False as well if the model does not call one of the layers, but computes with its weight.
    """
    modules = {name: layer_module(model, name) for name in layers}
    modes = [(module, module.training) for module in model.modules()]
    model.eval()  # nothing random, and no statistics that NaN would get into
    try:
        return all(_stays(model, modules, images, image) for image in (0, 1))
    except Exception:  # a model of one's own may refuse NaN, or two images
        return False
    finally:
        for module, training in modes:
            module.training = training


def _stays(model: nn.Module, layers: Mapping[str, nn.Module], images: Tensor, image: int) -> bool:
    called: set[str] = set()
    try:
        for name, layer in layers.items():
            compute = functools.partial(_spoilt, layer, image)
            vars(layer)["forward"] = functools.partial(_noted, called, name, 2, compute)
        features: Tensor = model(images)
    finally:
        for layer in layers.values():
            vars(layer).pop("forward", None)
    return len(called) == len(layers) and not bool(features[1 - image].isnan().any())


def _spoilt(layer: nn.Module, image: int, inputs: Tensor) -> Tensor:
    """The output of a layer, with NaN in the half that would be one image's."""
    output: Tensor = type(layer).forward(layer, inputs)
    half = len(output) // 2
    output[image * half : (image + 1) * half] = torch.nan
    return output


def _check_batch(name: str, size: int, images: int) -> None:
    if size == 0 or size % images:
        raise UserError(
            f"model: expected layers with a multiple of {images} images in the first dimension of their input, got "
            f"{size} in {name}; compute the images of each task apart"
        )


def _noted(called: set[str], name: str, images: int, compute: Callable[[Tensor], Tensor], inputs: Tensor) -> Tensor:
    called.add(name)
    _check_batch(name, len(inputs), images)
    return compute(inputs)


def _templates(layer: nn.Module) -> Tensor:
    combination = _combination(layer)
    return combination.bank.values().to(combination.dtype)


def _combination(layer: nn.Module) -> TemplateCombination:
    combination = layer.get_submodule(_COMBINATION)
    assert isinstance(combination, TemplateCombination)
    return combination


def _forward(layer: nn.Linear | nn.Conv2d, templates: Tensor, tasks: _Tasks, inputs: Tensor) -> Tensor:
    """The output of a layer.

    Args:
        layer: The layer, for its bias and the settings of a convolution.
        templates: [n, rows, ...].
        tasks: S tasks with N images.
        inputs: [M, ..., columns] or [M, channels, height, width], with M a multiple of N.
    """
    repeats = inputs.shape[0] // sum(tasks.counts)
    counts = [count * repeats for count in tasks.counts]
    vectors = inputs[0, 0].numel() if isinstance(layer, nn.Conv2d) else inputs[0].numel() // inputs.shape[-1]
    enough = WEIGHTS_FROM if inputs.device.type == "cpu" else WEIGHTS_FROM_ELSEWHERE
    cheaper = "weights" if vectors * inputs.shape[0] >= enough * len(counts) else "products"
    if (tasks.way or cheaper) == "products":
        return _with_products(layer, templates, tasks.coefficients, counts, inputs)
    return _with_weights(layer, templates, tasks.coefficients, counts, inputs)


def _with_changes(layer: nn.Linear | nn.Conv2d, tasks: _Tasks, inputs: Tensor) -> Tensor:
    """The output of a layer whose templates are added to its weight: a weight for each task."""
    repeats = inputs.shape[0] // sum(tasks.counts)
    combination, parts = _combination(layer), []
    batches = torch.split(inputs, [count * repeats for count in tasks.counts])
    for each, batch in zip(tasks.coefficients, batches, strict=True):
        weight = combination(each)
        if isinstance(layer, nn.Conv2d):
            parts.append(layer._conv_forward(batch, weight, layer.bias))
        else:
            parts.append(F.linear(batch, weight, layer.bias))
    return torch.cat(parts)


def _with_weights(
    layer: nn.Linear | nn.Conv2d, templates: Tensor, coefficients: Tensor, counts: list[int], inputs: Tensor
) -> Tensor:
    """The weight of each task, and its product with the images of the task."""
    involved = (inputs, coefficients, layer.bias)
    trained = torch.is_grad_enabled() and any(each is not None and each.requires_grad for each in involved)
    if trained or isinstance(layer, nn.Conv2d) or torch.is_autocast_enabled(inputs.device.type):
        parts = []
        for each, batch in zip(coefficients, torch.split(inputs, counts), strict=True):
            weight = combine(each, templates)
            if isinstance(layer, nn.Conv2d):
                parts.append(layer._conv_forward(batch, weight, layer.bias))
            else:
                parts.append(F.linear(batch, weight, layer.bias))
        return torch.cat(parts)
    # The same without new memory for each task: a few weights, and one output
    mean = coefficients.mean(1).to(templates.dtype).unsqueeze(-1)  # [S, B, n, 1]
    blocks = templates.reshape(len(templates), mean.shape[1], -1)
    rows, columns = templates.shape[1:]
    flat, outputs = inputs.reshape(-1, columns), inputs.new_empty(*inputs.shape[:-1], rows)
    flat_outputs = outputs.view(-1, rows)
    weights = templates.new_empty(_at_once(), rows, columns)
    vectors = len(flat) // len(inputs)
    start = 0
    for tasks in _alike(counts, len(weights)):
        size, number = counts[tasks.start] * vectors, len(tasks)
        into = weights[:number].view(number, *blocks.shape[1:])
        chosen = mean[tasks.start : tasks.stop]
        torch.mul(blocks[0], chosen[:, :, 0], out=into)
        for index in range(1, len(blocks)):
            into.addcmul_(blocks[index], chosen[:, :, index])
        end = start + size * number
        batch, output = (each[start:end].view(number, size, -1) for each in (flat, flat_outputs))
        transposed = weights[:number].transpose(1, 2)
        if layer.bias is None:
            torch.bmm(batch, transposed, out=output)
        else:
            torch.baddbmm(layer.bias, batch, transposed, out=output)
        start = end
    return outputs


def _at_once() -> int:
    """How many weights are made at once: for each thread one, which is quicker than to divide a small product."""
    return min(torch.get_num_threads(), 8)


def _alike(counts: Sequence[int], at_most: int) -> Iterator[range]:
    """Runs of neighbouring tasks with the same number of images, in parts of `at_most`."""
    start = 0
    for number in range(1, len(counts) + 1):
        if number == len(counts) or counts[number] != counts[start] or number - start == at_most:
            yield range(start, number)
            start = number


def _with_products(
    layer: nn.Linear | nn.Conv2d, templates: Tensor, coefficients: Tensor, counts: list[int], inputs: Tensor
) -> Tensor:
    """A product of all images with each template.

    With one block of rows, the coefficients scale the inputs, which needs no memory for n outputs. With several, they
    scale the blocks of each output.
    """
    repeats = torch.tensor(counts, device=coefficients.device)
    weights = coefficients.mean(1).repeat_interleave(repeats, 0).to(inputs.dtype)  # [M, B, n]
    num_blocks = weights.shape[1]
    channels = 1 if isinstance(layer, nn.Conv2d) else inputs.dim() - 1
    shape = (-1, *[1] * (inputs.dim() - 1))
    total: Tensor | None = None
    for index, template in enumerate(templates):
        weight = weights[:, :, index]
        if num_blocks == 1:
            total = _add(layer, template, inputs * weight.reshape(shape), total)
            continue
        rows = template.shape[0]
        scale = weight.repeat_interleave(rows // num_blocks, 1)  # [M, rows]
        scale = scale.reshape([len(scale), *[rows if axis == channels else 1 for axis in range(1, inputs.dim())]])
        part = _add(layer, template, inputs, None, with_bias=False) * scale
        total = part if total is None else total + part
    assert total is not None
    if num_blocks > 1 and layer.bias is not None:
        total = total + layer.bias.reshape([-1 if axis == channels else 1 for axis in range(inputs.dim())])
    return total


def _add(
    layer: nn.Linear | nn.Conv2d, weight: Tensor, inputs: Tensor, total: Tensor | None, with_bias: bool = True
) -> Tensor:
    """`total` plus the product of one template with the inputs; the bias comes with the first."""
    bias = layer.bias if total is None and with_bias else None
    if isinstance(layer, nn.Conv2d):
        product: Tensor = layer._conv_forward(inputs, weight, bias)
        return product if total is None else total + product
    if total is None:
        return F.linear(inputs, weight, bias)
    flat = torch.addmm(total.flatten(0, -2), inputs.flatten(0, -2), weight.T)  # the sum within the product
    return flat.reshape(total.shape)
