"""A batch in which each image has coefficients of its own: many tasks in one forward pass.

With n templates T[i] shared by a layer's group, the layer computes for an image x with coefficients c(x)

    W(x) x = Σ_i c_i(x) · (T[i] x) = Σ_i T[i] (c_i(x) · x)

so n products with the templates serve all images, however many different tasks they belong to. With coefficients for
each of B blocks of rows, the first form scales the blocks of the output; with B = 1, the second scales the input, which
needs no memory for n outputs.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from recast_exp.recast.bank import TemplateCombination
from recast_exp.recast.grouping import layer_module


@contextlib.contextmanager
def per_image(model: nn.Module, coefficients: Mapping[str, Tensor]) -> Iterator[None]:
    """Within the block, the layers of a model use coefficients of each image's own.

    The batch of a layer's input may be a multiple of the images: windows, say, as long as those of an image are
    neighbours. Not for several threads at once.

    Args:
        model: A model that `inject` has changed.
        coefficients: Layer → [N, K, B, n] for the N images of a batch.
    """
    layers = {name: layer_module(model, name) for name in coefficients}
    try:
        for name, layer in layers.items():
            mean = coefficients[name].mean(1)
            # An instance's attribute, which hides the method of its class
            vars(layer)["forward"] = functools.partial(_forward, layer, _templates(layer), mean)
        yield
    finally:
        for layer in layers.values():
            vars(layer).pop("forward", None)


def _templates(layer: nn.Module) -> Tensor:
    combination = layer.get_submodule("parametrizations.weight.0")
    assert isinstance(combination, TemplateCombination)
    return combination.bank.templates.to(combination.dtype)


def _forward(layer: nn.Linear | nn.Conv2d, templates: Tensor, coefficients: Tensor, inputs: Tensor) -> Tensor:
    """The output of a layer.

    Args:
        layer: The layer, for its bias and the settings of a convolution.
        templates: [n, rows, ...].
        coefficients: [N, B, n].
        inputs: [M, ..., columns] or [M, channels, height, width], with M a multiple of N.
    """
    repeats = inputs.shape[0] // coefficients.shape[0]
    weights = coefficients.repeat_interleave(repeats, 0).to(inputs.dtype)  # [M, B, n]
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
        return nn.functional.linear(inputs, weight, bias)
    flat = torch.addmm(total.flatten(0, -2), inputs.flatten(0, -2), weight.T)  # the sum within the product
    return flat.reshape(total.shape)
