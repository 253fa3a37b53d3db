"""Readers of files get bytes that nobody has thought of: each answers with its own error, or reads them."""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from recast_exp import schemas
from recast_exp.config import grammar
from recast_exp.data.images import read_image
from recast_exp.data.preprocessing import Decoding
from recast_exp.data.unpack import ArchiveError, extract
from recast_exp.errors import RecastError, UserError
from recast_exp.recast import Banks
from recast_exp.runs import record
from recast_exp.runs.sweep import SweepRecord
from recast_exp.runs.task_header import read_record
from recast_exp.schemas import check_yaml

FUZZ = settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=12), inner, max_size=4),
    max_leaves=12,
)
"""Anything that JSON can say, NaN and infinity included."""

ENTRIES = (
    *("format", "config", "bank", "backbone", "classes", "input", "eval_batch_size", "templates", "metrics"),
    *("groups", "settings", "origin", "hash", "jobs", "command", "state", "label", "epoch"),
)
RECORD = st.fixed_dictionaries({}, optional=dict.fromkeys(ENTRIES, JSON))


def written(content: bytes, read: Callable[[Path], object], name: str = "file") -> None:
    """Write and read a file; only this project's errors may come of it."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / name
        path.write_bytes(content)
        with contextlib.suppress(RecastError, ArchiveError):
            read(path)


@FUZZ
@given(st.binary(max_size=300))
def test_bytes(content: bytes) -> None:
    for read in (read_record, Banks.load, check_yaml, lambda path: schemas.read_json(path, SweepRecord, "a sweep")):
        written(content, read)
    written(content, lambda path: record.read(path.parent), "job.json")
    for name in ("x.zip", "x.tar.gz", "x.tar"):
        written(content, lambda path: extract(path, path.parent / "out"), name)
    for start in (b"", b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff\xe0", b"GIF89a", b"II*\x00", b"BM"):
        written(start + content, lambda path: read_image(path, Decoding("white", True, 10**6)), "x.png")


@FUZZ
@given(st.integers(0, 2**64 - 1), st.binary(max_size=200))
def test_headers(length: int, content: bytes) -> None:
    for size in (length, len(content)):
        for read in (read_record, Banks.load):
            written(size.to_bytes(8, "little") + content, read)


@FUZZ
@given(RECORD)
def test_records(content: dict[str, Any]) -> None:
    text = json.dumps(content)
    written(text.encode(), lambda path: record.read(path.parent), "job.json")
    written(text.encode(), lambda path: schemas.read_json(path, SweepRecord, "a sweep"))
    for key, read in (("recast_exp", read_record), ("recast_exp_bank", Banks.load)):
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "file.safetensors"
            save_file({"templates/g": torch.ones(1, 2, 2)}, path, {key: text})
            with contextlib.suppress(RecastError):
                read(path)


@FUZZ
@given(st.text(max_size=60))
@example("~0")  # nobody here
def test_overrides(text: str) -> None:
    for typed in (text, f"seed={text}", f"dataset.classes=[{text}]", f"data_dir={text}", f"optimizer.lr={text}"):
        for multirun in (False, True):
            (found,) = grammar.rewrite([typed], multirun=multirun)
            assert grammar.rewrite([found], multirun=multirun) == [found]
            grammar.parse(found)


@pytest.mark.parametrize("text", ["{a:" * 600 + "1" + "}" * 600, "[" * 2000, "9" * 6000])
def test_deep_and_long_values(text: str) -> None:
    assert grammar.parse(f"adapter.arguments={text}") is None


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no pipes with names")
@pytest.mark.parametrize("kind", ["pipe", "device", "folder"])
def test_what_is_no_file_is_not_read(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "job.json"
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    else:
        path.mkdir()
    with pytest.raises(ValueError, match=r"^it is no regular file$"):
        schemas.decode(path, dict[str, Any])
    with pytest.raises(UserError, match="it is no regular file"):
        check_yaml(path)


def test_a_file_that_grows_is_read_to_its_limit(tmp_path: Path) -> None:
    path = tmp_path / "large.json"
    path.write_bytes(b" " * 101)
    with pytest.raises(ValueError, match=r"^101 bytes, where 100 are the limit$"):
        schemas.read_regular(path, 100)
    assert schemas.read_regular(path, 101) == b" " * 101
