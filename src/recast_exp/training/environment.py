"""What surrounds a run: the devices and threads that it computes on, and its rank among processes."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.pytorch.utilities import rank_zero_only

from recast_exp.config.schema import TrainerConfig
from recast_exp.errors import UserError
from recast_exp.system import usable_cores


class OneProcess(LightningEnvironment):
    """The first and only process of a run, whatever ranks the environment variables of a program around it give."""

    @property
    def creates_processes_externally(self) -> bool:
        """Nothing around the run starts processes of it."""
        return False

    def world_size(self) -> int:
        """One process."""
        return 1

    def set_world_size(self, size: int) -> None:
        """Stays one."""

    def global_rank(self) -> int:
        """The first."""
        return 0

    def set_global_rank(self, rank: int) -> None:
        """Stays the first."""

    def local_rank(self) -> int:
        """The first."""
        return 0

    def node_rank(self) -> int:
        """The first."""
        return 0

    def teardown(self) -> None:
        """Leave the environment variables of the program around the run alone."""


@contextlib.contextmanager
def own_rank(devices: int) -> Iterator[None]:
    """Let Lightning and its loggers write in the block, where a run on one device is its own main process.

    Lightning takes the rank of a process from the environment when it is imported.

    Args:
        devices: Number of devices of the run; with several, the ranks are Lightning's.
    """
    if devices > 1:
        yield
        return
    holder: Any = rank_zero_only  # a function that holds the rank as its attribute
    before = holder.rank
    holder.rank = 0
    try:
        yield
    finally:
        holder.rank = before


def thread_count(trainer: TrainerConfig) -> int:
    """The CPU threads that a run computes on: those that are asked for, or torch's choice within the usable cores."""
    return trainer.num_threads or min(torch.get_num_threads(), usable_cores())


def device_name(trainer: TrainerConfig) -> str:
    """The device that a run uses, in words."""
    if trainer.accelerator in ("auto", "gpu") and torch.cuda.is_available():
        return str(torch.cuda.get_device_name())
    if trainer.accelerator in ("auto", "mps") and torch.backends.mps.is_available():
        return "mps"
    return f"cpu ({thread_count(trainer)} threads)"


def check_device(trainer: TrainerConfig) -> None:
    """Refuse a device that is not there.

    Raises:
        UserError: One line.
    """
    if trainer.accelerator == "gpu" and trainer.devices > torch.cuda.device_count():
        raise UserError(
            f"trainer.accelerator: got gpu with trainer.devices={trainer.devices}, but torch finds "
            f"{torch.cuda.device_count()} here; takes auto or cpu, or fewer devices"
        )
    if trainer.accelerator == "mps" and not torch.backends.mps.is_available():
        raise UserError("trainer.accelerator: got mps, but torch finds none here; takes auto or cpu")
