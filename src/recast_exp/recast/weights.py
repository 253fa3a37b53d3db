"""The pretrained weights of the layers that share templates: read, hashed, and compared with what a bank rebuilds."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from recast_exp.errors import UserError
from recast_exp.recast.bank import Banks
from recast_exp.recast.formulas import cosine_similarity, relative_error
from recast_exp.recast.grouping import layer_module


def reference(model: nn.Module, layer: str) -> Tensor:
    """The layer's own weight [rows, ...], detached, float32 on the CPU.

    Raises:
        UnknownNameError: If the model has no such layer.
        UserError: If its weight is no dense tensor of finite floating-point numbers.
    """
    weight = layer_module(model, layer).weight.detach()
    if weight.is_meta:
        raise UserError(f"model: expected weights with values, got the layer {layer} on the meta device")
    if weight.layout != torch.strided or not weight.is_floating_point():
        raise UserError(
            f"model: expected dense weights of floating-point numbers, got {weight.dtype} in {layer} ({weight.layout})"
        )
    weight = weight.to("cpu", torch.float32)
    if not torch.isfinite(weight).all():
        raise UserError(f"model: expected finite weights, got NaN or infinity in {layer}; load them again")
    return weight


def weights_hash(model: nn.Module, layers: Iterable[str]) -> str:
    """The first 32 digits of the sha256 of the weights of layers in float32, whatever the model's dtype.

    Raises:
        UnknownNameError: If the model lacks one of the layers.
    """
    digest = hashlib.sha256()
    for layer in layers:
        weight = reference(model, layer)
        digest.update(f"{layer} {tuple(weight.shape)}".encode())
        digest.update(weight.contiguous().numpy().data)
    return digest.hexdigest()[:32]


def weight_report(original: nn.Module, banks: Banks) -> dict[str, dict[str, float]]:
    """For each layer, `relative_error`, `max_error` (absolute) and `cosine_similarity` of the rebuilt weight."""
    report = {}
    for group in banks.groups:
        for layer in group.layers:
            weight = reference(original, layer)[None]
            rebuilt = banks.rebuilt(layer, weight[0])[None]
            report[layer] = {
                "relative_error": relative_error(rebuilt, weight).item(),
                "max_error": (rebuilt - weight).abs().max().item(),
                "cosine_similarity": cosine_similarity(rebuilt, weight).item(),
            }
    return report
