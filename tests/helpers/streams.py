"""Shards of real garments, and a server that loses connections."""

import io
import tarfile
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from vqgen.tokenizer.data.sources import DEMO

Members = Sequence[tuple[str | tarfile.TarInfo, bytes]]


def garments(count: int) -> list[dict[str, Any]]:
    """Rows of the demo: PNG and label."""
    rows = pq.read_table(DEMO / "train.parquet").slice(0, count).to_pylist()
    return [{"image": row["image"]["bytes"], "label": row["label"]} for row in rows]


def as_jpeg(data: bytes) -> bytes:
    out = io.BytesIO()
    Image.open(io.BytesIO(data)).save(out, "JPEG", quality=95)
    return out.getvalue()


def write_tar(path: Path, members: Members) -> Path:
    """A tar file of members by name or by header; a header keeps its size where there are no bytes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            header = tarfile.TarInfo(name) if isinstance(name, str) else name
            if data or isinstance(name, str):
                header.size = len(data)
            tar.addfile(header, io.BytesIO(data))
    return path


def sample(key: str, row: dict[str, Any], image: str = "png") -> Members:
    """The members of one sample: image, class and caption."""
    return [(f"{key}.{image}", row["image"]), (f"{key}.cls", b"%d" % row["label"]), (f"{key}.txt", key.encode())]


def write_tars(folder: Path, files: int, each: int, stem: str = "shard") -> Path:
    """`files` tar files of `each` garments; every third image is a JPEG."""
    rows = garments(files * each)
    for file in range(files):
        members = list[Any]()
        for number in range(file * each, (file + 1) * each):
            row = rows[number]
            row = row if number % 3 else {**row, "image": as_jpeg(row["image"])}
            members += sample(f"{number:05d}", row, "png" if number % 3 else "jpg")
        write_tar(folder / f"{stem}-{file:04d}.tar", members)
    return folder


def write_parquets(folder: Path, files: int, each: int) -> Path:
    """`files` parquet files of `each` garments with captions, in groups of 7 rows."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = garments(files * each)
    for file in range(files):
        part = rows[file * each : (file + 1) * each]
        columns = {
            "image": [{"bytes": row["image"], "path": None} for row in part],
            "label": [row["label"] for row in part],
            "text": [f"{file * each + number:05d}" for number in range(each)],
        }
        pq.write_table(pa.table(columns), folder / f"part-{file:04d}.parquet", row_group_size=7)
    return folder


@dataclass
class Server:
    """Files of a folder by HTTP. `drop(number)` says after how many bytes of answer `number` the connection is lost."""

    folder: Path
    drop: Callable[[int], int | None] = lambda _: None
    status: int = 200
    ranges: bool = True
    requests: list[str] = field(default_factory=list)
    authorization: str | None = None
    """The header of that name without which the answer is 401."""
    elsewhere: str = ""
    """The server that every request is redirected to."""
    given: list[str] = field(default_factory=list)
    """The headers Authorization of the requests."""
    url: str = ""


@contextmanager
def serving(folder: Path, **settings: Any) -> Iterator[Server]:
    server = Server(folder, **settings)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: Any) -> None:
            pass

        def do_HEAD(self) -> None:
            self.answer(False)

        def do_GET(self) -> None:
            self.answer(True)

        def answer(self, body: bool) -> None:
            server.requests.append(f"{self.command} {self.path} {self.headers.get('Range', '')}".strip())
            server.given.append(given := self.headers.get("Authorization", ""))
            number = sum(each.startswith("GET") for each in server.requests)
            path = server.folder / self.path.lstrip("/").split("?")[0]
            status = 404 if not path.is_file() else server.status
            if server.authorization not in (None, given):
                status = 401
            status = 302 if server.elsewhere else status
            data = path.read_bytes() if status == 200 else b""
            self.close_connection = True
            size, start = len(data), 0
            if server.ranges and status == 200 and (asked := self.headers.get("Range")):
                first, _, last = asked.removeprefix("bytes=").partition("-")
                start, stop = int(first), min(int(last or size - 1) + 1, size)
                data, status = data[start:stop], 206
            self.send_response(status)
            if server.elsewhere:
                self.send_header("Location", f"{server.elsewhere}{self.path}")
            if server.ranges:
                self.send_header("Accept-Ranges", "bytes")
                if status == 206:
                    self.send_header("Content-Range", f"bytes {start}-{start + len(data) - 1}/{size}")
            self.send_header("Content-Length", str(len(data)))
            self.send_header("Connection", "close")
            self.end_headers()
            if body:
                self.wfile.write(data[: server.drop(number)])

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as http:
        thread = threading.Thread(target=http.serve_forever, args=(0.01,), daemon=True)
        thread.start()
        server.url = f"http://127.0.0.1:{http.server_address[1]}"
        try:
            yield server
        finally:
            http.shutdown()
            thread.join()
