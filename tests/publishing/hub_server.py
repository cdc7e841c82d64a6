"""A Hub on loopback: the part of its HTTP API by which huggingface_hub creates, fills, lists and reads models.

It lives in memory and believes nothing: tokens, visibility, checksums, the objects that a commit names and the metadata
of cards are checked as the Hub does. Large files go through Git LFS; with ``Hub.xet`` also over Xet, which
``Hub.environment`` switches off, into a folder that hf_xet takes for a server.
"""

import base64
import hashlib
import json
import math
import re
import shutil
import socket
import tempfile
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import unquote, urlsplit

import huggingface_hub
import yaml
from huggingface_hub import ModelCardData, constants

LARGE = (".safetensors", ".bin", ".pt", ".pth", ".png")
REPOSITORY = r"(?P<name>[\w.-]+/[\w.-]+)"
MODEL = f"/api/models/{REPOSITORY}"


class Refused(Exception):
    """A response that is an error, with the header by which the client tells one from another."""

    def __init__(self, status: int, message: str, code: str | None = None):
        super().__init__(message)
        self.status, self.code = status, code


class File(NamedTuple):
    content: bytes
    large: bool

    @property
    def oid(self) -> str:
        if self.large:
            return hashlib.sha256(self.content).hexdigest()
        return hashlib.sha1(b"blob %d\0" % len(self.content) + self.content).hexdigest()


class Commit(NamedTuple):
    oid: str
    message: str
    files: dict[str, File]


@dataclass
class Repository:
    private: bool
    commits: list[Commit] = field(default_factory=list)

    def at(self, revision: str) -> Commit:
        found = [commit for commit in self.commits if revision in ("main", commit.oid)]
        if not found:
            raise Refused(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return found[-1]


class Hub:
    """``with Hub() as hub``: ``hub.url`` answers; ``repositories`` is what it holds, ``received`` counts the uploads of
    each large object.
    """

    user = "ada"
    token = "hf_MayWriteAsAdaOnly"
    reading_token = "hf_MayOnlyRead"

    def __init__(self):
        self.repositories: dict[str, Repository] = {}
        self.objects: dict[str, bytes] = {}
        self.received: Counter[str] = Counter()
        self.cuts: list[Any] = ["", 0]
        self.xet: Path | None = None
        self.lock = threading.Lock()

    def __enter__(self) -> "Hub":
        handler = type("Bound", (Handler,), {"hub": self})
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *exception) -> None:
        self.server.shutdown()
        self.server.server_close()

    def environment(self, home, token: str | None = None) -> dict[str, str]:
        """For a process that shall know no other Hub and nothing of this user's; without a token "" hides any other."""
        return {
            "HF_ENDPOINT": self.url, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1", "HF_HOME": str(home),
            "HF_TOKEN": token or "", "HF_HUB_DISABLE_TELEMETRY": "1",
        }  # fmt: skip

    def serve_this_process(self, monkeypatch, home) -> None:
        """Pushes and downloads of this process, too, go here, as the user."""
        for name, value in {"ENDPOINT": self.url, "HF_HUB_DISABLE_XET": True, "HF_HUB_OFFLINE": False}.items():
            monkeypatch.setattr(constants, name, value)
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(home / "no-token"))
        monkeypatch.setattr(huggingface_hub.hf_api.api, "endpoint", self.url)
        monkeypatch.setattr("transformers.utils.hub._hf_api", None, raising=False)
        monkeypatch.setenv("HF_TOKEN", self.token)

    def cut(self, pattern: str, times: float = math.inf) -> None:
        """End the connection in the middle of the next requests whose "METHOD /path" the pattern matches."""
        self.cuts = [pattern, times]

    def is_cut(self, request: str) -> bool:
        with self.lock:
            pattern, left = self.cuts
            if not left or not re.match(pattern, request):
                return False
            self.cuts[1] -= 1
            return True

    def files(self, name: str, revision: str = "main") -> dict[str, bytes]:
        return {path: file.content for path, file in self.repositories[name].at(revision).files.items()}

    def messages(self, name: str) -> list[str]:
        return [commit.message for commit in self.repositories[name].commits]

    # ---- what the API answers: each gets the request's user, the path's parts and its body ----

    def create(self, user, body):
        name = f"{body.get('organization') or user}/{body['name']}"
        self._may_write(user, name)
        address = {"url": f"{self.url}/{name}"}
        if name in self.repositories:
            return 409, address | {"error": "You already created this model repo"}
        private = body.get("visibility") == "private" or body.get("private") is True
        self.repositories[name] = Repository(private)
        self._commit(name, "initial commit", {".gitattributes": File(b"*.safetensors filter=lfs\n", False)})
        return address

    def whoami(self, user, body):
        self._may_write(user, f"{user}/")
        return {"type": "user", "name": user, "orgs": []}

    def validate_card(self, user, body):
        head = re.match(r"---\n(.*?)\n---\n", body["content"], flags=re.DOTALL)
        metadata = yaml.safe_load(head[1]) if head else {}
        ModelCardData(**metadata)  # raises where the model index is not one
        if metadata.get("license", "mit") not in ("apache-2.0", "mit", "other"):
            message = f'"license" must not be {metadata["license"]}'
            return 400, {"errors": [{"message": message}], "warnings": []}
        return {"errors": [], "warnings": []}

    def preupload(self, user, body, name, revision):
        self._may_write(user, name)
        there = self._read(user, name).at(revision).files
        return {"files": [
            {"path": file["path"], "uploadMode": "lfs" if file["path"].endswith(LARGE) else "regular",
             "shouldIgnore": False, "oid": there[file["path"]].oid if file["path"] in there else None}
            for file in body["files"]
        ]}  # fmt: skip

    def batch(self, user, body, name):
        self._may_write(user, name)
        return {"transfer": "basic", "objects": [
            {"oid": wanted["oid"], "size": wanted["size"]} | ({} if wanted["oid"] in self.objects else {"actions": {
                "upload": {"href": f"{self.url}/objects/{wanted['oid']}"}}})
            for wanted in body["objects"]
        ]}  # fmt: skip

    def store(self, user, body, oid):
        if hashlib.sha256(body).hexdigest() != oid:
            raise Refused(400, f"object {oid} is not what was announced")
        with self.lock:
            self.objects[oid] = body
            self.received[oid] += 1
        return {}

    def xet_token(self, user, body, name, revision):
        self._may_write(user, name)
        if self.xet is None:
            raise Refused(404, "no Xet here")
        return {"casUrl": f"local://{self.xet}", "accessToken": "ours", "exp": int(time.time()) + 3600}

    def commit(self, user, body, name, revision):
        self._may_write(user, name)
        head, *operations = body
        files = dict(self._read(user, name).at(revision).files)
        for operation in operations:
            value = operation["value"]
            if operation["key"] == "file":
                files[value["path"]] = File(base64.b64decode(value["content"]), False)
            elif operation["key"] == "lfsFile" and (content := self._stored(**value)) is not None:
                files[value["path"]] = File(content, True)
            else:
                raise Refused(400, f"cannot commit {operation}")
        oid = self._commit(name, head["value"]["summary"], files)
        return {"commitUrl": f"{self.url}/{name}/commit/{oid}", "commitOid": oid, "success": True}

    def info(self, user, body, name, revision="main"):
        repository = self._read(user, name)
        commit = repository.at(revision)
        return {
            "_id": name, "id": name, "modelId": name, "sha": commit.oid, "private": repository.private, "tags": [],
            "siblings": [{"rfilename": path} for path in commit.files],
        }  # fmt: skip

    def tree(self, user, body, name, revision, folder=""):
        found = []
        for path, file in self._read(user, name).at(revision).files.items():
            if path.startswith(folder and f"{folder}/"):
                large = {"oid": file.oid, "size": len(file.content), "pointerSize": 130}
                entry = {"type": "file", "path": path, "size": len(file.content), "oid": file.oid}
                found.append(entry | ({"lfs": large} if file.large else {}))
        if folder and not found:
            raise Refused(404, f"{folder} does not exist on {revision}", "EntryNotFound")
        return found

    def resolve(self, user, body, name, revision, path):
        commit = self._read(user, name).at(revision)
        if path not in commit.files:
            raise Refused(404, "Entry not found", "EntryNotFound")
        file = commit.files[path]
        return file.content, {"X-Repo-Commit": commit.oid, "ETag": f'"{file.oid}"'}

    def _stored(self, oid: str, size: int, **_) -> bytes | None:
        """What was sent through LFS or over Xet. There, a file of one segment has its own hash three records of 48
        bytes before its SHA-256, both as 64-bit words."""
        if oid in self.objects or self.xet is None:
            return self.objects.get(oid)
        import hf_xet  # not installed everywhere

        for shard in self.xet.rglob("shards/*.mdb"):
            records = shard.read_bytes()
            at = records.find(_swapped(bytes.fromhex(oid))) - 144
            if at >= 0:
                with tempfile.TemporaryDirectory() as copy:  # the client keeps the folder locked
                    shutil.copytree(self.xet, f"{copy}/cas")
                    own_hash = _swapped(records[at : at + 32]).hex()
                    file = hf_xet.PyXetDownloadInfo(f"{copy}/file", own_hash, size)
                    hf_xet.download_files([file], f"local://{copy}/cas", ("ours", int(1e10)), None, None)
                    return Path(copy, "file").read_bytes()
        return None

    def _commit(self, name, message, files) -> str:
        commits = self.repositories[name].commits
        oid = hashlib.sha1(f"{name} {len(commits)}".encode()).hexdigest()
        commits.append(Commit(oid, message, files))
        return oid

    def _read(self, user, name) -> Repository:
        repository = self.repositories.get(name)
        if repository is None or (repository.private and user is None):
            raise Refused(401 if user is None else 404, "Repository not found", "RepoNotFound")
        return repository

    def _may_write(self, user, name) -> None:
        if user is None:
            raise Refused(401, "Invalid username or password.")
        if name.split("/")[0] != user:
            raise Refused(403, f'You don\'t have the rights to write under "{name.split("/")[0]}"')


def _swapped(digest: bytes) -> bytes:
    return b"".join(digest[at : at + 8][::-1] for at in range(0, len(digest), 8))


ROUTES = [(re.compile(pattern), answer) for pattern, answer in (
    (r"GET /api/whoami-v2", Hub.whoami),
    (r"POST /api/repos/create", Hub.create),
    (r"POST /api/validate-yaml", Hub.validate_card),
    (rf"POST {MODEL}/preupload/(?P<revision>[^/]+)", Hub.preupload),
    (rf"GET {MODEL}/xet-write-token/(?P<revision>[^/]+)", Hub.xet_token),
    (rf"POST {MODEL}/commit/(?P<revision>[^/]+)", Hub.commit),
    (rf"POST /{REPOSITORY}\.git/info/lfs/objects/batch", Hub.batch),
    (r"PUT /objects/(?P<oid>\w+)", Hub.store),
    (rf"GET {MODEL}(/revision/(?P<revision>[^/]+))?", Hub.info),
    (rf"GET {MODEL}/tree/(?P<revision>[^/]+)(/(?P<folder>.+))?", Hub.tree),
    (rf"(GET|HEAD) /{REPOSITORY}/resolve/(?P<revision>[^/]+)/(?P<path>.+)", Hub.resolve),
)]  # fmt: skip


class Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        request = f"{self.command} {unquote(urlsplit(self.path).path)}"
        length = int(self.headers.get("Content-Length", 0))
        if self.hub.is_cut(request):
            self.rfile.read(length // 2)
            self.close_connection = True
            self.connection.shutdown(socket.SHUT_RDWR)
            return
        content = self.rfile.read(length)
        try:
            answer = self._answer(request, content)
        except Refused as error:
            headers = {"X-Error-Message": str(error)} | ({"X-Error-Code": error.code} if error.code else {})
            self._send(error.status, json.dumps({"error": str(error)}).encode(), headers)
            return
        if isinstance(answer, tuple) and isinstance(answer[0], bytes):
            self._send(200, *answer)
        else:
            status, body = answer if isinstance(answer, tuple) else (200, answer)
            self._send(status, json.dumps(body).encode(), {"Content-Type": "application/json"})

    do_HEAD = do_POST = do_PUT = do_GET

    def _answer(self, request, content):
        kind = self.headers.get("Content-Type", "")
        body = content
        if "ndjson" in kind:
            body = [json.loads(line) for line in content.splitlines()]
        elif "json" in kind:
            body = json.loads(content)
        for pattern, answer in ROUTES:
            found = pattern.fullmatch(request)
            if found:
                parts = {key: value for key, value in found.groupdict().items() if value is not None}
                return answer(self.hub, self._user(), body, **parts)
        raise Refused(404, f"no such address: {request}")

    def _user(self) -> str | None:
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        return {self.hub.token: self.hub.user, self.hub.reading_token: "reader"}.get(token)

    def _send(self, status: int, content: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def log_message(self, *arguments) -> None:
        pass
