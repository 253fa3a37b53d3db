"""A W&B workspace for the runs of a project, as code, for readers of the paper.

    python -m recast_exp.tracking.dashboard ENTITY PROJECT             # saves it, prints its address
    python -m recast_exp.tracking.dashboard ENTITY PROJECT --dry-run   # prints what would be sent, without network

Runs are grouped by dataset and method, so that a bar, a point or a curve is the mean over the seeds.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from recast_exp.errors import MissingInputError, RecastError, UserError, one_line

if TYPE_CHECKING:
    from wandb_workspaces.workspaces import Workspace

ACCURACY, SIZE = "test/accuracy", "parameters/task_specific"
CHANGE = "coefficients/change"
IMAGES = ("learning_curves", "coefficients", "confusion", "mistakes", "batch")


def main(argv: Sequence[str] | None = None) -> int:
    """Save the workspace, or print it. Returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m recast_exp.tracking.dashboard", description="Build a W&B workspace."
    )
    parser.add_argument("entity", help="W&B user or team")
    parser.add_argument("project", help="W&B project, as logger.project")
    parser.add_argument("--name", default="RECAST", help="name of the workspace (default: %(default)s)")
    parser.add_argument("--dry-run", action="store_true", help="print the workspace as JSON; nothing is sent")
    args = parser.parse_args(argv)
    try:
        workspace = build(args.entity, args.project, args.name)
        print(spec(workspace) if args.dry_run else save(workspace))
    except RecastError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


def build(entity: str, project: str, name: str = "RECAST") -> Workspace:
    """The workspace: accuracy by method, dataset and task parameters; curves, coefficients, plots, differing settings.

    Raises:
        MissingInputError: If wandb-workspaces is not installed.
    """
    try:
        import wandb_workspaces.reports.v2.interface as wr
        import wandb_workspaces.workspaces as ws
        from wandb_workspaces import expr
    except ImportError as error:
        raise MissingInputError(
            "dashboard: wandb-workspaces is not installed; pip install 'recast-exp[dashboard]'"
        ) from error

    mean: dict[str, Any] = {"groupby_aggfunc": "mean", "groupby_rangefunc": "stddev"}

    def curve(title: str, *metrics: str, **options: Any) -> wr.LinePlot:
        return wr.LinePlot(title=title, x="epoch", y=list(metrics), title_x="epoch", **mean, **options)

    def against_accuracy(title: str, metric: str) -> wr.ScatterPlot:
        x, y = wr.SummaryMetric(metric), wr.SummaryMetric(ACCURACY)
        return wr.ScatterPlot(title=title, x=x, y=y, log_x=True)

    sections = [
        ws.Section(
            name="Accuracy by method and dataset",
            is_open=True,
            pinned=True,
            panels=[
                wr.BarPlot(title="test accuracy", metrics=[ACCURACY], title_x="test accuracy", **mean),
                wr.BarPlot(
                    title="validation accuracy", metrics=["val/accuracy"], title_x="validation accuracy", **mean
                ),
                wr.BarPlot(title="linear probe, test accuracy", metrics=["probe/test/accuracy"], **mean),
            ],
        ),
        ws.Section(
            name="Accuracy against the size of a task",
            is_open=True,
            panels=[
                against_accuracy("test accuracy against task parameters, without the head", SIZE),
                against_accuracy("test accuracy against bits of a task, without the head", "parameters/task_bits"),
                against_accuracy("test accuracy against seconds of training", "seconds"),
            ],
        ),
        ws.Section(
            name="Learning curves",
            is_open=True,
            panels=[
                curve("validation accuracy", "val/accuracy"),
                curve("training loss", "train/loss"),
                curve("validation loss", "val/loss"),
                curve("training accuracy", "train/accuracy"),
                curve("learning rate of the head", "lr/head"),
            ],
        ),
        ws.Section(
            name="Coefficients over time",
            is_open=True,
            panels=[
                curve("mean absolute change from the mimicked start", CHANGE),
                curve("by group of layers", metric_regex=f"{CHANGE}/.*"),
            ],
        ),
        ws.Section(
            name="Plots", panels=[wr.MediaBrowser(title="plots", media_keys=[f"plots/{stem}" for stem in IMAGES])]
        ),
        ws.Section(name="Runs side by side", panels=[wr.RunComparer(diff_only="split")]),
    ]
    return ws.Workspace(
        entity=entity,
        project=project,
        name=name,
        sections=sections,
        settings=ws.WorkspaceSettings(x_axis="epoch", max_runs=100),
        runset_settings=ws.RunsetSettings(
            groupby=[expr.Config("dataset"), expr.Config("method")],
            order=[expr.Ordering(expr.Summary(ACCURACY), ascending=False)],
            pinned_columns=[f"summary:{ACCURACY}", "summary:val/accuracy", f"summary:{SIZE}", "config:seed"],
        ),
    )


def spec(workspace: Workspace) -> str:
    """A workspace as the JSON that would be sent."""
    view = workspace._to_model()
    return json.dumps(view.spec.model_dump(mode="json", by_alias=True, exclude_none=True), indent=2)


def save(workspace: Any) -> str:
    """Save a workspace. Returns its address.

    Raises:
        UserError: If W&B has no key, or refuses the workspace.
    """
    import wandb

    wandb.setup(settings=wandb.Settings(silent=True))
    try:
        if not wandb.login(prompt=False):
            raise UserError("dashboard: W&B has no API key; set WANDB_API_KEY or run `wandb login`, or use --dry-run")
        return str(workspace.save().url)
    except RecastError:
        raise
    except Exception as error:  # of W&B, of its GraphQL client, or of the connection
        raise UserError(f"dashboard: W&B refused the workspace: {one_line(error, limit=300)}") from error


if __name__ == "__main__":
    sys.exit(main())
