"""Downloads against a server on this machine: whole, cut and continued, changed, refused."""

import hashlib
import http.server
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from sasrec.data import catalogue, download
from sasrec.data.catalogue import Dataset
from sasrec.errors import UserError

LINES = "".join(f"u{user},i{item},5,{1000 + item}\n" for user in range(300) for item in range(30)).encode()
DIGEST = hashlib.sha256(LINES).hexdigest()


class Server(http.server.ThreadingHTTPServer):
    """Serves `content` with ranges; the first `cuts` answers stop in the middle."""

    content = LINES
    etag: str | None = '"one"'
    cuts = 0
    ranges = True
    status = 0
    requests: list[str]


class Handler(http.server.BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        server = self.server
        wanted = self.headers.get("Range")
        server.requests.append(wanted or "all")
        if server.status:
            self.send_error(server.status)
            return
        content, start = server.content, 0
        fresh = self.headers.get("If-Range") in (None, server.etag)
        if wanted and server.ranges and fresh:
            start = int(wanted.removeprefix("bytes=").removesuffix("-"))
            if start >= len(content):
                self.send_response(416)
                self.send_header("Content-Range", f"bytes */{len(content)}")
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        else:
            self.send_response(200)
        if server.etag:
            self.send_header("ETag", server.etag)
        # A .gz file that the server calls an encoding must not be unpacked on the way.
        self.send_header("Content-Encoding", "gzip")
        self.send_header("Content-Length", str(len(content) - start))
        self.end_headers()
        stop = len(content)
        if server.cuts:
            server.cuts -= 1
            stop = start + (len(content) - start) // 2
        self.wfile.write(content[start:stop])

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(download, "PAUSE", 0.0)
    running = Server(("127.0.0.1", 0), Handler)
    running.requests = []
    thread = threading.Thread(target=running.serve_forever, args=(0.01,))
    thread.start()
    yield running
    running.shutdown()
    thread.join()
    running.server_close()


def url(server: Server) -> str:
    return f"http://127.0.0.1:{server.server_address[1]}/ratings_Beauty.csv"


def test_whole(server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = tmp_path / "deep" / "a.csv"
    assert download.obtain(url(server), target, DIGEST, "x").read_bytes() == LINES
    assert [path.name for path in target.parent.iterdir()] == ["a.csv"]
    assert capsys.readouterr().out == f"downloading a.csv ({len(LINES) / 1e6:.1f} MB)\n"
    download.obtain(url(server), target, DIGEST, "x")
    assert server.requests == ["all"]


@pytest.mark.parametrize("etag", ['"one"', None])
def test_cut_and_continued(server: Server, tmp_path: Path, etag: str | None) -> None:
    server.cuts, server.etag = 2, etag
    target = tmp_path / "a.csv"
    assert download.obtain(url(server), target, DIGEST, "x").read_bytes() == LINES
    half = len(LINES) // 2
    assert server.requests == ["all", f"bytes={half}-", f"bytes={half + (len(LINES) - half) // 2}-"]


def test_continued_by_the_next_run(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(download, "ATTEMPTS", 1)
    server.cuts = 1
    target = tmp_path / "a.csv"
    with pytest.raises(UserError, match="Run again to continue"):
        download.download(url(server), target)
    assert not target.exists() and (tmp_path / "a.csv.part").stat().st_size == len(LINES) // 2
    download.download(url(server), target)
    assert target.read_bytes() == LINES and server.requests[1] == f"bytes={len(LINES) // 2}-"


def test_server_without_ranges_starts_again(server: Server, tmp_path: Path) -> None:
    server.cuts, server.ranges = 1, False
    download.download(url(server), tmp_path / "a.csv")
    assert (tmp_path / "a.csv").read_bytes() == LINES


def test_file_that_changed_meanwhile_is_not_joined(server: Server, tmp_path: Path) -> None:
    (tmp_path / "a.csv.part").write_bytes(b"older")
    (tmp_path / "a.csv.part.etag").write_text('"zero"')
    download.download(url(server), tmp_path / "a.csv")
    assert (tmp_path / "a.csv").read_bytes() == LINES


@pytest.mark.parametrize("part", [LINES, LINES + b"more"])
def test_part_that_is_already_whole_or_too_long(server: Server, tmp_path: Path, part: bytes) -> None:
    (tmp_path / "a.csv.part").write_bytes(part)
    download.download(url(server), tmp_path / "a.csv")
    assert (tmp_path / "a.csv").read_bytes() == LINES


def test_wrong_hash_is_refused_and_removed(server: Server, tmp_path: Path) -> None:
    target = tmp_path / "a.csv"
    with pytest.raises(UserError) as refusal:
        download.obtain(url(server), target, "0" * 64, "x")
    assert DIGEST in str(refusal.value) and "0" * 64 in str(refusal.value) and "dataset.sha256" in str(refusal.value)
    assert not target.exists()


@pytest.mark.parametrize(("status", "attempts"), [(404, 1), (503, 5)])
def test_refused_by_the_server(server: Server, tmp_path: Path, status: int, attempts: int) -> None:
    server.status = status
    with pytest.raises(UserError, match=str(status)):
        download.download(url(server), tmp_path / "a.csv")
    assert len(server.requests) == attempts


def test_no_connection(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(download, "PAUSE", 0.0)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with pytest.raises(UserError, match="continue, or get the file by other means"):
        download.download("http://127.0.0.1:1/a.csv", tmp_path / "a.csv")


def test_unknown_hash_fails_once_and_the_file_is_used_then(
    server: Server, stage: Callable[..., None], project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    entry = Dataset(url(server), None, "amazon-2014", None, "comparable")
    monkeypatch.setitem(catalogue.DATASETS, "amazon-beauty-2014", entry)
    for _ in range(2):
        with pytest.raises(SystemExit) as ended:
            stage("fetch", dataset={"name": "amazon-beauty-2014"})
        assert str(ended.value.code).endswith(f"sha256: {DIGEST}") and "`dataset:`" in str(ended.value.code)
        assert not (project / "data" / "raw").exists()
    stage("fetch", dataset={"name": "amazon-beauty-2014", "sha256": DIGEST})
    stage("prepare", dataset={"name": "amazon-beauty-2014", "sha256": DIGEST}, prepare={"candidates": 3})
    assert server.requests == ["all"]
    assert (project / "data" / "prepared" / "stats.json").exists()
