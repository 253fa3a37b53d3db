"""Optimiser, its parameter groups, and the schedule over epochs."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch.optim import SGD, Adam, AdamW, Optimizer
from torch.optim.lr_scheduler import (
    ConstantLR,
    CosineAnnealingLR,
    LambdaLR,
    LinearLR,
    LRScheduler,
    SequentialLR,
    StepLR,
)

from recast_exp.config.schema import OptimizerConfig, SchedulerConfig
from recast_exp.models.adapted import KINDS, AdaptedModel


def make_optimizer(adapted: AdaptedModel, options: OptimizerConfig, kinds: Sequence[str] = KINDS) -> Optimizer:
    """One parameter group for each of the kinds, named after it; options that are null take the common value."""
    options_of = {
        "coefficients": (options.coefficients_lr, options.coefficients_weight_decay),
        "adapter": (options.adapter_lr, options.adapter_weight_decay),
        "backbone": (options.backbone_lr, options.backbone_weight_decay),
        "head": (None, options.head_weight_decay),
    }
    groups: list[dict[str, object]] = []
    for kind in kinds:
        parameters = [parameter for _, parameter in adapted.parameters(kind)]
        if parameters:
            lr, decay = options_of[kind]
            groups.append(
                {
                    "name": kind,
                    "params": parameters,
                    "lr": (options.lr if lr is None else lr) * (1.0 if kind == "head" else options.lr_scale),
                    "weight_decay": options.weight_decay if decay is None else decay,
                }
            )
    if options.name == "adamw":
        return AdamW(groups)
    if options.name == "adam":
        return Adam(groups)
    return SGD(groups, momentum=options.momentum, nesterov=options.nesterov)


def make_schedule(optimizer: Optimizer, options: SchedulerConfig, max_epochs: int) -> LRScheduler:
    """The schedule, stepped once an epoch, after the linear warm-up if there is one."""
    epochs = max_epochs - options.warmup_epochs
    schedule: LRScheduler
    if options.name == "step" and options.adapter_step_size:
        names = [group["name"] for group in optimizer.param_groups]
        sizes = [options.adapter_step_size if name == "adapter" else options.step_size for name in names]
        schedule = LambdaLR(optimizer, [_steps(size, options.gamma) for size in sizes])
    elif options.name == "step":
        schedule = StepLR(optimizer, options.step_size, options.gamma)
    elif options.name == "cosine":
        schedule = CosineAnnealingLR(optimizer, epochs)
    else:
        schedule = ConstantLR(optimizer, factor=1.0)
    if options.warmup_epochs:
        start = 1.0 / (options.warmup_epochs + 1)
        warmup = LinearLR(optimizer, start_factor=start, total_iters=options.warmup_epochs)
        schedule = SequentialLR(optimizer, [warmup, schedule], milestones=[options.warmup_epochs])
    return schedule


def _steps(size: int, gamma: float) -> Callable[[int], float]:
    def factor(epoch: int) -> float:
        return float(gamma ** (epoch // size))

    return factor


def gradient_free(parameters: list[torch.nn.Parameter]) -> None:
    """Drop the gradients of parameters, so that the optimiser changes neither them nor its moments of them."""
    for parameter in parameters:
        parameter.grad = None
