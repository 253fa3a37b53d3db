"""Plug-ins: modules that are found by their names, in a package of this project or through an entry point.

A module of the package whose name does not begin with an underscore is a plug-in of that name. Another distribution
adds one by an entry point, whose value is the module:

    [project.entry-points."recast_exp.adapters"]
    my_adapter = "my_package.my_adapter"

Nothing heavy is imported here; loading a plug-in imports what its module imports.
"""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import pkgutil
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

from recast_exp.errors import UnknownNameError, UserError


@dataclass(frozen=True)
class Registry:
    """The plug-ins of one kind.

    Attributes:
        kind: What they are, for messages: "adapter".
        package: The package whose modules they are.
        group: The group of entry points.
    """

    kind: str
    package: str
    group: str

    def names(self) -> list[str]:
        """The names of all plug-ins, sorted."""
        return sorted({*self._own(), *_entry_points(self.group)})

    def load(self, name: str) -> ModuleType:
        """Import the module of a plug-in.

        Raises:
            UnknownNameError: If there is no plug-in of that name.
            UserError: If the module of an entry point cannot be imported.
        """
        if name in self._own():
            return importlib.import_module(f"{self.package}.{name}")
        if name not in (found := _entry_points(self.group)):
            raise UnknownNameError(f"name: expected one of {', '.join(self.names())}, got {name!r}")
        try:
            module = found[name].load()
        except (Exception, SystemExit) as error:  # of somebody else's code
            reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
            raise UserError(
                f"name: the {self.kind} {name} of {found[name].value} cannot be imported ({reason})"
            ) from error
        if not isinstance(module, ModuleType):
            raise UserError(f"name: expected the entry point of the {self.kind} {name} to be a module, got {module!r}")
        return module

    def _own(self) -> list[str]:
        return [found.name for found in pkgutil.iter_modules(self._path()) if not found.name.startswith("_")]

    def _path(self) -> list[str]:
        """The folders of the package, which is not imported for it: some packages import torch."""
        if self.package in sys.modules:
            return list(sys.modules[self.package].__path__)
        root, _, below = self.package.partition(".")
        return [str(Path(folder, *below.split("."))) for folder in sys.modules[root].__path__]


ADAPTERS = Registry("adapter", "recast_exp.adapters", "recast_exp.adapters")
DATASETS = Registry("dataset", "recast_exp.data.sets", "recast_exp.datasets")
HEADS = Registry("head", "recast_exp.heads", "recast_exp.heads")
OBJECTIVES = Registry("objective", "recast_exp.training.objectives", "recast_exp.objectives")
SOLVERS = Registry("solver", "recast_exp.recast.solvers", "recast_exp.solvers")
TEMPLATES = Registry("kind of templates", "recast_exp.recast.templates", "recast_exp.templates")
STAGES = Registry("stage", "recast_exp.stages", "recast_exp.stages")
TRACKERS = Registry("tracker", "recast_exp.tracking.trackers", "recast_exp.trackers")


@functools.cache
def _entry_points(group: str) -> dict[str, importlib.metadata.EntryPoint]:
    return {point.name: point for point in importlib.metadata.entry_points(group=group)}
