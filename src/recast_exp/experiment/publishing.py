"""The procedure of `stage=publish`: a task file with its model card, sent to the Hugging Face Hub or shown."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.errors import LocalTokenNotFoundError

from recast_exp.config.schema import Config
from recast_exp.errors import UserError, first_line
from recast_exp.export._base import facts_of
from recast_exp.export.card import model_card
from recast_exp.files import replacing, write_text, writing
from recast_exp.models.loading import Task, load_task
from recast_exp.runs import layout
from recast_exp.runs.hub import TASK
from recast_exp.runs.results import Metrics

log = logging.getLogger(__name__)

CARD = "README.md"
_SENT = CARD, TASK

LOAD = """import timm, recast_exp
task = recast_exp.load_task("hf://{repo}")
model = timm.create_model(task.backbone, pretrained=True{size})
model = recast_exp.apply_task(model, task)  # images [N, 3, {pixels}, {pixels}] → logits [N, {classes}]
print(task.classes, task.input)
"""


def run(settings: Config, run_dir: Path, repo: str, *, dry_run: bool, private: bool) -> Metrics:
    """Write the files of a repository, and send them unless it is a dry run.

    Args:
        settings: The settings of the command, with the task file.
        run_dir: Folder of the run; the files go into `publish` in it.
        repo: The repository.
        dry_run: Whether nothing is sent.
        private: Whether a new repository is private.

    Raises:
        UserError: If there is no token, or the Hub refuses.
    """
    task = load_task(settings.task or "")
    folder = run_dir / layout.PUBLISH
    with writing(folder):
        folder.mkdir(exist_ok=True)
    with replacing(folder / TASK) as temporary:
        shutil.copyfile(task.path, temporary)
    facts = facts_of(task, own_weights=settings.model.weights is not None)
    size = task.settings.img_size
    load = LOAD.format(
        repo=repo,
        size="" if size is None else f", img_size={size}",
        pixels=task.input.size,
        classes=len(task.classes),
    )
    write_text(folder / CARD, model_card(facts, load, parameters=counted(task)))
    sizes = {name: (folder / name).stat().st_size for name in _SENT}
    listed = ", ".join(f"{name} ({size:,} bytes)" for name, size in sizes.items())
    if dry_run:
        log.info("Nothing is sent. To %s would go %s: %s", repo, listed, folder)
        log.info("Read %s; then stage.dry_run=false sends it.", folder / CARD)
    else:
        log.info("Sent to %s: %s", _send(folder, repo, private), listed)
    return {"bytes": sum(sizes.values()), "sent": float(not dry_run)}


def counted(task: Task) -> str:
    """What a task file holds, in words: every number of it."""
    kinds = {"coefficients": 0, "adapter": 0, "backbone": 0, "buffers": 0, "fixed": 0, "head": 0}
    for name, tensor in task.tensors.items():
        kind = name.partition("/")[0]
        if kind in kinds:  # not the relative form, which is the coefficients once more
            kinds[kind] += tensor.numel() * (1 if tensor.is_floating_point() else 8 * tensor.element_size())
    names = {"buffers": "running statistics", "fixed": "fixed numbers of the adapter"}
    parts = [f"{count:,} {names.get(kind, kind)}" for kind, count in kinds.items() if count]
    return f"{' + '.join(parts)}; {task.path.stat().st_size / 1000:,.1f} kB"


def _send(folder: Path, repo: str, private: bool) -> str:
    api = HfApi()
    try:
        api.create_repo(repo, private=private, exist_ok=True)
        done = api.upload_folder(
            repo_id=repo,
            folder_path=folder,
            allow_patterns=[*_SENT],  # whatever else lies there
            commit_message="Task file and model card of recast_exp",
        )
    except LocalTokenNotFoundError as error:
        raise UserError(
            "stage.dry_run: expected a token of the Hugging Face Hub to send with, got none; set HF_TOKEN, or run hf "
            "auth login"
        ) from error
    except Exception as error:  # those of the Hub's client, and of the one for HTTP below it
        raise UserError(
            f"stage.repo: {repo} does not take it ({first_line(error)}); is there a network, and does HF_TOKEN write?"
        ) from error
    return str(done.commit_url)
