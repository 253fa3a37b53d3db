"""All benchmarks as one page: JSON, Markdown and a plot.

Each script runs in a process of its own, one after the other. `make bench` writes `bench.json`, `bench.md` and
`bench.svg` to build/bench; on a machine with a GPU, the training step, inference, adapters and an epoch are measured
there too, in bfloat16, the step compiled as well.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.ticker import NullLocator

from measuring import described, shown

HERE = Path(__file__).parent
RUNS: dict[str, list[str]] = {
    "training_step": ["--rounds", "5"],
    "inference": ["--rounds", "18"],
    "mimicry": ["--rounds", "5"],
    "startup": [],
    "input_pipeline": ["--rounds", "5"],
    "adapters": ["--rounds", "5"],
    "heads": ["--threads", "1"],
    "last_blocks": ["--rounds", "5", "--blocks", "6"],
    "many_tasks": ["--rounds", "3"],
    "epoch": [],
    "sweep": ["--rounds", "5"],
}
"""Script → options that keep the whole within minutes."""
_CUDA = ["--device", "cuda", "--batch-size", "128"]
ON_GPU: dict[str, list[str]] = {
    "training_step": [*_CUDA, "--bf16", "--rounds", "20"],
    "training_step, compiled": [*_CUDA, "--bf16", "--compile", "--rounds", "20"],
    "inference": [*_CUDA, "--bf16", "--rounds", "20"],
    "adapters": [*_CUDA, "--bf16", "--rounds", "20"],
    "epoch": [*_CUDA, "--images", "2048", "--img-size", "224", "trainer.precision=bf16-mixed"],
}
FAR = 5
TICKS = [0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 1, 1.5, 2, 3, 5]
WIDE = [1, 3, 10, 30, 100, 300, 1000, 3000, 10000]
COLOURS = {"met": "#2a7f62", "not met": "#c0392b", "": "#5b6570"}


def measure(name: str, options: list[str], folder: Path) -> dict[str, Any]:
    """Run one script; what it has measured."""
    script = name.partition(",")[0]
    file = folder / f"{script}.part.json"
    print(f"\n$ python benchmarks/{script}.py {' '.join(options)}", flush=True)
    subprocess.run([sys.executable, str(HERE / f"{script}.py"), *options, "--json", str(file)], check=True)
    content: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    file.unlink()
    return content


def figures(content: dict[str, Any]) -> list[dict[str, Any]]:
    """All figures of a script, in its order."""
    return [figure for part in content["parts"] for figure in part["figures"]]


def markdown(page: dict[str, Any]) -> str:
    """The page: a table of all figures, then the tables of the scripts."""
    every = [figure for content in page["benchmarks"] for figure in figures(content)]
    aimed = [figure for figure in every if figure["target"]]
    lines = [
        "# Benchmarks",
        "",
        f"{described(page['benchmarks'][0]['machine'])}; {page['date']}, {page['minutes']:.0f} minutes. `make bench` "
        "makes this page.",
        "",
        f"{sum(figure['verdict'].startswith('met') for figure in aimed)} of {len(aimed)} targets are met. A figure is "
        "the median of the rounds, beside the middle half of them; `?` says that the quartiles disagree with the "
        "median, so that the run was too noisy to tell. The limit is what the arithmetic allows.",
        "",
        "![Ratios and their targets](bench.svg)",
        "",
        "| figure | median | middle half | limit | target | |",
        "|---|---|---|---|---|---|",
    ]
    for figure in every:
        unit, measured = figure["unit"], figure["measured"]
        low, high = (shown(value, unit) for value in measured["quartiles"])
        limit = "" if figure["limit"] is None else shown(figure["limit"], unit)
        cells = [figure["name"], shown(measured["median"], unit), f"{low} - {high}", limit]
        lines.append("| " + " | ".join([*cells, figure["target"], figure["verdict"]]) + " |")
    for content in page["benchmarks"]:
        lines += ["", f"## {content['parts'][0]['title']}", "", f"`{content['command']}`"]
        for number, part in enumerate(content["parts"]):
            if number:
                lines += ["", f"### {part['title']}"]
            heading, *rows = part["table"]
            lines += ["", f"{part['rounds']} interleaved rounds, ratios to {part['baseline']}.", ""]
            lines += ["| " + " | ".join(heading) + " |", "|" + "---|" * len(heading)]
            lines += ["| " + " | ".join(row) + " |" for row in rows]
            for note in part["notes"]:
                lines += ["", f"{note}."]
    return "\n".join(lines) + "\n"


def plot(page: dict[str, Any], file: Path) -> None:
    """Every ratio: median, middle half, and marks for target and limit; those far from 1 in a panel of their own."""
    ratios = [
        each
        for content in page["benchmarks"]
        for each in figures(content)
        if not each["unit"] and each["measured"]["median"] > 0.02
    ]
    panels = [[each for each in ratios if _far(each) == far] for far in (False, True)]
    panels = [rows for rows in panels if rows]
    mpl.rcParams["svg.hashsalt"] = "bench"
    figure, all_axes = plt.subplots(
        len(panels),
        figsize=(9.5, 1.6 + 0.235 * len(ratios)),
        height_ratios=[len(rows) + 2 for rows in panels],
        layout="constrained",
        squeeze=False,
    )
    for axes, rows in zip(all_axes[:, 0], panels, strict=True):
        _panel(axes, rows)
    figure.supxlabel("ratio of two things measured in turn    ◁ at most    ▷ at least    | limit", fontsize=9)
    figure.savefig(file, metadata={"Date": None})
    figure.savefig(file.with_suffix(".png"), dpi=110)
    plt.close(figure)


def _far(figure: dict[str, Any]) -> bool:
    """Whether a ratio would squeeze those around 1 together."""
    values = [figure["measured"]["median"], figure["at_least"] or 1]
    return max(values) > FAR


def _panel(axes: Axes, rows: list[dict[str, Any]]) -> None:
    for row, each in enumerate(reversed(rows)):
        measured, colour = each["measured"], COLOURS[each["verdict"].rstrip("?")]
        axes.plot(measured["quartiles"], [row, row], color=colour, linewidth=5, alpha=0.35, solid_capstyle="butt")
        axes.plot(measured["median"], row, "o", color=colour, markersize=5)
        for bound, marker in ((each["at_most"], "<"), (each["at_least"], ">")):
            if bound is not None:
                axes.plot(bound, row, marker, color="black", markersize=5, markerfacecolor="none")
        if each["limit"] is not None:
            axes.plot(each["limit"], row, "|", color="black", markersize=9)
        place = {"xycoords": ("axes fraction", "data"), "va": "center", "fontsize": 8, "color": colour}
        axes.annotate(shown(measured["median"]), (1.01, row), **place)
    axes.set_yticks(range(len(rows)), [each["name"] for each in reversed(rows)], fontsize=8)
    axes.set_xscale("log")
    low, high = axes.get_xlim()
    steps = [value for value in (TICKS if high < 10 else WIDE) if low <= value <= high]
    axes.set_xticks(steps, [f"{value:g}" for value in steps])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.axvline(1, color="#b0b6bc", linewidth=0.8, zorder=0)
    axes.grid(axis="y", color="#eceff1", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_ylim(-0.8, len(rows) - 0.2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("build/bench"), help="folder (default: %(default)s)")
    parser.add_argument("--only", nargs="+", choices=sorted(RUNS), help="scripts to run; the page has these alone")
    parser.add_argument("--gpu", choices=["auto", "only", "none"], default="auto", help="(default: %(default)s)")
    args = parser.parse_args()
    import torch

    args.out.mkdir(parents=True, exist_ok=True)
    start = time.time()
    runs = [] if args.gpu == "only" else list(RUNS.items())
    if args.gpu != "none" and torch.cuda.is_available():
        runs += ON_GPU.items()
    if args.only:
        runs = [(name, options) for name, options in runs if name.partition(",")[0] in args.only]
    if not runs:
        raise SystemExit("--gpu=only: expected a GPU, got none")
    contents = [measure(name, options, args.out) for name, options in runs]
    page = {
        "date": time.strftime("%Y-%m-%d"),
        "minutes": (time.time() - start) / 60,
        "benchmarks": contents,
    }
    (args.out / "bench.json").write_text(json.dumps(page, indent=2) + "\n", encoding="utf-8")
    (args.out / "bench.md").write_text(markdown(page), encoding="utf-8")
    plot(page, args.out / "bench.svg")
    print(f"\n{args.out / 'bench.md'}, bench.json and bench.svg are written.")


if __name__ == "__main__":
    main()
