"""As much of a W&B server as a run needs: it answers wandb's own process, keeps rows, and knows where a run stopped."""

from __future__ import annotations

import contextlib
import gzip
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class WandbServer:
    """Runs by id, each with its rows as they came. Use as a context manager."""

    def __init__(self) -> None:
        self.rows: dict[str, list[dict[str, Any]]] = {}
        self.config: dict[str, Any] = {}
        self.finished: dict[str, int] = {}
        self.requests: list[str] = []
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                if body.startswith(b"\x1f\x8b"):
                    body = gzip.decompress(body)
                is_known = self.path == "/graphql" or self.path.endswith("/file_stream")
                answer = json.dumps(server.answer(self.path, json.loads(body)) if is_known else {}).encode()
                self.send_response(200)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(answer)))
                self.end_headers()
                self.wfile.write(answer)

            do_PUT = do_POST

            def handle_one_request(self) -> None:
                with contextlib.suppress(ConnectionError):  # of a process that was killed
                    super().handle_one_request()

            def log_message(self, format: str, *args: object) -> None:  # noqa: A002
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)

    def __enter__(self) -> WandbServer:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    def answer(self, path: str, asked: dict[str, Any]) -> dict[str, Any]:
        found = re.fullmatch(r"/files/[^/]+/[^/]+/([^/]+)/file_stream", path)
        if found:
            self.take_files(found[1], asked)
            return {"exitcode": None, "limits": {}}
        operation = re.search(r"(?:query|mutation)\s+(\w+)", asked.get("query", ""))
        name, variables = operation[1] if operation else "", asked.get("variables", {})
        self.requests.append(name)
        if name == "RunResumeStatus":
            return {"data": {"model": {**PROJECT, "bucket": self.stopped_at(variables["name"])}}}
        if name == "UpsertBucket":
            self.config = json.loads(variables.get("config") or "{}")
            is_new = variables["name"] not in self.rows
            bucket = {**BUCKET, "name": variables["name"], "project": PROJECT}
            return {"data": {"upsertBucket": {"bucket": bucket, "inserted": is_new}}}
        if name == "CreateRunFiles":
            files = [{"name": file, "uploadUrl": f"{self.url}/put/{file}"} for file in variables["files"]]
            return {"data": {"createRunFiles": {"runID": BUCKET["id"], "uploadHeaders": [], "files": files}}}
        return {"data": {}}

    def take_files(self, run_id: str, asked: dict[str, Any]) -> None:
        rows = self.rows.setdefault(run_id, [])
        if "exitcode" in asked and asked.get("complete"):
            self.finished[run_id] = asked["exitcode"]
        history = (asked.get("files") or {}).get("wandb-history.jsonl")
        if history:
            assert history["offset"] <= len(rows), "rows were left out"
            rows[history["offset"] :] = [json.loads(line) for line in history["content"]]

    def stopped_at(self, run_id: str) -> dict[str, Any] | None:
        rows = self.rows.get(run_id)
        if rows is None:
            return None
        tail = [json.dumps(rows[-1])] if rows else []
        return {
            **BUCKET, "name": run_id, "historyLineCount": len(rows), "eventsLineCount": 0, "logLineCount": 0,
            "historyTail": json.dumps(tail), "eventsTail": "[]", "config": json.dumps(self.config),
            "summaryMetrics": json.dumps(rows[-1] if rows else {}), "tags": [], "wandbConfig": "{\"t\": 1}",
        }  # fmt: skip


PROJECT = {"id": "cHJvamVjdA==", "name": "dino_exp", "entity": {"id": "ZW50aXR5", "name": "me"}}
BUCKET = {"id": "YnVja2V0", "displayName": "a run", "description": "", "config": "{}", "sweepName": None}
