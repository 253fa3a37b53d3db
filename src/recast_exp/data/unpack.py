"""Unpacking archives of others: nothing is written outside the folder, and nothing stays of an archive with a fault.

Nothing heavy is imported.
"""

from __future__ import annotations

import errno
import lzma
import re
import shutil
import stat
import struct
import tarfile
import zipfile
import zlib
from pathlib import Path, PurePosixPath
from typing import NoReturn

from recast_exp.errors import RecastError, UserError
from recast_exp.files import writing

_CHUNK = 1 << 20
MAX_MEMBERS, MAX_DEPTH = 10_000_000, 32
MAX_RATIO, FREE_BYTES = 100, 1 << 30
"""The contents of an archive may take 100 times as much space as the archive, or 1 GiB if that is more.

Photographs hardly shrink. The lists of a set do, but are small.
"""
_MAX_HEADER = 1 << 20
"""Bytes of a member of a tar file that carries a long name, or other facts, of the next one."""

_DAMAGE = (
    *(tarfile.TarError, zipfile.BadZipFile, zlib.error, lzma.LZMAError, struct.error),
    *(EOFError, NotImplementedError, ValueError, LookupError, OverflowError, RecursionError),
)
"""The exceptions of the standard library for a damaged archive, apart from an OSError without a number."""


_NO_NAME = errno.ENAMETOOLONG, errno.ENOTDIR, errno.EISDIR, errno.EEXIST
"""The numbers of an OSError for members that are in each other's way, or have names that no file can have."""


class ArchiveError(UserError):
    """An archive that is damaged or not safe to unpack."""


def extract(archive: Path, folder: Path) -> None:
    """Unpack a zip file or a tar file, compressed or not; its first bytes decide which.

    Args:
        archive: The file.
        folder: The folder for its contents. It must not exist yet, and does not exist after an error.

    Raises:
        UserError: If the archive is damaged, or has a member that would lie outside the folder, leads there by a link,
            or is neither a file nor a folder; if it holds more than an honest archive of its size; if the folder cannot
            be written to; or if this Python cannot unpack tar files safely.
    """
    with writing(folder):
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
                raise ArchiveError(f"{archive}: truncated or damaged ({reason}); download it again") from error
            if isinstance(error, OSError) and error.errno in _NO_NAME:
                raise ArchiveError(
                    f"{archive}: holds a member that cannot be a file here ({error.strerror}: {error.filename})"
                ) from error
            raise


class _Contents:
    """What an archive has held so far, against the limits."""

    def __init__(self, archive: Path) -> None:
        self._archive = archive
        self._members = self._bytes = 0
        self._max_bytes = max(FREE_BYTES, MAX_RATIO * archive.stat().st_size)

    def add(self, name: str, size: int) -> None:
        """Count a member, or bytes between members.

        Raises:
            ArchiveError: If this is more than the limits allow.
        """
        if size < 0:
            raise ArchiveError(f"{self._archive}: member {name!r} has a size of {size} bytes")
        self._members += 1
        self._bytes += size
        if self._members > MAX_MEMBERS:
            raise ArchiveError(f"{self._archive}: expected at most {MAX_MEMBERS:,} members, got more")
        if self._bytes > self._max_bytes:
            raise ArchiveError(
                f"{self._archive}: expected at most {self._max_bytes:,} bytes of content, got more at member {name!r}"
            )
        if name.count("/") >= MAX_DEPTH:
            raise _unsafe(self._archive, f"{name[:80]}…", f"it lies more than {MAX_DEPTH} folders deep")


class _Member(tarfile.TarInfo):
    """A member whose header is no larger than any honest one: tarfile reads some headers into memory at once.

    Nor is it sparse: the maps of sparse files are read into memory too, and photographs have none.
    """

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> _Member:
        member = super().frombuf(buf, encoding, errors)
        if member.size < 0:  # with which tarfile goes back, for ever
            raise tarfile.HeaderError(f"a member of {member.size} bytes")
        if member.type == tarfile.GNUTYPE_SPARSE:
            member._refuse_sparse()
        is_header = member.type in (b"x", b"g", b"X", tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK)
        if is_header and member.size > _MAX_HEADER:
            raise tarfile.HeaderError(f"a header of {member.size} bytes")
        return member

    def _refuse_sparse(self, *_: object) -> NoReturn:
        raise tarfile.HeaderError("a sparse file")

    # What tarfile calls for each format of such maps
    _proc_gnusparse_00 = _proc_gnusparse_01 = _proc_gnusparse_10 = _refuse_sparse


def _extract_tar(archive: Path, folder: Path) -> None:
    if not hasattr(tarfile, "data_filter"):
        raise UserError(f"{archive}: expected Python 3.11.4 or newer, as this one cannot unpack tar files safely")

    contents = _Contents(archive)

    def check(member: tarfile.TarInfo, destination: str) -> tarfile.TarInfo:
        _check_name(archive, member.name)
        contents.add(member.name, member.size)
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

    with tarfile.open(archive, "r:*", tarinfo=_Member) as tar:
        tar.extractall(folder, filter=check)
        # tarfile ends an archive at anything that is not a header. Reading on checks the sum of the compressed data
        stream = tar.fileobj
        assert stream is not None
        stream.seek(tar.offset)
        if stream.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
            raise EOFError("its end is missing")
        while rest := stream.read(_CHUNK):
            contents.add("", len(rest))


def _extract_zip(archive: Path, folder: Path) -> None:
    with zipfile.ZipFile(archive) as file:
        contents = _Contents(archive)
        for info in file.infolist():
            _check_name(archive, info.orig_filename)
            contents.add(info.filename, info.file_size)
            kind = stat.S_IFMT(info.external_attr >> 16)
            if kind not in (0, stat.S_IFREG, stat.S_IFDIR):
                raise _unsafe(archive, info.filename, "it is a link or a device")
            if info.flag_bits & 1:
                raise ArchiveError(f"{archive}: {info.filename} is encrypted")
        file.extractall(folder)


def _check_name(archive: Path, name: str) -> None:
    if re.match(r"[/\\]|[A-Za-z]:", name) or ".." in re.split(r"[/\\]", name):
        raise _unsafe(archive, name, "its path leads out of the folder")


def _through_link(folder: Path, name: str) -> bool:
    parts = PurePosixPath(name).parts
    return any(folder.joinpath(*parts[:count]).is_symlink() for count in range(1, len(parts) + 1))


def _unsafe(archive: Path, member: str, reason: str) -> ArchiveError:
    return ArchiveError(f"{archive}: member {member!r} is not safe to unpack: {' '.join(reason.split())}")
