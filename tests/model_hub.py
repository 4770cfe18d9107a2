"""A model hub on this machine, as far as tests need one that run the real client without a network."""

import base64
import hashlib
import http.server
import json
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest
from huggingface_hub import constants

_COMMIT = "0" * 39 + "1"


@dataclass
class Hub:
    """Where it listens; what it was asked for; and repositories by name, each a folder or an HTTP status to fail with.

    `broken` are names of files that it lists but does not give. `pushed` are files that were uploaded, by repository;
    `private` are repositories that were made so; `refusal` is an HTTP status to fail uploads with.
    """

    url: str
    repositories: Mapping[str, Path | int]
    broken: set[str] = field(default_factory=set)
    requests: list[str] = field(default_factory=list)
    pushed: dict[str, dict[str, bytes]] = field(default_factory=dict)
    private: set[str] = field(default_factory=set)
    refusal: int | None = None


@contextmanager
def serve_hub(repositories: Mapping[str, Path | int]) -> Iterator[Hub]:
    """A hub that serves `repositories` as long as the block lasts."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    hub = server.hub = Hub(f"http://127.0.0.1:{server.server_port}", repositories)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def use_hub(hub: Hub, monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    """Point the hub's client at `hub`, with its own cache folder."""
    template = constants.HUGGINGFACE_CO_URL_TEMPLATE.removeprefix(constants.ENDPOINT)
    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.url + template)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        self._answer(with_body=False)

    def do_GET(self) -> None:
        self._answer(with_body=True)

    def do_POST(self) -> None:
        path = unquote(urlsplit(self.path).path)
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        hub = self.server.hub
        hub.requests.append(path)
        status, content = (hub.refusal, {}) if hub.refusal else self._take(path.strip("/").split("/"), body)
        answer = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    def _take(self, parts: list[str], body: bytes) -> tuple[int, dict[str, Any]]:
        """Makes a repository, or takes files into it, all of them as they are."""
        hub = self.server.hub
        if parts == ["api", "repos", "create"]:
            asked = json.loads(body)
            repository = f"{asked['organization']}/{asked['name']}"
            if asked["visibility"] == "private":
                hub.private.add(repository)
            is_new = repository not in hub.pushed
            hub.pushed.setdefault(repository, {})
            return 200 if is_new else 409, {"url": f"{hub.url}/{repository}"}
        repository, verb = "/".join(parts[2:4]), parts[4]
        if verb == "preupload":
            files = [file["path"] for file in json.loads(body)["files"]]
            return 200, {"files": [{"path": path, "uploadMode": "regular", "shouldIgnore": False} for path in files]}
        assert verb == "commit", f"this hub knows no {verb}"
        for line in map(json.loads, body.splitlines()):
            if line["key"] == "file":
                hub.pushed[repository][line["value"]["path"]] = base64.b64decode(line["value"]["content"])
        return 200, {"commitUrl": f"{hub.url}/{repository}/commit/{_COMMIT}", "commitOid": _COMMIT}

    def log_message(self, *_: Any) -> None:
        pass

    def _answer(self, *, with_body: bool) -> None:
        path = unquote(urlsplit(self.path).path)
        self.server.hub.requests.append(path)
        status, headers, body = self._reply(path.strip("/").split("/"))
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if with_body:
            self.wfile.write(body)

    def _reply(self, parts: list[str]) -> tuple[int, dict[str, str], bytes]:
        api = parts[:2] == ["api", "models"]
        owner, name, *rest = parts[2:] if api else parts
        repository = self.server.hub.repositories.get(f"{owner}/{name}", 404)
        if isinstance(repository, int):
            code = {404: "RepoNotFound", 403: "GatedRepo"}.get(repository)
            return repository, {"X-Error-Code": code} if code else {}, b""
        if api:
            content = _listing(repository) if rest[:1] == ["tree"] else {"id": f"{owner}/{name}", "sha": _COMMIT}
            return 200, {"Content-Type": "application/json"}, json.dumps(content).encode()
        file = repository.joinpath(*rest[2:])
        if file.name in self.server.hub.broken:
            return 410, {}, b""  # not a status that the client tries again
        etag = hashlib.sha1(file.read_bytes()).hexdigest()
        return 200, {"ETag": f'"{etag}"', "X-Repo-Commit": _COMMIT}, file.read_bytes()


def _listing(repository: Path) -> list[dict[str, Any]]:
    return [
        {
            "type": "file",
            "path": str(file.relative_to(repository)),
            "size": file.stat().st_size,
            "oid": hashlib.sha1(file.read_bytes()).hexdigest(),
        }
        for file in sorted(repository.rglob("*"))
        if file.is_file()
    ]
