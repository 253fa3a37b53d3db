"""What attacks start from: a finished run and an interrupted one, a bank, weights, images; made once, then copied."""

from __future__ import annotations

import json
import shutil
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from recast_exp.cli import main as cli
from recast_exp.models.task_file import _checksum
from recast_exp.runs import layout
from support.fixtures_data import make_cub, make_flowers, make_folder

QUICK = ("model.pretrained=false", "logger=none", "probe=false", "trainer.max_epochs=1", "dataset.shots=2")
TASK = "recast_exp"
BANK = "recast_exp_bank"


@dataclass(frozen=True)
class Materials:
    """Good files, which an attack damages.

    Attributes:
        good: The folder of the originals, which nobody changes.
        here: A folder of this attack alone.
        cache: The cache that holds the templates of `good`.
    """

    good: Path
    here: Path
    cache: Path

    def copy(self, name: str) -> Path:
        """A copy of one of the originals in `here`."""
        source, target = self.good / name, self.here / name
        if source.is_dir():
            return Path(shutil.copytree(source, target))
        return Path(shutil.copy(source, target))

    def file(self, name: str, content: bytes | str) -> Path:
        """A new file in `here`."""
        path = self.here / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return path

    def task(self, change: Any) -> Path:
        """The task file with a record that `change` has been given; with the right checksum, as a forger would."""
        return self._changed("task.safetensors", TASK, change)

    def bank(self, change: Any) -> Path:
        """The bank with a record that `change` has been given."""
        return self._changed("bank.safetensors", BANK, change)

    def _changed(self, name: str, key: str, change: Any) -> Path:
        with safe_open(self.good / name, framework="pt") as file:
            record = json.loads(file.metadata()[key])
            tensors = {tensor: file.get_tensor(tensor) for tensor in file.keys()}  # noqa: SIM118
        before = record.get("checksum")
        text = change(record, tensors)
        if not isinstance(text, str):
            if key == TASK and isinstance(record, dict) and record.get("checksum") == before:
                record["checksum"] = _checksum(tensors, record)
            text = json.dumps(record)
        path = self.here / name
        save_file({tensor: value.contiguous() for tensor, value in tensors.items()}, path, {key: text})
        return path


def make(folder: Path, cache: Path) -> None:
    """Make the originals with the program itself."""
    base = [*QUICK, f"cache_dir={cache}", "model=vit_att", "training=joint", "trainer.limit_batches=1"]
    assert cli.run([*base, f"hydra.run.dir={folder / 'run'}"]) == 0
    shutil.copy(folder / "run" / layout.TASK, folder / "task.safetensors")
    for name, typed in (("frozen", ("model=vit_frozen",)), ("biases", ("model=vit_frozen", "adapter=bitfit"))):
        assert cli.run([*base, *typed, f"hydra.run.dir={folder / name}"]) == 0
    (bank,) = (cache / "banks").glob("*.safetensors")
    shutil.copy(bank, folder / "bank.safetensors")
    with pytest.MonkeyPatch.context() as patch:

        def failing(*_: object) -> None:
            raise RuntimeError("stopped here")

        patch.setattr("recast_exp.experiment.adaptation.test", failing)
        assert cli.run([*base, f"hydra.run.dir={folder / 'interrupted'}"]) == 1
    make_folder(folder / "images")
    make_cub(folder / "cub")
    make_flowers(folder / "flowers")
    torch.save({"x": torch.zeros(2)}, folder / "weights.pth")


def header(text: bytes) -> bytes:
    """A safetensors file that has nothing but this header."""
    return struct.pack("<Q", len(text)) + text
