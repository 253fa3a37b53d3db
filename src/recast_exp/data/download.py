"""Downloads that continue where they were cut off, are verified, and are unpacked into place as a whole or not at all.

Below the root, `.downloads/NAME/` holds the unfinished downloads of dataset NAME, and `checksums.json` the checksums of
earlier downloads of archives without a published one. Nothing heavy is imported.
"""

from __future__ import annotations

import hashlib
import http.client
import logging
import os
import re
import shutil
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from email.message import Message
from pathlib import Path, PurePosixPath
from types import TracebackType
from typing import Protocol
from urllib.parse import urlsplit

from recast_exp import __version__, schemas
from recast_exp.data.unpack import ArchiveError, extract
from recast_exp.errors import MissingInputError, UserError
from recast_exp.files import locked, write_json, writing

log = logging.getLogger(__name__)

PAUSES: Sequence[float] = (1, 2, 5, 15, 30)
"""Seconds to wait before each new attempt after a connection broke off."""
TIMEOUT = 60.0
"""Seconds without a byte after which a connection counts as broken off."""

_FOLDER, _CHECKSUMS = ".downloads", "checksums.json"
_CHUNK = 1 << 20


@dataclass(frozen=True)
class Archive:
    """A file to download.

    Attributes:
        url: Where it is; http, https or ftp.
        provides: Path of the resulting file or folder, relative to the root.
        md5: The published checksum, if there is one.
        member: Path inside the archive that becomes `provides`, "." for all of it; None for a file that is not an
            archive and becomes `provides` itself.
    """

    url: str
    provides: str
    md5: str | None = None
    member: str | None = None


class _Response(Protocol):
    """A response over http or ftp."""

    status: int | None
    headers: Message

    def read1(self, size: int, /) -> bytes: ...

    def __enter__(self) -> _Response: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None, /
    ) -> object: ...


@dataclass(frozen=True)
class _State:
    """The source of a partial file: the URL, what changes with the file there, its size; None is unknown."""

    url: str | None = None
    validator: str | None = None
    total: int | None = None


class _NetworkError(Exception):
    """A connection that failed.

    Attributes:
        begun: Whether the server had responded before.
    """

    def __init__(self, reason: object, *, begun: bool) -> None:
        super().__init__(" ".join(str(reason).split()) or type(reason).__name__)
        self.begun = begun


def download(archives: Sequence[Archive], root: Path, *, name: str) -> None:
    """Download the archives of a dataset that are missing below `root`, and put them in place.

    If none is missing, nothing is requested or written. Of several processes, one downloads and the others wait for it.
    After an error or a kill, partial downloads are kept, and the next call continues them.

    Args:
        archives: All archives of the dataset.
        root: Root folder of all datasets.
        name: The dataset, for messages.

    Raises:
        MissingInputError: If an archive cannot be downloaded.
        UserError: If a connection keeps breaking off, a checksum is wrong, an archive is damaged or not safe to
            unpack, or `root` cannot be written to or has too little space.
    """
    if all((root / archive.provides).exists() for archive in archives):
        return
    safe_name = re.sub(r"[^\w-]", "_", name)  # it names a folder that is removed at the end
    with writing(f"data_dir: {root}"):
        partial = root / _FOLDER / safe_name
        partial.parent.mkdir(parents=True, exist_ok=True)
        with locked(root / _FOLDER / f"{safe_name}.lock", f"the download of dataset {name}"):
            partial.mkdir(exist_ok=True)
            for archive in archives:
                if not (root / archive.provides).exists():
                    _provide(archive, root, partial, name)
            # The lock file stays: without it, a waiting process and a new one would lock different files
            shutil.rmtree(partial)


def fetch(url: str, path: Path, *, description: str) -> None:
    """Download a file, and replace `path` once it is complete; from a `.part` file next to it, a later call continues.

    Args:
        url: Where it is; http, https or ftp.
        path: Where it goes.
        description: The dataset or model that it belongs to, for messages.

    Raises:
        MissingInputError: If it cannot be downloaded.
        UserError: If the connection keeps breaking off, the URL is of another kind, or `path` cannot be written to or
            does not fit on the disk.
    """
    if urlsplit(url).scheme not in ("http", "https", "ftp"):
        raise UserError(f"{description}: expected an http, https or ftp URL, got {url}")
    part, state = path.with_name(f"{path.name}.part"), path.with_name(f"{path.name}.part.json")
    begun = False
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        for pause in (*PAUSES, None):
            try:
                _receive(url, part, state, description, quiet=begun)
                break
            except _NetworkError as error:
                begun = begun or error.begun
                if not begun:
                    raise MissingInputError(
                        f"{description}: {url} cannot be downloaded ({error}); "
                        f"check the network and its proxy settings, or put the file at {path}"
                    ) from error
                if pause is None:
                    total = _read_state(state).total
                    received = _megabytes(_size(part)) + (f" of {_megabytes(total)}" if total else "")
                    raise UserError(
                        f"{description}: {url} keeps breaking off ({error}) after {received}; "
                        "run again to continue from there"
                    ) from error
                log.warning("%s: %s broke off (%s); retrying in %g s", description, url, error, pause)
                time.sleep(pause)
        with part.open("rb+") as file:
            os.fsync(file.fileno())
        part.replace(path)
        state.unlink(missing_ok=True)


def _provide(archive: Archive, root: Path, partial: Path, name: str) -> None:
    """Download an archive into the folder of partial downloads, verify it and put it in place."""
    path = partial / (PurePosixPath(urlsplit(archive.url).path).name or "archive")
    unpacked, target = partial / "unpacked", root / archive.provides
    if unpacked.exists():
        shutil.rmtree(unpacked)  # by a run that was killed
    if not path.exists():
        fetch(archive.url, path, description=f"dataset {name}")
    key = f"{partial.name}/{path.name}"
    checksum = _verify(archive, path, root, key, name)

    source = path
    if archive.member is not None:
        try:
            extract(path, unpacked)
            source = unpacked / archive.member
            if not source.exists():
                raise ArchiveError(
                    f"dataset {name}: expected {archive.member} in {archive.url}, got an archive without it"
                )
        except ArchiveError:
            path.unlink()
            raise
        if hasattr(os, "sync"):
            os.sync()  # `target` must survive a power failure, and one sync is faster than one per file
    if archive.md5 is None:
        _record(root, key, checksum)
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        source.replace(target)
    except OSError:
        if not target.exists():  # otherwise a dataset with the same files was faster
            raise
    path.unlink(missing_ok=True)


def _verify(archive: Archive, path: Path, root: Path, key: str, name: str) -> str:
    """Check the checksum of a downloaded file against the published or else the recorded one, and return it.

    Raises:
        UserError: If it differs. The file is removed then.
    """
    kind = "sha256" if archive.md5 is None else "md5"
    with path.open("rb") as file:
        checksum = hashlib.file_digest(file, lambda: hashlib.new(kind, usedforsecurity=False)).hexdigest()
    record = root / _CHECKSUMS
    expected = _checksums(record).get(key, checksum) if archive.md5 is None else archive.md5.lower()
    if checksum != expected:
        path.unlink()
        hint = "the file has been removed; run again to download it again"
        if archive.md5 is None:
            hint += f"; if the publisher changed the file, remove the line {key} from {record}"
        raise UserError(f"dataset {name}: expected {archive.url} to have the {kind} {expected}, got {checksum}; {hint}")
    return checksum


def _record(root: Path, key: str, checksum: str) -> None:
    """Record the checksum of a download, for later downloads to compare with."""
    with locked(root / _FOLDER / f"{_CHECKSUMS}.lock", _CHECKSUMS):  # another dataset may be recorded at the same time
        write_json(root / _CHECKSUMS, dict(sorted({**_checksums(root / _CHECKSUMS), key: checksum}.items())))


def _checksums(record: Path) -> dict[str, str]:
    """Read the recorded checksums. Users edit them, so a damaged file is reported rather than ignored."""
    if not record.exists():
        return {}
    try:
        return schemas.decode(record, dict[str, str])
    except ValueError as error:
        raise UserError(
            f"{record}: expected a JSON object of checksums, got {error}; correct or remove the file"
        ) from error


def _receive(url: str, part: Path, state: Path, description: str, *, quiet: bool) -> None:
    """Append to `part` the data of one connection; return once it is complete.

    Raises:
        _NetworkError: If it is not complete.
        UserError: If it does not fit on the disk.
    """
    from tqdm import tqdm

    earlier = _read_state(state)
    resumable = earlier.url == url and (earlier.validator or earlier.total)
    size = _size(part) if resumable else 0
    if size and size == earlier.total:
        return  # killed just before it was renamed
    with _open(url, size, earlier.validator) as response:
        start, total = _extent(response)
        if start and (start != size or earlier.total not in (total, None)):
            part.unlink()
            raise _NetworkError("the file on the server has changed", begun=True)
        if not start:  # a new download, or the file on the server has changed, or the server cannot continue one
            part.unlink(missing_ok=True)
            write_json(state, asdict(_State(url, _validator(response), total)))
            size = 0
        free = shutil.disk_usage(part.parent).free
        if total is not None and total - size > free:
            raise UserError(
                f"{description}: {url} needs {_megabytes(total - size)}, "
                f"but {part.parent} has only {_megabytes(free)} free; free space or choose another folder"
            )
        visible = sys.stderr.isatty()
        if not visible and not quiet:
            shown = "size unknown" if total is None else _megabytes(total)
            if size:
                shown += f", {_megabytes(size)} already downloaded"
            log.info("%s: downloading %s (%s)", description, url, shown)
        title = f"{description}: {part.stem}"
        with (
            part.open("ab") as file,
            tqdm(desc=title, total=total, initial=size, unit="B", unit_scale=True, disable=not visible) as bar,
        ):
            while total is None or size < total:
                try:
                    chunk = response.read1(_CHUNK)
                except (OSError, http.client.HTTPException) as error:
                    raise _NetworkError(error, begun=True) from error
                if not chunk:
                    break
                file.write(chunk)
                size += len(chunk)
                bar.update(len(chunk))
    if total is not None and size < total:
        raise _NetworkError("the connection was closed", begun=True)


def _open(url: str, start: int, validator: str | None) -> _Response:
    """Request a URL from byte `start` on if its file still has that validator, otherwise all of it."""
    request = urllib.request.Request(url, headers={"User-Agent": f"recast-exp/{__version__}"})
    if start:
        request.add_header("Range", f"bytes={start}-")
        if validator:
            request.add_header("If-Range", validator)
    try:
        response: _Response = urllib.request.urlopen(request, timeout=TIMEOUT)
        return response
    except urllib.error.HTTPError as error:
        error.close()
        if start and error.code == 416:  # the file is shorter than `start`
            return _open(url, 0, None)
        raise _NetworkError(error, begun=False) from error
    except urllib.error.URLError as error:
        raise _NetworkError(error.reason, begun=False) from error
    except (OSError, http.client.HTTPException) as error:
        raise _NetworkError(error, begun=False) from error


def _extent(response: _Response) -> tuple[int, int | None]:
    """The first byte of a response, -1 if unknown, and the size of the whole file, if known."""
    length = response.headers.get("Content-Length", "")
    total = int(length) if length.isdecimal() else None
    if response.status != 206:
        return 0, total
    extent = re.fullmatch(r"bytes (\d+)-\d+/(\d+|\*)", response.headers.get("Content-Range", "").strip())
    if extent is None:
        return -1, None
    start = int(extent[1])
    if extent[2] != "*":
        return start, int(extent[2])
    return start, None if total is None else start + total


def _validator(response: _Response) -> str | None:
    """A value that changes with the file on the server. Weak ETags do not count: they can stay when bytes change."""
    etag: str = response.headers.get("ETag", "")
    return etag if etag.startswith('"') else response.headers.get("Last-Modified")


def _read_state(path: Path) -> _State:
    """Read the source of a partial file; empty if it is not known."""
    try:
        return schemas.decode(path, _State)
    except ValueError:
        return _State()


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _megabytes(size: int) -> str:
    return f"{size / 1e6:,.1f} MB"
