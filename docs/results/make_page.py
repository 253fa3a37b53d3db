"""The tables and the figure of docs/results.md, from the records of runs beside this file.

    python docs/results/make_page.py add FOLDER    # take over the finished runs of experiment=real_mini in a folder
    python docs/results/make_page.py               # write tables and figure

A record is a run on the test images. A row of a table is a method that has a record for every draw of its dataset.
"""

from __future__ import annotations

import csv
import math
import re
import statistics
import sys
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from recast_exp.display.figures import Point, accuracy_by_parameters
from recast_exp.report.comparing import mean_interval
from recast_exp.report.reading import Job, read_jobs

HERE = Path(__file__).parent
RECORDS, PAGE, FIGURE = HERE / "real_mini.csv", HERE.parent / "results.md", HERE.parent / "_static/results.png"
NAMES = {
    "cub": "birds",
    "cub 32-true": "birds, float32",
    "flowers": "flowers",
    "digits": "digits 5 to 9",
    "cifar10": "CIFAR-10",
}
"""Dataset → its name on the page; photographs that were not computed in bfloat16 stand apart."""
PROBE = "linear probe"
MINUS = "−"

Record = dict[str, str]


def record(job: Job) -> Record:
    """A finished run in one line."""
    names = {
        "validation": "val/accuracy",
        "validation_loss": "val/loss",
        "test": "test/accuracy",
        "test_macro": "test/accuracy_macro",
        "test_loss": "test/loss",
        "calibration_error": "test/calibration_error",
        "head": "head",
        "seconds": "seconds",
        "device": "device",
    }
    model = job.setting("model", "method")
    return {
        "dataset": _table_of(job.dataset, str(job.setting("trainer", "precision"))),
        "method": job.label,
        "draw": str(job.draw),
        "trains": "coefficients" if model == "recast" else "backbone" if model == "full" else "adapter",
        "lr_scale": f"{job.setting('optimizer', 'lr_scale'):g}",
        "parameters": str(job.count("task_specific")),
        **{name: _short(job.metrics.get(key, "")) for name, key in names.items()},
    }


def _table_of(dataset: str, precision: str) -> str:
    """The table that a run belongs to: methods are compared with a probe of the same precision."""
    apart = f"{dataset} {precision}"
    return apart if apart in NAMES else dataset


def add(folder: Path) -> None:
    """Take over the finished runs of a folder; those of a method and a draw that are there already are replaced."""
    found = {_key(each): each for each in read()}
    new = [record(job) for job in read_jobs(folder).jobs if job.finished]
    found |= {_key(each): each for each in new}
    rows = sorted(found.values(), key=lambda each: (each["dataset"], int(each["parameters"]), *_key(each)))
    with RECORDS.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    print(f"{len(new)} records from {folder}, {len(rows)} in all")


def read() -> list[Record]:
    """All records."""
    if not RECORDS.is_file():
        return []
    with RECORDS.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def complete(records: Sequence[Record]) -> dict[str, dict[str, dict[int, Record]]]:
    """Dataset → method → draw → record, of the methods that have every draw of their dataset."""
    found: dict[str, dict[str, dict[int, Record]]] = defaultdict(lambda: defaultdict(dict))
    for each in records:
        found[each["dataset"]][each["method"]][int(each["draw"])] = each
    every = {name: {draw for draws in methods.values() for draw in draws} for name, methods in found.items()}
    return {
        name: {label: draws for label, draws in found[name].items() if draws.keys() == every[name]}
        for name in NAMES
        if name in found
    }


def table(methods: dict[str, dict[int, Record]]) -> list[str]:
    """The table of one dataset, as lines of Markdown."""
    lines = [
        "| method | parameters | test | vs probe, paired | 95 % interval | validation loss | rates × | head |",
        "|---|---|---|---|---|---|---|---|",
    ]
    probe = methods[PROBE]
    for label, draws in methods.items():
        first = next(iter(draws.values()))
        test = [100 * float(each["test"]) for each in draws.values()]
        loss = [float(each["validation_loss"]) for each in draws.values()]
        cells = [label, f"{int(first['parameters']):,}", f"{statistics.fmean(test):.1f} ± {error(test):.1f}", "–", ""]
        if label != PROBE:
            gains = [100 * (float(draws[draw]["test"]) - float(probe[draw]["test"])) for draw in draws]
            interval = mean_interval([gains])
            assert interval is not None
            cells[3:] = [f"{signed(statistics.fmean(gains))} ± {error(gains):.1f}", " to ".join(map(signed, interval))]
        heads = sorted({each["head"].split()[0] for each in draws.values()})
        cells += [f"{statistics.fmean(loss):.3f}", "" if label == PROBE else first["lr_scale"], ", ".join(heads)]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def with_tables(page: str) -> str:
    """The page with the tables of its records between its markers."""
    for name, methods in complete(read()).items():
        marker = f"<!-- records: {name} -->"
        pattern = rf"{re.escape(marker)}\n.*?{re.escape('<!-- end -->')}"
        title = f"### {NAMES[name][0].upper()}{NAMES[name][1:]}"
        text = "\n".join([marker, title, "", *table(methods), "", "<!-- end -->"])
        page, count = re.subn(pattern, lambda _, text=text: text, page, flags=re.DOTALL)
        if count != 1:
            raise SystemExit(f"{PAGE}: expected one {marker} with <!-- end --> below it, got {count}")
    return page


def draw() -> None:
    """The figure: means and their standard errors."""
    panels = {}
    for name, methods in complete(read()).items():
        panels[NAMES[name]] = [
            Point(
                label,
                int(next(iter(draws.values()))["parameters"]),
                statistics.fmean(test := [float(each["test"]) for each in draws.values()]),
                error(test),
                next(iter(draws.values()))["trains"] == "coefficients",
            )
            for label, draws in methods.items()
        ]
    accuracy_by_parameters(panels, FIGURE)


def error(values: Sequence[float]) -> float:
    """The standard error of a mean."""
    return statistics.stdev(values) / math.sqrt(len(values))


def signed(value: float) -> str:
    """A difference with its sign: `+3.4`, `−0.2`."""
    return f"{value:+.1f}".replace("-", MINUS)


def _key(each: Record) -> tuple[str, str, int]:
    return each["dataset"], each["method"], int(each["draw"])


def _short(value: object) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    if sys.argv[1:2] == ["add"]:
        add(Path(sys.argv[2]))
    else:
        PAGE.write_text(with_tables(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
        draw()
