"""A stand-in for the Hugging Face Hub on loopback: repositories in memory, over the requests of its client.

It knows what huggingface_hub asks for small files: creating a repository, the question of how each file is to be sent
(here: within the commit), the commit, and downloads with the headers that its cache needs.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub:
    """The server; `files` maps repositories to their files."""

    def __init__(self, token: str = "hf_secret") -> None:
        self.files: dict[str, dict[str, bytes]] = {}
        self.token = token
        self.requests: list[str] = []
        hub = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *_: Any) -> None:
                pass

            def _answer(self, code: int, content: bytes = b"{}", headers: dict[str, str] | None = None) -> None:
                self.send_response(code)
                own = {"Content-Length": str(len(content)), "Content-Type": "application/json", **(headers or {})}
                for name, value in own.items():
                    self.send_header(name, value)
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(content)

            def _body(self) -> bytes:
                return self.rfile.read(int(self.headers.get("Content-Length", 0)))

            def do_HEAD(self) -> None:
                self.do_GET()

            def do_GET(self) -> None:
                hub.requests.append(f"{self.command} {self.path}")
                found = re.fullmatch(r"/([\w.-]+/[\w.-]+)/resolve/([^/]+)/(.+)", self.path)
                if info := re.match(r"/api/models/([\w.-]+/[\w.-]+)", self.path):
                    name = info[1]
                    known = name in hub.files
                    text = json.dumps({"id": name, "sha": COMMIT, "siblings": [], "private": False}).encode()
                    self._answer(200 if known else 404, text if known else b"{}")
                    return
                content = hub.files.get(found[1], {}).get(found[3]) if found else None
                if content is None:
                    missing = "EntryNotFound" if found and found[1] in hub.files else "RepoNotFound"
                    self._answer(404, b"{}", {"X-Error-Code": missing})
                    return
                etag = f'"{hashlib.sha256(content).hexdigest()}"'
                self._answer(200, content, {"ETag": etag, "X-Repo-Commit": COMMIT, "X-Linked-Size": str(len(content))})

            def do_POST(self) -> None:
                hub.requests.append(f"POST {self.path}")
                body = self._body()
                if self.path == "/api/validate-yaml":
                    self._answer(200, b'{"errors": [], "warnings": []}')
                    return
                if self.headers.get("Authorization") != f"Bearer {hub.token}":
                    self._answer(401, b'{"error": "Invalid username or password."}')
                    return
                if self.path == "/api/repos/create":
                    asked = json.loads(body)
                    name = f"{asked['organization']}/{asked['name']}" if asked.get("organization") else asked["name"]
                    hub.files.setdefault(name, {})
                    self._answer(200, json.dumps({"url": f"{hub.url}/{name}", "name": name, "id": "1"}).encode())
                elif found := re.fullmatch(r"/api/models/([\w.-]+/[\w.-]+)/preupload/.+", self.path):
                    files = [
                        {"path": file["path"], "uploadMode": "regular", "shouldIgnore": False, "oid": None}
                        for file in json.loads(body)["files"]
                    ]
                    self._answer(200, json.dumps({"files": files}).encode())
                elif found := re.fullmatch(r"/api/models/([\w.-]+/[\w.-]+)/commit/.+", self.path):
                    for line in map(json.loads, body.decode().splitlines()):
                        if line["key"] == "file":
                            hub.files[found[1]][line["value"]["path"]] = base64.b64decode(line["value"]["content"])
                    done = {"success": True, "commitOid": COMMIT, "commitUrl": f"{hub.url}/{found[1]}/commit/{COMMIT}"}
                    self._answer(200, json.dumps(done | {"hookOutput": ""}).encode())
                else:
                    self._answer(404)

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()
