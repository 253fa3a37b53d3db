"""Optimiser, its parameter groups, and the schedule over epochs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from omegaconf import DictConfig
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

from recast_exp.models.adapted import KINDS, AdaptedModel


def make_optimizer(adapted: AdaptedModel, cfg: DictConfig) -> Optimizer:
    """One parameter group for each kind that trains, named by it; a null rate or decay is the common one."""
    groups: list[dict[str, Any]] = []
    for kind in KINDS:
        parameters = [parameter for _, parameter in adapted.parameters(kind)]
        if parameters:
            lr, decay = cfg.get(f"{kind}_lr"), cfg.get(f"{kind}_weight_decay")
            groups.append(
                {
                    "name": kind,
                    "params": parameters,
                    "lr": (cfg.lr if lr is None else lr) * (1.0 if kind == "head" else cfg.lr_scale),
                    "weight_decay": cfg.weight_decay if decay is None else decay,
                }
            )
    if cfg.name == "adamw":
        return AdamW(groups)
    if cfg.name == "adam":
        return Adam(groups)
    return SGD(groups, momentum=cfg.momentum, nesterov=cfg.nesterov)


def make_schedule(optimizer: Optimizer, cfg: DictConfig, max_epochs: int) -> LRScheduler:
    """The schedule, stepped once an epoch, after a linear warm-up where one is asked for."""
    epochs = max_epochs - cfg.warmup_epochs
    schedule: LRScheduler
    if cfg.name == "step" and cfg.adapter_step_size:
        sizes = [cfg.adapter_step_size if g["name"] == "adapter" else cfg.step_size for g in optimizer.param_groups]
        schedule = LambdaLR(optimizer, [_steps(size, cfg.gamma) for size in sizes])
    elif cfg.name == "step":
        schedule = StepLR(optimizer, cfg.step_size, cfg.gamma)
    elif cfg.name == "cosine":
        schedule = CosineAnnealingLR(optimizer, epochs)
    else:
        schedule = ConstantLR(optimizer, factor=1.0)
    if cfg.warmup_epochs:
        start = 1.0 / (cfg.warmup_epochs + 1)
        warmup = LinearLR(optimizer, start_factor=start, total_iters=cfg.warmup_epochs)
        schedule = SequentialLR(optimizer, [warmup, schedule], milestones=[cfg.warmup_epochs])
    return schedule


def _steps(size: int, gamma: float) -> Callable[[int], float]:
    def factor(epoch: int) -> float:
        return float(gamma ** (epoch // size))

    return factor


def gradient_free(parameters: list[torch.nn.Parameter]) -> None:
    """Drop the gradients of parameters, so that the optimiser leaves them and its moments of them alone."""
    for parameter in parameters:
        parameter.grad = None
