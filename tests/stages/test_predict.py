"""`stage=predict`: the same as evaluation, whatever the files are, in constant memory, and it goes on."""

from __future__ import annotations

import csv
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file

from recast_exp.cli import main as cli
from recast_exp.cli.check import CommandLine, check
from recast_exp.config.schema import Config, DatasetConfig
from recast_exp.data import load_dataset
from recast_exp.data.listing import images_at
from recast_exp.errors import MissingInputError, UserError
from recast_exp.experiment import prediction
from support.helpers import assert_one_line
from support.running import run_commands, run_stage

Compose = Callable[..., Config]


def lines(*typed: str) -> tuple[list[str], list[str]]:
    """What is wrong with a command, and what it misses."""
    found = check(CommandLine(typed))
    return found.wrong, found.missing


def table(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The digits' test images as files, in their order."""
    folder = tmp_path_factory.mktemp("digits")
    samples = load_dataset(DatasetConfig(name="digits", part="target"), "nowhere").splits["test"]
    for number, image in enumerate(samples.images):
        Image.fromarray(np.asarray(image)).save(folder / f"{number:04d}.png")
    return folder


@pytest.fixture(scope="module")
def trained(tiny: Compose, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two tasks of the digits: RECAST, and MeLo on the frozen backbone."""
    found = {}
    for name, typed in {"att": ("model=vit_att",), "melo": ("model=vit_frozen", "adapter=melo")}.items():
        folder = tmp_path_factory.mktemp("runs") / name
        run_stage(tiny(*typed), folder)
        found[name] = folder / "task.safetensors"
    return found


@pytest.fixture
def predict(tiny: Compose, trained: dict[str, Path], tmp_path: Path) -> Callable[..., dict[str, Any]]:
    def predict(images: Path | str, *typed: str, task: str = "", folder: Path = tmp_path) -> dict[str, Any]:
        own = ("stage=predict", f"task={task or trained['att']}", f"stage.images={images}", *typed)
        folder.mkdir(exist_ok=True)
        return run_stage(tiny(*own), folder)

    return predict


def test_as_evaluation(
    predict: Callable[..., Any], tiny: Compose, trained: dict[str, Path], digits: Path, tmp_path: Path
) -> None:
    metrics = predict(digits, "stage.batch_size=50", folder=tmp_path / "predicted")
    settings = tiny("stage=evaluate", "model=vit_att", f"task={trained['att']}")
    settings.trainer.limit_batches = None
    run_stage(settings, tmp_path / "evaluated")
    rows, expected = (table(tmp_path / name / "predictions.csv") for name in ("predicted", "evaluated"))
    assert len(rows) == len(expected) == metrics["images"] == len(list(digits.iterdir()))
    for row, other in zip(rows, expected, strict=True):
        assert row["class"] == other["predicted"]
        assert float(row["probability"]) == pytest.approx(float(other["probability"]), abs=1e-5)
        assert sum(float(row[name]) for name in row if name.startswith("probability")) == pytest.approx(1, abs=1e-5)
    entries = [json.loads(line) for line in (tmp_path / "predicted" / "predictions.jsonl").read_text().splitlines()]
    assert [entry["class"] for entry in entries] == [row["class"] for row in rows]
    assert all(entry["top"][0] == [entry["class"], entry["probability"]] for entry in entries)
    with Image.open(tmp_path / "predicted" / "plots" / "predictions.png") as image:
        image.verify()


def test_several_tasks(predict: Callable[..., Any], trained: dict[str, Path], digits: Path, tmp_path: Path) -> None:
    alone = {}
    for name, path in trained.items():
        predict(digits, task=str(path), folder=tmp_path / name)
        alone[name] = [row["class"] for row in table(tmp_path / name / "predictions.csv")]
    both = f"[{trained['att']},{trained['melo']}]"
    predict(digits, task=both, folder=tmp_path / "both")
    rows = table(tmp_path / "both" / "predictions.csv")
    assert [row["task"] for row in rows[:2]] == ["att/task", "melo/task"]
    for name in trained:
        assert [row["class"] for row in rows if row["task"] == f"{name}/task"] == alone[name]


def test_files_of_all_kinds(
    predict: Callable[..., Any], digits: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "some images ü"
    (folder / "deep" / "er").mkdir(parents=True)
    source = Image.open(digits / "0000.png").convert("RGB")
    for mode, name in {
        "L": "grey.png",
        "RGBA": "alpha.png",
        "P": "palette.png",
        "CMYK": "cmyk.jpg",
        "1": "bits.png",
    }.items():
        source.convert(mode).save(folder / name)
    Image.fromarray(np.full((8, 8), 2**15, dtype=np.uint16)).save(folder / "deep" / "sixteen bits.png")
    source.resize((300, 20)).save(folder / "deep" / "er" / "wide.webp")
    (folder / "text.jpg").write_text("no image")
    (folder / "empty.png").touch()
    (folder / "deep" / "cut.png").write_bytes((digits / "0000.png").read_bytes()[:-30])
    (folder / "notes.md").write_text("ignored")
    metrics = predict(folder, folder=tmp_path / "run")
    assert (metrics["images"], metrics["broken"]) == (7, 3)
    assert [Path(row["image"]).name for row in table(tmp_path / "run" / "predictions.csv")] == [
        *("alpha.png", "bits.png", "cmyk.jpg", "grey.png", "palette.png", "sixteen bits.png", "wide.webp")
    ]
    broken = {Path(row["image"]).name: row["reason"] for row in table(tmp_path / "run" / "broken.csv")}
    assert set(broken) == {"text.jpg", "empty.png", "cut.png"} and all(broken.values())
    assert sum("is left out" in message for message in caplog.messages) == 3


def test_the_places_of_images(digits: Path, tmp_path: Path) -> None:
    for name in ("a/1.png", "a/b/2.png", "a/b/c/3.jpg", "d/4.png", "d/5.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes((digits / "0000.png").read_bytes())

    def found(where: str) -> list[str]:
        return [str(path.relative_to(tmp_path)) for path in images_at(f"{tmp_path}/{where}".rstrip("/"))]

    assert found("") == ["a/1.png", "a/b/2.png", "a/b/c/3.jpg", "d/4.png"]
    assert found("*/*.png") == ["a/1.png", "d/4.png"]
    assert found("**/*.png") == ["a/1.png", "a/b/2.png", "d/4.png"]
    assert found("a/**/[23].*") == ["a/b/2.png", "a/b/c/3.jpg"]
    assert found("d/4.png") == ["d/4.png"]
    (tmp_path / "list.txt").write_text(f"{tmp_path}/d/4.png\n\n{tmp_path}/a/1.png\n")
    assert found("list.txt") == ["d/4.png", "a/1.png"]
    for nothing in ("nowhere", "*.png", "d/*.gif"):
        with pytest.raises(MissingInputError, match=r"^stage\.images: expected"):
            found(nothing)


def test_lists_as_other_systems_write_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("a.png", "b.png", "im/a/b/b/x.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "bom.txt").write_bytes(b"\xef\xbb\xbfa.png\r\nb.png\r\n")
    assert [str(path) for path in images_at("bom.txt")] == ["a.png", "b.png"]
    long = "x" * 300
    (tmp_path / "long.txt").write_text(f"a.png\n{long}\nb.png\n")
    assert [str(path) for path in images_at("long.txt")] == ["a.png", long, "b.png"]
    (tmp_path / "wide.txt").write_text("a.png\n", encoding="utf-16")
    with pytest.raises(UserError, match=r"^stage.images: expected a list in UTF-8, got wide.txt in UTF-16"):
        next(images_at("wide.txt"))
    assert [str(path) for path in images_at("im/**/b/**/*.png")] == ["im/a/b/b/x.png"]


def test_a_million_paths_are_not_gathered(monkeypatch: pytest.MonkeyPatch) -> None:
    """The generator is asked for a few batches ahead, never for all."""
    asked = 0

    def endless() -> Iterator[Path]:
        nonlocal asked
        while True:
            asked += 1
            yield Path(f"{asked}.png")

    batches = prediction._decoded(endless(), [], 10, 1000)
    taken = list(itertools.islice(batches, 5))
    assert [len(batch) for batch in taken] == [10] * 5
    assert asked <= (5 + prediction.AHEAD) * 10


def test_other_predictions_in_the_folder(predict: Callable[..., Any], digits: Path, tmp_path: Path) -> None:
    predict(f"{digits}/000?.png")
    before = (tmp_path / "predictions.csv").read_bytes()
    again = predict(f"{digits}/000?.png")
    assert again["images"] == 10
    assert (tmp_path / "predictions.csv").read_bytes() == before
    for typed in ((f"{digits}/001?.png",), (f"{digits}/000?.png", "stage.top=2")):
        with pytest.raises(UserError) as error:
            predict(*typed)
        assert_one_line(error, "hydra.run.dir", tmp_path, "choose a new folder")
    assert (tmp_path / "predictions.csv").read_bytes() == before


def test_files_that_no_run_has_written_stay(
    trained: dict[str, Path], digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "predictions.csv").write_text("mine")
    typed = ("stage=predict", f"task={trained['att']}", f"stage.images={digits}", f"hydra.run.dir={tmp_path}")
    assert cli.run([*typed]) == 2
    assert "which has a predictions.csv already" in capsys.readouterr().err
    assert (tmp_path / "predictions.csv").read_text() == "mine"


def test_another_stage_is_refused_in_its_folder(
    trained: dict[str, Path], weights: dict[str, Path], digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    common = (f"task={trained['att']}", f"model.weights={weights['digits_vit']}", f"hydra.run.dir={tmp_path}")
    assert cli.run(["stage=predict", f"stage.images={digits}/000?.png", *common]) == 0
    before = (tmp_path / "predictions.csv").read_bytes()
    for typed in (["stage=evaluate"], ["stage=predict", f"stage.images={digits}/001?.png"]):
        assert cli.run([*typed, *common]) == 2
        assert "was started with stage" in capsys.readouterr().err
    assert (tmp_path / "predictions.csv").read_bytes() == before


def test_a_list_with_a_line_of_any_length(tmp_path: Path) -> None:
    path = tmp_path / "list.txt"
    path.write_bytes(bytes(1 << 17))
    with pytest.raises(UserError, match="which has a line of 65,536 characters or more"):
        list(images_at(str(path)))


def test_images_that_have_changed_since(predict: Callable[..., Any], digits: Path, tmp_path: Path) -> None:
    images = tmp_path / "images"
    images.mkdir()
    for path in sorted(digits.iterdir())[:3]:
        shutil.copy(path, images / f"b{path.name}")
    run = tmp_path / "run"
    predict(images, folder=run)
    before = {path: path.read_bytes() for path in run.iterdir() if path.is_file()}
    shutil.copy(next(digits.iterdir()), images / "a.png")  # comes first: the last one would be predicted again
    with pytest.raises(UserError) as error:
        predict(images, folder=run)
    assert_one_line(error, "hydra.run.dir", run, "some have been added, removed or renamed since")
    assert before == {path: path.read_bytes() for path in run.iterdir() if path.is_file()}
    (images / "a.png").rename(images / "c.png")  # comes last: nothing before it has changed
    assert predict(images, folder=run)["images"] == 4
    assert len(table(run / "predictions.csv")) == 4


@pytest.mark.parametrize("name", ["predictions.csv", "predictions.jsonl", "broken.csv"])
@pytest.mark.parametrize("change", ["removed", "cut", "folder"])
def test_files_of_predictions_that_are_not_whole(
    name: str, change: str, predict: Callable[..., Any], digits: Path, tmp_path: Path
) -> None:
    predict(f"{digits}/000?.png")
    path = tmp_path / name
    content = path.read_bytes()
    path.unlink()
    if change == "cut":
        path.write_bytes(content[:-1])
    elif change == "folder":
        path.mkdir()
    before = {each: each.read_bytes() for each in tmp_path.iterdir() if each.is_file()}
    with pytest.raises(UserError) as error:
        predict(f"{digits}/000?.png")
    assert_one_line(error, "hydra.run.dir", path, "is not there, or shorter than progress.json says")
    assert before == {each: each.read_bytes() for each in tmp_path.iterdir() if each.is_file()}


@pytest.mark.parametrize("entry", ["seen", "broken", "seconds", "sizes"])
def test_progress_that_cannot_be(entry: str, predict: Callable[..., Any], digits: Path, tmp_path: Path) -> None:
    predict(f"{digits}/000?.png")
    path = tmp_path / "progress.json"
    content = json.loads(path.read_text())
    path.write_text(json.dumps(content | {entry: {"predictions.csv": -5} if entry == "sizes" else -1}))
    with pytest.raises(UserError) as error:
        predict(f"{digits}/000?.png")
    assert_one_line(error, "hydra.run.dir", path, "is damaged")


def test_no_image_that_can_be_read(predict: Callable[..., Any], tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "a.png").write_bytes(b"nothing")
    with pytest.raises(UserError) as error:
        predict(tmp_path / "images", folder=tmp_path / "run")
    assert_one_line(error, "stage.images: expected images, got 1 files", "broken.csv says why")


def test_wrong_commands(trained: dict[str, Path], digits: Path, tmp_path: Path) -> None:
    task = f"task={trained['att']}"
    assert lines("stage=predict", task)[0] == [
        "stage.images: expected a folder, a pattern, a list (.txt) or an image, got nothing"
    ]
    wrong, missing = lines("stage=predict", task, f"stage.images={tmp_path}/nowhere")
    assert not wrong and len(missing) == 1 and "is not there" in missing[0]
    other = f"task=[{trained['att']},{tmp_path}/gone.safetensors]"
    assert "gone.safetensors" in lines("stage=predict", other, f"stage.images={digits}")[1][0]
    assert lines("stage=predict", task, f"stage.images={digits}", "stage.top=0")[0] == [
        "stage.top: expected an integer ≥ 1, got 0"
    ]


@pytest.mark.parametrize("stage", [("evaluate",), ("predict", "stage.images=DIGITS")])
def test_other_weights_are_refused_before_anything_is_written(
    stage: tuple[str, ...],
    trained: dict[str, Path],
    digits: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    torch.manual_seed(7)
    save_file(timm.create_model("digits_vit", num_classes=0).state_dict(), tmp_path / "other.safetensors")
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    more = [text.replace("DIGITS", str(digits)) for text in stage[1:]]
    given = [f"stage={stage[0]}", *more, f"task={trained['att']}", f"model.weights={tmp_path}/other.safetensors"]
    assert cli.run(given) == 2
    error = capsys.readouterr().err
    assert "error: model: expected digits_vit with the weights that" in error and "Traceback" not in error
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.slow
def test_a_killed_prediction_goes_on(
    trained: dict[str, Path], weights: dict[str, Path], digits: Path, tmp_path: Path
) -> None:
    command = ["stage=predict", f"task={trained['att']}", f"stage.images={digits}"]
    command += ["stage.batch_size=3", "trainer.accelerator=cpu", f"model.weights={weights['digits_vit']}"]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    started = [sys.executable, "-m", "recast_exp", *command, f"hydra.run.dir={killed}"]
    process = subprocess.Popen(started, start_new_session=True)
    end = time.monotonic() + 60
    while time.monotonic() < end:
        if (killed / "progress.json").is_file() and (killed / "predictions.csv").stat().st_size > 5000:
            break
        time.sleep(0.002)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert not (killed / "metrics.json").is_file()
    done = json.loads((killed / "progress.json").read_text())["seen"]
    assert 0 < done < len(list(digits.iterdir()))
    with (killed / "predictions.csv").open("ab") as file:
        file.write(b"half a li")  # as if the kill had come within a batch
    run_commands(*([*command, f"hydra.run.dir={folder}"] for folder in (killed, whole)))
    for name in ("predictions.csv", "predictions.jsonl", "broken.csv"):
        assert (killed / name).read_bytes() == (whole / name).read_bytes()
