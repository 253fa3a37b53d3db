"""A trial's side of a search: reports each epoch to the study, and stops when its pruner says so."""

from __future__ import annotations

from typing import TYPE_CHECKING

import lightning as L  # noqa: N812
from lightning.pytorch.callbacks import Callback

from recast_exp.config.schema import SearchConfig
from recast_exp.errors import Pruned

if TYPE_CHECKING:
    from optuna.trial import Trial


class Pruning(Callback):
    """Reports the validation accuracy of each epoch to a trial.

    Training ends in order, with its checkpoint and its row in metrics.csv, and `check` says afterwards that it did.
    Optuna's own callback for Lightning raises within the epoch instead, before either is written.

    Args:
        trial: A running trial.
    """

    def __init__(self, trial: Trial) -> None:
        self._trial = trial
        self.epoch = 0
        self.accuracy = 0.0

    @classmethod
    def of(cls, search: SearchConfig) -> Pruning | None:
        """That of a job's configuration; None where it is no trial of a search, or of one that has ended it.

        Raises:
            UserError: If the search's storage is not there, or has no such trial.
        """
        if search.storage is None or search.trial is None:
            return None
        from recast_exp.search.study import load_trial  # an extra, which other runs do without

        trial = load_trial(search.storage, search.trial)
        return None if trial is None else cls(trial)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Stop again, if the run was killed between the decision and its end."""
        if self.epoch:
            trainer.should_stop = True

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Report, and stop if need be. The last epoch ends by itself: there is nothing left to save."""
        if (trainer.current_epoch + 1) % (trainer.check_val_every_n_epoch or 1):
            return
        epoch, accuracy = trainer.current_epoch + 1, trainer.callback_metrics["val/accuracy"].item()
        storage, number = self._trial.storage, self._trial._trial_id
        reported = storage.get_trial(number).intermediate_values
        if epoch not in reported:  # a run that goes on from a checkpoint may see an epoch again
            self._trial.report(accuracy, epoch)
        newest = max([epoch, *reported])
        if epoch == newest and epoch < (trainer.max_epochs or 0) and self._trial.should_prune():
            self.epoch, self.accuracy = epoch, accuracy
            trainer.should_stop = True

    def check(self, epochs: int) -> None:
        """Say that the trial was pruned, if it was.

        Raises:
            Pruned: If it was.
        """
        if self.epoch:
            raise Pruned(self.epoch, epochs, self.accuracy)

    def state_dict(self) -> dict[str, float]:
        """What a checkpoint keeps."""
        return {"epoch": self.epoch, "accuracy": self.accuracy}

    def load_state_dict(self, state_dict: dict[str, float]) -> None:
        """Continue from a checkpoint."""
        self.epoch, self.accuracy = int(state_dict["epoch"]), state_dict["accuracy"]
