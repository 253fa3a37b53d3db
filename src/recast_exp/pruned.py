"""The end of a trial that its search has given up: neither a result nor a failure. Nothing heavy is imported."""

from __future__ import annotations


class Pruned(Exception):  # noqa: N818 - nothing went wrong
    """Training was stopped by the search that the job is a trial of. One line."""

    def __init__(self, epoch: int, epochs: int, accuracy: float) -> None:
        super().__init__(epoch, epochs, accuracy)  # so that it can be pickled
        self.epoch = epoch
        self.epochs = epochs
        self.accuracy = accuracy

    def __str__(self) -> str:
        return f"pruned after epoch {self.epoch} of {self.epochs} at {100 * self.accuracy:.1f} % validation accuracy"
