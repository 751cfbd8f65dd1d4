"""A server that answers the few calls which the hf:// file system makes: a repository of data sets that is a local directory."""

import json
import re
from functools import cached_property
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class FakeHub:
    """Serves `directory` as the data set `repository` until closed; `seen` lists the calls."""

    def __init__(self, directory: Path, repository: str):
        self.directory, self.repository, self.seen = directory, repository, []
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"owner": self}))
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        Thread(target=self.server.serve_forever, args=(0.05,), daemon=True).start()

    def __enter__(self) -> "FakeHub":
        return self

    def __exit__(self, *exception: object) -> None:
        self.server.shutdown()
        self.server.server_close()

    def entry(self, name: str) -> dict[str, Any]:
        path = self.directory / name
        if path.is_dir():
            return {"type": "directory", "path": name, "oid": COMMIT, "size": 0}
        return {"type": "file", "path": name, "oid": COMMIT, "size": path.stat().st_size}


class _Handler(BaseHTTPRequestHandler):
    owner: FakeHub
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self._answer()

    def do_HEAD(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        self._answer()

    @cached_property
    def body(self) -> bytes:
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def _answer(self) -> None:
        self.__dict__.pop("body", None)
        path, hub = unquote(urlsplit(self.path).path), self.owner
        hub.seen.append(f"{self.command} {path}")
        api = f"/api/datasets/{hub.repository}"
        if path == api or re.fullmatch(re.escape(api) + r"/revision/\w+", path):
            facts = {"private": False, "tags": [], "downloads": 0, "likes": 0}
            self._json({"id": hub.repository, "sha": COMMIT, "siblings": [], **facts})
        elif (tree := re.fullmatch(re.escape(api) + r"/tree/\w+/?(.*)", path)) and (hub.directory / tree[1]).is_dir():
            children = sorted((hub.directory / tree[1]).iterdir())
            self._json([hub.entry(str(child.relative_to(hub.directory))) for child in children])
        elif path.startswith(f"{api}/paths-info/"):
            names = json.loads(self.body)["paths"] if self.body.startswith(b"{") else []
            self._json([hub.entry(name) for name in names if (hub.directory / name).exists()])
        elif (found := re.fullmatch(rf"/datasets/{re.escape(hub.repository)}/resolve/\w+/(.+)", path)) and (
            hub.directory / found[1]
        ).is_file():
            self._file(hub.directory / found[1])
        else:
            self._send(404, {"X-Error-Code": "EntryNotFound"}, b"")

    def _file(self, path: Path) -> None:
        data, status, headers = path.read_bytes(), 200, {"ETag": f'"{COMMIT}"', "X-Repo-Commit": COMMIT}
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        if wanted:
            stop = int(wanted[2]) + 1 if wanted[2] else len(data)
            headers["Content-Range"] = f"bytes {wanted[1]}-{min(stop, len(data)) - 1}/{len(data)}"
            data, status = data[int(wanted[1]) : stop], 206
        self._send(status, headers, data)

    def _json(self, value: Any) -> None:
        self._send(200, {"Content-Type": "application/json"}, json.dumps(value).encode())

    def _send(self, status: int, headers: dict[str, str], body: bytes) -> None:
        _ = self.body  # else it would be read as the next request
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, *_: Any) -> None: ...
