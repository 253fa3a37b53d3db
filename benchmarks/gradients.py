"""What the images ask of the coefficients before these are trained: how steep the loss is, and whether images agree.

A linear probe is trained and its head put on a RECAST model, whose coefficients are still the mimicked ones. Then the
gradient of the loss along the coefficients is taken for each image by itself: g on training images, h on test images.

- slope: length of the mean gradient, |ḡ| and |h̄|; loss for each unit that the coefficients move;
- agreement: mean of gᵢ·gₖ over all pairs of images i ≠ k, over the mean of gᵢ·gᵢ: 1 if all ask for the same change,
  0 if each asks for its own;
- carried over: ḡ·h̄ / |ḡ|, how steeply the loss of the test images falls where that of the training images falls most.

Example: python benchmarks/gradients.py dataset=digits --models vit_att vit_mlp --seeds 42 1998 3142592
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import logging
import statistics
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from recast_exp.config.compose import Composer
from recast_exp.config.grammar import rewrite
from recast_exp.config.schema import Config, typed
from recast_exp.experiment.experiment import Experiment
from recast_exp.models.adapted import AdaptedModel
from recast_exp.training.loop import fit

MEASURES = ("train loss", "test loss", "train slope", "test slope", "agreement", "carried over")


def configured(texts: list[str]) -> Config:
    """The settings of one run; of an experiment that is a comparison, the data, backbone and recipe."""
    return typed(Composer().compose(rewrite(texts, multirun=False)).cfg)


def probe_head(settings: Config) -> dict[str, Tensor]:
    """The head of a linear probe, trained as the settings say."""
    model = dataclasses.replace(settings.model, method="frozen")
    experiment = Experiment.open(dataclasses.replace(settings, model=model, adapter={"name": "none"}))
    adapted = experiment.adapt(None)
    fit(experiment.recipe, adapted, experiment.data(keep=True), description="linear probe")
    return {name: parameter.detach() for name, parameter in adapted.parameters("head")}


def with_head(experiment: Experiment, head: dict[str, Tensor]) -> AdaptedModel:
    """The RECAST model with a given head, ready for gradients along the coefficients."""
    adapted = experiment.adapt(experiment.banks()[0])
    for name, parameter in adapted.parameters("head"):
        parameter.data.copy_(head[name])
    adapted.set_trainable("coefficients")
    adapted.network.eval()
    return adapted


def gradients(network: nn.Module, coefficients: list[Tensor], images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Losses [N] and their gradients [N, coefficients], an image at a time."""
    losses, found = [], []
    for image, label in zip(images, labels, strict=True):
        loss = F.cross_entropy(network(image[None]), label[None])
        found.append(torch.cat([each.flatten() for each in torch.autograd.grad(loss, coefficients)]))
        losses.append(loss.detach())
    return torch.stack(losses), torch.stack(found)


def measure(settings: Config, head: dict[str, Tensor]) -> dict[str, float]:
    """The measures of one model: its training images as the first epoch augments them, and the test images."""
    experiment = Experiment.open(settings)
    adapted, data = with_head(experiment, head), experiment.data(keep=True)
    coefficients = [parameter for _, parameter in adapted.parameters("coefficients")]
    seen, labels = data.example(len(data.datasets["train"]))
    train_loss, g = gradients(adapted.network, coefficients, data.normalize(seen), labels)
    batches = [data.on_after_batch_transfer(batch, 0) for batch in data.test_dataloader()]
    unseen, labels = (torch.cat(parts) for parts in zip(*batches, strict=True))
    test_loss, h = gradients(adapted.network, coefficients, unseen, labels)
    return {"train loss": train_loss.mean().item(), "test loss": test_loss.mean().item(), **compare(g, h)}


def compare(g: Tensor, h: Tensor) -> dict[str, float]:
    """Slopes, agreement and what is carried over, of gradients [N, n] of training and [M, n] of test images."""
    down, up, count = g.mean(0), h.mean(0), len(g)
    pairs = (g.sum(0).square().sum() - g.square().sum()) / (count * (count - 1))
    return {
        "train slope": down.norm().item(),
        "test slope": up.norm().item(),
        "agreement": (pairs / g.square().sum(1).mean()).item(),
        "carried over": (down @ up / down.norm()).item(),
    }


def table(measured: dict[str, list[dict[str, float]]]) -> Table:
    """Mean and standard deviation over the seeds."""
    shown = Table(title="gradients along the coefficients, before they are trained")
    for name in ("model", *MEASURES):
        shown.add_column(name, justify="left" if name == "model" else "right")
    for model, rows in measured.items():
        cells = []
        for name in MEASURES:
            values = [row[name] for row in rows]
            spread = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
            cells.append(f"{statistics.mean(values):.3f}{spread}")
        shown.add_row(model, *cells)
    return shown


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", help="as for recast_exp: dataset=digits")
    parser.add_argument("--models", nargs="+", default=["vit_att", "vit_mlp"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[42, 1998, 3142592])
    parser.add_argument("--json", type=Path, help="write the measures of each seed to this file")
    args = parser.parse_args()
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    measured: dict[str, list[dict[str, float]]] = {model: [] for model in args.models}
    for seed in args.seeds:
        head: dict[str, Tensor] = {}
        for model in args.models:
            settings = configured([*args.overrides, f"model={model}", f"seed={seed}"])
            head = head or probe_head(settings)
            measured[model].append(measure(settings, head))
    Console().print(table(measured))
    if args.json:
        args.json.write_text(json.dumps(measured, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
