"""The LightningModule: one for every method, backbone and dataset."""

from __future__ import annotations

import math
from typing import Any

import lightning as L  # noqa: N812
import torch
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from torch.optim import Optimizer
from torchmetrics import CatMetric, Metric
from torchmetrics.classification import MulticlassAccuracy

from recast_exp.data.datamodule import ImageDataModule
from recast_exp.data.loader import Share
from recast_exp.errors import UserError
from recast_exp.heads import Features
from recast_exp.models.adapted import AdaptedModel
from recast_exp.models.check import cut_off
from recast_exp.models.features import tapped
from recast_exp.models.resume import Resumable
from recast_exp.models.task_file import copy_into
from recast_exp.training.metrics import make_metrics, update
from recast_exp.training.optim import gradient_free, make_optimizer, make_schedule
from recast_exp.training.recipe import Recipe

PARTS = ("train", "val", "test")


class TaskModule(L.LightningModule):
    """Trains the task parameters of an `AdaptedModel`, and evaluates the model.

    Its checkpoints hold only the task parameters: the backbone and the banks are rebuilt from their sources.
    """

    def __init__(
        self, adapted: AdaptedModel, recipe: Recipe, num_classes: int, data: ImageDataModule | None = None
    ) -> None:
        super().__init__()
        self.strict_loading = False
        self.adapted = adapted
        self.network = adapted.network
        self.recipe = recipe
        self.num_classes = num_classes
        self.objective = recipe.objective
        self.objective_state = self.objective.state()
        self._data = data
        self.resumable: Resumable | None = None
        self.metrics = nn.ModuleDict(
            {f"{part}_metrics": make_metrics(num_classes, calibration=part != "train") for part in PARTS}
        )
        self.per_class = MulticlassAccuracy(num_classes, average="none")
        self.predictions = CatMetric(nan_strategy="disable")
        self._pull_to = [
            (adapted.trainable["coefficients"][layer], start) for layer, start in adapted.start_coefficients().items()
        ]
        self.train()  # Lightning keeps the mode; in that of a new network, running statistics would change

    def forward(self, images: Tensor) -> Tensor:
        """Normalised images [N, 3, H, W], or the inputs of the block at which training starts → logits [N, classes]."""
        if self.resumable and self._data:
            return self.resumable.after(images, self._data.spec.size)
        logits: Tensor = self.network(images)
        return logits

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """The loss of the objective, plus the pull of the coefficients towards their start."""
        self.adapted.adapter.before_step(self.network)
        share = self.share("train", batch_idx)
        step = self.objective.step(self, batch[0], batch[1][: share.local], batch_idx)
        loss = step.loss
        self._measure("train", step.logits, step.labels, loss.detach())
        if share.local != share.total:
            # DDP averages the gradients of the ranks. With this factor, the result is the mean over all images of the
            # batch even if the ranks have different numbers of them.
            loss = loss * (share.local * self.trainer.world_size / share.total)
        if self.recipe.optimizer.coefficients_pull:
            loss = loss + self._pull()
        return loss * self._weight(batch_idx) if self.recipe.trainer.accumulate > 1 else loss

    def _weight(self, batch_idx: int) -> float:
        """Makes the sum of the losses of a step their mean over all its images: Lightning divides each by their number.

        The last step of an epoch may have fewer batches, and its last batch fewer images.
        """
        count = self.recipe.trainer.accumulate
        first = batch_idx - batch_idx % count
        batches = range(first, min(first + count, int(self.trainer.num_training_batches)))
        images = sum(self.share("train", each).total for each in batches)
        return self.share("train", batch_idx).total * count / images

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Measure on validation images."""
        self._evaluate("val", batch, batch_idx)

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Measure on test images: as a whole, per class, and image by image."""
        share, logits, labels = self._evaluate("test", batch, batch_idx)
        if not share.local:
            return
        self.per_class.update(logits, labels)
        probability, predicted = logits.softmax(1).max(1)
        # Rank r has every world_size-th image of a batch, starting at r; their numbers in the split restore the order
        positions = torch.arange(share.local, device=labels.device)
        numbers = share.start + self.trainer.global_rank + self.trainer.world_size * positions
        loss = F.cross_entropy(logits, labels, reduction="none")
        rows = [numbers, labels, predicted, probability, loss]
        self.predictions.update(torch.stack([row.float() for row in rows], 1))

    def share(self, part: str, batch_idx: int) -> Share:
        """This process's share of a batch of a part."""
        loader = {"train": "train_dataloader", "val": "val_dataloaders", "test": "test_dataloaders"}[part]
        share: Share = getattr(self.trainer, loader).batch_sampler.share(batch_idx)
        return share

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Parameter groups and schedule of the configuration."""
        optimizer = make_optimizer(self.adapted, self.recipe.optimizer, self.objective.trains)
        if self.objective_state is not None:
            own = {"name": "objective", "params": [*self.objective_state.parameters()]}
            optimizer.add_param_group(own | {"lr": self.objective.lr, "weight_decay": 0.0})
        schedule = make_schedule(optimizer, self.recipe.scheduler, self.recipe.trainer.max_epochs)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "epoch"}}

    def train(self, mode: bool = True) -> TaskModule:
        """Set training mode, in which running statistics do not change that are frozen, or wait for the head."""
        super().train(mode)
        self.adapted.hold_statistics(head_only=self.head_first)
        return self

    @property
    def head_first(self) -> bool:
        """Whether this epoch trains only the head."""
        return bool(self.current_epoch < self.recipe.trainer.head_first_epochs)

    def on_train_epoch_start(self) -> None:
        """Choose the parameters that train in this epoch, and let the objective prepare the model."""
        # DDP has fixed its list of gradients before training; there, gradients are dropped instead (see below)
        if self.recipe.trainer.head_first_epochs and self.trainer.world_size == 1:
            self.adapted.set_trainable(*(("head",) if self.head_first else self.objective.trains))
        if self.recipe.trainer.head_first_epochs:
            self.train()  # running statistics train from the epoch on in which the rest does
        self.objective.before_epoch(self)

    def on_validation_epoch_start(self) -> None:
        """Let the objective prepare the model, during training."""
        if self.trainer.state.fn == "fit":
            self.objective.before_validation(self)

    @torch.no_grad()
    def training_features(self) -> Features:
        """The features of all training images, as evaluation sees them, computed now.

        Needs one process: each would have its own share of the images.

        Raises:
            UserError: If they are not finite.
        """
        assert self._data is not None
        values, labels = [], []
        training = self.training
        self.eval()
        with tapped(self.network) as tap:
            for batch in self._data.plain_dataloader("train"):
                images, numbers = self.trainer.strategy.batch_to_device(batch)  # normalises them, too
                with self.trainer.precision_plugin.forward_context():
                    self(images)
                values.append(tap.take().float().cpu())
                labels.append(numbers.cpu())
        self.train(training)
        features = torch.cat(values)
        if self.global_step and not features.isfinite().all():  # before the first step, `Features` says why
            raise self.diverged("the features of the training images are not finite")
        return Features(features, torch.cat(labels), self.num_classes)

    def on_train_epoch_end(self) -> None:
        """Stop a run that has diverged, before its checkpoint replaces the last good one.

        Raises:
            UserError: If the epoch's loss is not finite.
        """
        measured = self.trainer.callback_metrics
        for name in ("train/loss", "val/loss"):
            loss = measured[name].item() if name in measured else 0.0  # not validated yet
            if not math.isfinite(loss):
                raise self.diverged(f"{name} is {loss}")

    def diverged(self, sign: str) -> UserError:
        """The error of a training that has left all bounds, by what shows it."""
        return UserError(
            f"optimizer.lr: training diverged, {sign} in epoch {self.current_epoch + 1}; lower optimizer.lr, "
            "optimizer.coefficients_lr, or another learning rate or weight decay that is set"
        )

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Drop all gradients but the head's in the epochs of the head; notice parameters that an adapter has cut off.

        Raises:
            UserError: If coefficients or parameters of the adapter have no gradient.
        """
        if not self.head_first and self.global_step == 0:
            for kind in ("coefficients", "adapter"):
                without = [name for name, parameter in self.adapted.parameters(kind) if parameter.grad is None]
                if without:
                    raise UserError(cut_off(self.adapted.adapter, kind, without, frozen=self.adapted.banks is None))
        if self.head_first:
            for group in optimizer.param_groups:
                if group["name"] != "head":
                    gradient_free(group["params"])

    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, *more: Any, **options: Any) -> None:
        """Lightning's step, then what the adapter does after it."""
        super().optimizer_step(epoch, batch_idx, optimizer, *more, **options)
        lr = next((group["lr"] for group in optimizer.param_groups if group["name"] == "adapter"), None)
        if lr is not None and not self.head_first:
            self.adapted.adapter.after_step(self.network, lr)

    def on_save_checkpoint(self, checkpoint: dict[str, object]) -> None:
        """Leave the frozen parameters out of checkpoints: 87 MB for a ViT-S, whose task parameters take a few kB."""
        checkpoint["trunk"] = self.adapted.trunk
        if self.objective_state is not None:
            checkpoint["objective"] = {
                name: tensor.clone() for name, tensor in self.objective_state.state_dict().items()
            }
        checkpoint["state_dict"] = {name: tensor.clone() for name, tensor in self.adapted.task_tensors().items()}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restore the task parameters; nothing is left for Lightning to load.

        Raises:
            UserError: If they belong to a backbone or a template bank other than this model's.
        """
        if checkpoint["trunk"] != self.adapted.trunk:
            different = [name for name, content in self.adapted.trunk.items() if checkpoint["trunk"][name] != content]
            raise UserError(
                f"resume: expected the {' and '.join(different)} that the run was started with, got different content; "
                "restore the file(s), or start the run from scratch"
            )
        copy_into(self.adapted, checkpoint["state_dict"])
        if self.objective_state is not None:
            self.objective_state.load_state_dict(checkpoint["objective"])
        checkpoint["state_dict"] = {}

    def _pull(self) -> Tensor:
        distance = torch.zeros((), device=self.device)
        for path, start in self._pull_to:
            distance = distance + (self.network.get_parameter(path) - start.to(self.device)).square().sum()
        return self.recipe.optimizer.coefficients_pull * distance

    def loss(self, logits: Tensor, labels: Tensor, label_smoothing: float = 0.0) -> Tensor:
        """Mean cross-entropy; without images, it and its gradients are 0."""
        reduction = "mean" if len(labels) else "sum"
        return F.cross_entropy(logits, labels, label_smoothing=label_smoothing, reduction=reduction)

    def _evaluate(self, part: str, batch: tuple[Tensor, Tensor], batch_idx: int) -> tuple[Share, Tensor, Tensor]:
        share = self.share(part, batch_idx)
        logits, labels = self(batch[0]).float()[: share.local], batch[1][: share.local]
        self._measure(part, logits, labels, self.loss(logits, labels))
        return share, logits, labels

    def _measure(self, part: str, logits: Tensor, labels: Tensor, loss: Tensor) -> None:
        """Update and log the metrics of a part under `part/name`; all images have the same weight.

        `History` sends them to the trackers, with the rest of an epoch's row.
        """
        metrics = self.metrics[f"{part}_metrics"]
        assert isinstance(metrics, nn.ModuleDict)
        update(metrics, logits.detach(), labels, loss)
        for name, metric in metrics.items():
            assert isinstance(metric, Metric)
            shown = name == "accuracy"
            self.log(f"{part}/{name}", metric, on_step=False, on_epoch=True, prog_bar=shown, logger=False)
