"""Downloads that continue where they were cut off, are verified, and are unpacked into place as a whole or not at all.

Below the root, `.downloads/NAME/` holds the unfinished downloads of dataset NAME, and `checksums.json` the checksums of
earlier downloads of archives without a published one. Nothing heavy is imported.
"""

from __future__ import annotations

import contextlib
import hashlib
import http.client
import json
import logging
import lzma
import os
import re
import shutil
import stat
import sys
import tarfile
import time
import urllib.error
import urllib.request
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from email.message import Message
from pathlib import Path, PurePosixPath
from types import TracebackType
from typing import Protocol
from urllib.parse import urlsplit

from recast_exp import __version__
from recast_exp.errors import MissingInputError, RecastError, UserError
from recast_exp.files import write_json

log = logging.getLogger(__name__)

PAUSES: Sequence[float] = (1, 2, 5, 15, 30)
"""Seconds to wait before each new attempt after a connection broke off."""
TIMEOUT = 60.0
"""Seconds without a byte after which a connection counts as broken off."""

_FOLDER, _CHECKSUMS = ".downloads", "checksums.json"
_CHUNK = 1 << 20
_DAMAGE = (tarfile.TarError, zipfile.BadZipFile, EOFError, zlib.error, lzma.LZMAError, NotImplementedError, ValueError)
"""The exceptions of the standard library for a damaged archive, apart from an OSError without a number."""


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


class _ArchiveError(UserError):
    """An archive that is damaged or not safe to unpack."""


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
    from filelock import FileLock, Timeout

    safe_name = re.sub(r"[^\w-]", "_", name)  # it names a folder that is removed at the end
    with _writing(f"data_dir: {root}"):
        partial = root / _FOLDER / safe_name
        partial.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(root / _FOLDER / f"{safe_name}.lock")
        try:
            held = lock.acquire(timeout=0)
        except Timeout:
            log.info("dataset %s: waiting for another process that downloads it", name)
            held = lock.acquire()
        with held:
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
    with _writing(path):
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


def extract(archive: Path, folder: Path) -> None:
    """Unpack a zip file or a tar file, compressed or not; its first bytes decide which.

    Args:
        archive: The file.
        folder: The folder for its contents. It must not exist yet, and does not exist after an error.

    Raises:
        UserError: If the archive is damaged, or has a member that would lie outside the folder, leads there by a link,
            or is neither a file nor a folder; if the folder cannot be written to; or if this Python cannot unpack tar
            files safely.
    """
    with _writing(folder):
        folder.mkdir(parents=True)
        try:
            with archive.open("rb") as file:
                is_zip = file.read(4) in (b"PK\x03\x04", b"PK\x05\x06")
            if is_zip:
                _extract_zip(archive, folder)
            else:
                _extract_tar(archive, folder)
        except BaseException as error:
            shutil.rmtree(folder, ignore_errors=True)
            if isinstance(error, RecastError):
                raise
            # An OSError with a number comes from the disk; without one, from the decompressor
            if isinstance(error, _DAMAGE) or (isinstance(error, OSError) and error.errno is None):
                reason = (str(error) or type(error).__name__).splitlines()[0].rstrip(":")
                raise _ArchiveError(f"{archive}: truncated or damaged ({reason}); download it again") from error
            raise


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
                raise _ArchiveError(
                    f"dataset {name}: expected {archive.member} in {archive.url}, got an archive without it"
                )
        except _ArchiveError:
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
    from filelock import FileLock

    with FileLock(root / _FOLDER / f"{_CHECKSUMS}.lock"):  # another dataset may be recorded at the same time
        write_json(root / _CHECKSUMS, dict(sorted({**_checksums(root / _CHECKSUMS), key: checksum}.items())))


def _checksums(record: Path) -> dict[str, object]:
    """Read the recorded checksums. Users edit them, so a damaged file is reported rather than ignored."""
    try:
        checksums = json.loads(record.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise UserError(f"{record}: expected JSON, got {error}; correct or remove the file") from error
    if not isinstance(checksums, dict):
        raise UserError(f"{record}: expected a JSON object, got {type(checksums).__name__}; correct or remove the file")
    return checksums


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


def _extract_tar(archive: Path, folder: Path) -> None:
    if not hasattr(tarfile, "data_filter"):
        raise UserError(f"{archive}: expected Python 3.11.4 or newer, as this one cannot unpack tar files safely")

    def check(member: tarfile.TarInfo, destination: str) -> tarfile.TarInfo:
        _check_name(archive, member.name)
        # Python's filter resolves links on disk, and chains of links have defeated it before
        if _through_link(folder, member.name):
            raise _unsafe(archive, member.name, "its path goes through a link")
        if member.islnk() and (_through_link(folder, member.linkname) or not (folder / member.linkname).is_file()):
            raise _unsafe(
                archive, member.name, f"it is a link to {member.linkname}, which is not an earlier file of the archive"
            )
        try:
            return tarfile.data_filter(member, destination)
        except tarfile.FilterError as error:
            raise _unsafe(archive, member.name, str(error)) from error

    with tarfile.open(archive, "r:*") as tar:
        tar.extractall(folder, filter=check)
        # tarfile ends an archive at anything that is not a header. Reading on checks the sum of the compressed data
        stream = tar.fileobj
        assert stream is not None
        stream.seek(tar.offset)
        if stream.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
            raise EOFError("its end is missing")
        while stream.read(_CHUNK):
            pass


def _extract_zip(archive: Path, folder: Path) -> None:
    with zipfile.ZipFile(archive) as file:
        for info in file.infolist():
            _check_name(archive, info.orig_filename)
            kind = stat.S_IFMT(info.external_attr >> 16)
            if kind not in (0, stat.S_IFREG, stat.S_IFDIR):
                raise _unsafe(archive, info.filename, "it is a link or a device")
            if info.flag_bits & 1:
                raise _ArchiveError(f"{archive}: {info.filename} is encrypted")
        file.extractall(folder)


def _check_name(archive: Path, name: str) -> None:
    if re.match(r"[/\\]|[A-Za-z]:", name) or ".." in re.split(r"[/\\]", name):
        raise _unsafe(archive, name, "its path leads out of the folder")


def _through_link(folder: Path, name: str) -> bool:
    parts = PurePosixPath(name).parts
    return any(folder.joinpath(*parts[:count]).is_symlink() for count in range(1, len(parts) + 1))


def _unsafe(archive: Path, member: str, reason: str) -> _ArchiveError:
    return _ArchiveError(f"{archive}: member {member!r} is not safe to unpack: {' '.join(reason.split())}")


@contextlib.contextmanager
def _writing(target: object) -> Iterator[None]:
    try:
        yield
    except RecastError:  # MissingInputError is an OSError too
        raise
    except OSError as error:
        raise UserError(f"{target} cannot be written to ({error}); free space or choose another folder") from error


def _read_state(path: Path) -> _State:
    """Read the source of a partial file; empty if it is not known."""
    try:
        state = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return _State()
    return _State(state.get("url"), state.get("validator"), state.get("total")) if isinstance(state, dict) else _State()


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _megabytes(size: int) -> str:
    return f"{size / 1e6:,.1f} MB"
