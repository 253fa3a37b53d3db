"""An adapter and a dataset of other packages, installed by pip: the examples of the documentation, word for word."""

from __future__ import annotations

import itertools
import json
import os
import re
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from recast_exp.data.types import SPLITS

DOCS = Path(__file__).parents[2] / "docs"
ADAPTER, DATASET = DOCS / "adding-an-adapter.md", DOCS / "adding-a-dataset.md"
TINY = (
    *("trainer.max_epochs=1", "trainer.limit_batches=2", "trainer.accelerator=cpu", "probe=false"),
    *("model.pretrained=false", "dataset.num_workers=0"),
)


def block(page: Path, language: str) -> str:
    found = re.search(rf"```{language}\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)
    assert found, language
    return found[1]


def build_wheel(page: Path, folder: Path) -> Path:
    """The wheel that a build backend makes of the example's pyproject.toml; written by hand, to need no network."""
    project = tomllib.loads(block(page, "toml"))["project"]
    name, version = project["name"].replace("-", "_"), project["version"]
    info = f"{name}-{version}.dist-info"
    groups = project["entry-points"]
    ((group, points),) = groups.items()
    ((module,),) = (points.values(),)
    lines = [f"[{group}]", *(f"{point} = {module}" for point, module in points.items())]
    files = {
        f"{name}/__init__.py": "",
        f"{module.replace('.', '/')}.py": block(page, "python"),
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {version}\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        f"{info}/entry_points.txt": "\n".join(lines) + "\n",
    }
    files[f"{info}/RECORD"] = "".join(f"{file},,\n" for file in [*files, f"{info}/RECORD"])
    wheel = folder / f"{name}-{version}-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for file, content in files.items():
            archive.writestr(file, content)
    return wheel


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs the program with the example's package installed and its preset in a folder of its own."""
    # Asked in another process: once pip is imported, setuptools cannot be, which torch's C++ extensions need
    if subprocess.run([sys.executable, "-m", "pip", "--version"], capture_output=True).returncode:
        pytest.skip("pip is not installed")
    folder = tmp_path_factory.mktemp("elsewhere")
    for page, preset in ((ADAPTER, "adapter/mlp_shift.yaml"), (DATASET, "dataset/leaves.yaml")):
        path = folder / "my_conf" / preset
        path.parent.mkdir(parents=True)
        path.write_text(block(page, "yaml"), encoding="utf-8")
    wheels = [build_wheel(page, folder) for page in (ADAPTER, DATASET)]
    pip = (sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps", "--no-index")
    subprocess.run([*pip, "--target", folder / "site", *wheels], check=True, timeout=120)
    path = os.pathsep.join(filter(None, (str(folder / "site"), os.environ.get("PYTHONPATH"))))

    def program(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "recast_exp", "--config-dir=my_conf", *arguments]
        environment = {**os.environ, "PYTHONPATH": path}
        return subprocess.run(
            command, cwd=folder, env=environment, capture_output=True, text=True, timeout=200, check=False
        )

    return program


@pytest.mark.slow
def test_an_installed_adapter_trains_and_its_task_file_is_evaluated(
    program: Callable[..., subprocess.CompletedProcess[str]], tmp_path: Path
) -> None:
    trained = program("adapter=mlp_shift", *TINY, f"hydra.run.dir={tmp_path}/run")
    assert trained.returncode == 0, trained.stderr
    counts = json.loads((tmp_path / "run" / "parameters.json").read_text())
    assert counts["adapter"] == 12 * 96  # one vector for each block of the embedded ViT
    evaluated = program("stage=evaluate", f"task={tmp_path}/run/task.safetensors", f"hydra.run.dir={tmp_path}/again")
    assert evaluated.returncode == 0, evaluated.stderr
    accuracies = [
        json.loads((tmp_path / run / "metrics.json").read_text())["test/accuracy"] for run in ("run", "again")
    ]
    assert accuracies[0] == accuracies[1]


@pytest.mark.parametrize(
    ("typed", "expected"),
    [
        ("adapter.scale=0", r"error: adapter\.scale: expected a number > 0, got 0\.0"),
        ("adapter.scael=1", r"error: adapter\.scael: unknown option.* takes scale; did you mean adapter\.scale\?"),
    ],
)
def test_a_wrong_option_of_an_installed_adapter_is_refused_in_one_line(
    program: Callable[..., subprocess.CompletedProcess[str]], typed: str, expected: str
) -> None:
    refused = program("adapter=mlp_shift", typed, "model.pretrained=false")
    assert refused.returncode == 2
    assert re.fullmatch(expected, refused.stderr.strip())


def test_an_installed_adapter_without_its_preset_is_told_where_it_is_looked_for(
    program: Callable[..., subprocess.CompletedProcess[str]],
) -> None:
    refused = program("--config-dir=site", "adapter=mlp_shift", "model.pretrained=false")  # the last of two counts
    assert refused.returncode == 2
    assert refused.stderr == (
        "error: adapter: mlp_shift is installed, but adapter/mlp_shift.yaml, its preset, is not there; pass the folder "
        "that holds it with --config-dir\n"
    )


@pytest.mark.slow
def test_an_installed_dataset_is_read_and_trains(
    program: Callable[..., subprocess.CompletedProcess[str]], tmp_path: Path
) -> None:
    images = tmp_path / "data" / "leaves" / "images"
    images.mkdir(parents=True)
    rows = ["file,species,split"]
    for number, (species, split) in enumerate(itertools.product(("ash", "oak"), ("train", "val", "test") * 4)):
        file = f"{number}.png"
        Image.new("RGB", (40, 40), (200, 10 * number, 0)).save(images / file)
        rows.append(f"{file},{species},{split}")
    data = f"data_dir={tmp_path / 'data'}"
    missing = program("dataset=leaves", data, "model.pretrained=false")
    assert (missing.returncode, missing.stderr.count("\n")) == (3, 1)
    assert "error: dataset leaves: no file " in missing.stderr
    (images.parent / "leaves.csv").write_text("\n".join(rows), encoding="utf-8")
    typed = ("dataset=leaves", data, "model.backbone=digits_vit", "dataset.batch_size=4", *TINY)
    trained = program(*typed, f"hydra.run.dir={tmp_path}/run")
    assert trained.returncode == 0, trained.stderr
    card = json.loads((tmp_path / "run" / "dataset.json").read_text())
    assert (card["name"], card["classes"], card["images"]) == ("leaves", ["ash", "oak"], dict.fromkeys(SPLITS, 8))
