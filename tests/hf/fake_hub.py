"""A Hugging Face hub of a few files, on this machine's loopback, that writes down what it is asked for."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

MAIN, OLD = "a" * 40, "b" * 40  # commits


class Hub:
    """Repositories by id, each with files by commit and name.

    Attributes:
        asked: (method, path) of every request, in their order.
        gated: ids of repositories that nobody may read.
    """

    def __init__(self) -> None:
        self.files: dict[str, dict[str, dict[str, bytes]]] = {}
        self.gated: set[str] = set()
        self.asked: list[tuple[str, str]] = []
        self.endpoint = ""

    def add(self, repo_id: str, folder: Path, commit: str = MAIN, **more: bytes) -> None:
        """Take all files of a folder, and more by their names."""
        files = {
            str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()
        }
        self.files.setdefault(repo_id, {})[commit] = files | more

    def downloaded(self) -> set[str]:
        """Names of the files whose content was handed out."""
        return {
            path.split("/", 5)[5] for method, path in self.asked if method == "GET" and "/resolve/" in path
        }


@contextmanager
def serving() -> Iterator[Hub]:
    """A hub that answers at `endpoint` until the block ends."""
    hub = Hub()

    class Handler(_Handler):
        pass

    Handler.hub = hub
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    hub.endpoint = f"http://127.0.0.1:{server.server_address[1]}"
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self._answer(with_body=True)

    def do_HEAD(self) -> None:
        self._answer(with_body=False)

    def log_message(self, *_: object) -> None:
        """Nothing on stderr."""

    def _answer(self, *, with_body: bool) -> None:
        path = self.path.partition("?")[0]
        self.hub.asked.append((self.command, path))
        status, headers, body = self._found(path.strip("/").split("/"))
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if with_body:
            self.wfile.write(body)

    def _found(self, parts: list[str]) -> tuple[int, dict[str, str], bytes]:
        is_api = parts[:2] == ["api", "models"]
        parts = parts[2:] if is_api else parts
        repo_id, rest = "/".join(parts[:2]), parts[2:]
        commits = self.hub.files.get(repo_id)
        if commits is None:
            return 404, {"X-Error-Code": "RepoNotFound"}, b"{}"
        if repo_id in self.hub.gated:
            return 403, {"X-Error-Code": "GatedRepo", "X-Error-Message": "Access is restricted"}, b"{}"
        revision = rest[1] if len(rest) > 1 else "main"
        commit = {"main": MAIN, "old": OLD}.get(revision, revision)
        if commit not in commits:
            return 404, {"X-Error-Code": "RevisionNotFound"}, b"{}"
        files = commits[commit]
        if not is_api:
            content = files["/".join(rest[2:])]
            return 200, {"X-Repo-Commit": commit, "ETag": f'"{hashlib.sha1(content).hexdigest()}"'}, content
        if rest[:1] == ["tree"]:
            listed = [
                {"type": "file", "path": name, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
                for name, content in files.items()
            ]
            return 200, {"Content-Type": "application/json"}, json.dumps(listed).encode()
        info = {"id": repo_id, "sha": commit, "siblings": [{"rfilename": name} for name in files]}
        return 200, {"Content-Type": "application/json"}, json.dumps(info).encode()


def cached(home: Path, repo_id: str, folder: Path, commit: str = MAIN, ref: str = "main") -> Path:
    """Lay the files of a folder into a cache, as huggingface_hub keeps a snapshot; the snapshot's folder."""
    repo = home / "hub" / f"models--{repo_id.replace('/', '--')}"
    snapshot = repo / "snapshots" / commit
    for path in folder.iterdir():
        blob = repo / "blobs" / hashlib.sha256(path.read_bytes()).hexdigest()
        for parent in (blob.parent, snapshot):
            parent.mkdir(parents=True, exist_ok=True)
        blob.write_bytes(path.read_bytes())
        (snapshot / path.name).symlink_to(f"../../blobs/{blob.name}")
    (repo / "refs").mkdir(exist_ok=True)
    (repo / "refs" / ref).write_text(commit)
    return snapshot
