"""The LightningModule: one for every method, backbone and dataset."""

from __future__ import annotations

import math
from typing import Any

import lightning as L  # noqa: N812
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from torch.optim import Optimizer
from torchmetrics import CatMetric, MeanMetric, Metric
from torchmetrics.classification import MulticlassAccuracy

from recast_exp.data.loader import Share
from recast_exp.errors import UserError
from recast_exp.models.adapted import KINDS, AdaptedModel, normalisations_with_statistics
from recast_exp.models.task_file import apply_task
from recast_exp.training.optim import gradient_free, make_optimizer, make_schedule
from recast_exp.training.recipe import Recipe

TOP_K = 5  # reported where there are more classes than that


class TaskModule(L.LightningModule):
    """Trains the task's numbers of an `AdaptedModel` and measures them.

    Its checkpoints hold those numbers alone: the backbone and the banks are rebuilt from where they came.
    """

    def __init__(self, adapted: AdaptedModel, recipe: Recipe, num_classes: int) -> None:
        super().__init__()
        self.strict_loading = False
        self.adapted = adapted
        self.network = adapted.network
        self.recipe = recipe
        self.metrics = nn.ModuleDict({f"{part}_metrics": _metrics(num_classes) for part in ("train", "val", "test")})
        self.per_class = MulticlassAccuracy(num_classes, average="none")
        self.predictions = CatMetric(nan_strategy="disable")
        self._pull_to = [
            (adapted.trainable["coefficients"][layer], start) for layer, start in adapted.start_coefficients().items()
        ]
        self.train()  # Lightning leaves the mode as it finds it, and a new network's statistics would move

    def forward(self, images: Tensor) -> Tensor:
        """Normalised images [N, 3, H, W] → logits [N, classes]."""
        logits: Tensor = self.network(images)
        return logits

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Cross-entropy, plus the pull of the coefficients to where they started."""
        share = self.share("train", batch_idx)
        logits, labels = self(batch[0])[: share.own], batch[1][: share.own]
        loss = self._loss(logits.float(), labels, label_smoothing=self.recipe.optimizer.label_smoothing)
        self._measure("train", logits, labels, loss.detach())
        if share.own != share.total:
            # DDP takes the mean of the ranks' gradients. This way it is that of all images of the batch, where ranks
            # have not equally many.
            loss = loss * (share.own * self.trainer.world_size / share.total)
        return loss + self._pull() if self.recipe.optimizer.coefficients_pull else loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Measure on validation images."""
        self._evaluate("val", batch, batch_idx)

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Measure on test images, per class and image by image too."""
        share, logits, labels = self._evaluate("test", batch, batch_idx)
        if not share.own:
            return
        self.per_class.update(logits, labels)
        probability, predicted = logits.softmax(1).max(1)
        # A rank has every so-manieth image of a batch: gathered by ranks, their numbers tell the order
        own = torch.arange(share.own, device=labels.device)
        numbers = share.start + self.trainer.global_rank + self.trainer.world_size * own
        loss = F.cross_entropy(logits, labels, reduction="none")
        rows = [numbers, labels, predicted, probability, loss]
        self.predictions.update(torch.stack([row.float() for row in rows], 1))

    def share(self, part: str, batch_idx: int) -> Share:
        """What this process has of a batch of a part, which all processes share."""
        loader = {"train": "train_dataloader", "val": "val_dataloaders", "test": "test_dataloaders"}[part]
        found: Share = getattr(self.trainer, loader).batch_sampler.share(batch_idx)
        return found

    def configure_optimizers(self) -> Any:
        """Parameter groups and schedule of the configuration."""
        optimizer = make_optimizer(self.adapted, self.recipe.optimizer)
        schedule = make_schedule(optimizer, self.recipe.scheduler, self.recipe.trainer.max_epochs)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "epoch"}}

    def train(self, mode: bool = True) -> TaskModule:
        """Training mode, in which the frozen trunk's running statistics stay put."""
        super().train(mode)
        if not self.adapted.buffers:
            for _, module in normalisations_with_statistics(self.network):
                module.eval()
        return self

    @property
    def head_first(self) -> bool:
        """Whether this epoch trains the head alone."""
        return bool(self.current_epoch < self.recipe.trainer.head_first_epochs)

    def on_train_epoch_start(self) -> None:
        """Decide what trains in this epoch."""
        # DDP has fixed what it reduces before training; there the gradients are dropped instead (below).
        if self.recipe.trainer.head_first_epochs and self.trainer.world_size == 1:
            self.adapted.set_trainable(*(("head",) if self.head_first else KINDS))

    def on_train_epoch_end(self) -> None:
        """Stop a run that has diverged, before its checkpoint replaces the last good one.

        Raises:
            UserError: If the epoch's loss is not finite.
        """
        for name in ("train/loss", "val/loss"):
            loss = self.trainer.callback_metrics[name].item()
            if not math.isfinite(loss):
                raise UserError(
                    f"optimizer.lr: training diverged, {name} is {loss} in epoch {self.current_epoch + 1}; lower "
                    "optimizer.lr, optimizer.coefficients_lr or the rate of whatever else trains"
                )

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Keep everything but the head still in the head's epochs; notice what an adapter has cut off.

        Raises:
            UserError: If coefficients or numbers of the adapter have no gradient.
        """
        if not self.head_first and self.global_step == 0:
            for kind in ("coefficients", "adapter"):
                without = [name for name, parameter in self.adapted.parameters(kind) if parameter.grad is None]
                if without:
                    raise UserError(
                        f"adapter: with {self.adapted.adapter.name}, {len(without)} of the {kind} get no gradient "
                        f"(such as {without[0]}); use it on a frozen model (model=vit_frozen), or another method"
                    )
        if self.head_first:
            for group in optimizer.param_groups:
                if group["name"] != "head":
                    gradient_free(group["params"])

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Leave the frozen numbers out of checkpoints: 87 MB for a ViT-S, of which a task has a few kB."""
        checkpoint["trunk"] = self.adapted.trunk
        checkpoint["state_dict"] = {name: tensor.clone() for name, tensor in self.adapted.task_tensors().items()}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Put the task's numbers back; Lightning is left nothing to load.

        Raises:
            UserError: If they belong to other weights or another template bank than this model's.
        """
        if checkpoint["trunk"] != self.adapted.trunk:
            different = [name for name, content in self.adapted.trunk.items() if checkpoint["trunk"][name] != content]
            raise UserError(
                f"resume: the run was started with another {' and '.join(different)} than is found now; put the old "
                "file back, or start the run anew"
            )
        apply_task(self.adapted, checkpoint["state_dict"])
        checkpoint["state_dict"] = {}

    def _pull(self) -> Tensor:
        distance = torch.zeros((), device=self.device)
        for path, start in self._pull_to:
            distance = distance + (self.network.get_parameter(path) - start.to(self.device)).square().sum()
        return self.recipe.optimizer.coefficients_pull * distance

    def _loss(self, logits: Tensor, labels: Tensor, label_smoothing: float = 0.0) -> Tensor:
        """Mean cross-entropy; of no images it is 0, and so are its gradients."""
        reduction = "mean" if len(labels) else "sum"
        return F.cross_entropy(logits, labels, label_smoothing=label_smoothing, reduction=reduction)

    def _evaluate(self, part: str, batch: tuple[Tensor, Tensor], batch_idx: int) -> tuple[Share, Tensor, Tensor]:
        share = self.share(part, batch_idx)
        logits, labels = self(batch[0]).float()[: share.own], batch[1][: share.own]
        self._measure(part, logits, labels, self._loss(logits, labels))
        return share, logits, labels

    def _measure(self, part: str, logits: Tensor, labels: Tensor, loss: Tensor) -> None:
        """Update and log the metrics of a part under `part/name`; each image counts the same.

        `History` sends them to the trackers, with the rest of an epoch's row.
        """
        metrics = self.metrics[f"{part}_metrics"]
        assert isinstance(metrics, nn.ModuleDict)
        for name, metric in metrics.items():
            assert isinstance(metric, Metric)
            if name == "loss":
                metric.update(loss, weight=len(labels))
            elif len(labels):
                metric.update(logits.detach(), labels)
            shown = name == "accuracy"
            self.log(f"{part}/{name}", metric, on_step=False, on_epoch=True, prog_bar=shown, logger=False)


def _metrics(num_classes: int) -> nn.ModuleDict:
    metrics: dict[str, Metric] = {
        "loss": MeanMetric(),
        "accuracy": MulticlassAccuracy(num_classes, average="micro"),
    }
    if num_classes > TOP_K:
        metrics["accuracy_top5"] = MulticlassAccuracy(num_classes, average="micro", top_k=TOP_K)
    return nn.ModuleDict(metrics)
