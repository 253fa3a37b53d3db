"""Coverage-guided fuzzing of what reads files of others: `make fuzz`.

Atheris changes valid files, and keeps the changes that reach new lines of this project. A reader may answer with its
own error only; any other ends the fuzzing with the bytes that did it. `python tests/attack/fuzz.py task` fuzzes one.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import atheris  # no part of the project's environment: `make fuzz` installs it

with atheris.instrument_imports(include=["recast_exp"]):
    from recast_exp import schemas
    from recast_exp.config import grammar
    from recast_exp.data.unpack import ArchiveError, extract
    from recast_exp.errors import RecastError
    from recast_exp.recast import Banks
    from recast_exp.runs import record
    from recast_exp.runs.sweep import SweepRecord
    from recast_exp.runs.task_header import read_record
    from recast_exp.schemas import check_yaml

HASH = "0" * 64
TASK = {
    "format": 2,
    "version": "0.1.0",
    "config": {"seed": 1, "model": {"backbone": "vit_small_patch16_224"}},
    "bank": HASH,
    "templates": {"groups": [["g", 2, 1, "a", "b"]], "solver": "closed_form", "seed": 1, "num_sets": 2, "weights": "x"},
    "backbone": {"name": "vit", "fingerprint": "x"},
    "classes": ["cat", "dog"],
    "input": {"size": 32, "mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5], "crop_pct": 0.9, "interpolation": "bicubic"},
    "eval_batch_size": 8,
    "metrics": {"test/accuracy": 0.5},
    "checksum": HASH,
}
BANK = {"format": 1, "hash": HASH, "groups": [["g", 2, 1, "a", "b"]]}
SWEEP = {"format": 1, "command": "-m seed=1,2", "created": "2026-11-21T10:00:00", "jobs": {"seed=1": "0"}}


def safetensors(key: str, content: object) -> bytes:
    """A file without tensors."""
    header = json.dumps({"__metadata__": {key: json.dumps(content)}}).encode()
    return len(header).to_bytes(8, "little") + header


def zipped() -> bytes:
    """A small archive."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("images/a.txt", "a" * 50)
        archive.writestr("images/b/c.txt", "b")
    return buffer.getvalue()


def tarred() -> bytes:
    """The same as a tar file."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name in ("images/a.txt", "images/b/c.txt"):
            member = tarfile.TarInfo(name)
            member.size = 3
            archive.addfile(member, io.BytesIO(b"abc"))
    return buffer.getvalue()


def unpack(path: Path) -> None:
    """Unpack next to the file, and see that nothing is written elsewhere."""
    inside = path.parent / "inside"
    target = inside / "out"
    extract(path, target)
    assert {each.name for each in path.parent.iterdir()} <= {path.name, "inside"}, "something has left the folder"
    assert {each.name for each in inside.iterdir()} <= {"out"}, "something has left the folder"


def overrides(path: Path) -> None:
    """Rewrite what was typed, twice."""
    text = path.read_bytes().decode("utf-8", "surrogateescape")
    for typed in (text, f"seed={text}", f"dataset.classes=[{text}]", f"data_dir={text}"):
        (found,) = grammar.rewrite([typed], multirun=True)
        assert grammar.rewrite([found], multirun=True) == [found]
        grammar.parse(found)


READERS: dict[str, tuple[str, Callable[[Path], object], list[bytes]]] = {
    "task": ("task.safetensors", read_record, [safetensors("recast_exp", TASK)]),
    "bank": ("bank.safetensors", Banks.load, [safetensors("recast_exp_bank", BANK)]),
    "job": ("job.json", lambda path: record.read(path.parent), [json.dumps({"format": 1, "state": "done"}).encode()]),
    "sweep": (
        "sweep.json",
        lambda path: schemas.read_json(path, SweepRecord, "a sweep"),
        [json.dumps(SWEEP).encode()],
    ),
    "yaml": ("config.yaml", check_yaml, [b"a: &x [1, 2]\nb: {c: *x}\n", b"defaults:\n  - model: vit_att\n"]),
    "zip": ("x.zip", unpack, [zipped()]),
    "tar": ("x.tar", unpack, [tarred()]),
    "overrides": ("typed.txt", overrides, [b"1,2", b"[cat,'a dog']", b"~/x,$HOME", b"range(1,5)"]),
}
"""Name → name of the file, reader, valid files to begin with."""


def fuzz(name: str, seconds: int) -> None:
    """Fuzz one reader in this process, which ends with it."""
    file, read, seeds = READERS[name]
    with tempfile.TemporaryDirectory() as folder:
        corpus = Path(folder) / "corpus"
        corpus.mkdir()
        for number, content in enumerate(seeds):
            (corpus / str(number)).write_bytes(content)

        def one(content: bytes) -> None:
            with tempfile.TemporaryDirectory(dir=folder) as place:
                path = Path(place) / file
                path.write_bytes(content)
                with contextlib.suppress(RecastError, ArchiveError):
                    read(path)

        limits = [f"-max_total_time={seconds}", "-max_len=4096", "-rss_limit_mb=4096", "-timeout=20"]
        atheris.Setup(
            [sys.argv[0], *limits, f"-artifact_prefix={tempfile.gettempdir()}/fuzz-{name}-", str(corpus)], one
        )
        atheris.Fuzz()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("readers", nargs="*", help=f"of {', '.join(READERS)} (default: all)")
    parser.add_argument("--seconds", type=int, default=60, help="for each (default: %(default)s)")
    args = parser.parse_args()
    if len(args.readers) == 1:
        fuzz(args.readers[0], args.seconds)
        return
    failed = []
    for name in args.readers or READERS:
        done = subprocess.run(
            [sys.executable, __file__, name, "--seconds", str(args.seconds)],
            capture_output=True,
            text=True,
            errors="replace",
            check=False,
        )
        last = [line for line in done.stderr.splitlines() if line.startswith(("Done", "#"))][-1:]
        print(f"{name}: {'failed' if done.returncode else 'only its own errors'} ({' '.join(last)})", flush=True)
        if done.returncode:
            failed.append(name)
            print(done.stdout[-4000:], done.stderr[-4000:], sep="\n")
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
