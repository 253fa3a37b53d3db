"""`hydra/sweeper=optuna`. Hydra imports this file whenever it starts, so what it needs is imported when it sweeps."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.core.plugins import Plugins
from hydra.errors import HydraException
from hydra.plugins.launcher import Launcher
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf

if TYPE_CHECKING:
    from recast_exp.runs.sweep import SearchRecord


class OptunaSweeper(Sweeper):
    """Chooses the values of each job by the results of the jobs before it.

    Args:
        settings: What conf/hydra/sweeper/optuna.yaml has.
    """

    hydra_context: HydraContext | None
    config: DictConfig | None
    launcher: Launcher | None

    def __init__(self, **settings: Any) -> None:
        self.settings = settings
        self.hydra_context = None
        self.config = None
        self.launcher = None

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """Take what Hydra gives, and make the launcher."""
        self.hydra_context = hydra_context
        self.config = config
        self.launcher = Plugins.instance().instantiate_launcher(
            hydra_context=hydra_context, task_function=task_function, config=config
        )

    def sweep(self, arguments: list[str]) -> SearchRecord:
        """Search.

        Args:
            arguments: The overrides, those of a sweep with all their values.

        Returns:
            What the finished study says of itself, as in search.json.

        Raises:
            HydraException: If the search cannot begin or go on. One line.
        """
        assert self.hydra_context is not None
        assert self.config is not None
        assert self.launcher is not None
        from recast_exp.errors import RecastError
        from recast_exp.search.run import search

        # Resolved now: the jobs make the pruner again, and have no node `hydra.sweeper`
        settings: Any = {
            name: OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value
            for name, value in self.settings.items()
        }
        whole = OmegaConf.to_container(self.config, resolve=False)
        assert isinstance(whole, dict)
        content = {str(name): value for name, value in whole.items() if name != "hydra"}
        folder = Path(self.config.hydra.sweep.dir)
        try:
            return search(
                content,
                OmegaConf.to_yaml(self.config),
                settings,
                arguments,
                folder,
                self.launcher,
                self.hydra_context.config_loader,
            )
        except RecastError as error:
            raise HydraException(str(error)) from error  # the command line shows it as it shows Hydra's own
