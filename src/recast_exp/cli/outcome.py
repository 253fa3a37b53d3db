"""How a command ends: its exit code, and one line for each of the user's mistakes."""

from __future__ import annotations

import errno
import linecache
import os
import sys
import traceback
from collections.abc import Callable, Iterable

from hydra.errors import HydraException
from omegaconf.errors import OmegaConfBaseException

from recast_exp.cli import launchers
from recast_exp.cli.job import JobRunner
from recast_exp.config import compose
from recast_exp.errors import RecastError, UserError, first_line


def report_errors(lines: Iterable[str], exit_code: int) -> int:
    """Print one line for each error; the exit code."""
    for line in lines:
        print(f"error: {' '.join(line.split())}", file=sys.stderr)
    return exit_code


_OUT_OF_REACH = errno.EACCES, errno.EPERM, errno.EROFS, errno.EIO, errno.ESTALE, errno.ENOTCONN


def out_of_reach(error: OSError) -> str | None:
    """The line for an error of a file or folder that this user, or this machine, cannot get at; None for any other."""
    if error.errno not in _OUT_OF_REACH or error.filename is None:
        return None
    return f"{error.filename} cannot be read or written ({error.strerror}); see to its permissions, or choose another"


def unreadable_variable(error: Exception) -> str | None:
    """The line for an environment variable that a library could not read while it was imported; None for any other."""
    modules = [frame for frame, _ in traceback.walk_tb(error.__traceback__) if frame.f_code.co_name == "<module>"]
    library = str(modules[-1].f_globals.get("__name__")).partition(".")[0] if modules else ""
    if library in ("", "recast_exp", "__main__"):
        return None
    names = [name for name, value in os.environ.items() if value and repr(value) in str(error)]
    if not names:
        return None
    # Of several that have the value, what the code names; tqdm puts its own names together
    code = "".join(linecache.getlines(modules[-1].f_code.co_filename))
    name = next((name for name in names if name in code or name.lower().startswith(library)), names[0])
    return (
        f"{name}: {library} cannot read the value {os.environ[name]!r} ({first_line(error)}); correct or unset this "
        "environment variable"
    )


def guarded(start: Callable[[], object], runner: JobRunner) -> int:
    """Start jobs; the exit code. What is a user's mistake is one line; what is a bug keeps its traceback."""
    try:
        start()
    except RecastError as error:  # not of a job, which reports its own
        return max([report_errors(error.lines, error.exit_code), *runner.failures])
    except (HydraException, OmegaConfBaseException) as error:
        if not runner.failures:  # Hydra refused: no job has started
            return report_errors([compose.describe(error)], UserError.exit_code)
    except OSError as error:
        if runner.started:
            raise
        return report_errors([f"hydra.run.dir: the folder of the run cannot be made ({error})"], UserError.exit_code)
    except Exception as error:
        if lost := launchers.lost_job(error):
            return max([report_errors([lost], 1), *runner.failures])
        if isinstance(error, ValueError) and "Unable to configure handler" in str(error):
            line = (
                "hydra.job_logging: the file of the log cannot be opened "
                f"({first_line(error.__cause__ or error)}); check hydra.job.name, or choose another folder"
            )
            return max([report_errors([line], UserError.exit_code), *runner.failures])
        if not runner.failures:
            raise
    return max(runner.failures, default=0)
