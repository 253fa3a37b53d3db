"""The models that the benchmarks compare: stock timm ViT-S/16 and RECAST on it, with random weights."""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Callable
from dataclasses import dataclass

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


@dataclass(frozen=True)
class Setting:
    """Where and how models are run: `--device`, `--bf16`, `--compile`."""

    device: str = "cpu"
    bf16: bool = False
    compile: bool = False

    @classmethod
    def of(cls, args: argparse.Namespace) -> Setting:
        """What was asked for; models and tensors are made on the device from here on."""
        torch.set_default_device(args.device)
        if args.device != "cpu":
            torch.zeros(1)  # the device's own start is not timed
        return cls(args.device, args.bf16, args.compile)

    def autocast(self) -> contextlib.AbstractContextManager[object]:
        """bfloat16 where it was asked for."""
        return torch.autocast(self.device, torch.bfloat16) if self.bf16 else contextlib.nullcontext()

    def compiled(self, function: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        """A model or function, compiled where that was asked for."""
        return torch.compile(function) if self.compile else function

    def __str__(self) -> str:
        words = [self.device, "bfloat16" if self.bf16 else "float32", *(["compiled"] if self.compile else [])]
        return ", ".join(words)


def add_setting(parser: argparse.ArgumentParser) -> None:
    """Add the options of `Setting`."""
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default: %(default)s)")
    parser.add_argument("--bf16", action="store_true", help="autocast to bfloat16")
    parser.add_argument("--compile", action="store_true", help="torch.compile")


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
