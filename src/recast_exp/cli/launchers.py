"""What starts the jobs of a sweep: the options of `launcher=`, what they need, and what they say when they lose a job.

How a job in another process ended is known from what it writes (`job_record`). Imports nothing heavy.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess

from hydra.core.override_parser.types import Override

PLUGINS = {"joblib": "hydra_joblib_launcher", "slurm": "hydra_submitit_launcher", "ray": "hydra_ray_launcher"}
"""The option of the group `launcher`, which is the name of the extra too, and the module of Hydra's plugin."""

_LIBRARIES = ("joblib", "submitit", "ray")


def is_override(override: Override) -> bool:
    """Whether an override is `launcher=...`: like Hydra's own, it is about all jobs and none of their keys."""
    return override.key_or_group == "launcher"


def problem(option: str, *, multirun: bool, here: bool = True) -> str | None:
    """Say in one line why a launcher cannot start anything; None if it can.

    Args:
        option: Its name.
        multirun: Whether there is a sweep.
        here: Whether it is about to start jobs. Otherwise the configuration is only printed.
    """
    plugin = PLUGINS.get(option)
    if plugin is None:
        return None
    try:
        found = importlib.util.find_spec(f"hydra_plugins.{plugin}") is not None
    except ModuleNotFoundError:
        found = False
    if not found:
        return (
            f"launcher: got {option}, whose plugin {plugin} is not installed; pip install 'recast-exp[{option}]', or "
            "leave it out"
        )
    if here and not multirun:
        return f"launcher: got {option} without -m, but it starts the jobs of a sweep (one is enough); add -m"
    if here and option == "slurm" and shutil.which("sbatch") is None:
        return "launcher: got slurm, but there is no sbatch here; run it where SLURM's commands are, as on a login node"
    return None


def too_many(option: str, jobs: int) -> str | None:
    """Say in one line that a cluster takes no array of so many jobs; None if it does, or does not tell.

    Args:
        option: Name of the launcher.
        jobs: Jobs of the sweep.
    """
    if option != "slurm" or (most := _largest_array()) is None or jobs <= most:
        return None
    return (
        f"launcher: expected at most {most:,} jobs of a sweep with launcher=slurm, as this cluster's MaxArraySize is, "
        f"got {jobs:,}; divide the sweep, as by its seeds, into several with a folder each (hydra.sweep.dir)"
    )


def _largest_array() -> int | None:
    """The most jobs of an array; its numbers are below SLURM's MaxArraySize."""
    try:
        said = subprocess.run(["scontrol", "show", "config"], capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    found = re.search(r"^MaxArraySize\s*=\s*(\d+)", said.stdout, re.MULTILINE)
    return int(found[1]) if found else None


def enter_folder() -> None:
    """Go to the folder of the command, in a worker that Ray has started elsewhere (conf/launcher/ray.yaml)."""
    os.chdir(os.environ["RECAST_EXP_CWD"])


def lost_job(error: BaseException) -> str | None:
    """Say in one line what a launcher's library says when it cannot start a job, or when one ended without a result.

    None where the error is another one.
    """
    library = type(error).__module__.partition(".")[0]
    if library not in _LIBRARIES:
        return None
    text = " ".join(str(error).split("\n\n")[0].split()) or "no reason given"
    return f"launcher: {library} cannot start a job, or lost one ({type(error).__name__}: {text[:300]})"
