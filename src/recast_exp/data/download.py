"""Downloads that continue where they were cut off, are verified, and are unpacked into place as a whole or not at all.

Below the root, `.downloads/NAME/` holds what dataset NAME has so far, and `checksums.json` what was seen of archives
whose publisher gives no checksum. Nothing heavy is imported.
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
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any
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
"""What the standard library raises over a damaged archive, besides an OSError without a number."""


@dataclass(frozen=True)
class Archive:
    """A file to download.

    Attributes:
        url: Where it is; http, https or ftp.
        provides: Path relative to the root, of a file or folder, that exists once it is in place.
        md5: The published checksum, if there is one.
        member: Path inside the archive that becomes `provides`, "." for all of it; None for a file that is no archive
            and becomes `provides` itself.
    """

    url: str
    provides: str
    md5: str | None = None
    member: str | None = None


class _ArchiveError(UserError):
    """An archive that is damaged or not safe to unpack."""


class _NetworkError(Exception):
    """A connection that failed.

    Attributes:
        begun: Whether the server had answered before.
    """

    def __init__(self, reason: object, *, begun: bool) -> None:
        super().__init__(" ".join(str(reason).split()) or type(reason).__name__)
        self.begun = begun


def download(archives: Sequence[Archive], root: Path, *, name: str) -> None:
    """Put what is not there yet of a dataset's archives below `root`.

    Where all of it is there, nothing is asked of the network or written. Of several processes one downloads and the
    others wait for it. After an error or a kill, what was downloaded is kept, and the next call continues.

    Args:
        archives: What the dataset consists of.
        root: Root folder of all datasets.
        name: The dataset, for messages.

    Raises:
        MissingInputError: If an archive cannot be downloaded.
        UserError: If a connection keeps breaking off, a checksum is wrong, an archive is damaged or not safe to
            unpack, `root` cannot be written to, or has too little room.
    """
    if all((root / archive.provides).exists() for archive in archives):
        return
    from filelock import FileLock, Timeout

    safe_name = re.sub(r"[^\w-]", "_", name)  # it names a folder that is removed in the end
    with _writing(f"data_dir: {root}"):
        own = root / _FOLDER / safe_name
        own.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(root / _FOLDER / f"{safe_name}.lock")
        try:
            held = lock.acquire(timeout=0)
        except Timeout:
            log.info("dataset %s: waiting for another process that downloads it", name)
            held = lock.acquire()
        with held:
            own.mkdir(exist_ok=True)
            for archive in archives:
                if not (root / archive.provides).exists():
                    _provide(archive, root, own, name)
            # The lock's file stays: without it, a process that waits and one that comes would lock different files
            shutil.rmtree(own)


def fetch(url: str, path: Path, *, description: str) -> None:
    """Download a file, replacing `path` when it is whole; a `.part` file beside it lets a later call continue.

    Args:
        url: Where it is; http, https or ftp.
        path: Where it goes.
        description: What it belongs to, for messages.

    Raises:
        MissingInputError: If it cannot be downloaded.
        UserError: If the connection keeps breaking off, the URL is of another kind, or `path` cannot be written or
            would not fit on the disk.
    """
    if urlsplit(url).scheme not in ("http", "https", "ftp"):
        raise UserError(f"{description}: got {url}, takes an http, https or ftp URL")
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
                    total = _read_state(state).get("total")
                    there = _megabytes(_size(part)) + (f" of {_megabytes(total)}" if total else "")
                    raise UserError(
                        f"{description}: {url} keeps breaking off ({error}), {there} are there; "
                        "run again to continue from there"
                    ) from error
                log.warning("%s: %s broke off (%s); again in %g s", description, url, error, pause)
                time.sleep(pause)
        with part.open("rb+") as file:
            os.fsync(file.fileno())
        part.replace(path)
        state.unlink(missing_ok=True)


def extract(archive: Path, folder: Path) -> None:
    """Unpack a zip file or a tar file, compressed or not, as its first bytes say.

    Args:
        archive: The file.
        folder: Where its contents go. It must not exist yet, and does not after an error.

    Raises:
        UserError: If the archive is damaged, or has a member that would end up outside the folder, leads there by a
            link or is no file or folder; if the folder cannot be written to; or if this Python cannot unpack tar
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
            # An OSError with a number is the disk's; without one, the decompressor's
            if isinstance(error, _DAMAGE) or (isinstance(error, OSError) and error.errno is None):
                reason = (str(error) or type(error).__name__).splitlines()[0].rstrip(":")
                raise _ArchiveError(f"{archive}: truncated or damaged ({reason}); download it again") from error
            raise


def _provide(archive: Archive, root: Path, own: Path, name: str) -> None:
    """Download an archive into the dataset's `own` folder, verify it and put it in place."""
    path = own / (PurePosixPath(urlsplit(archive.url).path).name or "archive")
    unpacked, target = own / "unpacked", root / archive.provides
    if unpacked.exists():
        shutil.rmtree(unpacked)  # of a run that was killed
    if not path.exists():
        fetch(archive.url, path, description=f"dataset {name}")
    key = f"{own.name}/{path.name}"
    checksum = _verify(archive, path, root, key, name)

    source = path
    if archive.member is not None:
        try:
            extract(path, unpacked)
            source = unpacked / archive.member
            if not source.exists():
                raise _ArchiveError(f"dataset {name}: {archive.url} has no {archive.member} in it")
        except _ArchiveError:
            path.unlink()
            raise
        if hasattr(os, "sync"):
            os.sync()  # what `target` names must outlast a power failure, and one sync is faster than one per file
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
    """Return the checksum of a downloaded file, if it is the published one, else the recorded one, if there is one.

    Raises:
        UserError: If it is another one. The file is gone then.
    """
    kind = "sha256" if archive.md5 is None else "md5"
    with path.open("rb") as file:
        found = hashlib.file_digest(file, lambda: hashlib.new(kind, usedforsecurity=False)).hexdigest()
    record = root / _CHECKSUMS
    expected = _checksums(record).get(key, found) if archive.md5 is None else archive.md5.lower()
    if found != expected:
        path.unlink()
        hint = "it is removed, run again to download it again"
        if archive.md5 is None:
            hint += f"; if the publisher changed the file, remove the line {key} from {record}"
        raise UserError(f"dataset {name}: {archive.url} has {kind} {found}, expected {expected}; {hint}")
    return found


def _record(root: Path, key: str, checksum: str) -> None:
    """Record what was downloaded, for later downloads to compare with."""
    from filelock import FileLock

    with FileLock(root / _FOLDER / f"{_CHECKSUMS}.lock"):  # another dataset may be recorded at the same time
        write_json(root / _CHECKSUMS, dict(sorted({**_checksums(root / _CHECKSUMS), key: checksum}.items())))


def _checksums(record: Path) -> dict[str, Any]:
    """Read the recorded checksums. Users edit them, so damage is theirs to mend, not to be passed over."""
    try:
        checksums = json.loads(record.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise UserError(f"{record}: is not JSON ({error}); correct or remove it") from error
    if not isinstance(checksums, dict):
        raise UserError(f"{record}: is no JSON object; correct or remove it")
    return checksums


def _receive(url: str, part: Path, state: Path, description: str, *, quiet: bool) -> None:
    """Append to `part` what one connection brings; return when it is whole.

    Raises:
        _NetworkError: If it is not whole.
        UserError: If it would not fit on the disk.
    """
    from tqdm import tqdm

    known = _read_state(state)
    resumable = known.get("url") == url and (known.get("validator") or known.get("total"))
    size = _size(part) if resumable else 0
    if size and size == known.get("total"):
        return  # killed just before it got its name
    with _open(url, size, known.get("validator")) as response:
        start, total = _extent(response)
        if start and (start != size or known.get("total") not in (total, None)):
            part.unlink()
            raise _NetworkError("the file there has changed", begun=True)
        if not start:  # a new download, or the file there has changed, or the server cannot continue one
            part.unlink(missing_ok=True)
            write_json(state, {"url": url, "validator": _validator(response), "total": total})
            size = 0
        free = shutil.disk_usage(part.parent).free
        if total is not None and total - size > free:
            raise UserError(
                f"{description}: {url} needs {_megabytes(total - size)}, "
                f"but {part.parent} has room for {_megabytes(free)}; make room or choose another folder"
            )
        visible = sys.stderr.isatty()
        if not visible and not quiet:
            shown = "size unknown" if total is None else _megabytes(total)
            log.info("%s: downloading %s (%s%s)", description, url, shown, f", {_megabytes(size)} there" * bool(size))
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


def _open(url: str, start: int, validator: str | None) -> Any:
    """Ask for a URL from byte `start` on, if it is still the file that `validator` says, else for all of it."""
    request = urllib.request.Request(url, headers={"User-Agent": f"recast-exp/{__version__}"})
    if start:
        request.add_header("Range", f"bytes={start}-")
        if validator:
            request.add_header("If-Range", validator)
    try:
        return urllib.request.urlopen(request, timeout=TIMEOUT)
    except urllib.error.HTTPError as error:
        error.close()
        if start and error.code == 416:  # shorter than what is there
            return _open(url, 0, None)
        raise _NetworkError(error, begun=False) from error
    except urllib.error.URLError as error:
        raise _NetworkError(error.reason, begun=False) from error
    except (OSError, http.client.HTTPException) as error:
        raise _NetworkError(error, begun=False) from error


def _extent(response: Any) -> tuple[int, int | None]:
    """The byte that a response starts at, -1 if it does not say, and the size of the whole file, if known."""
    length = response.headers.get("Content-Length", "")
    total = int(length) if length.isdecimal() else None
    if response.status != 206:
        return 0, total
    found = re.fullmatch(r"bytes (\d+)-\d+/(\d+|\*)", response.headers.get("Content-Range", "").strip())
    if found is None:
        return -1, None
    start = int(found[1])
    if found[2] != "*":
        return start, int(found[2])
    return start, None if total is None else start + total


def _validator(response: Any) -> str | None:
    """What tells whether the file there is still the same. Weak ETags may stay when bytes change."""
    etag: str = response.headers.get("ETag", "")
    return etag if etag.startswith('"') else response.headers.get("Last-Modified")


def _extract_tar(archive: Path, folder: Path) -> None:
    if not hasattr(tarfile, "data_filter"):
        raise UserError(f"{archive}: this Python cannot unpack tar files safely; takes Python 3.11.4 or newer")

    def check(member: tarfile.TarInfo, destination: str) -> tarfile.TarInfo:
        _check_name(archive, member.name)
        # Python's filter follows links on disk to see where a path leads, and has been outwitted by chains of them
        if _through_link(folder, member.name):
            raise _unsafe(archive, member.name, "its path goes through a link")
        if member.islnk() and (_through_link(folder, member.linkname) or not (folder / member.linkname).is_file()):
            raise _unsafe(archive, member.name, f"it is a link to {member.linkname}, which is no file before it")
        try:
            return tarfile.data_filter(member, destination)
        except tarfile.FilterError as error:
            raise _unsafe(archive, member.name, str(error)) from error

    with tarfile.open(archive, "r:*") as tar:
        tar.extractall(folder, filter=check)
        # tarfile takes whatever is no header for the end of the archive. Reading on checks the compressed data's sum
        stream = tar.fileobj
        assert stream is not None
        stream.seek(tar.offset)
        if stream.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
            raise EOFError("it has no end")
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
def _writing(what: object) -> Iterator[None]:
    try:
        yield
    except RecastError:  # one of them is an OSError too
        raise
    except OSError as error:
        raise UserError(f"{what} cannot be written to ({error}); make room or choose another folder") from error


def _read_state(path: Path) -> dict[str, Any]:
    """Read what a partial file is a part of; nothing, if that is not known."""
    try:
        state = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return {}
    return state if isinstance(state, dict) else {}


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _megabytes(size: int) -> str:
    return f"{size / 1e6:,.1f} MB"
