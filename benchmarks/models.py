"""The models that the benchmarks compare: stock timm ViT-S/16 and RECAST on it, with random weights."""

from __future__ import annotations

import timm
import torch
from torch import Tensor, nn

from recast_exp.recast import find_groups, inject, mimic

BACKBONE = "vit_small_patch16_224"
CLASSES = 10
TARGETS = {
    "vit_att": ["*.attn.qkv"],
    "vit_mlp": ["*.mlp.fc1", "*.mlp.fc2"],
    "vit_att_mlp": ["*.attn.qkv", "*.mlp.fc1", "*.mlp.fc2"],
}


def batch(size: int) -> tuple[Tensor, Tensor]:
    """Random images [size, 3, 224, 224] and labels [size]."""
    torch.manual_seed(0)
    return torch.randn(size, 3, 224, 224), torch.randint(CLASSES, (size,))


def stock(classes: int = CLASSES) -> nn.Module:
    """Stock timm, every parameter trained: full fine-tuning."""
    torch.manual_seed(0)
    return timm.create_model(BACKBONE, pretrained=False, num_classes=classes)


def frozen() -> nn.Module:
    """Only the head trained: the linear probe."""
    model = stock()
    model.requires_grad_(False)
    model.get_classifier().requires_grad_(True)
    return model


def recast(name: str, last_blocks: int | None = None) -> nn.Module:
    """A named RECAST model in groups of 2 layers (one of 3 where they are odd), K = 2: coefficients and head trained.

    Args:
        name: One of `TARGETS`.
        last_blocks: Only the layers of this number of blocks, from the end; None for all.
    """
    model = frozen()
    coefficients = inject(model, mimic(model, find_groups(model, targets=TARGETS[name], last_blocks=last_blocks)))
    for parameter in coefficients.values():
        model.get_parameter(parameter).requires_grad_(True)
    return model
