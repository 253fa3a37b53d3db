"""Matching: templates and coefficients of all groups, descended together until a model does what another one does.

The closed forms of `solvers/calibrated.py` fit one group after the other. What is left is minimised for all at once, by
gradients through the whole model, for batches x of unlabelled images, with the features f and the layers' outputs y[l]
of the pretrained model and those of the one with templates, f̂ and ŷ[l]:

    ‖f(x) - f̂(x)‖² / ‖f(x) - E f(x)‖²  +  1/L · Σ_l ‖y[l](x) - ŷ[l](x)‖² / ‖y[l](x)‖²

Each batch mixes and mirrors images at random. Both models see the same, so it does not matter what a mixture shows:
a few images become as many as there are steps. It is the function matching of Beyer et al. (CVPR 2022, "Knowledge
distillation: A good teacher is patient and consistent", arXiv 2106.05237).
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.func import functional_call

from recast_exp.recast.formulas import Mimicked, combine

log = logging.getLogger(__name__)

BATCH = 16
TRIES = 3


def match(
    network: nn.Module,
    groups: Sequence[tuple[Sequence[str], Mimicked]],
    images: Tensor,
    *,
    steps: int,
    lr: float,
    seed: int,
    progress: Callable[[], None] = lambda: None,
) -> list[Mimicked]:
    """Descend from where templates and coefficients stand.

    Args:
        network: The pretrained model in evaluation mode, float32.
        groups: The layers of each group, and where their templates and coefficients start.
        images: Preprocessed images [N, 3, H, W], float32.
        steps: Number of steps of Adam, of 16 images each; the learning rate falls to 0 with the cosine.
        lr: The first learning rate. If the images themselves are no nearer in the end, a third of it is tried, then a
            ninth: what is near already needs small steps.
        seed: Seed of the batches.
        progress: Called after each step of the first try.

    Returns:
        For each group, its templates and coefficients: as they were, if no try has come nearer.
    """
    original = copy.deepcopy(network).requires_grad_(False)
    layers = [layer for names, _ in groups for layer in names]
    teacher, student = _Watched(original, layers), _Watched(copy.deepcopy(original), layers)

    def distance(state: Sequence[Mimicked], batch: Tensor) -> Tensor:
        with torch.no_grad():
            expected = teacher(batch)
        weights = {
            f"network.{layer}.weight": combine(own, each.templates)
            for (names, _), each in zip(groups, state, strict=True)
            for layer, own in zip(names, each.coefficients, strict=True)
        }
        return _distance(functional_call(student, weights, (batch,)), expected)

    def on_images(state: Sequence[Mimicked]) -> float:
        with torch.no_grad():
            return sum(float(distance(state, each)) for each in torch.split(images[: 4 * BATCH], BATCH))

    start = [_one_set(each, images.device) for _, each in groups]
    before = on_images(start)
    for number in range(TRIES):
        found = _descended(start, distance, images, steps, lr / 3**number, seed, progress if number == 0 else _nothing)
        if on_images(found) < before:
            return [
                Mimicked(
                    each.templates.to(given.templates),
                    each.coefficients.to(given.coefficients).expand(given.coefficients.shape).clone(),
                )
                for (_, given), each in zip(groups, found, strict=True)
            ]
        log.info("Matching with a learning rate of %g comes no nearer", lr / 3**number)
    return [given for _, given in groups]


def _descended(
    start: Sequence[Mimicked],
    distance: Callable[[Sequence[Mimicked], Tensor], Tensor],
    images: Tensor,
    steps: int,
    lr: float,
    seed: int,
    progress: Callable[[], None],
) -> list[Mimicked]:
    """Where the steps lead to."""
    state = [Mimicked(*(tensor.clone().requires_grad_() for tensor in each)) for each in start]
    parameters = [tensor for each in state for tensor in each]
    optimizer = torch.optim.Adam(parameters, lr=lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        with torch.enable_grad():
            gradients = torch.autograd.grad(distance(state, _batch(images, generator)), parameters)
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient
        optimizer.step()
        schedule.step()
        progress()
    return [Mimicked(*(tensor.detach() for tensor in each)) for each in state]


def _one_set(given: Mimicked, device: torch.device) -> Mimicked:
    """Templates, and coefficients [L, 1, B, n] of a single set, float32."""
    mean = given.coefficients.mean(1, keepdim=True)
    return Mimicked(*(tensor.to(device, torch.float32) for tensor in (given.templates, mean)))


def _nothing() -> None:
    """No progress is shown."""


class _Watched(nn.Module):
    """A model whose call returns its features, and the outputs of some of its layers."""

    def __init__(self, network: nn.Module, layers: Sequence[str]) -> None:
        super().__init__()
        self.network = network
        self._outputs: dict[str, Tensor] = {}
        for layer in layers:
            network.get_submodule(layer).register_forward_hook(self._keep(layer))

    def _keep(self, layer: str) -> Callable[[nn.Module, object, Tensor], None]:
        def hook(module: nn.Module, inputs: object, output: Tensor) -> None:
            self._outputs[layer] = output

        return hook

    def forward(self, images: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        self._outputs = {}
        # Of timm, before they are pooled: each position counts
        features = getattr(self.network, "forward_features", self.network)(images)
        return features, self._outputs


def _distance(found: tuple[Tensor, dict[str, Tensor]], expected: tuple[Tensor, dict[str, Tensor]]) -> Tensor:
    (features, outputs), (own, theirs) = found, expected
    of_features = (features - own).square().sum() / (own - own.mean(0)).square().sum().clamp_min(1e-30)
    of_layers = [
        (outputs[layer] - output).square().sum() / output.square().sum().clamp_min(1e-30)
        for layer, output in theirs.items()
    ]
    return of_features + sum(of_layers, torch.zeros_like(of_features)) / max(1, len(of_layers))


def _batch(images: Tensor, generator: torch.Generator) -> Tensor:
    """Mixtures of two images each, some of them mirrored: [16, 3, H, W]."""
    first, second = torch.randint(len(images), (2, BATCH), generator=generator).to(images.device)
    share, mirrored = torch.rand(2, BATCH, 1, 1, 1, generator=generator).to(images.device)
    mixed = share * images[first] + (1 - share) * images[second]
    return torch.where(mirrored < 0.5, mixed, mixed.flip(-1))
