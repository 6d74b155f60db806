"""CIFAR files in the real format, with a few rows; and a server that hands out an archive, whole or not."""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import io
import tarfile
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np

from dino_exp.data.cifar import CIFAR10, CIFAR100, Cifar

PIXELS = 3 * 32 * 32
SMALL10 = replace(CIFAR10, files=tuple(replace(file, num_rows=50) for file in CIFAR10.files))
SMALL100 = replace(CIFAR100, files=tuple(replace(file, num_rows=200) for file in CIFAR100.files))


def contents(cifar: Cifar) -> dict[str, bytes]:
    """The bytes of every file: labels in turn, pixels at random."""
    made = {}
    for number, file in enumerate(cifar.files):
        rows = np.random.default_rng(number).integers(0, 256, (file.num_rows, cifar.row_bytes), dtype=np.uint8)
        for place, num in enumerate(cifar.num_labels):
            rows[:, place] = (np.arange(file.num_rows) + number) % num
        made[file.name] = rows.tobytes()
    return made


def write_folder(cifar: Cifar, root: Path) -> Path:
    """What extracting the archive gives."""
    folder = root / cifar.folder
    folder.mkdir(parents=True)
    for name, data in contents(cifar).items():
        (folder / name).write_bytes(data)
    (folder / "readme.html").write_text("<p>Not read.</p>")
    return folder


def archive_bytes(cifar: Cifar, files: dict[str, bytes] | None = None) -> bytes:
    """The archive: a folder with the files, and what else is in the real one."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as archive:
        folder = tarfile.TarInfo(cifar.folder)
        folder.type = tarfile.DIRTYPE
        archive.addfile(folder)
        made = contents(cifar) if files is None else files
        for name, data in {"readme.html": b"<p>Not read.</p>", **dict(reversed(made.items()))}.items():
            member = tarfile.TarInfo(f"{cifar.folder}/{name}")
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return gzip.compress(out.getvalue(), compresslevel=1, mtime=0)  # no time in it: equal files, equal bytes


def write_archive(cifar: Cifar, root: Path, files: dict[str, bytes] | None = None) -> Cifar:
    """Put the archive into `root`; the collection with its checksum."""
    root.mkdir(parents=True, exist_ok=True)
    data = archive_bytes(cifar, files)
    (root / cifar.archive).write_bytes(data)
    return replace(cifar, md5=hashlib.md5(data).hexdigest())


@contextlib.contextmanager
def server(
    data: bytes,
    *,
    status: int = 200,
    cut_at: int | None = None,
    says_length: bool = True,
    pause: Callable[[], object] = bool,
) -> Iterator[Any]:
    """Answers every request with `data`, after `pause` in its middle; ends the connection after `cut_at` bytes.

    Has `address` and `asked`.
    """
    asked: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.headers["User-Agent"])
            self.send_response(status)
            if says_length:
                self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data[:cut_at][: len(data) // 2])
            pause()
            self.wfile.write(data[:cut_at][len(data) // 2 :])
            self.close_connection = True

        def log_message(self, *_: object) -> None: ...

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as http:
        thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        http.address, http.asked = f"http://127.0.0.1:{http.server_port}", asked  # type: ignore[attr-defined]
        try:
            yield http
        finally:
            http.shutdown()
            thread.join()
