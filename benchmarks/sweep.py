"""The overhead of a job in a sweep, on top of its training and test: target at most 2 s.

Jobs of one process, RECAST-Att on the embedded digits, two epochs each: the time from one job's beginning to the next
one's, less the time of `fit` and `test` (training, validation, test). What remains is Hydra's composition, opening
images, backbone and bank, files and plots. The first job pays for imports and caches, and is left out. Processor time
is given alongside clock time, which includes the other load of the machine.
"""

from __future__ import annotations

import json
import os
import tempfile
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
from omegaconf import DictConfig
from rich.console import Console

from measuring import Spread, arguments, use_threads, verdict
from recast_exp.cli import main as cli
from recast_exp.cli.job import JobRunner
from recast_exp.experiment import adaptation

TARGET = 2.0

Moment = npt.NDArray[np.float64]


def main() -> None:
    args = arguments(__doc__, rounds=8).parse_args()
    use_threads(args.threads)
    begun: list[Moment] = []
    work: list[Moment] = []

    def timed(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            start = now()
            result = function(*arguments, **options)
            work[-1] = work[-1] + now() - start
            return result

        return call

    run_one = JobRunner.__call__

    def job(runner: JobRunner, cfg: DictConfig) -> float | None:
        begun.append(now())
        work.append(np.zeros(2))
        return run_one(runner, cfg)

    adaptation.fit, adaptation.test = timed(adaptation.fit), timed(adaptation.test)
    JobRunner.__call__ = job  # type: ignore[method-assign]
    seeds = ",".join(map(str, range(args.rounds + 2)))
    command = ["-m", "model=vit_att", f"seed={seeds}", "probe=false", "trainer.max_epochs=2", "trainer.accelerator=cpu"]
    file = args.json.absolute() if args.json else None
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        code = cli.run(command)
        os.chdir("/")
    if code:
        raise SystemExit(code)
    beside = np.array(
        [later - earlier - inside for earlier, later, inside in zip(begun[1:], begun[2:], work[1:], strict=False)]
    )
    for name, values in zip(("clock", "processor"), beside.T.tolist(), strict=True):
        spread = Spread.of(values)
        text = f"{name}: a job costs {spread.median:.2f} s ({spread.min:.2f} - {spread.max:.2f}) on top of fit and test"
        Console().print(verdict(f"{text}, target at most {TARGET} s", spread, at_most=TARGET), highlight=False)
    if file:
        file.write_text(json.dumps({"beside": beside.tolist(), "work": np.array(work).tolist()}, indent=2))


def now() -> Moment:
    """Seconds of the clock and of the processor."""
    return np.array([time.perf_counter(), time.process_time()])


if __name__ == "__main__":
    main()
