"""`stage=publish` and `hf://`: nothing is sent unless it is asked for, and what is sent comes back as it was."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import HfApi
from huggingface_hub.errors import LocalEntryNotFoundError

from recast_exp.cli.check import CommandLine, check
from recast_exp.config.schema import Config
from recast_exp.errors import MissingInputError, UserError
from recast_exp.experiment import publishing
from recast_exp.experiment.publishing import counted
from recast_exp.export import card
from recast_exp.export._base import facts_of
from recast_exp.models.loading import load_task
from recast_exp.runs import hub as addresses
from support.helpers import assert_one_line
from support.hub import Hub
from support.running import run_stage

Compose = Callable[..., Config]


@pytest.fixture
def hub() -> Iterator[Hub]:
    hub = Hub()
    yield hub
    hub.close()


@pytest.fixture(scope="module")
def trained(tiny: Compose, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    run_stage(tiny("model=vit_att"), folder)
    return folder / "task.safetensors"


@pytest.fixture
def program(hub: Hub, tmp_path: Path, weights: dict[str, Path]) -> Callable[..., subprocess.CompletedProcess[str]]:
    """The program, whose Hub is the stand-in."""

    def program(*typed: str, token: str | None = "hf_secret", code: int = 0) -> subprocess.CompletedProcess[str]:
        environment = {**os.environ, "HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "hf"), "HF_HUB_DISABLE_XET": "1"}
        environment.pop("HF_HUB_OFFLINE", None)
        environment.pop("HF_TOKEN", None)
        if token:
            environment["HF_TOKEN"] = token
        own = [f"model.weights={weights['digits_vit']}", "trainer.accelerator=cpu"]
        done = subprocess.run(
            [sys.executable, "-m", "recast_exp", *typed, *own],
            cwd=tmp_path, env=environment, text=True, capture_output=True, timeout=120,
        )  # fmt: skip
        assert done.returncode == code, done.stderr
        return done

    return program


def test_a_dry_run_sends_nothing(program: Callable[..., Any], hub: Hub, trained: Path, tmp_path: Path) -> None:
    (tmp_path / "run" / "publish").mkdir(parents=True)
    (tmp_path / "run" / "publish" / ".env").write_text("SECRET=1")
    done = program("stage=publish", f"task={trained}", "stage.repo=me/digits", "hydra.run.dir=run", token=None)
    assert hub.requests == [] and hub.files == {}
    folder = tmp_path / "run" / "publish"
    assert ".env" not in done.stderr + done.stdout
    (folder / ".env").unlink()
    assert sorted(path.name for path in folder.iterdir()) == ["README.md", "task.safetensors"]
    assert (folder / "task.safetensors").read_bytes() == trained.read_bytes()
    assert "Nothing is sent. To me/digits would go README.md" in done.stderr + done.stdout
    card = (folder / "README.md").read_text(encoding="utf-8")
    front = yaml.safe_load(card.split("---")[1])
    assert front["datasets"] == ["digits"] and "recast" in front["tags"]
    assert '"hf://me/digits"' in card and "48 coefficients + 485 head" in card


@pytest.mark.slow
def test_what_is_sent_comes_back(program: Callable[..., Any], hub: Hub, trained: Path, tmp_path: Path) -> None:
    sent = program("stage=publish", f"task={trained}", "stage.repo=me/digits", "stage.dry_run=false")
    assert "Sent to" in sent.stderr + sent.stdout
    assert set(hub.files["me/digits"]) == {"README.md", "task.safetensors"}
    assert hub.files["me/digits"]["task.safetensors"] == trained.read_bytes()
    done = program("stage=evaluate", "task=hf://me/digits", "hydra.run.dir=hub")
    assert "test/accuracy" in done.stdout
    assert yaml.safe_load((tmp_path / "hub" / "parameters.json").read_text())["coefficients"] == 48
    missing = program("stage=evaluate", "task=hf://me/nowhere", code=3).stderr.splitlines()
    assert [line for line in missing if line.startswith("error: task: expected a file at hf://me/nowhere, got none")]
    hub.files["me/broken"] = {"task.safetensors": b"something else"}
    damaged = program("stage=evaluate", "task=hf://me/broken", code=2).stderr
    assert "which is no safetensors file or is cut short" in damaged


@pytest.mark.parametrize("token", [None, "hf_other"])
def test_without_a_token_or_with_a_wrong_one(
    token: str | None, hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def client() -> HfApi:
        return HfApi(endpoint=hub.url, token=token or False)

    monkeypatch.setattr(publishing, "HfApi", client)
    with pytest.raises(UserError) as error:
        publishing._send(tmp_path, "me/digits", private=True)
    assert_one_line(error, "stage.", "HF_TOKEN")
    assert hub.files == {}


def test_wrong_repositories(trained: Path) -> None:
    for repo in ("digits", "a/b/c"):
        found = check(CommandLine(("stage=publish", f"task={trained}", f"stage.repo={repo}"), inputs=False))
        assert found.wrong == [f"stage.repo: expected owner/name with stage=publish, got {repo}"]


@pytest.mark.parametrize("text", ["hf://", "hf://name", "hf://a/b/../c.safetensors", "hf://a/b/x.pth", "hf://a/b@"])
def test_addresses_that_are_none(text: str) -> None:
    for read in (addresses.local, load_task):
        with pytest.raises(UserError) as error:
            read(text)
        assert_one_line(error, "task: expected hf://owner/name", text)


def test_what_an_address_asks_for(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked = []

    def download(repo: str, file: str, revision: str | None) -> str:
        asked.append((repo, file, revision))
        return str(tmp_path / "x")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    for text in (
        *("hf://a/b", "hf://a/b@v1.0", "hf://a/b/sub/t.safetensors", "hf://a/b@main/t.safetensors"),
        *("hf://a/b@refs/pr/1", "hf://a/b@refs/pr/1/t.safetensors"),
    ):
        assert addresses.local(text) == tmp_path / "x"
    assert asked == [
        ("a/b", "task.safetensors", None),
        ("a/b", "task.safetensors", "v1.0"),
        ("a/b", "sub/t.safetensors", None),
        ("a/b", "t.safetensors", "main"),
        ("a/b", "task.safetensors", "refs/pr/1"),
        ("a/b", "t.safetensors", "refs/pr/1"),
    ]
    assert addresses.local("a/b.safetensors") == Path("a/b.safetensors")


@pytest.mark.parametrize("error", [LocalEntryNotFoundError("not in the disk cache"), Exception("407 Proxy")])
def test_without_a_network_the_cache_serves_or_a_line_says_so(
    error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    def offline(*_: Any, **__: Any) -> str:
        raise error

    monkeypatch.setattr("huggingface_hub.hf_hub_download", offline)
    with pytest.raises(MissingInputError) as found:
        addresses.local("hf://a/b")
    assert_one_line(found, "task: expected a file at hf://a/b, got none")


def test_the_licence_of_own_weights_is_not_guessed(trained: Path) -> None:
    task = dataclasses.replace(load_task(trained), backbone="vit_small_patch16_224.augreg_in21k_ft_in1k")
    known, own = facts_of(task), facts_of(task, own_weights=True)
    assert known.licence == "apache-2.0" and "hf_hub_id" in known.origin
    assert own.licence is None and set(own.origin) == {"backbone", "fingerprint"}
    assert "apache" not in card.model_card(own, "") and "base_model" not in card.model_card(own, "")


def test_what_a_file_says_is_no_markdown_and_may_be_no_text(trained: Path) -> None:
    facts = facts_of(load_task(trained))
    forged = dataclasses.replace(facts, origin=facts.origin | {"fingerprint": "x|\n# <b>"}, classes=("a", "\udcff"))
    assert "x\\| \\# \\<b\\>…" in card.model_card(forged, "")
    assert json.loads(forged.texts()["classes"].encode()) == ["a", "\udcff"]


def test_everything_in_a_file_is_counted(trained: Path) -> None:
    assert counted(load_task(trained)).startswith("48 coefficients + 485 head; ")
