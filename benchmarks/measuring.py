"""Interleaved timing, the table and the JSON file that all benchmarks share."""

from __future__ import annotations

import argparse
import gc
import json
import math
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
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
    """Time the cases in turn, A B C A B C …, without garbage collection, after untimed rounds."""
    times = Times({name: [] for name in cases}, {name: [] for name in cases})
    for index in range(warmup + rounds):
        for name, run in cases.items():
            gc.collect()
            gc.disable()
            start = time.perf_counter(), time.process_time()
            run()
            seconds, processor = time.perf_counter() - start[0], time.process_time() - start[1]
            gc.enable()
            if index >= warmup:
                times.seconds[name].append(seconds)
                times.processor[name].append(processor)
    return times


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
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "load": [round(load, 2) for load in os.getloadavg()] if hasattr(os, "getloadavg") else None,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "timm": timm.__version__,
    }


def report(
    benchmark: str,
    times: Times,
    baseline: str,
    *,
    columns: Mapping[str, Mapping[str, str]] | None = None,
    notes: Sequence[str] = (),
    extra: Mapping[str, Any] | None = None,
    path: Path | None = None,
    children: bool = False,
) -> dict[str, Any]:
    """Print the table of one comparison, and write it down.

    Args:
        benchmark: Its name.
        times: What was measured.
        baseline: The case that the ratios are taken against.
        columns: More columns: heading → case → text.
        notes: Lines below the table.
        extra: More for the JSON file.
        path: The JSON file, if one is wanted.
        children: Whether other processes did the work, so that this one's processor time says nothing.

    Returns:
        What the JSON file holds.
    """
    columns = columns or {}
    here = machine()
    rounds = len(times.seconds[baseline])
    console = Console(width=None if Console().is_terminal else 120)
    table = Table(title=f"{benchmark} · {rounds} interleaved rounds · ratios to {baseline}")
    table.add_column("case")
    for heading in ("median", "min - max", "ratio", "min - max", *([] if children else ["processor"]), *columns):
        table.add_column(heading, justify="right")
    for case in times.seconds:
        own, ratio, processor = (
            times.spread(case),
            times.ratio(case, baseline),
            times.processor_ratio(case, baseline),
        )
        table.add_row(
            case,
            _seconds(own.median),
            f"{_seconds(own.min)} - {_seconds(own.max)}",
            _ratio(ratio.median),
            f"{_ratio(ratio.min)} - {_ratio(ratio.max)}",
            *([] if children else [_ratio(processor.median)]),
            *(texts.get(case, "") for texts in columns.values()),
        )
    console.print(table)
    for note in notes:
        console.print(note, highlight=False)
    console.print(
        f"[dim]{here['processor']}, {here['cores']} cores, {here['threads']} threads, {here['capability']}, "
        f"load {here['load']}, Python {here['python']}, torch {here['torch']}, timm {here['timm']}[/dim]"
    )
    content = {
        "benchmark": benchmark,
        "machine": here,
        "baseline": baseline,
        "cases": {
            case: {
                "seconds": times.seconds[case],
                "median": times.spread(case).median,
                "ratio": asdict(times.ratio(case, baseline)),
            }
            | (
                {}
                if children
                else {
                    "processor_seconds": times.processor[case],
                    "processor_ratio": asdict(times.processor_ratio(case, baseline)),
                }
            )
            for case in times.seconds
        },
        **(extra or {}),
    }
    if path is not None:
        write(path, content)
    return content


def write(path: Path, content: Mapping[str, Any]) -> None:
    """Write measurements to a JSON file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def verdict(text: str, measured: Spread, *, at_least: float = -math.inf, at_most: float = math.inf) -> str:
    """A line that says whether the median meets a target, and whether the middle half of the rounds agrees."""

    def met(value: float) -> bool:
        return at_least <= value <= at_most

    answer = "[green]met[/green]" if met(measured.median) else "[red]not met[/red]"
    low, high = measured.quartiles
    if len({met(value) for value in (low, measured.median, high)}) == 2:
        answer += f" by the median, [yellow]too noisy to tell[/yellow] (middle half {_ratio(low)} - {_ratio(high)})"
    return f"{text}: {answer}"


def _ratios(times: Mapping[str, Sequence[float]], case: str, baseline: str) -> Spread:
    return Spread.of([own / max(base, 1e-9) for own, base in zip(times[case], times[baseline], strict=True)])


def _seconds(value: float) -> str:
    if value >= 1:
        return f"{value:.2f} s"
    return f"{value * 1e3:.1f} ms" if value >= 1e-3 else f"{value * 1e6:.0f} µs"


def _ratio(value: float) -> str:
    return f"{value:.3f}" if value < 10 else f"{value:,.0f}"


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
