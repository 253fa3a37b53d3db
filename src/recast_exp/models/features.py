"""The features of a model: the inputs of its classifier, whatever the architecture computes before it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from recast_exp.errors import UserError
from recast_exp.heads import Solution


class Tap:
    """Holds what last went into the classifier."""

    def __init__(self) -> None:
        self.features: Tensor | None = None

    def take(self) -> Tensor:
        """The features [N, D] of the images of the last forward pass, with their gradients."""
        assert self.features is not None, "no forward pass has reached the classifier"
        features, self.features = self.features, None
        return features


def classifier(network: nn.Module) -> nn.Module:
    """The one module that a timm model classifies with: a Linear, or an Identity where it has no classes.

    Raises:
        UserError: If it has another classifier, which a solved weight and bias cannot replace.
    """
    get_classifier = getattr(network, "get_classifier", None)
    found = get_classifier() if get_classifier is not None else None
    if not isinstance(found, nn.Linear | nn.Identity):
        several = isinstance(found, tuple | list)
        kind = "none" if found is None else f"{len(found)}" if several else f"a {type(found).__name__}"
        raise UserError(
            f"model.backbone: expected a model with one linear classifier for a solved head, got {kind} in "
            f"{type(network).__name__}; train the head (training=joint head=linear probe=false), or use another "
            "backbone"
        )
    return found


@contextlib.contextmanager
def tapped(network: nn.Module) -> Iterator[Tap]:
    """Note what goes into the classifier of a model, within the block.

    Raises:
        UserError: If the model has no single linear classifier.
    """
    tap = Tap()

    def note(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        tap.features = inputs[0]

    handle = classifier(network).register_forward_pre_hook(note)
    try:
        yield tap
    finally:
        handle.remove()


@contextlib.contextmanager
def full_precision(network: nn.Module) -> Iterator[None]:
    """Within the block, the classifier of a model computes in the precision of its weights, whatever autocast says.

    A solved head may take the difference of large numbers: bfloat16, which keeps three digits, has been seen to bring
    93 % of images that are classified right down to chance. A model with another classifier stays as it is.
    """
    get_classifier = getattr(network, "get_classifier", None)
    linear = get_classifier() if get_classifier is not None else None
    if not isinstance(linear, nn.Linear):
        yield
        return

    def forward(features: Tensor) -> Tensor:
        with torch.autocast(features.device.type, enabled=False):
            return F.linear(features.to(linear.weight.dtype), linear.weight, linear.bias)

    vars(linear)["forward"] = forward  # an instance's attribute, which hides the method of its class
    try:
        yield
    finally:
        vars(linear).pop("forward", None)


def classified(head: nn.Module, features: Tensor) -> Tensor:
    """Features [N, D] → logits, in the precision of the weights of the head, as `full_precision` has it."""
    logits: Tensor
    if isinstance(head, nn.Linear) and torch.is_autocast_enabled(features.device.type):
        with torch.autocast(features.device.type, enabled=False):
            logits = head(features.to(head.weight.dtype))
    else:
        logits = head(features)
    return logits


def head_of(network: nn.Module) -> Solution:
    """The classifier of a model as it is.

    Raises:
        UserError: If the model has no linear classifier.
    """
    weight, bias = _parameters(network)
    return Solution(weight.detach().cpu().double(), bias.detach().cpu().double())


@torch.no_grad()
def set_head(network: nn.Module, solution: Solution) -> None:
    """Make a solved head the classifier of a model.

    Args:
        network: A timm model with one linear classifier.
        solution: Weight [C, D] and bias [C].

    Raises:
        UserError: If the model has no such classifier.
    """
    weight, bias = _parameters(network)
    weight.copy_(solution.weight)
    bias.copy_(solution.bias)


def _parameters(network: nn.Module) -> tuple[Tensor, Tensor]:
    linear = classifier(network)
    if not isinstance(linear, nn.Linear) or linear.bias is None:
        raise UserError(f"head: expected a linear classifier with a bias, got that of {type(network).__name__}")
    return linear.weight, linear.bias
