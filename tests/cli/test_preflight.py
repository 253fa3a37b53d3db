"""A request that cannot be carried out is refused in one line, before anything is written."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest
from safetensors.torch import save_file
from torch import ones, zeros

from recast_exp.cli import main as cli
from recast_exp.cli.job import out_of_room
from recast_exp.config.schema import DatasetConfig
from recast_exp.data import read_official
from recast_exp.data.protocol import choose
from recast_exp.experiment import check
from recast_exp.recast import Banks
from recast_exp.recast.grouping import Group
from support.fixtures_data import make_folder

DIGITS = ("model.pretrained=false", "logger=none")

REFUSED = {
    "a class": (("dataset.classes=[nope]",), 2, "dataset.classes: expected names or patterns such as 5, 6, 7, got"),
    "a device": (("trainer.accelerator=gpu", "trainer.devices=1"), 2, "trainer.accelerator: expected auto, cpu"),
    "a cache": (("cache_dir=FILE",), 2, "cache_dir: FILE cannot be written to"),
    "weights": (
        ("model.pretrained=true", "model.weights=FILE"),
        2,
        "model.weights: expected a file of weights, a",
    ),
    "weights of another model": (
        ("model.pretrained=true", "model.weights=TENSORS"),
        2,
        "model.weights: expected the weights of",
    ),
    "a bank": (("bank=FILE",), 2, "bank: FILE: expected a safetensors file"),
    "a method": (("stage=compare", "stage.methods=[nope]"), 2, "stage.methods: expected names or patterns of linear"),
    "a rank": (("adapter=melo", "adapter.rank=1000000"), 2, "adapter: expected at most the 1,348,704 parameters of"),
    "a seed twice": (("-m", "seed=1,1"), 2, "seed: expected each value once, got 1 more than once in 1,1"),
    "threads": (("trainer.num_threads=100000",), 2, "trainer.num_threads: expected an integer ≥ 1 and ≤ 512 or null"),
    "a mean": (("model.mean=[nan,0,0]", "model.std=[1,1,1]"), 2, "model.mean: expected a list of numbers or null"),
    "a size": (
        ("model.backbone=vit_tiny_patch16_224", "model.img_size=225"),
        2,
        "model.img_size: expected a multiple of 16, the patch size of vit_tiny_patch16_224",
    ),
    "a folder": (("dataset=folder", "dataset.path=NOWHERE"), 3, "dataset.path: expected the folder of"),
    "too few images": (
        ("dataset=folder", "dataset.path=IMAGES", "model.backbone=vit_tiny_patch16_224"),
        2,
        "expected at least 3 images, one for each split",
    ),
    "one image of each class": (
        ("dataset.shots=1", "training=through_head"),
        2,
        "training: expected joint, or a class with two training images",
    ),
    "a sweep": (("-m", "model=vit_att,vit_mlp", "dataset.classes=[nope]"), 2, "dataset.classes: expected names"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_nothing_is_written(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    typed, code, expected = REFUSED[case]
    inputs, here = tmp_path / "inputs", tmp_path / "here"
    inputs.mkdir()
    here.mkdir()
    (inputs / "file").write_bytes(b"neither weights nor a folder")
    save_file({"x": zeros(2)}, inputs / "tensors.safetensors")
    for path in make_folder(inputs / "images").rglob("*.png"):
        if path.name != "0.png":
            path.unlink()
    places = {"FILE": "file", "TENSORS": "tensors.safetensors", "NOWHERE": "nowhere", "IMAGES": "images"}
    arguments = [*DIGITS, f"cache_dir={tmp_path / 'cache'}", *typed]
    for word, name in places.items():
        arguments = [text.replace(word, str(inputs / name)) for text in arguments]
        expected = expected.replace(word, str(inputs / name))
    if any(text.startswith("cache_dir=") for text in typed):
        arguments.remove(f"cache_dir={tmp_path / 'cache'}")
    monkeypatch.chdir(here)
    assert cli.run(arguments) == code
    errors = capsys.readouterr().err.splitlines()
    assert [line for line in errors if line.startswith("error: ") and expected in line]
    assert not [line for line in errors if "Traceback" in line]
    assert list(here.iterdir()) == []


def test_a_file_is_read_once_for_all_jobs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    group = Group("blocks.0-1.attn.qkv", ("blocks.0.attn.qkv", "blocks.1.attn.qkv"), 2, 1)
    templates, coefficients = {group.name: ones(2, 3, 3)}, {layer: zeros(2, 1, 2) for layer in group.layers}
    Banks((group,), templates, coefficients, {}).save(tmp_path / "bank.safetensors")
    loads: list[Path] = []
    load = Banks.load

    def counted(path: Path, expected_hash: str | None = None) -> Banks:
        loads.append(path)
        return load(path, expected_hash)

    monkeypatch.setattr(Banks, "load", counted)
    arguments = [*DIGITS, f"cache_dir={tmp_path / 'cache'}", f"bank={tmp_path / 'bank.safetensors'}"]
    assert cli.run(["-m", *arguments, "seed=1,2", "optimizer.lr=0.1,0.2", "dataset.classes=[nope]"]) == 2
    assert len(loads) == 1
    assert capsys.readouterr().err.count("dataset.classes") == 1


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (
            OSError(errno.ENOSPC, "No space left on device", "/full/metrics.json"),
            "/full/metrics.json cannot be written",
        ),
        (OSError(errno.EROFS, "Read-only file system"), "run cannot be written to (Read-only file system)"),
        (OSError(errno.EFBIG, "File too large"), "run cannot be written to (File too large)"),
        (RuntimeError("basic_ios::clear: iostream error"), "run cannot be written to (Input/output error)"),
        (OSError(errno.EIO, "Input/output error"), "run cannot be written to (Input/output error)"),
        (
            OSError(errno.EMFILE, "Too many open files"),
            "too many files are open ([Errno 24] Too many open files); raise",
        ),
        (MemoryError(), "memory: there is not enough (MemoryError); lower dataset.batch_size"),
        (
            RuntimeError("[enforce] DefaultCPUAllocator: can't allocate memory: 9\nmore"),
            "can't allocate memory: 9); lower",
        ),
        (OSError(errno.ENOENT, "No such file"), None),
        (RuntimeError("a bug"), None),
    ],
)
def test_what_the_machine_lacks_is_one_line(error: Exception, expected: str | None) -> None:
    line = out_of_room(error, Path("run"))
    assert (line is None) == (expected is None)
    if line is not None and expected is not None:
        assert expected in line
        assert "\n" not in line


def test_what_the_run_says_is_not_said_before(caplog: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    path = make_folder(tmp_path)
    (next(path.iterdir()) / "@eaDir").mkdir()
    caplog.set_level("INFO")
    settings = DatasetConfig(name="folder", path=str(path), shots=1000, split="random_80_20")
    check._check_images(settings, str(tmp_path), None)
    assert caplog.records == []
    choose(settings, read_official(settings, tmp_path))
    assert "fewer training images" in caplog.text
    assert "@eaDir" in caplog.text
