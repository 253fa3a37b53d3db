"""Files that are whole or not there: atomic writes, content hashes, and the user's cache folder."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import logging
import os
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import platformdirs

from recast_exp.errors import RecastError, UserError

log = logging.getLogger(__name__)

LONGEST_NAME = 255
LONGEST_PATH = 4096
"""Bytes of the name of a file or folder."""

FIRST_WAIT, NEXT_WAIT = 2.0, 60.0
"""Seconds until a wait is said, and said again."""


def user_path(text: str | Path) -> Path:
    """The path that a user means: `~` is the home folder; a `~name` of nobody here stays as it is, as in a shell.

    Raises:
        UserError: If it, or a name in it, is longer than systems have them, or it is no path.
    """
    if not isinstance(text, str | os.PathLike):
        raise UserError(f"expected a path, got {text!r}")
    try:
        path = Path(os.path.expanduser(text))  # noqa: PTH111  (pathlib's raises for the `~name` of nobody)
    except ValueError:  # a NUL, which no path has; what opens it says so
        return Path(text)
    # Asked for one, Python raises an error instead of saying that it is not there
    if (size := len(str(path).encode(errors="surrogatepass"))) >= LONGEST_PATH:
        raise UserError(f"expected a path of less than {LONGEST_PATH:,} bytes, got {str(path)[:40]}… of {size:,}")
    for name in path.parts:
        if (size := len(name.encode(errors="surrogatepass"))) > LONGEST_NAME:
            raise UserError(
                f"expected a path whose names have at most {LONGEST_NAME} bytes, got {name[:40]}… of {size:,}"
            )
    return path


@contextlib.contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path next to `path` that replaces it, synced to disk, when the block ends without an error.

    A reader sees the old file or the new one, never a part; after an error or a kill the old file is untouched.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name[:40]}.", suffix=path.suffix[:40])
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)  # mkstemp makes files that only their owner can read
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def writing(target: object) -> Iterator[None]:
    """Report an error of the disk in the block as one of the user's folder, `target`.

    Raises:
        UserError: In place of an OSError.
    """
    try:
        yield
    except RecastError:  # MissingInputError is an OSError too
        raise
    except (OSError, ValueError) as error:
        if isinstance(error, ValueError) and "null" not in str(error):
            raise
        raise UserError(f"{target} cannot be written to ({error}); free space or choose another folder") from error


def write_text(path: str | Path, text: str) -> None:
    """Write `text` to `path` atomically, as UTF-8."""
    with replacing(path) as temporary:
        # Names of files may hold what is no text; it is written as \\udcNN, which JSON reads again
        temporary.write_text(text, encoding="utf-8", errors="backslashreplace")


def write_json(path: str | Path, value: object) -> None:
    """Write `value` to `path` atomically, as indented JSON; NaN and infinity are refused, as JSON has none."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


@contextlib.contextmanager
def alone_at(path: Path) -> Iterator[None]:
    """Hold a lock next to `path` in the block: of the jobs that would make this file at once, one does, others wait.

    What is there is read without it; whoever gets the lock looks once more. The lock of a killed process is free.
    """
    with locked(path.with_name(f"{path.name}.lock"), str(path)):
        yield


@contextlib.contextmanager
def locked(path: Path, what: str, *, wait: bool = True) -> Iterator[None]:
    """Hold a lock file in the block. Where no lock can be had, the block runs without one, and a warning says so.

    Every file is written whole or not at all, so without locks two jobs may do the same work twice, and nothing worse.

    Args:
        path: The lock file; it stays.
        what: What the lock is for, for messages.
        wait: Whether to wait for another process that holds it; a message says for what, and for how long.

    Raises:
        TimeoutError: If another process holds it, without `wait`.
    """
    from filelock import FileLock, Timeout  # brings asyncio along

    held = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(path)
        started = time.monotonic()
        for pause in itertools.chain([0 if not wait else FIRST_WAIT], itertools.repeat(NEXT_WAIT)):
            try:
                held = lock.acquire(timeout=pause)
                break
            except Timeout:
                if not wait:
                    raise TimeoutError(str(path)) from None
                log.warning(
                    "waiting for %s, on which another job works, for %.0f s now; if there is no such job, remove %s",
                    *(what, time.monotonic() - started, path),
                )
    except TimeoutError:
        raise
    except (OSError, NotImplementedError) as error:  # file systems without locks, and folders of another user
        log.warning("%s: no lock can be had (%s); jobs at the same time may do its work twice", what, error)
    try:
        yield
    finally:
        if held is not None:
            held.lock.release()


def json_hash(value: object, length: int = 16) -> str:
    """Hash a JSON-able value, independent of the order of its keys. For cache keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:length]


def cache_place(cache_dir: str | None) -> Path:
    """Where `cache_folder` is, without making it."""
    name = cache_dir or os.environ.get("RECAST_EXP_CACHE") or platformdirs.user_cache_dir("recast_exp")
    return user_path(name).absolute()


def cache_folder(cache_dir: str | None) -> Path:
    """The folder for banks, probes and embedded backbones: `cache_dir`, $RECAST_EXP_CACHE, or the user's own.

    Raises:
        UserError: If it cannot be made or written to: better now than after training.
    """
    folder = cache_place(cache_dir)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UserError(
            f"cache_dir: {folder} cannot be written to ({error.strerror}); choose another folder"
        ) from error
    return folder
