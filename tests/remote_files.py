"""Servers and copies of small data for the tests of files at URLs."""

from __future__ import annotations

import io
import tarfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from http.client import HTTPConnection
from http.server import BaseHTTPRequestHandler, SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq


def put_memory(folder: Path, name: str) -> str:
    """Copy a folder to a URL of memory:// and return it."""
    files = fsspec.filesystem("memory")
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            files.pipe_file(f"/{name}/{path.relative_to(folder).as_posix()}", path.read_bytes())
    return f"memory://{name}"


def clips_table(folder: Path) -> pa.Table:
    """Return the clips of a folder with their media in the rows."""
    import csv

    with (folder / "metadata.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    return pa.table(
        {
            "id": [row["id"] for row in rows],
            "label": [row["label"] for row in rows],
            "audio": pa.array([(folder / row["audio_file_name"]).read_bytes() for row in rows], pa.binary()),
            "image": pa.array([(folder / row["image_file_name"]).read_bytes() for row in rows], pa.binary()),
        }
    )


def write_forms(clips: Path, folder: Path) -> dict[str, Path]:
    """Write the clips in every form that is read at URLs; return the sources by form."""
    table = clips_table(clips)
    (folder / "parquet").mkdir(parents=True)
    for number in range(2):
        pq.write_table(table.slice(12 * number, 12), folder / f"parquet/{number}.parquet", row_group_size=5)
    (folder / "tars").mkdir()
    for number in range(2):
        with tarfile.open(folder / f"tars/{number}.tar", "w") as archive:
            for row in table.slice(12 * number, 12).to_pylist():
                for name, data in (("wav", row["audio"]), ("png", row["image"]), ("cls", row["label"][-1].encode())):
                    member = tarfile.TarInfo(f"{row['id']}.{name}")
                    member.size = len(data)
                    archive.addfile(member, io.BytesIO(data))
    for row in table.to_pylist():
        target = folder / "folders" / row["label"]
        target.mkdir(parents=True, exist_ok=True)
        (target / f"{row['id']}.wav").write_bytes(row["audio"])
        (target / f"{row['id']}.png").write_bytes(row["image"])
    return {name: folder / name for name in ("parquet", "tars", "folders")}


@dataclass
class Faults:
    """Faults that a server makes: by path, a list of kinds, one for each request, the last one for all others.

    Kinds: "" none, "500", "403", "404", "slow", "short" (a truncated body), "redirect".
    """

    by_path: dict[str, list[str]] = field(default_factory=dict)
    requests: list[tuple[str, str, str]] = field(default_factory=list)
    delay: float = 0.0
    on_head: bool = False
    slow_seconds: float = 3.0

    def next(self, path: str) -> str:
        kinds = next((kinds for name, kinds in self.by_path.items() if path.endswith(name)), [""])
        return kinds.pop(0) if len(kinds) > 1 else kinds[0]


class RangeHandler(SimpleHTTPRequestHandler):
    """Files of a folder with ranges, sizes and tags, and with faults."""

    protocol_version = "HTTP/1.1"

    def __init__(self, *args: Any, faults: Faults, **options: Any) -> None:
        self.faults = faults
        super().__init__(*args, **options)

    def log_message(self, *args: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer(head=True)

    def do_GET(self) -> None:
        self._answer(head=False)

    def _answer(self, *, head: bool) -> None:
        path = Path(self.translate_path(self.path))
        asked = self.headers.get("Range", "")
        self.faults.requests.append((self.command, self.path, asked))
        if self.faults.delay:
            threading.Event().wait(self.faults.delay)
        kind = "" if head and not self.faults.on_head else self.faults.next(self.path)
        if kind == "slow":
            threading.Event().wait(self.faults.slow_seconds)
        if kind == "redirect":
            self.send_response(302)
            self.send_header("Location", "file:///etc/hostname")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        if kind.isdecimal():
            self._send(int(kind), b"")
            return
        if path.is_dir():
            names = sorted(entry.name + ("/" if entry.is_dir() else "") for entry in path.iterdir())
            page = "".join(f'<a href="{name}">{name}</a>\n' for name in [*names, "../", "http://other.example/x.wav"])
            self._send(200, page.encode(), head=head, kind="text/html")
            return
        if not path.is_file():
            self._send(404, b"")
            return
        data = path.read_bytes()
        start, end = 0, len(data)
        if asked.startswith("bytes="):
            first, _, last = asked[6:].partition("-")
            start, end = int(first), min(len(data), int(last) + 1) if last else len(data)
        body = data[start:end]
        if kind == "short":
            body = body[: len(body) // 2]
        self._send(206 if asked else 200, body, head=head, tag=f'"{path.stat().st_mtime_ns}"')

    def _send(
        self, status: int, body: bytes, *, head: bool = False, kind: str = "application/x", tag: str = ""
    ) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Accept-Ranges", "bytes")
        if tag:
            self.send_header("ETag", tag)
        self.end_headers()
        if not head:
            self.wfile.write(body)


class Server(ThreadingHTTPServer):
    """A server that ends with its tests, and is silent where a client leaves early."""

    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        pass


class ProxyHandler(BaseHTTPRequestHandler):
    """Requests passed on to another server, with faults of the answers to GET."""

    protocol_version = "HTTP/1.1"

    def __init__(self, *args: Any, faults: Faults, port: int, **options: Any) -> None:
        self.faults, self.port = faults, port
        super().__init__(*args, **options)

    def log_message(self, *args: Any) -> None:
        pass

    def pass_on(self) -> None:
        kind = self.faults.next(self.path.partition("?")[0]) if self.command == "GET" else ""
        if kind == "slow":
            threading.Event().wait(self.faults.slow_seconds)
        if kind.isdecimal():
            self._send(int(kind), {}, b"")
            return
        connection = HTTPConnection("127.0.0.1", self.port)
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        connection.request(self.command, self.path, body, dict(self.headers))
        answer = connection.getresponse()
        data, headers = answer.read(), dict(answer.getheaders())
        connection.close()
        self._send(answer.status, headers, data, num_bytes=len(data) // 2 if kind == "short" else len(data))

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = pass_on

    def _send(self, status: int, headers: dict[str, str], body: bytes, *, num_bytes: int = 0) -> None:
        self.send_response(status)
        for name, value in headers.items():
            if name.lower() not in ("transfer-encoding", "connection", "server", "date", "content-length"):
                self.send_header(name, value)
        length = headers.get("Content-Length", str(len(body))) if self.command == "HEAD" else str(len(body))
        self.send_header("Content-Length", length)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body[:num_bytes])
            self.close_connection = num_bytes < len(body)


@contextmanager
def proxy(port: int, faults: Faults) -> Iterator[str]:
    """Pass requests on to a port of loopback, with faults; yield the URL."""
    with serving(partial(ProxyHandler, faults=faults, port=port)) as url:
        yield url


@contextmanager
def range_server(folder: Path, faults: Faults | None = None) -> Iterator[str]:
    """Serve a folder on loopback; yield its URL."""
    with serving(partial(RangeHandler, faults=faults or Faults(), directory=str(folder))) as url:
        yield url


@contextmanager
def serving(handler: Any) -> Iterator[str]:
    """Serve requests on a port of loopback; yield the URL."""
    server = Server(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
