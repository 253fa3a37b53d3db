"""Folders of runs that somebody or something has changed: `resume=` refuses them in one line, and harms nothing."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypedDict

import pytest
import torch

from recast_exp import schemas
from recast_exp.cli import main as cli
from recast_exp.errors import UserError
from recast_exp.recast import Banks
from recast_exp.recast.grouping import Group
from support.helpers import assert_one_line

OPTIONS = ("model.pretrained=false", "logger=none", "trainer.max_epochs=1", "dataset.shots=2", "probe=false")


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose images could not be tested; everything before is there."""
    folder = tmp_path_factory.mktemp("runs") / "run"

    def failing(*args: Any) -> None:
        raise RuntimeError("stopped here")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("recast_exp.experiment.adaptation.test", failing)
        assert cli.run([*OPTIONS, f"hydra.run.dir={folder}"]) == 1
    assert (folder / "checkpoints" / "last.ckpt").is_file()
    return folder


def checkpoint(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    """Changes the content of a run's checkpoint."""

    def damage(run: Path) -> None:
        path = run / "checkpoints" / "last.ckpt"
        content = torch.load(path, weights_only=True)
        change(content)
        torch.save(content, path)

    return damage


def no_number(content: dict[str, Any]) -> None:
    content["state_dict"][next(iter(content["state_dict"]))].fill_(torch.nan)


def folder_instead(run: Path) -> None:
    (run / "checkpoints" / "last.ckpt").unlink()
    (run / "checkpoints" / "last.ckpt").mkdir()


def text(name: str, content: str) -> Callable[[Path], object]:
    """Writes another file over one of a run."""
    return lambda run: (run / name).write_text(content)


ALIASES = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{at}: &a{at} [{', '.join([f'*a{at - 1}'] * 10)}]\n" for at in range(1, 12)
)

DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "NaN in the checkpoint": (checkpoint(no_number), "not made of finite numbers"),
    "no state in the checkpoint": (checkpoint(lambda found: found.pop("state_dict")), "which is damaged"),
    "a list for a state": (checkpoint(lambda found: found.update(state_dict=[])), "which is damaged"),
    "a text for an epoch": (checkpoint(lambda found: found.update(epoch="three")), "which is damaged"),
    "a folder for a checkpoint": (folder_instead, "which is damaged"),
    "a list for a configuration": (text(".hydra/config.yaml", "- a\n- b\n"), "is not the configuration of a run"),
    "nested aliases": (text(".hydra/config.yaml", ALIASES), "aliases counted as often as they are used"),
    "nested aliases among overrides": (text(".hydra/overrides.yaml", ALIASES), "aliases counted"),
    "deep YAML": (text(".hydra/config.yaml", "[" * 5000 + "]" * 5000), "nested more than 100 times"),
    "no YAML": (text(".hydra/config.yaml", "a: [b\n"), "config.yaml: line 2"),
    "bytes": (lambda run: (run / ".hydra/config.yaml").write_bytes(b"\xff\xfe\x00"), "expected YAML"),
}


def files_of(folder: Path) -> dict[str, bytes]:
    """Every file, but for the log."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.suffix != ".log"
    }


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_run_is_refused_before_anything_is_written(
    damage: str, interrupted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = Path(shutil.copytree(interrupted, tmp_path / "run"))
    change, expected = DAMAGES[damage]
    change(run)
    before = files_of(run)
    assert cli.run([f"resume={run}", f"cache_dir={tmp_path / 'cache'}"]) == 2
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 1 and errors[0].startswith("error: resume: ") and expected in errors[0], errors
    assert files_of(run) == before


@pytest.mark.parametrize(
    "content", ["", "null", "[]", "{}", '{"test/accuracy": null}', "NaN", '{"test/accuracy": 1e999}']
)
def test_damaged_metrics_are_measured_again(content: str, interrupted: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(interrupted, tmp_path / "run"))
    (run / "metrics.json").write_text(content)
    record = json.loads((run / "job.json").read_text())
    (run / "job.json").write_text(json.dumps(record | {"state": "finished"}))
    assert cli.run([f"resume={run}"]) == 0
    assert 0 <= json.loads((run / "metrics.json").read_text())["test/accuracy"] <= 1


@pytest.mark.parametrize("content", ["", "null", "[]", "[" * 100_000, '{"state": "finished"}', "9" * 6000])
def test_a_record_that_is_none_is_written_again(content: str, interrupted: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(interrupted, tmp_path / "run"))
    (run / "job.json").write_text(content)
    assert cli.run([f"resume={run}"]) == 0
    assert json.loads((run / "job.json").read_text())["state"] == "finished"


# Banks


def bank(**changes: Any) -> Banks:
    """A bank of two layers of 6 × 4, with some of its parts replaced."""
    group = changes.pop("group", Group("g", ("a", "b"), 2, 1))
    parts = {
        "templates": {"g": torch.ones(2, 6, 4)},
        "coefficients": {"a": torch.ones(2, 1, 2), "b": torch.ones(2, 1, 2)},
    }
    return Banks((group,), **(parts | changes), settings={})


COEFFICIENTS = torch.ones(2, 1, 2)
BANKS = {
    "other shape": {"templates": {"g": torch.ones(3, 6, 4)}},
    "vector": {"templates": {"g": torch.ones(2)}},
    "integers": {"templates": {"g": torch.ones(2, 6, 4, dtype=torch.int64)}},
    "half": {"templates": {"g": torch.ones(2, 6, 4).half()}},
    "zeros": {"templates": {"g": torch.zeros(2, 6, 4)}},
    "NaN": {"templates": {"g": torch.full((2, 6, 4), torch.nan)}},
    "empty": {"templates": {"g": torch.ones(2, 0, 4)}},
    "coefficients of another shape": {"coefficients": {"a": COEFFICIENTS, "b": torch.ones(2, 1, 3)}},
    "sets that differ": {"coefficients": {"a": COEFFICIENTS, "b": torch.ones(1, 1, 2)}},
    "infinite coefficients": {"coefficients": {"a": COEFFICIENTS, "b": torch.full((2, 1, 2), torch.inf)}},
    "blocks": {"group": Group("g", ("a", "b"), 2, 4)},
    "no blocks": {"group": Group("g", ("a", "b"), 2, 0)},
    "another count": {"group": Group("g", ("a", "b"), 3, 1)},
}


def test_a_whole_bank_is_read(tmp_path: Path) -> None:
    bank().save(tmp_path / "bank.safetensors")
    assert Banks.load(tmp_path / "bank.safetensors").hash == bank().hash


@pytest.mark.parametrize("case", BANKS)
def test_a_bank_that_fits_no_model(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "bank.safetensors"
    with pytest.raises(UserError) as error:
        bank(**BANKS[case]).save(path)
    assert_one_line(error, "banks: expected templates and coefficients that fit their groups")
    assert not path.exists()
    with monkeypatch.context() as patched:  # as a forger's program would
        patched.setattr(Banks, "check", lambda _: None)
        bank(**BANKS[case]).save(path)
    with pytest.raises(UserError) as error:
        Banks.load(path)
    assert_one_line(error, str(path), "expected template banks")


# JSON


class Needed(TypedDict):
    a: float


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b'{"a": NaN}', "no number of JSON"),
        (b'{"a": -Infinity}', "no number of JSON"),
        (b'{"a": 1e999}', "too large"),
        (b'{"a": "b"}', "a: expected a number, got text"),
        (b"[" * 200_000, "nested too deeply"),
        (b'{"a": ' + b"9" * 6000 + b"}", "too large for an integer"),
        (b"\xff", "decode"),
        (b"", "Expecting value"),
        (b"{}", "the entry `a` is missing"),
    ],
)
def test_json_is_read_against_its_schema(content: bytes, expected: str, tmp_path: Path) -> None:
    path = tmp_path / "file.json"
    path.write_bytes(content)
    with pytest.raises(UserError) as error:
        schemas.read_json(path, Needed, "numbers")
    assert_one_line(error, str(path), "expected numbers", expected)


def test_a_file_of_many_bytes_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "file.json"
    with path.open("wb") as file:
        file.truncate(schemas.LARGEST + 1)  # sparse: it takes no room
    with pytest.raises(UserError, match="bytes, where"):
        schemas.read_json(path, Needed, "numbers")


def test_names_that_are_no_text_are_read_back(tmp_path: Path) -> None:
    (tmp_path / "file.json").write_text('{"a": 1, "b": "image\\udce9.png"}')
    assert schemas.decode(tmp_path / "file.json", dict[str, Any])["b"] == "image\udce9.png"
