"""A Hub of one process on localhost: enough of its HTTP interface for the real client to push and pull, with faults.

No network and no Xet: clients need HF_ENDPOINT, HF_TOKEN and HF_HUB_DISABLE_XET=1 before they import huggingface_hub.
"""

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

TOKEN, READ_TOKEN = "hf_written_by_a_test", "hf_may_only_read"
LFS_ENDINGS = (".safetensors", ".bin")


@dataclass
class Commit:
    sha: str
    message: str
    files: dict[str, bytes]


@dataclass
class Repo:
    private: bool = False
    gated: bool = False
    branches: dict[str, list[Commit]] = field(default_factory=lambda: {"main": [Commit("0" * 40, "initial", {})]})

    def at(self, revision: str) -> Commit | None:
        if revision in self.branches:
            return self.branches[revision][-1]
        return next((c for commits in self.branches.values() for c in commits if c.sha == revision), None)


@dataclass
class Hub:
    """The server's memory; tests look into it and break it."""

    url: str = ""
    repos: dict[str, Repo] = field(default_factory=dict)
    lfs: dict[str, bytes] = field(default_factory=dict)
    uploads: list[str] = field(default_factory=list)
    """oids of large files that were sent"""
    cut_uploads: int = 0
    """so many uploads of large files end in the middle"""
    user: str = "user"

    def environment(self, token: str | None = TOKEN) -> dict[str, str]:
        """What a client process needs to talk to this server."""
        known = {"HF_ENDPOINT": self.url, "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
        return known | ({"HF_TOKEN": token} if token else {})


@contextmanager
def serving() -> Iterator[Hub]:
    """The server, while the block lasts."""
    hub = Hub()
    handler = type("Bound", (_Handler,), {"hub": hub})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        self._answer("GET")

    def do_HEAD(self) -> None:
        self._answer("HEAD")

    def do_POST(self) -> None:
        self._answer("POST")

    def do_PUT(self) -> None:
        oid = self.path.rsplit("/", 1)[1]
        size = int(self.headers["Content-Length"])
        if self.hub.cut_uploads:
            self.hub.cut_uploads -= 1
            self.rfile.read(min(size // 2, 1000))
            self.close_connection = True
            self.connection.close()
            return
        data = self.rfile.read(size)
        self.hub.lfs[oid] = data
        self.hub.uploads.append(oid)
        self._send(200, {})

    def _answer(self, method: str) -> None:
        parts = urlsplit(self.path)
        path, query = unquote(parts.path), parse_qs(parts.query)
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0)) if method == "POST" else b""
        for pattern, verb, function in ROUTES:
            match = re.fullmatch(pattern, path)
            if match and (verb == method or (verb == "GET" and method == "HEAD")):
                function(self, *match.groups(), body=body, query=query)
                return
        self._error(404, "EntryNotFound", f"no route for {method} {path}")

    # who ------------------------------------------------------------------------------------------------------

    def _token(self) -> str | None:
        header = self.headers.get("Authorization", "")
        return header.removeprefix("Bearer ") or None

    def _may_write(self, repo: str) -> bool:
        if self._token() not in (TOKEN, READ_TOKEN):
            self._error(401, None, "Invalid username or password.")
        elif self._token() == READ_TOKEN or not repo.startswith(f"{self.hub.user}/"):
            self._error(403, None, "Forbidden: you don't have the rights to write here.")
        else:
            return True
        return False

    def whoami(self, *, body: bytes, query: Any) -> None:
        if self._token() not in (TOKEN, READ_TOKEN):
            self._error(401, None, "Invalid username or password.")
            return
        role = "write" if self._token() == TOKEN else "read"
        token = {"accessToken": {"displayName": "test", "role": role}}
        self._send(200, {"type": "user", "name": self.hub.user, "orgs": [], "auth": token})

    # repositories ---------------------------------------------------------------------------------------------

    def create(self, *, body: bytes, query: Any) -> None:
        asked = json.loads(body)
        name = f"{asked.get('organization') or self.hub.user}/{asked['name']}"
        if not self._may_write(name):
            return
        known = {"url": f"{self.hub.url}/{name}", "name": name, "id": name}
        if name in self.hub.repos:
            self._send(409, known | {"error": "You already created this model repo"})
            return
        self.hub.repos[name] = Repo(private=asked.get("private") or asked.get("visibility") == "private")
        self._send(200, known)

    def branch(self, repo: str, branch: str, *, body: bytes, query: Any) -> None:
        if not self._may_write(repo):
            return
        branches = self.hub.repos[repo].branches
        if branch in branches:
            self._error(409, None, "Reference already exists")
            return
        branches[branch] = list(branches["main"])
        self._send(200, {})

    def validate(self, *, body: bytes, query: Any) -> None:
        self._send(200, {"errors": [], "warnings": []})

    def info(self, repo: str, revision: str | None = None, *, body: bytes, query: Any) -> None:
        commit = self._commit(repo, revision or "main")
        if commit is not None:
            siblings = [{"rfilename": name} for name in commit.files]
            known = self.hub.repos[repo]
            self._send(200, {"id": repo, "modelId": repo, "sha": commit.sha, "private": known.private,
                             "siblings": siblings, "tags": [], "downloads": 0})  # fmt: skip

    def tree(self, repo: str, revision: str, *, body: bytes, query: Any) -> None:
        commit = self._commit(repo, revision)
        if commit is not None:
            self._send(200, [_entry(name, data) for name, data in commit.files.items()])

    def paths(self, repo: str, revision: str, *, body: bytes, query: Any) -> None:
        commit = self._commit(repo, revision)
        if commit is not None:
            asked = parse_qs(body.decode())["paths"] if not body.startswith(b"{") else json.loads(body)["paths"]
            self._send(200, [_entry(name, commit.files[name]) for name in asked if name in commit.files])

    def resolve(self, repo: str, revision: str, name: str, *, body: bytes, query: Any) -> None:
        commit = self._commit(repo, revision)
        if commit is None:
            return
        if name not in commit.files:
            self._error(404, "EntryNotFound", "Entry not found", {"X-Repo-Commit": commit.sha})
            return
        data = commit.files[name]
        tag = f'"{_oid(name, data)}"'
        known = {"X-Repo-Commit": commit.sha, "ETag": tag, "X-Linked-ETag": tag, "X-Linked-Size": str(len(data))}
        self._raw(200, data, known)

    # pushing --------------------------------------------------------------------------------------------------

    def preupload(self, repo: str, revision: str, *, body: bytes, query: Any) -> None:
        if not self._may_write(repo):
            return
        commit = self._commit(repo, revision)
        if commit is None:
            return
        files = []
        for file in json.loads(body)["files"]:
            there = commit.files.get(file["path"])
            mode = "lfs" if file["path"].endswith(LFS_ENDINGS) else "regular"
            oid = None if there is None else _oid(file["path"], there)
            files.append({"path": file["path"], "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        self._send(200, {"files": files})

    def batch(self, repo: str, *, body: bytes, query: Any) -> None:
        if not self._may_write(repo):
            return
        objects = []
        for one in json.loads(body)["objects"]:
            action = {"upload": {"href": f"{self.hub.url}/upload/{one['oid']}"}}
            objects.append(one | ({"actions": action} if one["oid"] not in self.hub.lfs else {}))
        self._send(200, {"transfer": "basic", "objects": objects})

    def commit(self, repo: str, revision: str, *, body: bytes, query: Any) -> None:
        if not self._may_write(repo):
            return
        last = self._commit(repo, revision)
        if last is None:
            return
        files, message = dict(last.files), ""
        for line in body.decode().splitlines():
            item = json.loads(line)
            key, value = item["key"], item["value"]
            if key == "header":
                message = value["summary"]
            elif key == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif key == "lfsFile":
                files[value["path"]] = self.hub.lfs[value["oid"]]
            elif key == "deletedFile":
                del files[value["path"]]
        sha = hashlib.sha1(json.dumps([last.sha, sorted(files), message]).encode()).hexdigest()
        self.hub.repos[repo].branches[revision].append(Commit(sha, message, files))
        url = f"{self.hub.url}/{repo}/commit/{sha}"
        self._send(200, {"success": True, "commitUrl": url, "commitOid": sha})

    # answers --------------------------------------------------------------------------------------------------

    def _commit(self, repo: str, revision: str) -> Commit | None:
        if self._token() not in (None, TOKEN, READ_TOKEN):
            self._error(401, None, "Invalid credentials in Authorization header")
            return None
        known = self.hub.repos.get(repo)
        if known is None or (known.private and self._token() != TOKEN):
            self._error(404 if self._token() else 401, "RepoNotFound", "Repository not found")
            return None
        if known.gated and self._token() != TOKEN:
            self._error(403, "GatedRepo", "Access to this model is restricted")
            return None
        found = known.at(revision)
        if found is None:
            self._error(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return found

    def _error(self, status: int, code: str | None, text: str, more: dict[str, str] | None = None) -> None:
        known = {"X-Error-Message": text} | ({"X-Error-Code": code} if code else {})
        self._raw(status, json.dumps({"error": text}).encode(), known | (more or {}))

    def _send(self, status: int, value: Any) -> None:
        self._raw(status, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _raw(self, status: int, data: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)


def _oid(name: str, data: bytes) -> str:
    if name.endswith(LFS_ENDINGS):
        return hashlib.sha256(data).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def _entry(name: str, data: bytes) -> dict[str, Any]:
    entry: dict[str, Any] = {"type": "file", "path": name, "size": len(data), "oid": _oid(name, data)}
    if name.endswith(LFS_ENDINGS):
        entry["lfs"] = {"oid": entry["oid"], "size": len(data), "pointerSize": 130}
    return entry


_REPO = r"([\w.-]+/[\w.-]+)"
ROUTES = (
    (r"/api/whoami-v2", "GET", _Handler.whoami),
    (r"/api/repos/create", "POST", _Handler.create),
    (r"/api/validate-yaml", "POST", _Handler.validate),
    (rf"/api/models/{_REPO}", "GET", _Handler.info),
    (rf"/api/models/{_REPO}/revision/(.+)", "GET", _Handler.info),
    (rf"/api/models/{_REPO}/tree/([^/]+)", "GET", _Handler.tree),
    (rf"/api/models/{_REPO}/paths-info/(.+)", "POST", _Handler.paths),
    (rf"/api/models/{_REPO}/branch/(.+)", "POST", _Handler.branch),
    (rf"/api/models/{_REPO}/preupload/(.+)", "POST", _Handler.preupload),
    (rf"/api/models/{_REPO}/commit/(.+)", "POST", _Handler.commit),
    (rf"/{_REPO}\.git/info/lfs/objects/batch", "POST", _Handler.batch),
    (rf"/{_REPO}/resolve/([^/]+)/(.+)", "GET", _Handler.resolve),
)
