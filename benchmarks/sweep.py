"""The overhead of a job in sweeps of 1, 10 and 100 jobs, on top of its training and test: target at most 2 s.

Sweeps in one process, RECAST-Att on the embedded digits, one epoch of two batches each: the time of the whole sweep,
less the time of training, solving and choosing the head, and test, divided by its jobs. What remains is Hydra's
composition, opening images, backbone and bank, files and plots, and the report at the end. A sweep before the first
round pays for imports and caches. Target for the growth: a job of a hundred costs at most 1.10 of a job of ten.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from measuring import Figure, Report, Spread, Times, arguments, use_threads, write
from recast_exp.cli import main as cli
from recast_exp.experiment import adaptation

TARGET, GROWTH = 2.0, 1.10
LIMITS = ["probe=false", "trainer.max_epochs=1", "trainer.limit_batches=2", "trainer.accelerator=cpu"]

Moment = npt.NDArray[np.float64]


class Work:
    """The time spent in training, the head and test."""

    def __init__(self) -> None:
        self.spent = np.zeros(2)

    def timed(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """A function that adds its time."""

        def call(*arguments: Any, **options: Any) -> Any:
            start = now()
            result = function(*arguments, **options)
            self.spent += now() - start
            return result

        return call


def main() -> None:
    parser = arguments(__doc__, rounds=3)
    parser.add_argument("--jobs", type=int, nargs="+", default=[1, 10, 100], help="the largest runs once")
    args = parser.parse_args()
    use_threads(args.threads)
    file = args.json.absolute() if args.json else None
    work = Work()
    for name in ("fit", "finish_head", "test"):
        setattr(adaptation, name, work.timed(getattr(adaptation, name)))
    *few, many = sorted(args.jobs)
    beside: dict[int, list[Moment]] = {count: [] for count in (*few, many)}
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        sweep(1, work)
        for _ in range(args.rounds):
            for count in few:
                beside[count].append(sweep(count, work))
        beside[many].append(sweep(many, work))
        os.chdir("/")
    part = report(beside)
    write(file, "sweep", part.show())


def sweep(count: int, work: Work) -> Moment:
    """Seconds that each job of a sweep costs beside training, head and test."""
    before, start = work.spent.copy(), now()
    seeds = ",".join(map(str, range(count)))
    if code := cli.run(["-m", "model=vit_att", f"seed={seeds}", *LIMITS, f"hydra.sweep.dir=sweep_{time.time_ns()}"]):
        raise SystemExit(code)
    return (now() - start - (work.spent - before)) / count


def report(beside: dict[int, list[Moment]]) -> Report:
    """The costs of a job by the number of jobs; sweeps that ran once are compared with the median of the others."""
    names = {count: f"a job of {count:,}" for count in beside}
    rounds = max(map(len, beside.values()))
    columns = {
        names[count]: np.stack(values if len(values) == rounds else values * rounds) for count, values in beside.items()
    }
    times = Times(*({name: rows[:, at].tolist() for name, rows in columns.items()} for at in range(2)))
    figures = [
        Figure(f"overhead of {names[count]}", Spread.of([row[0] for row in values]), "s", at_most=TARGET)
        for count, values in beside.items()
    ]
    *_, ten, many = names.values()
    figures.append(Figure(f"overhead: {many} / {ten}, processor", times.processor_ratio(many, ten), at_most=GROWTH))
    return Report("overhead of a job in a sweep", times, next(iter(names.values())), figures)


def now() -> Moment:
    """Seconds of the clock and of the processor."""
    return np.array([time.perf_counter(), time.process_time()])


if __name__ == "__main__":
    main()
