"""A stand-in for Hugging Face's hub on loopback: repositories are folders, and large files come from another host.

It answers what huggingface_hub asks too, which tests use as the reference for its own behaviour.
"""

import dataclasses
import hashlib
import json
import re
import threading
from contextlib import suppress
from functools import cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, NamedTuple, Self
from urllib.parse import unquote, urlsplit

TOKEN = "hf_secret"
LARGE = (".gguf", ".safetensors", ".bin")  # stored with Git LFS


@dataclasses.dataclass
class Faults:
    """What goes wrong. Lists are used up, one item per request for the bytes of a large file."""

    break_after: list[int | None] = dataclasses.field(default_factory=list)  # bytes, then the connection is closed
    stall_after: list[int | None] = dataclasses.field(default_factory=list)  # bytes, then nothing more comes
    statuses: list[int] = dataclasses.field(default_factory=list)
    retry_after: str = ""
    ignores_ranges: bool = False
    corrupts: bool = False
    listing_status: int = 0
    gated: set[str] = dataclasses.field(default_factory=set)  # repositories that need TOKEN


class Seen(NamedTuple):
    host: str
    path: str
    range: str
    has_token: bool


class StubHub:
    """The hub, which answers while the context is open."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder  # org/name/files
        self.faults = Faults()
        self.seen: list[Seen] = []
        self.num_bytes_sent = 0  # of large files
        self.closed = threading.Event()

    def environment(self, folder: Path) -> dict[str, str]:
        """Return the variables with which this is the hub, with an empty cache in `folder`."""
        return {
            "HF_ENDPOINT": self.url,
            "HF_HOME": str(folder / "home"),
            "HF_HUB_CACHE": str(folder / "cache"),
            "HF_HUB_OFFLINE": "0",
            "NO_PROXY": "127.0.0.1,localhost",
        }

    def add(self, repo: str, files: dict[str, bytes]) -> None:
        for path, content in files.items():
            target = self.folder / repo / path
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(content)

    def commit(self, repo: str) -> str:
        digest = hashlib.sha1(repo.encode())
        for path in self._paths(repo):
            digest.update(path.encode() + sha256(self.folder / repo / path).encode())
        return digest.hexdigest()

    def requests(self, pattern: str) -> list[Seen]:
        return [seen for seen in self.seen if re.search(pattern, seen.path)]

    def _paths(self, repo: str) -> list[str]:
        root = self.folder / repo
        return sorted(path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file())

    def listing(self, repo: str) -> Any:
        return {"id": repo, "sha": self.commit(repo), "siblings": [self._entry(repo, p) for p in self._paths(repo)]}

    def _entry(self, repo: str, path: str) -> dict[str, Any]:
        file = self.folder / repo / path
        size, is_large = file.stat().st_size, path.endswith(LARGE)
        content = sha256(file).encode() if is_large else file.read_bytes()
        entry: dict[str, Any] = {"rfilename": path, "size": size, "blobId": git_hash(content)}
        lfs = {"lfs": {"sha256": content.decode(), "size": size, "pointerSize": 135}} if is_large else {}
        return entry | lfs

    def __enter__(self) -> Self:
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"stub": self}))
        self.port = self._server.server_address[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.cdn = f"http://localhost:{self.port}"
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02})
        self._thread.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.closed.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


def sha256(file: Path) -> str:
    status = file.stat()
    return _sha256(file, status.st_size, status.st_mtime_ns)


@cache
def _sha256(file: Path, size: int, modified: int) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def git_hash(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


class _Handler(BaseHTTPRequestHandler):
    stub: StubHub
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_GET(self) -> None:
        with suppress(ConnectionError):  # the client has been interrupted
            self._answer()

    do_HEAD = do_GET  # noqa: N815

    def _answer(self) -> None:
        path = urlsplit(self.path).path
        self._has_token = self.headers.get("Authorization") == f"Bearer {TOKEN}"
        host = (self.headers.get("Host") or "").partition(":")[0]
        has_any = "Authorization" in self.headers
        self.stub.seen.append(Seen(host, unquote(self.path), self.headers.get("Range", ""), has_any))
        if host == "localhost":
            self._send_large(path)
        elif match := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/revision/(.+))?", path):
            self._send_listing(match[1], unquote(match[2] or "main"))
        elif match := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            self._resolve(match[1], unquote(match[2]), unquote(match[3]))
        else:
            self._send(404, b"Not found", {})

    def _has_repo(self, repo: str, revision: str) -> bool:
        if not (self.stub.folder / repo).is_dir():
            self._send(401, b"", {"X-Error-Code": "RepoNotFound", "X-Error-Message": "Repository not found"})
            return False
        if revision not in ("main", "v1.0", "refs/pr/1", self.stub.commit(repo)):
            self._send(404, b"", {"X-Error-Code": "RevisionNotFound", "X-Error-Message": f"Invalid rev id: {revision}"})
            return False
        return True

    def _send_listing(self, repo: str, revision: str) -> None:
        if status := self.stub.faults.listing_status:
            self._send(status, b"", {"Retry-After": self.stub.faults.retry_after})
        elif self._has_repo(repo, revision):
            listing = self.stub.listing(repo)
            data = listing if isinstance(listing, bytes) else json.dumps(listing).encode()
            self._send(200, data, {"Content-Type": "application/json"})

    def _resolve(self, repo: str, revision: str, path: str) -> None:
        if not self._has_repo(repo, revision):
            return
        file = self.stub.folder / repo / path
        if repo in self.stub.faults.gated and not self._has_token:
            self._send(401, b"", {"X-Error-Code": "GatedRepo", "X-Error-Message": f"Access to {repo} is restricted."})
        elif not file.is_file():
            self._send(404, b"", {"X-Error-Code": "EntryNotFound", "X-Error-Message": "Entry not found"})
        else:
            headers = {"X-Repo-Commit": self.stub.commit(repo), "Accept-Ranges": "bytes"}
            if not path.endswith(LARGE):
                content = file.read_bytes()
                self._send(200, content, headers | {"ETag": f'"{git_hash(content)}"'})
                return
            headers |= dict.fromkeys(("X-Linked-Etag", "ETag"), f'"{sha256(file)}"')
            headers |= {"X-Linked-Size": str(file.stat().st_size)}
            self._send(302, b"", headers | {"Location": f"{self.stub.cdn}/{repo}/{path}?signed=1"})

    def _send_large(self, path: str) -> None:
        faults, content = self.stub.faults, (self.stub.folder / unquote(path[1:])).read_bytes()
        if faults.statuses:
            self._send(faults.statuses.pop(0), b"", {"Retry-After": faults.retry_after})
            return
        if faults.corrupts:
            content = content[:-1] + bytes([content[-1] ^ 1])
        status, start, stop = 200, 0, len(content)
        match = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        headers = {"ETag": '"of the other host"', "Accept-Ranges": "bytes"}
        if match and not faults.ignores_ranges:
            status, start = 206, int(match[1])
            stop = min(stop, int(match[2]) + 1) if match[2] else stop
            headers["Content-Range"] = f"bytes {start}-{stop - 1}/{len(content)}"
        end, stall = (ends.pop(0) if ends else None for ends in (faults.break_after, faults.stall_after))
        self._send(status, content[start:stop], headers, end if stall is None else stall, stalls=stall is not None)

    def _send(
        self, status: int, body: bytes, headers: dict[str, str], end: int | None = None, *, stalls: bool = False
    ) -> None:
        """Send an answer; only its first `end` bytes, if that is given, and then close the connection, or wait."""
        self.send_response(status)
        for name, value in headers.items():
            if value:
                self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "HEAD":
            return
        body = body[:end]
        if "signed" in self.path:
            self.stub.num_bytes_sent += len(body)
        self.wfile.write(body)
        if stalls:
            self.stub.closed.wait()
        if end is not None:
            self.close_connection = True
