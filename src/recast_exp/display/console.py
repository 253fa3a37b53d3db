"""The tables in the terminal, shown at the end of stages, sweeps and searches."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table

from recast_exp.config.grammar import short
from recast_exp.display.cells import cell
from recast_exp.display.numbers import mean_and_spread
from recast_exp.errors import printable
from recast_exp.runs import layout
from recast_exp.runs.results import (
    LEFT_OUT,
    TESTED,
    BankSize,
    Compared,
    Copies,
    Counts,
    Inspection,
    MergedTask,
    Metrics,
    Reconstruction,
    Results,
    Sequenced,
)
from recast_exp.runs.state import State
from recast_exp.runs.sweep import Left, Recorded, SearchRecord

SHOWN = 10  # rows of a table that could be of any length
BEST = 5  # trials of a search
NARROWEST = 72  # columns of a table: a terminal that has fewer wraps its lines, where a narrower table loses numbers


def show_adaptation(title: str, method: str, select: str, metrics: Metrics, parameters: Counts) -> None:
    """Show the trained method: its parameters, and its accuracy next to the linear probe's.

    Args:
        title: Method, dataset, backbone and seed.
        method: Its name in the table.
        select: Which epoch is reported, "last" or "best".
        metrics: Those of `metrics.json`.
        parameters: The counts of `parameters.json`.
    """
    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("")
    for column in ("parameters", "head", "val", "test"):
        table.add_column(column, justify="right")
    if "probe/test/accuracy" in metrics:
        table.add_row(
            "linear probe",
            "0",
            f"{parameters['head']:,}",
            _percent(metrics["probe/val/accuracy"]),
            _percent(metrics["probe/test/accuracy"]),
        )
    table.add_row(
        f"[bold]{cell(method)}[/bold]",
        f"[bold]{parameters['task_specific']:,}[/bold]",
        f"{parameters['head']:,}",
        _percent(metrics["val/accuracy"]),
        f"[bold]{_percent(metrics['test/accuracy'])}[/bold]",
    )
    epochs = (
        f"Epoch {int(metrics['epoch'])} of {int(metrics['epochs'])} is reported ({select}); "
        f"{metrics['seconds']:.0f} s of training, {metrics['images_per_second']:.0f} images/s on {metrics['device']}."
    )
    trained = epochs if metrics["epochs"] else f"Nothing was trained by gradient descent; on {metrics['device']}."
    _print(title, table, _counts(parameters), *_heads(metrics), trained, *_part(metrics))


def _heads(metrics: Metrics) -> list[str]:
    """Which heads validation has chosen, in one line; none where none was solved."""
    heads = [f"{what}: {metrics[key]}" for what, key in (("head", "head"), ("probe", "probe/head")) if key in metrics]
    return [f"Solved {', '.join(heads)} (the best by validation)."] if heads else []


def _part(metrics: Metrics) -> list[str]:
    """How many of the test images were tested, in one line; none where all were."""
    if TESTED not in metrics:
        return []
    tested, left_out = int(metrics[TESTED]), int(metrics[LEFT_OUT])
    return [f"Only {tested:,} of {tested + left_out:,} test images were tested (trainer.limit_batches)."]


def show_evaluation(title: str, path: Path, metrics: Metrics, parameters: Counts, images: Mapping[str, int]) -> None:
    """Show the test metrics of a task file.

    Args:
        title: Method, dataset, backbone and seed.
        path: The task file.
        metrics: Those of `metrics.json`.
        parameters: The counts of `parameters.json`.
        images: Split → its number of images.
    """
    table = Table(box=box.SIMPLE_HEAD)
    for name in ("test/accuracy", "test/accuracy_top5", "test/loss"):
        if name in metrics:
            table.add_column(name, justify="right")
    shown = [metrics["test/accuracy"], *([metrics["test/accuracy_top5"]] if "test/accuracy_top5" in metrics else [])]
    table.add_row(*[_percent(value) for value in shown], f"{metrics['test/loss']:.4f}")
    rest = sum(images.values()) - images["test"]
    split = f"Test split: {images['test']:,} images; {rest:,} others are training and validation images."
    _print(f"{title}, from {path}", table, split, *_part(metrics), _counts(parameters))


def show_reconstruction(title: str, summary: Reconstruction, parameters: Counts) -> None:
    """Show the errors and similarities of every layer."""
    table = Table(box=box.SIMPLE_HEAD)
    for column in ("layer", "relative error", "max error", "cosine", "feature cosine"):
        table.add_column(column, justify="left" if column == "layer" else "right")
    for layer, row in summary["layers"].items():
        table.add_row(
            cell(layer),
            f"{row['relative_error']:.1e}",
            f"{row['max_error']:.1e}",
            f"{row['cosine_similarity']:.6f}",
            f"{row['feature_similarity']:.6f}",
        )
    _print(title, table, _counts(parameters))


def show_merged(rows: Sequence[MergedTask], bank: int, before: int) -> None:
    """Show how much tasks are in each other's way.

    Args:
        rows: The tasks.
        bank: Size of the templates that they share, in bytes.
        before: Size of their task files before, in bytes.
    """
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    table.add_column("task", overflow="fold")
    for column in ("error", "error if averaged", "most alike", "kB"):
        table.add_column(column, justify="right", overflow="fold")
    for row in rows:
        name, value = max(row["similarity"].items(), key=lambda pair: abs(pair[1]))
        cells = (f"{row['error']:.3f}", f"{row['averaged']:.3f}", f"{cell(name)} {value:+.2f}")
        table.add_row(cell(row["task"]), *cells, f"{row['bytes'] / 1000:,.1f}")
    after = bank + sum(row["bytes"] for row in rows)
    sizes = f"{before / 1e6:,.2f} MB before, {after / 1e6:,.2f} MB now, of which {bank / 1e6:,.2f} MB are shared"
    _print(f"{len(rows)} tasks", table, f"Error: of what a task has changed in the weights, relative. {sizes}.")


def show_bank_sizes(title: str, rows: Sequence[BankSize], pretrained: float) -> None:
    """Show what banks of several sizes cost.

    Args:
        title: What was compared.
        rows: The banks.
        pretrained: Accuracy of the head with the pretrained weights.
    """
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    for column in ("templates", "solver", "kept as", "size", "output error", "feature cosine", "head, validation"):
        table.add_column(column, justify="left" if column in ("solver", "kept as") else "right")
    for row in rows:
        table.add_row(
            str(row["num_templates"]),
            row["solver"],
            row["dtype"],
            f"{100 * row['share']:.0f} %",
            f"{row['output_error']:.3f}",
            f"{row['feature_similarity']:.3f}",
            f"{100 * row['head_accuracy']:.1f}",
        )
    own = f"With the pretrained weights, the head has {100 * pretrained:.1f} %."
    _print(title, table, f"Size: of the weights that the bank replaces, in float32. {own}")


def show_comparison(title: str, rows: Mapping[str, Compared], repeat: str = "seed") -> None:
    """Show a row for each method: the size of a task, and accuracy as mean ± standard deviation over its runs.

    Args:
        title: What was compared.
        rows: Label → its row.
        repeat: What the runs of a method differ in, "seed" or "draw".
    """
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    table.add_column("method", no_wrap=True)
    for column in ("params", "bytes", "val", "test", "time"):
        table.add_column(column, justify="right", no_wrap=True)
    for name, row in rows.items():
        cells = [f"{100 * accuracy:.1f}" for accuracy in (row["val/accuracy"], row["test/accuracy"])]
        if row["runs"] > 1:
            spreads = [f"{100 * spread:.1f}" for spread in (row["val/accuracy/spread"], row["test/accuracy/spread"])]
            cells = [f"{cell} ± {spread}" for cell, spread in zip(cells, spreads, strict=True)]
        size = f"{-(-row['task_bits'] // 8):,}"
        table.add_row(cell(name), f"{row['task_specific']:,}", size, *cells, f"{row['seconds']:.0f} s")
    counted = " or ".join(map(str, sorted({row["runs"] for row in rows.values()})))
    caption = f"Parameters and bytes of a task without its head; accuracy in percent, {counted} {repeat}(s)."
    _print(title, table, caption)


def show_check(
    title: str, report: Inspection, images: Mapping[str, int], images_per_class: Mapping[str, Sequence[int]]
) -> None:
    """Show the contents of a dataset: images per split and class, their sizes, and the images that were left out."""
    table = Table(box=box.SIMPLE_HEAD)
    for column in ("split", "images", "classes", "images per class"):
        table.add_column(column, justify="left" if column == "split" else "right")
    for split, counts in images_per_class.items():
        present = [count for count in counts if count]
        low, high = min(present), max(present)
        per_class = f"{low:,}" if low == high else f"{low:,} to {high:,}"
        table.add_row(split, f"{images[split]:,}", f"{len(present):,}", per_class)
    height, width = report["height"], report["width"]
    size = (
        f"{width['min']} × {height['min']} pixels"
        if (width["min"], height["min"]) == (width["max"], height["max"])
        else f"{width['min']} to {width['max']} pixels wide, {height['min']} to {height['max']} high "
        f"(medians {width['median']:.0f} and {height['median']:.0f})"
    )
    official = ", ".join(f"{count:,} {split}" for split, count in report["official_images"].items())
    verification = "the official set, verified" if report["verified"] else "not compared with an official set"
    kept, total = report["classes"], report["official_classes"]
    classes = f"{total:,} classes" if kept == total else f"{kept:,} of {total:,} classes"
    lines = [f"Found: {classes}, {official} images; {verification}.", f"Images: {size}."]
    if report["bad"]:
        lines.append(f"Left out: {len(report['bad'])} missing or damaged image(s), named in {layout.CHECK}.")
    if report["unread"]:
        kinds = [f"{name} ({count:,})" for name, count in report["unread"].items()]
        lines.append(f"Not read: {', '.join(kinds[:SHOWN])}{', …' if len(kinds) > SHOWN else ''}.")
    lines += _copies(report["copies"])
    _print(title, table, *lines)


def _copies(found: Copies) -> list[str]:
    """One line on the images that a dataset has more than once, if it has any."""
    before = {"val": "training", "test": "training or validation"}
    parts = [
        f"{count:,} {split} image(s) are {before[split]} images, too" for split, count in found["seen_before"].items()
    ]
    if found["other_classes"]:
        parts.append(f"{found['other_classes']:,} image(s) are in more than one class")
    if not parts and found["groups"]:
        parts = ["some images are there more than once, in one split and class"]
    return [f"Copies: {'; '.join(parts)}; named in {layout.CHECK}."] if parts else []


def show_bad(bad: dict[str, str]) -> None:
    """Show the first missing or damaged images."""
    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("image", overflow="fold")
    table.add_column("problem", overflow="fold")
    for path, reason in list(bad.items())[:SHOWN]:
        table.add_row(cell(path), cell(reason))
    _print(f"{len(bad)} image(s) cannot be used", table, *(["…"] if len(bad) > SHOWN else []))


def show_sweep(folder: Path, settings: Mapping[str, Sequence[Results]]) -> None:
    """Show a row for each setting of a sweep: trained parameters, mean accuracy ± standard deviation over its jobs."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    table.add_column("setting", overflow="fold", min_width=17)
    for column in ("jobs", "parameters", "val", "test", "probe"):
        table.add_column(column, justify="right")
    for setting, jobs in settings.items():
        cells = [_spread(jobs, name) for name in ("val/accuracy", "test/accuracy", "probe/test/accuracy")]
        table.add_row(cell(setting), str(len(jobs)), f"{jobs[0].parameters['task_specific']:,}", *cells)
    _print(f"Sweep {folder}", table)


def show_sequence(title: str, found: Sequenced) -> None:
    """Show the accuracies of a sequence after each of its tasks, and its methods next to each other."""
    matrix = Table(box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    matrix.add_column("after", overflow="fold")
    for task in found["tasks"]:
        matrix.add_column(cell(task), justify="right", overflow="fold")
    for task, row in zip(found["tasks"], found["accuracy"], strict=True):
        matrix.add_row(cell(task), *(f"{100 * accuracy:.1f}" for accuracy in row))
    methods = Table(box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    methods.add_column("after the last task", overflow="fold", min_width=17)
    for column in ("task known", "forgetting", "task unknown", "parameters"):
        methods.add_column(column, justify="right", overflow="fold")
    for line in found["methods"]:
        unknown = "–" if line["unknown"] is None else f"{100 * line['unknown']:.1f}"
        cells = (f"{100 * line['known']:.1f}", f"{100 * line['forgetting']:.1f}", unknown, f"{line['parameters']:,}")
        methods.add_row(cell(line["method"]), *cells)
    lines = ["Accuracy in percent: the mean over the tasks. Parameters: of all tasks, without heads."]
    if (transfer := found["forward_transfer"]) is not None:
        lines.append(f"Starting from earlier tasks changes the accuracy of a task by {100 * transfer:+.1f} points.")
    _print(title, matrix, methods, *lines)


def show_predictions(where: str, images: int, broken: int, counts: Mapping[str, Mapping[str, int]]) -> None:
    """Show how many images each task takes for each class, the most frequent ones first."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    table.add_column("task", overflow="fold")
    table.add_column("class", overflow="fold")
    table.add_column("images", justify="right")
    for task, by_class in counts.items():
        ranked = sorted(by_class.items(), key=lambda pair: -pair[1])
        for at, (label, count) in enumerate(ranked[:SHOWN]):
            table.add_row(cell(task) if at == 0 else "", cell(label), f"{count:,}")
        if len(ranked) > SHOWN:
            rest = sum(count for _, count in ranked[SHOWN:])
            table.add_row("", f"{len(ranked) - SHOWN} other classes", f"{rest:,}")
    left_out = f"; {broken:,} cannot be read, named in {layout.BROKEN}" if broken else ""
    _print(f"{images:,} images of {where}{left_out}", table)


def show_skipped(skipped: Sequence[Recorded | Left]) -> None:
    """Show the jobs of a sweep that were left out, by reason."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    table.add_column("jobs", overflow="fold")
    table.add_column("reason", overflow="fold")
    jobs_by_reason: dict[str, list[str]] = {}
    for record in skipped:
        jobs_by_reason.setdefault(record["reason"] or "", []).append(str(record["number"]))
    for reason, jobs in jobs_by_reason.items():
        table.add_row(", ".join(jobs), cell(reason))
    _print(f"{len(skipped)} job(s) do not fit and were left out", table)


def show_failures(left: Sequence[Recorded | Left], jobs: int, command: str) -> None:
    """Show the jobs of a sweep that did not finish, why, and the command that runs them again."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    table.add_column("job", justify="right")
    for column in ("method", "dataset", "seed", "state", "reason"):
        table.add_column(column, overflow="fold")
    for record in left[:SHOWN]:
        cells = (record["label"], record["dataset"], str(record["seed"]), record["state"], record["reason"] or "")
        table.add_row(str(record["number"]), *map(cell, cells))
    more = f" ({len(left) - SHOWN} more are not shown)" if len(left) > SHOWN else ""
    total = f" of {jobs}" if jobs else ""
    _print(
        f"{len(left)}{total} job(s) did not finish{more}",
        table,
        "The same command in the same folder runs only these jobs again:",
        f"  {command}",
    )


def show_search(folder: Path, search: SearchRecord) -> None:
    """Show the best trials of a search, the outcomes of the others, and the command that runs the best setting."""
    trials = search["trials"]
    finished = [(trial["value"], trial) for trial in trials if trial["value"] is not None]
    finished.sort(key=lambda pair: -pair[0])
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    table.add_column("trial", justify="right")
    table.add_column("val", justify="right")
    for key in search["space"]:
        table.add_column(cell(key), overflow="fold")
    for value, trial in finished[:BEST]:
        sampled = [cell(short(trial["parameters"][key])) for key in search["space"]]
        table.add_row(str(trial["number"]), _percent(value), *sampled)
    counts = Counter(trial["state"] for trial in trials)
    order = (State.FINISHED, State.PRUNED, State.FAILED, State.RUNNING)
    states = ", ".join(f"{counts[state]} {state}" for state in order if counts[state])
    failed = [trial for trial in trials if trial["state"] == State.FAILED]
    lines = [f"Trial {trial['number']} failed: {trial['reason'] or ''}" for trial in failed[:SHOWN]]
    lines += ["…"] if len(failed) > SHOWN else []
    if search["best"]:
        lines.append(f"Run the best setting: {search['best']['command']}")
    _print(f"Search {folder}: {len(trials)} trials, {states}", *([table] if finished else []), *lines)


def _spread(jobs: Sequence[Results], name: str) -> str:
    values = [float(job.metrics[name]) for job in jobs if name in job.metrics]
    if not values:
        return "–"
    mean, deviation = mean_and_spread(values)
    return f"{100 * mean:.1f} ± {100 * deviation:.1f}" if len(values) > 1 else f"{100 * mean:.1f}"


def _print(title: str, *parts: Table | str) -> None:
    """Print a title, tables, and lines that are left to the terminal to wrap."""
    console = Console()
    console.width = max(console.width, NARROWEST)
    for line in (title, *parts):
        if isinstance(line, str):  # what stands in brackets may be part of a name
            console.print(printable(line), highlight=False, markup=False, soft_wrap=True)
        else:
            console.print(line, highlight=False)


def _counts(parameters: Counts) -> str:
    parts = [
        f"{number:,} {label}"
        for number, label in (
            (parameters["coefficients"], "coefficients"),
            (parameters["adapter"], "adapter"),
            (parameters["backbone_trained"], "backbone"),
            (parameters["buffers"], "running statistics"),
            (parameters["head"], "head"),
        )
        if number
    ]
    width = parameters.get("template_bits", 0) / max(1, parameters["templates"])
    bits = f" of {width:.1f} bits" if 0 < width < 32 else ""
    size = f", {parameters['task_file_bytes'] / 1000:,.1f} kB task file" if parameters["task_file_bytes"] else ""
    return (
        f"Task: {' + '.join(parts)}{size}. Shared: {parameters['templates']:,} template parameters{bits}, "
        f"{parameters['frozen']:,} frozen."
    )


def _percent(value: float | str) -> str:
    return f"{100 * float(value):.1f} %"
