from __future__ import annotations

import gzip
import hashlib
import http.server
import io
import json
import logging
import random
import shutil
import socket
import subprocess
import sys
import tarfile
import threading
import time
import zipfile
from collections import namedtuple
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from recast_exp.data import download as module
from recast_exp.data import unpack
from recast_exp.data.download import Archive, download, fetch
from recast_exp.data.unpack import ArchiveError, extract
from recast_exp.errors import MissingInputError, RecastError

CONTENT = random.Random(0).randbytes(300_000)
DOWNLOAD = """
import sys
from pathlib import Path
from recast_exp.data.download import Archive, download
url, root, provides, member = sys.argv[1:]
download([Archive(url, provides, member=member or None)], Path(root), name="birds")
"""


class Server(http.server.ThreadingHTTPServer):
    """Serves `files`, as badly as asked."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.files: dict[str, bytes] = {}
        self.requests: list[Any] = []
        self.sent = 0
        self.break_after: list[int] = []  # bytes after which the next connections are closed
        self.ranges = True
        self.etag: str | None = '"{}"'
        self.length = True
        self.stall: threading.Event | None = None  # what each response waits for halfway

    def url(self, name: str) -> str:
        return f"http://127.0.0.1:{self.server_port}/{name}"

    def handle_error(self, *_: object) -> None:
        """A client that was killed is no news."""


class Handler(http.server.BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        server = self.server
        server.requests.append(self.headers)
        content = server.files.get(self.path[1:])
        if content is None:
            self.send_error(404)
            return
        etag = server.etag and server.etag.format(hashlib.md5(content).hexdigest())
        start = 0
        wanted = self.headers.get("Range")
        if server.ranges and wanted and self.headers.get("If-Range") in (None, etag):
            start = int(wanted.removeprefix("bytes=").rstrip("-"))
            if start >= len(content):
                self.send_error(416)
                return
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        else:
            self.send_response(200)
        if etag:
            self.send_header("ETag", etag)
        if server.length:
            self.send_header("Content-Length", str(len(content) - start))
        self.end_headers()
        body = content[start:]
        if server.break_after:
            body = body[: server.break_after.pop(0)]
        if server.stall:
            self.write(body[: len(body) // 2])
            server.stall.wait(10)
            body = body[len(body) // 2 :]
        self.write(body)

    def write(self, body: bytes) -> None:
        self.server.sent += len(body)  # before: a client that has all of it does not wait for this thread
        self.wfile.write(body)
        self.wfile.flush()

    def log_message(self, *_: object) -> None:
        """Not among the test's output."""


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setattr(module, "PAUSES", (0.01, 0.01))
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with Server() as server:
        server.files["birds.tgz"] = tar(*BIRDS)
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}).start()
        yield server
        server.shutdown()


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "data"


def fails(call: Callable[[], object], *expected: object, kind: type[RecastError] = RecastError) -> None:
    with pytest.raises(RecastError) as error:
        call()
    assert type(error.value) is kind or (kind is RecastError and not isinstance(error.value, MissingInputError))
    message = str(error.value)
    assert "\n" not in message
    for text in expected:
        assert str(text) in message


def content(folder: Path) -> dict[str, bytes]:
    """All files of a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def names(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir()]


def member(name: str, data: bytes = b"", kind: bytes = tarfile.REGTYPE, link: str = "") -> tuple[Any, bytes]:
    info = tarfile.TarInfo(name)
    info.size, info.type, info.linkname = len(data), kind, link
    return info, data


def tar(*members: tuple[tarfile.TarInfo, bytes], mode: str = "w:gz") -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=mode) as file:  # type: ignore[call-overload]
        for info, data in members:
            file.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def zipped(*members: tuple[str, bytes], mode: int = 0o100644) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as file:
        for name, data in members:
            info = zipfile.ZipInfo()
            info.compress_type = zipfile.ZIP_DEFLATED
            info.filename = name  # the constructor would mend it
            info.external_attr = mode << 16
            file.writestr(info, data)
    return buffer.getvalue()


BIRDS = [member("birds", kind=tarfile.DIRTYPE), member("birds/a.jpg", CONTENT), member("birds/deep/b.jpg", b"b")]
IN_BIRDS = {"birds/a.jpg": CONTENT, "birds/deep/b.jpg": b"b"}


# One file


def get(server: Server, path: Path, name: str = "file") -> None:
    fetch(server.url(name), path, description="dataset birds")


def test_fetch(server: Server, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    server.files["file"] = CONTENT
    path = tmp_path / "new" / "file"
    get(server, path)
    assert content(tmp_path) == {"new/file": CONTENT}
    assert server.requests[0]["User-Agent"].startswith("recast-exp/")
    assert [record.getMessage() for record in caplog.records] == [
        f"dataset birds: downloading {server.url('file')} (0.3 MB)"
    ]
    server.files["file"] = b"other"
    get(server, path)  # as its callers have their reasons
    assert path.read_bytes() == b"other"


def test_a_bar_only_on_a_terminal(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, capsys: Any
) -> None:
    caplog.set_level(logging.INFO)
    server.files["file"] = CONTENT
    get(server, tmp_path / "first")
    assert capsys.readouterr().err == ""
    caplog.clear()
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    get(server, tmp_path / "second")
    assert "dataset birds: second: 100%" in capsys.readouterr().err
    assert not caplog.records


@pytest.mark.parametrize("length", [True, False])
def test_a_break_is_continued(server: Server, tmp_path: Path, length: bool) -> None:
    server.files["file"], server.length = CONTENT, length
    if not length:
        server.etag = None
    server.break_after = [100_000, 50_000] if length else []
    get(server, tmp_path / "file")
    assert content(tmp_path) == {"file": CONTENT}
    assert server.sent == len(CONTENT)
    assert [headers["Range"] for headers in server.requests] == (
        [None, "bytes=100000-", "bytes=150000-"] if length else [None]
    )


def test_breaking_off_again_and_again(server: Server, tmp_path: Path) -> None:
    server.files["file"], server.break_after = CONTENT, [50_000] * 3
    path = tmp_path / "file"
    fails(lambda: get(server, path), "dataset birds", server.url("file"), "0.1 MB of 0.3 MB", "run again to continue")
    assert not path.exists()
    assert (tmp_path / "file.part").read_bytes() == CONTENT[:150_000]
    get(server, path)
    assert content(tmp_path) == {"file": CONTENT}
    assert server.requests[-1]["Range"] == "bytes=150000-"
    assert server.requests[-1]["If-Range"] == f'"{hashlib.md5(CONTENT).hexdigest()}"'
    assert server.sent == len(CONTENT)


def test_a_file_that_changed_is_started_again(server: Server, tmp_path: Path) -> None:
    server.files["file"], server.break_after = CONTENT, [50_000] * 3
    fails(lambda: get(server, tmp_path / "file"))
    server.files["file"] = changed = CONTENT[::-1]
    get(server, tmp_path / "file")
    assert content(tmp_path) == {"file": changed}


@pytest.mark.parametrize("size", [len(CONTENT) + 1000, 50_000])
def test_a_file_that_changed_its_size_where_no_tag_tells(server: Server, tmp_path: Path, size: int) -> None:
    server.etag = None
    server.files["file"], server.break_after = CONTENT, [50_000] * 3
    fails(lambda: get(server, tmp_path / "file"))
    server.files["file"] = changed = (CONTENT[::-1] * 2)[:size]  # the second is shorter than what is there: 416
    get(server, tmp_path / "file")
    assert content(tmp_path) == {"file": changed}


def test_the_part_of_another_url_is_not_continued(server: Server, tmp_path: Path) -> None:
    server.etag = None
    server.files = {"file": CONTENT, "other": CONTENT[::-1]}
    server.break_after = [50_000] * 3
    fails(lambda: get(server, tmp_path / "file"))
    get(server, tmp_path / "file", "other")
    assert content(tmp_path) == {"file": CONTENT[::-1]}


@pytest.mark.parametrize("etag", ["W/{}", None])
def test_weak_tags_are_not_used(server: Server, tmp_path: Path, etag: str | None) -> None:
    server.etag = etag
    server.files["file"], server.break_after = CONTENT, [50_000]
    get(server, tmp_path / "file")
    assert content(tmp_path) == {"file": CONTENT}
    assert [headers["If-Range"] for headers in server.requests] == [None, None]


def test_a_server_without_ranges(server: Server, tmp_path: Path) -> None:
    server.files["file"], server.ranges, server.break_after = CONTENT, False, [50_000, 100_000]
    get(server, tmp_path / "file")
    assert content(tmp_path) == {"file": CONTENT}


def test_a_part_that_is_whole_needs_no_request(server: Server, tmp_path: Path) -> None:
    state = {"url": server.url("file"), "validator": None, "total": len(CONTENT)}
    (tmp_path / "file.part").write_bytes(CONTENT)
    (tmp_path / "file.part.json").write_text(json.dumps(state))
    get(server, tmp_path / "file")
    assert content(tmp_path) == {"file": CONTENT}
    assert not server.requests


@pytest.mark.parametrize("state", [None, "{", "[]", "{}"])
def test_a_part_that_nothing_is_known_of(server: Server, tmp_path: Path, state: str | None) -> None:
    server.files["file"] = CONTENT
    (tmp_path / "file.part").write_bytes(b"something")
    if state is not None:
        (tmp_path / "file.part.json").write_text(state)
    get(server, tmp_path / "file")
    assert content(tmp_path) == {"file": CONTENT}


def test_a_silent_server_counts_as_broken(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "TIMEOUT", 0.1)
    server.files["file"], server.stall = CONTENT, threading.Event()
    monkeypatch.setattr(module.time, "sleep", lambda _: server.stall.set())
    get(server, tmp_path / "file")
    assert content(tmp_path) == {"file": CONTENT}
    assert server.requests[-1]["Range"] == "bytes=150000-"


def test_no_room(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(200_000))
    server.files["file"] = CONTENT
    fails(lambda: get(server, tmp_path / "file"), "dataset birds", "0.3 MB", tmp_path, "0.2 MB")
    assert set(content(tmp_path)) <= {"file.part.json"}


@pytest.mark.parametrize("url", ["file:///etc/hostname", "data:,x", "/etc/hostname"])
def test_other_urls_are_refused(tmp_path: Path, url: str) -> None:
    fails(lambda: fetch(url, tmp_path / "file", description="dataset birds"), "dataset birds", url, "http")
    assert not content(tmp_path)


def test_what_cannot_be_reached(server: Server, root: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        refused = f"http://127.0.0.1:{free.getsockname()[1]}/file"
    for url, reason in (
        (server.url("nothing"), "404"),
        (refused, "refused"),
        ("http://recast-exp.invalid/file", ""),
        ("http://127.0.0.1:port/file", "port"),
    ):
        start = f"dataset birds: {url} cannot be downloaded ("
        run = lambda url=url: download([Archive(url, "file")], root, name="birds")  # noqa: E731
        fails(run, start, reason, root / ".downloads" / "birds", kind=MissingInputError)
    assert set(content(root)) <= {".downloads/birds.lock"}


# Archives


@pytest.mark.parametrize("mode", ["w", "w:gz", "w:bz2", "w:xz"])
def test_extract_tar(tmp_path: Path, mode: str) -> None:
    (tmp_path / "archive.zip").write_bytes(tar(member("./", kind=tarfile.DIRTYPE), *BIRDS, mode=mode))
    extract(tmp_path / "archive.zip", tmp_path / "out")  # whatever its name is
    assert content(tmp_path / "out") == IN_BIRDS


def test_extract_zip(tmp_path: Path) -> None:
    (tmp_path / "archive.tar").write_bytes(zipped(("birds/", b""), *IN_BIRDS.items()))
    extract(tmp_path / "archive.tar", tmp_path / "out")
    assert content(tmp_path / "out") == IN_BIRDS


def test_links_inside_are_fine(tmp_path: Path) -> None:
    links = member("birds/c", kind=tarfile.SYMTYPE, link="deep/b.jpg"), member("d", b"", tarfile.LNKTYPE, "birds/a.jpg")
    (tmp_path / "archive").write_bytes(tar(*BIRDS, *links))
    (tmp_path / "real").mkdir()
    (tmp_path / "way").symlink_to("real")
    extract(tmp_path / "archive", tmp_path / "way" / "out")  # a link on the way to the folder is the user's
    assert content(tmp_path / "real" / "out") == {**IN_BIRDS, "birds/c": b"b", "d": CONTENT}


def evil(target: Path) -> dict[str, tuple[str, bytes]]:
    """Archives that would write to `target`, which is beside the folder, and the members that would."""
    symlink, hardlink = tarfile.SYMTYPE, tarfile.LNKTYPE
    good = member("good", b"good")
    outside = f"../{target.name}"
    return {
        "absolute": (str(target), tar(good, member(str(target), b"evil"))),
        "up": (outside, tar(good, member(outside, b"evil"))),
        "down and up": (f"good/../{outside}", tar(good, member(f"good/../{outside}", b"evil"))),
        "windows": ("C:\\evil", tar(good, member("C:\\evil", b"evil"))),
        "symlink up": (
            "link",
            tar(good, member("link", kind=symlink, link="..")),
        ),
        "symlink absolute": ("link", tar(good, member("link", kind=symlink, link=str(target)))),
        "through a symlink": (
            "s/file",
            tar(good, member("d", kind=tarfile.DIRTYPE), member("s", kind=symlink, link="d"), member("s/file", b"x")),
        ),
        "over a symlink": (
            "s",
            tar(
                good, member("d/s2", kind=symlink, link="../e"), member("s", kind=symlink, link="d"), member("s", b"x")
            ),
        ),
        "symlink chain": (
            "d/t",
            tar(member("d/s", kind=symlink, link=".."), member("d/t", kind=symlink, link=f"s/{outside}")),
        ),
        "hardlink up": ("link", tar(good, member("link", kind=hardlink, link=outside))),
        "hardlink absolute": ("link", tar(good, member("link", kind=hardlink, link=str(target)))),
        "hardlink to a symlink": (
            "link",
            tar(good, member("a/b", kind=symlink, link="../c"), member("link", kind=hardlink, link="a/b")),
        ),
        "device": ("null", tar(good, member("null", kind=tarfile.CHRTYPE))),
        "pipe": ("pipe", tar(good, member("pipe", kind=tarfile.FIFOTYPE))),
        "zip absolute": (str(target), zipped(("good", b"good"), (str(target), b"evil"))),
        "zip up": (outside, zipped(("good", b"good"), (outside, b"evil"))),
        "zip windows": ("..\\evil", zipped(("good", b"good"), ("..\\evil", b"evil"))),
        "zip symlink": ("link", zipped(("link", str(target).encode()), mode=0o120777)),
    }


@pytest.mark.parametrize("case", evil(Path("target")))
@pytest.mark.parametrize("there", [True, False])
def test_nothing_is_written_outside(tmp_path: Path, case: str, there: bool) -> None:
    target, archive = tmp_path / "target", tmp_path / "archive"
    if there:
        target.write_bytes(b"mine")
    name, data = evil(target)[case]
    archive.write_bytes(data)
    before = content(tmp_path)
    fails(lambda: extract(archive, tmp_path / "out"), archive, repr(name), kind=ArchiveError)
    assert content(tmp_path) == before
    assert not (tmp_path / "out").exists()


def damaged() -> dict[str, bytes]:
    plain = tar(*BIRDS, mode="w")
    packed = {mode: tar(*BIRDS, mode=mode) for mode in ("w:gz", "w:bz2", "w:xz")}
    whole_zip = bytearray(zipped(*IN_BIRDS.items()))
    whole_zip[1000] ^= 1
    wrong_sum = bytearray(packed["w:gz"])
    wrong_sum[-8] ^= 1
    header = plain.index(b"birds/deep")
    return {
        "empty": b"",
        "html": b"<html>please log in</html>" * 100,
        "tar in a file": plain[:100_000],
        "tar in a header": plain[: header + 100],
        "tar between files": plain[:header],
        "tar header": plain[:header] + b"xxxxx" + plain[header + 5 :],
        "gz sum": bytes(wrong_sum),
        **{f"{mode} truncated": data[: len(data) // 2] for mode, data in packed.items()},
        "zip truncated": zipped(*IN_BIRDS.items())[:-30],
        "zip content": bytes(whole_zip),
    }


@pytest.mark.parametrize("case", damaged())
def test_damaged_archives(tmp_path: Path, case: str) -> None:
    archive = tmp_path / "archive"
    archive.write_bytes(damaged()[case])
    fails(lambda: extract(archive, tmp_path / "out"), archive, "damaged", kind=ArchiveError)
    assert names(tmp_path) == ["archive"]


def bombs() -> dict[str, tuple[bytes, str]]:
    """Archives that hold far more than their size, and what is said of each."""
    zeros = bytes(400_000)
    long_name = tarfile.TarInfo("././@LongLink")
    long_name.type, long_name.size = tarfile.GNUTYPE_LONGNAME, 2 << 20
    return {
        "tar of zeros": (tar(*BIRDS, member("zeros", zeros)), "bytes of content"),
        "zip of zeros": (zipped(*IN_BIRDS.items(), ("zeros", zeros)), "bytes of content"),
        "zeros after the end": (gzip.compress(tar(*BIRDS, mode="w") + zeros), "bytes of content"),
        "tar with many members": (tar(*(member(str(number)) for number in range(60))), "at most 50 members"),
        "zip with many members": (zipped(*((str(number), b"") for number in range(60))), "at most 50 members"),
        "deep": (tar(member("a/" * 1500 + "b", b"b")), "folders deep"),
        "deep zip": (zipped(("a/" * 1500 + "b", b"b")), "folders deep"),
        "a long name": (tar((long_name, bytes(2 << 20))), "a header of 2097152 bytes"),
    }


@pytest.mark.parametrize("case", bombs())
def test_archives_that_eat_the_disk(tmp_path: Path, case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("FREE_BYTES", 250_000), ("MAX_RATIO", 2), ("MAX_MEMBERS", 50)):
        monkeypatch.setattr(unpack, name, value)
    data, expected = bombs()[case]
    (tmp_path / "archive").write_bytes(data)
    fails(lambda: extract(tmp_path / "archive", tmp_path / "out"), tmp_path / "archive", expected, kind=ArchiveError)
    assert names(tmp_path) == ["archive"]


def test_an_old_python(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(tarfile, "data_filter")
    (tmp_path / "archive").write_bytes(tar(*BIRDS))
    fails(lambda: extract(tmp_path / "archive", tmp_path / "out"), "archive", "3.11.4")


# Datasets


def birds(server: Server, **options: Any) -> list[Archive]:
    return [Archive(server.url("birds.tgz"), "aves/images", member="birds", **options)]


def is_in_place(root: Path) -> bool:
    """Whether the birds are, with nothing beside them but their lock."""
    expected = {f"aves/images/{name.removeprefix('birds/')}": data for name, data in IN_BIRDS.items()}
    rest = {name for name in content(root) if name not in expected}
    return expected.items() <= content(root).items() and rest <= {
        "checksums.json",
        ".downloads/birds.lock",
        ".downloads/checksums.json.lock",
    }


def test_download(server: Server, root: Path) -> None:
    archives = birds(server, md5=hashlib.md5(server.files["birds.tgz"]).hexdigest().upper())
    server.files["labels.mat"] = b"labels"
    archives.append(Archive(server.url("labels.mat"), "aves/labels.mat"))
    download(archives, root, name="birds")
    assert (root / "aves" / "labels.mat").read_bytes() == b"labels"
    assert json.loads((root / "checksums.json").read_text()) == {
        "birds/labels.mat": hashlib.sha256(b"labels").hexdigest()
    }
    (root / "aves" / "labels.mat").unlink()
    assert is_in_place(root)
    download(archives, root, name="birds")
    assert len(server.requests) == 3  # only the labels a second time


def test_what_is_there_is_left_alone(server: Server, root: Path) -> None:
    (root / "aves" / "images").mkdir(parents=True)
    download(birds(server), root, name="birds")
    assert not server.requests
    assert names(root) == ["aves"]


def test_the_whole_archive(server: Server, root: Path) -> None:
    server.files["birds.zip"] = zipped(("a.jpg", b"a"), ("b.jpg", b"b"))
    download([Archive(server.url("birds.zip"), "birds", member=".")], root, name="../birds")
    assert content(root / "birds") == {"a.jpg": b"a", "b.jpg": b"b"}


def test_a_published_checksum_that_is_not_met(server: Server, root: Path) -> None:
    archives = birds(server, md5="0" * 32)
    found = hashlib.md5(server.files["birds.tgz"]).hexdigest()
    fails(lambda: download(archives, root, name="birds"), archives[0].url, found, "0" * 32, "run again")
    assert set(content(root)) == {".downloads/birds.lock"}


def test_a_recorded_checksum_that_is_not_met(server: Server, root: Path) -> None:
    archives = birds(server)
    download(archives, root, name="birds")
    first = hashlib.sha256(server.files["birds.tgz"]).hexdigest()
    assert json.loads((root / "checksums.json").read_text()) == {"birds/birds.tgz": first}

    shutil.rmtree(root / "aves")
    server.files["birds.tgz"] = tar(*BIRDS, member("birds/new"))
    second = hashlib.sha256(server.files["birds.tgz"]).hexdigest()
    expected = archives[0].url, first, second, "birds/birds.tgz", root / "checksums.json"
    fails(lambda: download(archives, root, name="birds"), *expected)
    assert not (root / "aves" / "images").exists()
    assert not list(root.rglob("birds.tgz*"))

    (root / "checksums.json").write_text("{}")  # as the message says
    download(archives, root, name="birds")
    assert json.loads((root / "checksums.json").read_text()) == {"birds/birds.tgz": second}


@pytest.mark.parametrize("text", ["{,}", "[]"])
def test_checksums_that_are_no_json(server: Server, root: Path, text: str) -> None:
    root.mkdir()
    (root / "checksums.json").write_text(text)
    fails(lambda: download(birds(server), root, name="birds"), root / "checksums.json", "correct or remove")


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b"<html>please log in</html>", "damaged"),
        (tar(member("cats/a.jpg", b"a")), "expected birds in"),
        (tar(*BIRDS, member("../evil", b"evil")), "'../evil'"),
    ],
    ids=["html", "other", "evil"],
)
def test_a_wrong_archive_is_not_kept_or_recorded(server: Server, root: Path, data: bytes, expected: str) -> None:
    archives = birds(server)
    good = server.files["birds.tgz"]
    server.files["birds.tgz"] = data
    fails(lambda: download(archives, root, name="birds"), expected, kind=ArchiveError)
    server.files["birds.tgz"] = good
    download(archives, root, name="birds")
    assert is_in_place(root)
    assert names(root.parent) == ["data"]


def test_leftovers_of_killed_runs(server: Server, root: Path) -> None:
    archives = birds(server)
    own = root / ".downloads" / "birds"
    (own / "unpacked" / "birds" / "half").mkdir(parents=True)
    (own / "birds.tgz").write_bytes(server.files["birds.tgz"])  # whole, as it has its name
    download(archives, root, name="birds")
    assert is_in_place(root)
    assert not (root / "aves" / "images" / "half").exists()
    assert not own.exists()
    assert not server.requests


def test_another_dataset_with_the_same_files_was_faster(
    server: Server, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def slowly(archive: Path, folder: Path) -> None:
        extract(archive, folder)
        shutil.copytree(folder / "birds", root / "aves" / "images")

    monkeypatch.setattr(module, "extract", slowly)
    download(birds(server), root, name="birds")
    assert is_in_place(root)


def test_a_root_that_cannot_be_written_to(server: Server, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    root = tmp_path / "file" / "data"
    fails(lambda: download(birds(server), root, name="birds"), "data_dir", root, "cannot be written to")
    assert not server.requests


def start(archive: Archive, root: Path) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-c", DOWNLOAD, archive.url, str(root), archive.provides, archive.member or ""]
    return subprocess.Popen(command, stderr=subprocess.PIPE)


def wait_for(condition: Callable[[], object]) -> None:
    end = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_a_kill_halfway_is_continued(server: Server, root: Path) -> None:
    archive = birds(server)[0]
    size = len(server.files["birds.tgz"])
    part = root / ".downloads" / "birds" / "birds.tgz.part"
    server.stall = threading.Event()
    with start(archive, root) as process:
        wait_for(lambda: part.exists() and part.stat().st_size == size // 2)
        process.kill()
    assert not (root / "aves").exists()
    server.stall.set()
    server.sent = 0
    download([archive], root, name="birds")
    assert is_in_place(root)
    assert server.requests[-1]["Range"] == f"bytes={size // 2}-"
    assert size // 2 <= server.sent <= size + 1000  # the killed one's rest may have been sent into the void


def test_of_two_processes_one_downloads(server: Server, root: Path) -> None:
    archive = birds(server)[0]
    server.stall = threading.Event()
    with start(archive, root) as first, start(archive, root) as second:
        wait_for(lambda: server.requests)
        time.sleep(0.5)  # for the other to come to the lock
        server.stall.set()
        assert [first.wait(10), second.wait(10)] == [0, 0]
    assert is_in_place(root)
    assert len(server.requests) == 1
    assert server.sent == len(server.files["birds.tgz"])


def test_import_is_light() -> None:
    code = (
        "import sys, recast_exp.data.download\n"
        "print([m for m in ('numpy', 'torch', 'PIL', 'tqdm', 'filelock') if m in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"
