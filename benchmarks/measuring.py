"""Interleaved timing, figures with their targets, the table and the JSON file that all benchmarks share."""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table


@dataclass(frozen=True)
class Spread:
    """Median, extremes and quartiles of repeated measurements."""

    median: float
    min: float
    max: float
    quartiles: tuple[float, float]

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """The spread of at least one value."""
        low, median, high = statistics.quantiles(values, method="inclusive") if len(values) > 1 else list(values) * 3
        return cls(median, min(values), max(values), (low, high))


@dataclass(frozen=True)
class Figure:
    """One line of the page: what was measured against what, and the target where there is one.

    Attributes:
        name: `vit_att / full fine-tuning`, for a ratio.
        measured: Over the rounds.
        unit: Empty for a ratio; `s` or `MB`.
        at_least: The smallest value that meets the target.
        at_most: The largest.
        limit: What the arithmetic allows.
    """

    name: str
    measured: Spread
    unit: str = ""
    at_least: float | None = None
    at_most: float | None = None
    limit: float | None = None

    @property
    def target(self) -> str:
        """`≤ 0.800`; empty where there is none."""
        low, high = self.at_least, self.at_most
        if low is not None and high is not None:
            return f"{shown(low, self.unit)} to {shown(high, self.unit)}"
        if low is not None:
            return f"≥ {shown(low, self.unit)}"
        return "" if high is None else f"≤ {shown(high, self.unit)}"

    @property
    def verdict(self) -> str:
        """`met` or `not met`, with `?` where the quartiles disagree with the median; empty without a target."""
        if not self.target:
            return ""
        low, high = self.measured.quartiles
        answers = [self._meets(value) for value in (self.measured.median, low, high)]
        return ("met" if answers[0] else "not met") + ("" if len(set(answers)) == 1 else "?")

    def _meets(self, value: float) -> bool:
        return (self.at_least is None or value >= self.at_least) and (self.at_most is None or value <= self.at_most)

    def line(self) -> str:
        """As printed below a table."""
        low, high = (shown(value, self.unit) for value in self.measured.quartiles)
        text = f"{self.name}: {shown(self.measured.median, self.unit)} (middle half {low} - {high})"
        if self.limit is not None:
            text += f", limit of the arithmetic {shown(self.limit, self.unit)}"
        if not self.target:
            return text
        colour = "yellow" if self.verdict.endswith("?") else "green" if self.verdict == "met" else "red"
        doubt = ", too noisy to tell" if self.verdict.endswith("?") else ""
        return f"{text}, target {self.target}: [{colour}]{self.verdict.rstrip('?')}{doubt}[/{colour}]"

    def content(self) -> dict[str, Any]:
        """As written to JSON."""
        return asdict(self) | {"target": self.target, "verdict": self.verdict}


@dataclass(frozen=True)
class Times:
    """Seconds of every case, round by round, by the clock and of the processor (over all threads)."""

    seconds: dict[str, list[float]]
    processor: dict[str, list[float]]

    def spread(self, case: str) -> Spread:
        """Seconds of one case."""
        return Spread.of(self.seconds[case])

    def ratio(self, case: str, baseline: str) -> Spread:
        """Case over baseline, taken within each round: a machine that slows down for a while slows both."""
        return _ratios(self.seconds, case, baseline)

    def processor_ratio(self, case: str, baseline: str) -> Spread:
        """The same for the processor's time: with one thread it hardly depends on what else the machine does."""
        return _ratios(self.processor, case, baseline)


def interleaved(cases: Mapping[str, Callable[[], object]], *, rounds: int, warmup: int = 1) -> Times:
    """Time the cases in turn, without garbage collection, after untimed rounds.

    Each round begins with the next case, A B C, B C A, C A B, …: none is always the one after a certain other.
    """
    times = Times({name: [] for name in cases}, {name: [] for name in cases})
    order = list(cases.items())
    for index in range(warmup + rounds):
        first = index % len(order)
        for name, run in order[first:] + order[:first]:
            gc.collect()
            gc.disable()
            _wait()
            start = time.perf_counter(), time.process_time()
            run()
            _wait()
            seconds, processor = time.perf_counter() - start[0], time.process_time() - start[1]
            gc.enable()
            if index >= warmup:
                times.seconds[name].append(seconds)
                times.processor[name].append(processor)
    return times


def _wait() -> None:
    """Until a GPU has done what it was given; nothing where there is none, or no torch."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        torch.cuda.synchronize()


def peak_memory(run: Callable[[], object]) -> float | None:
    """MB that a run needs at most beyond what is there before: of the GPU where one is used, else of the process.

    None where it cannot be told (not Linux with glibc). Of a process, it says something for large amounts only: the
    first run also loads parts of libraries.
    """
    gc.collect()
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return float(torch.cuda.max_memory_allocated() - before) / 1e6
    try:
        ctypes.CDLL(None).malloc_trim(0)  # what is freed is no longer the process's, and is counted when used again
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # sets the peak to what there is now
        there = _status("VmRSS")
    except (AttributeError, OSError, TypeError):
        run()
        return None
    run()
    return _status("VmHWM") - there


def _status(name: str) -> float:
    """A line of /proc/self/status in MB."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:")) * 1024 / 1e6


def arguments(description: str | None, *, rounds: int) -> argparse.ArgumentParser:
    """A parser with the options that every benchmark has."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=rounds, help="timed rounds (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=None, help="torch's threads (default: torch's choice)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every measurement to this file")
    return parser


def use_threads(threads: int | None) -> None:
    """Set torch's threads, if asked to."""
    if threads is not None:
        import torch

        torch.set_num_threads(threads)


def machine() -> dict[str, Any]:
    """What the numbers depend on: processor, cores, load and versions."""
    import timm
    import torch

    return {
        "processor": _processor(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_initialized() else None,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "load": [round(load, 2) for load in os.getloadavg()] if hasattr(os, "getloadavg") else None,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "timm": timm.__version__,
    }


@dataclass
class Report:
    """One comparison: printed as a table, and written to a file.

    Attributes:
        title: What was compared.
        times: What was measured.
        baseline: The case that the ratios are taken against.
        figures: What the page shows of it.
        columns: More columns: heading → case → text.
        notes: Lines below the table.
        extra: More for the JSON file.
        children: Whether other processes did the work, so that this one's processor time says nothing.
    """

    title: str
    times: Times
    baseline: str
    figures: Sequence[Figure] = ()
    columns: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    notes: Sequence[str] = ()
    extra: Mapping[str, Any] = field(default_factory=dict)
    children: bool = False

    def headings(self) -> list[str]:
        """Of the table."""
        own = ["case", "median", "min - max", "ratio", "min - max"]
        return [*own, *([] if self.children else ["processor"]), *self.columns]

    def rows(self) -> list[list[str]]:
        """Of the table, one for each case."""
        found = []
        for case in self.times.seconds:
            own, ratio = self.times.spread(case), self.times.ratio(case, self.baseline)
            processor = [] if self.children else [shown(self.times.processor_ratio(case, self.baseline).median)]
            found.append(
                [
                    case,
                    shown(own.median, "s"),
                    f"{shown(own.min, 's')} - {shown(own.max, 's')}",
                    shown(ratio.median),
                    f"{shown(ratio.min)} - {shown(ratio.max)}",
                    *processor,
                    *(texts.get(case, "") for texts in self.columns.values()),
                ]
            )
        return found

    def show(self) -> Report:
        """Print the table and the figures; the report itself."""
        console = Console(width=None if Console().is_terminal else 120)
        table = Table(title=f"{self.title} · {self.rounds} interleaved rounds · ratios to {self.baseline}")
        for heading in self.headings():
            table.add_column(heading, justify="left" if heading == "case" else "right")
        for row in self.rows():
            table.add_row(*row)
        console.print(table)
        for line in (*self.notes, *(figure.line() for figure in self.figures)):
            console.print(line, highlight=False)
        console.print(f"[dim]{described(machine())}[/dim]", highlight=False)
        return self

    @property
    def rounds(self) -> int:
        """Timed rounds."""
        return len(self.times.seconds[self.baseline])

    def content(self) -> dict[str, Any]:
        """As written to JSON."""
        cases = {}
        for case in self.times.seconds:
            cases[case] = {
                "seconds": self.times.seconds[case],
                "median": self.times.spread(case).median,
                "ratio": asdict(self.times.ratio(case, self.baseline)),
            }
            if not self.children:
                cases[case] |= {
                    "processor_seconds": self.times.processor[case],
                    "processor_ratio": asdict(self.times.processor_ratio(case, self.baseline)),
                }
        return {
            "title": self.title,
            "baseline": self.baseline,
            "rounds": self.rounds,
            "figures": [figure.content() for figure in self.figures],
            "table": [self.headings(), *self.rows()],
            "notes": list(self.notes),
            "cases": cases,
            **self.extra,
        }


def write(path: Path | None, benchmark: str, *reports: Report) -> None:
    """Write what a script has measured to a JSON file, if one is wanted."""
    if path is None:
        return
    content = {
        "benchmark": benchmark,
        "command": " ".join(["python", f"benchmarks/{benchmark}.py", *_without_file(sys.argv[1:])]),
        "machine": machine(),
        "parts": [each.content() for each in reports],
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2, allow_nan=False) + "\n", encoding="utf-8")


def _without_file(words: Sequence[str]) -> list[str]:
    """The command without `--json FILE`, which says nothing of what was measured."""
    if "--json" not in words:
        return list(words)
    at = words.index("--json")
    return [*words[:at], *words[at + 2 :]]


def described(here: Mapping[str, Any]) -> str:
    """One line of what the numbers depend on."""
    gpu = f"{here['gpu']}, " if here["gpu"] else ""
    return (
        f"{gpu}{here['processor']}, {here['cores']} cores, {here['threads']} threads, {here['capability']}, "
        f"load {here['load']}, Python {here['python']}, torch {here['torch']}, timm {here['timm']}"
    )


def shown(value: float, unit: str = "") -> str:
    """A number as the tables have it: a ratio, or with a unit."""
    if unit == "s":
        if value >= 1:
            return f"{value:.2f} s"
        return f"{value * 1e3:.1f} ms" if value >= 1e-3 else f"{value * 1e6:.0f} µs"
    if unit:
        return f"{value:,.0f} {unit}"
    if 0 < value < 0.001:
        return f"{value:.1e}"
    return f"{value:.3f}" if value < 10 else f"{value:.1f}" if value < 100 else f"{value:,.0f}"


def _ratios(times: Mapping[str, Sequence[float]], case: str, baseline: str) -> Spread:
    return Spread.of([own / max(base, 1e-9) for own, base in zip(times[case], times[baseline], strict=True)])


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
