"""The environment of a run: its devices and threads, and its rank among processes."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.pytorch.utilities import rank_zero_only

from recast_exp.config.schema import TrainerConfig
from recast_exp.errors import UserError
from recast_exp.system import usable_cores


class OneProcess(LightningEnvironment):
    """The only process of a run, whatever rank the environment variables of a surrounding program give it."""

    @property
    def creates_processes_externally(self) -> bool:
        """No surrounding program starts processes of the run."""
        return False

    def world_size(self) -> int:
        """One process."""
        return 1

    def set_world_size(self, size: int) -> None:
        """Do nothing: the size stays one."""

    def global_rank(self) -> int:
        """The first."""
        return 0

    def set_global_rank(self, rank: int) -> None:
        """Do nothing: the rank stays the first."""

    def local_rank(self) -> int:
        """The first."""
        return 0

    def node_rank(self) -> int:
        """The first."""
        return 0

    def teardown(self) -> None:
        """Keep the environment variables of the surrounding program."""


@contextlib.contextmanager
def own_rank(devices: int) -> Iterator[None]:
    """Within the block, make the process of a run on one device the main process, so that Lightning and loggers write.

    Lightning reads the rank of the process from the environment when it is imported.

    Args:
        devices: Number of devices of the run; with several, the ranks are Lightning's.
    """
    if devices > 1:
        yield
        return
    holder = vars(rank_zero_only)  # a function that holds the rank as its attribute
    before = holder["rank"]
    holder["rank"] = 0
    try:
        yield
    finally:
        holder["rank"] = before


def thread_count(trainer: TrainerConfig) -> int:
    """The number of CPU threads of a run: as set, or torch's choice but at most the usable cores."""
    return trainer.num_threads or min(torch.get_num_threads(), usable_cores())


def device_name(trainer: TrainerConfig) -> str:
    """The name of the device that a run uses."""
    if trainer.accelerator in ("auto", "gpu") and torch.cuda.is_available():
        return str(torch.cuda.get_device_name())
    if trainer.accelerator in ("auto", "mps") and torch.backends.mps.is_available():
        return "mps"
    return f"cpu ({thread_count(trainer)} threads)"


def check_device(trainer: TrainerConfig) -> None:
    """Refuse a device that is not available.

    Raises:
        UserError: One line.
    """
    if trainer.accelerator == "gpu" and trainer.devices > torch.cuda.device_count():
        raise UserError(
            "trainer.accelerator: expected auto, cpu or fewer devices, got gpu with "
            f"trainer.devices={trainer.devices}, but torch finds {torch.cuda.device_count()} GPU(s)"
        )
    if trainer.precision == "16-mixed" and device_name(trainer).startswith("cpu"):
        raise UserError(
            "trainer.precision: expected 32-true or bf16-mixed on the CPU, as torch finds no other, got 16-mixed"
        )
    if trainer.accelerator == "mps" and not torch.backends.mps.is_available():
        raise UserError("trainer.accelerator: expected auto or cpu, got mps, which torch does not find")
