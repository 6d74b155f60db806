"""Backups in this process, backends that fail, and a real S3 server on this machine that can be told to misbehave."""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from dino_exp.backup.fetching import RestoreReport
from dino_exp.backup.fetching import restore as fetch_run
from dino_exp.backup.patience import Patience
from dino_exp.backup.sending import BackupReport, back_up
from dino_exp.backup.target import Target
from dino_exp.runs.layout import RunPaths

NO_WAIT = Patience(num_tries=4, answer_secs=20, first_secs=0.001, most_secs=0.002)


class Counted:
    """Progress that is counted and not shown."""

    def __init__(self) -> None:
        self.expected = self.done = 0

    def expect(self, num_bytes: int) -> None:
        self.expected += num_bytes

    def heard(self, num_bytes: int) -> None:
        self.done += num_bytes


def target_of(url: object, said: list[str] | None = None, patience: Patience = NO_WAIT) -> Target:
    return Target(str(url), say=(said if said is not None else []).append, patience=patience)


def send(
    run: Path, url: object, *, prune: bool = False, reread: bool = False, target: Target | None = None
) -> BackupReport:
    """Back up without the command line. `target` for one that was prepared."""
    made = target or target_of(url)
    return back_up(RunPaths(run), made, prune=prune, reread=reread, clock=lambda: 1.7e9, progress=Counted())


def fetch(url: object, directory: Path, *, target: Target | None = None) -> RestoreReport:
    return fetch_run(target or target_of(url), directory, progress=Counted())


class FaultyBackend:
    """A file system of fsspec that raises at call number `fail_at`: once, or from then on."""

    def __init__(self, inner: Any, fail_at: int, error: Callable[[], BaseException], *, once: bool) -> None:
        self.inner, self.fail_at, self.error, self.once = inner, fail_at, error, once
        self.num_calls = self.bytes_written = 0

    def tick(self) -> None:
        self.num_calls += 1
        if self.num_calls == self.fail_at or (self.num_calls > self.fail_at > 0 and not self.once):
            raise self.error()

    def open(self, path: str, mode: str) -> FaultyFile:
        self.tick()
        return FaultyFile(self, self.inner.open(path, mode))

    def pipe_file(self, path: str, data: bytes) -> None:
        self.tick()
        self.bytes_written += len(data)
        self.inner.pipe_file(path, data)

    def __getattr__(self, name: str) -> Any:
        found = getattr(self.inner, name)
        if not callable(found):
            return found

        def call(*arguments: Any, **options: Any) -> Any:
            self.tick()
            return found(*arguments, **options)

        return call


class FaultyFile:
    def __init__(self, backend: FaultyBackend, inner: Any) -> None:
        self.backend, self.inner = backend, inner

    def write(self, data: bytes) -> None:
        try:
            self.backend.tick()
        except BaseException:
            self.inner.write(data[: len(data) // 2])  # a fault in the middle of a write leaves half of it
            raise
        self.backend.bytes_written += len(data)
        self.inner.write(data)

    def read(self, num_bytes: int) -> bytes:
        self.backend.tick()
        data: bytes = self.inner.read(num_bytes)
        return data

    def close(self) -> None:
        self.inner.close()


def with_faults(url: object, fail_at: int, error: Callable[[], BaseException], *, once: bool) -> Target:
    """A target whose backend fails at a call."""
    made = target_of(url)
    made._fs = FaultyBackend(made._fs, fail_at, error, once=once)
    return made


class S3Server:
    """moto's S3, spoken to over a socket. `answer` may delay a request, or answer it in moto's place."""

    def __init__(self) -> None:
        from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
        from werkzeug.serving import make_server

        logging.getLogger("werkzeug").setLevel(logging.ERROR)
        self._app = DomainDispatcherApplication(create_backend_app)
        self._server = make_server("127.0.0.1", 0, self._serve, threaded=True)
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)
        self._thread.start()
        self.requests: list[tuple[str, str, int]] = []
        self.answer: Callable[[str, str], str | None] = lambda method, path: None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_port}"

    def environment(self) -> dict[str, str]:
        """What a client needs to find it, by botocore's own means."""
        return {
            "AWS_ENDPOINT_URL": self.url, "AWS_ACCESS_KEY_ID": "somebody", "AWS_SECRET_ACCESS_KEY": "s3cr3t-of-ours",
            "AWS_DEFAULT_REGION": "us-east-1", "AWS_EC2_METADATA_DISABLED": "true", "AWS_CONFIG_FILE": "/nonexistent",
            "AWS_SHARED_CREDENTIALS_FILE": "/nonexistent", "AWS_MAX_ATTEMPTS": "1", "NO_PROXY": "127.0.0.1",
        }  # fmt: skip

    def bytes_put(self) -> int:
        """Bytes of all uploads since the last call."""
        requests, self.requests = self.requests, []
        return sum(num_bytes for method, _, num_bytes in requests if method == "PUT")

    def close(self) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    @contextlib.contextmanager
    def misbehaving(self, answer: Callable[[str, str], str | None]) -> Iterator[None]:
        before, self.answer = self.answer, answer
        try:
            yield
        finally:
            self.answer = before

    def _serve(self, environ: dict[str, Any], start_response: Any) -> Any:
        method, path = environ["REQUEST_METHOD"], environ["PATH_INFO"]
        status = self.answer(method, path)
        if status is not None:
            environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
            code = "".join(status.split()[1:])
            body = f"<Error><Code>{code}</Code><Message>so it was told to say</Message></Error>".encode()
            start_response(status, [("Content-Type", "application/xml"), ("Content-Length", str(len(body)))])
            return [body]
        self.requests.append((method, path, int(environ.get("CONTENT_LENGTH") or 0)))
        return self._app(environ, start_response)


def slowly(secs: float) -> Callable[[str, str], str | None]:
    """Every answer comes late."""

    def answer(method: str, path: str) -> str | None:
        time.sleep(secs)
        return None

    return answer
