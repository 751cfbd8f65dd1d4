"""An HTTP server that misbehaves on request: it serves a directory, or passes requests on to another server (an S3 one), and on
chosen requests cuts the connection, stalls, corrupts a byte or answers with an error."""

import http.client
import re
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

STALL = 2.0  # seconds
Reply = tuple[int, dict[str, str], bytes]


class FaultyServer:
    """Serves until closed.

    `faults` is consumed from the front by GET requests for tars: "cut", "stall", "corrupt", "busy", "short", or "" for a proper
    answer. `requests` counts GETs by file name.
    """

    def __init__(self, *, directory: Path | None = None, upstream: str | None = None, ranges: bool = True):
        self.directory, self.upstream, self.ranges = directory, upstream, ranges
        self.faults: list[str] = []
        self.always: str = ""
        self.requests: Counter[str] = Counter()
        self.lock = threading.Lock()
        handler = type("Handler", (_Handler,), {"owner": self})
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        threading.Thread(target=self.server.serve_forever, args=(0.05,), daemon=True).start()

    def next_fault(self, path: str) -> str:
        name = unquote(urlsplit(path).path).rsplit("/", 1)[-1]
        with self.lock:
            self.requests[name] += 1
            if not name.endswith(".tar"):
                return ""
            return self.faults.pop(0) if self.faults else self.always

    def __enter__(self) -> "FaultyServer":
        return self

    def __exit__(self, *exception: object) -> None:
        self.server.shutdown()
        self.server.server_close()


class _Handler(BaseHTTPRequestHandler):
    owner: FaultyServer
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        fault = self.owner.next_fault(self.path)
        status, headers, body = (503, {}, b"busy") if fault == "busy" else self.answer()
        if fault == "stall":
            time.sleep(STALL)
        if fault == "corrupt":
            middle = len(body) // 2
            body = body[:middle] + bytes([body[middle] ^ 0x10]) + body[middle + 1 :]
        if fault == "short":
            body = body[: len(body) // 2]
        self.reply(status, headers, body, cut=fault == "cut")

    def do_HEAD(self) -> None:
        self.reply(*self.answer())

    do_PUT = do_POST = do_HEAD  # noqa: N815

    def reply(self, status: int, headers: dict[str, str], body: bytes, *, cut: bool = False) -> None:
        try:
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            if "Content-Length" not in headers:
                self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body[: len(body) // 2] if cut else body)
            self.wfile.flush()
        except (BrokenPipeError, ConnectionResetError):
            cut = True
        if cut:
            self.close_connection = True

    def answer(self) -> Reply:
        if self.owner.upstream is None:
            return self.from_directory()
        length = int(self.headers.get("Content-Length") or 0)
        body = self.rfile.read(length) if length else None
        target = urlsplit(self.owner.upstream)
        connection = http.client.HTTPConnection(target.hostname, target.port, timeout=20)
        skipped = {"connection", "transfer-encoding", "content-length", "expect"}
        headers = {name: value for name, value in self.headers.items() if name.lower() not in skipped}
        connection.request(self.command, self.path, body=body, headers=headers)
        response = connection.getresponse()
        data = response.read()
        kept = {name: value for name, value in response.getheaders() if name.lower() not in skipped | {"date", "server"}}
        if self.command == "HEAD":
            kept["Content-Length"] = response.headers.get("Content-Length", "0")
        connection.close()
        return response.status, kept, data

    def from_directory(self) -> Reply:
        file = self.owner.directory / unquote(urlsplit(self.path).path).lstrip("/")
        if not file.is_file():
            return 404, {}, b"no such file"
        data = file.read_bytes()
        wanted = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        if wanted is None or not self.owner.ranges:
            return 200, {}, data
        first, last = int(wanted[1]), int(wanted[2])
        return 206, {"Content-Range": f"bytes {first}-{last}/{len(data)}"}, data[first : last + 1]

    def log_message(self, *arguments: object) -> None: ...
