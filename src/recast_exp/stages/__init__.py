"""Stages: what a command does. One module each, named as the option of `stage=`, with a preset under `conf/stage/`.

A module defines one subclass of `Stage`. Nothing heavy is imported here; a stage imports what it needs when it runs.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping

from recast_exp.config.fields import build
from recast_exp.config.schema import Config
from recast_exp.errors import UserError, section
from recast_exp.plugins import STAGES
from recast_exp.stages._base import Job, Stage

__all__ = ["INPUTS", "Job", "Stage", "from_config", "load", "names", "problems"]

INPUTS = {
    "task": "a task file (task=outputs/…/task.safetensors)",
    "path": "a folder of runs (path=multirun/…)",
    "resume": "the folder of a run",
}
"""Keys that only some stages use, and what they hold."""


def names() -> list[str]:
    """The names of all stages, sorted."""
    return STAGES.names()


def load(name: str) -> type[Stage]:
    """The class of a stage.

    Raises:
        UnknownNameError: If there is no such stage.
        UserError: If its module does not define exactly one.
    """
    with section("stage."):
        module = STAGES.load(name)
    found = [
        each
        for _, each in inspect.getmembers(module, inspect.isclass)
        if issubclass(each, Stage) and each.__module__ == module.__name__
    ]
    if len(found) != 1:
        raise UserError(f"stage.name: expected one subclass of Stage in {module.__name__}, got {len(found)}")
    return found[0]


def from_config(node: Mapping[str, object]) -> Stage:
    """A stage with its options.

    Args:
        node: The node `stage` of the configuration: `name`, and the options.

    Raises:
        UserError: If there is no such stage, or an option is unknown, of the wrong type or out of range. One line.
    """
    name = str(node["name"])
    options = {key: value for key, value in node.items() if key != "name"}
    return build(load(name), options, "stage.", f"stage={name}")


def problems(stage: Stage, settings: Config, *, multirun: bool) -> Iterator[str]:
    """What is wrong with a command of a stage. One line each."""
    name = settings.stage["name"]
    values = {"task": settings.task, "path": settings.path, "resume": settings.resume}
    for key, value in values.items():
        if key in stage.requires and not value:
            yield f"{key}: expected {INPUTS[key]} with stage={name}, got nothing"
        elif value and key not in (*stage.requires, *stage.accepts):
            if key == "resume":
                yield (
                    f"resume: expected nothing with stage={name}, got {value!r}; to go on with what is there, give the "
                    "same command again, with hydra.run.dir=FOLDER"
                )
                continue
            users = [other for other in names() if key in (*load(other).requires, *load(other).accepts)]
            meant = " or ".join([", ".join(users[:-1]), users[-1]] if len(users) > 1 else users)
            yield f"{key}: expected nothing with stage={name}, got {value!r}; did you mean stage={meant}?"
    if multirun and not stage.runs_in_sweep:
        yield f"stage: expected another one in a sweep, got {name}, which runs by itself; leave out -m"
    yield from stage.problems(settings)
