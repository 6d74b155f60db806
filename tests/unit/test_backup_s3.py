"""Backups over the S3 protocol, to a real server on this machine: killed clients, failing and slow servers."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
from cli_samples import KEEP, cli, make_run
from support.backups import S3Server, fetch, send, slowly, target_of
from support.checkpoints import save_steps

from dino_exp.backup.patience import Patience
from dino_exp.errors import BackupError

ROOT = Path(__file__).parents[2]
NUM_BYTES = 200_000


@pytest.fixture(scope="module")
def started() -> Iterator[S3Server]:
    server = S3Server()
    yield server
    server.close()


@pytest.fixture
def server(started: S3Server, monkeypatch: pytest.MonkeyPatch) -> S3Server:
    for name, value in started.environment().items():
        monkeypatch.setenv(name, value)
    return started


@pytest.fixture
def s3(server: S3Server) -> Any:
    import boto3

    client = boto3.client("s3")
    yield client
    client.close()


@pytest.fixture
def url(s3: Any, server: S3Server) -> str:
    """An empty place in a bucket of its own."""
    bucket = f"runs-{uuid4().hex[:12]}"
    s3.create_bucket(Bucket=bucket)
    server.requests = []
    return f"s3://{bucket}/some/run"


@pytest.fixture
def run(tmp_path: Path) -> Path:
    run = make_run(tmp_path, 1, 2, 3)
    for number in range(5):
        (run / f"picture{number}.png").write_bytes(os.urandom(NUM_BYTES))
    return run


def keys(s3: Any, url: str) -> dict[str, int]:
    """What lies there: sizes by path."""
    bucket, _, prefix = url.removeprefix("s3://").partition("/")
    listed = s3.list_objects_v2(Bucket=bucket, Prefix=prefix).get("Contents", [])
    return {entry["Key"].removeprefix(f"{prefix}/"): entry["Size"] for entry in listed}


def test_there_and_back_and_only_what_is_new(run: Path, url: str, s3: Any, server: S3Server, tmp_path: Path) -> None:
    done = cli("backup", run, url, "--json")
    assert (done.code, done.err) == (0, "")
    whole = server.bytes_put()
    assert done.json["bytes_sent"] == whole
    save_steps(run / "checkpoints", [4], keep=KEEP)
    before = keys(s3, url)
    done = cli("backup", run, url, "--json").json
    after = keys(s3, url)
    new = {path: size for path, size in after.items() if path not in before}
    assert {path.partition(".")[0].rpartition("/")[2] for path in new} == {"step-000000004", "events"}
    assert server.bytes_put() == done["bytes_sent"] == sum(new.values()) + after["backup.json"]
    assert fetch(url, tmp_path / "back").steps == (1, 2, 3, 4)
    for path in run.glob("picture*"):
        assert (tmp_path / "back" / path.name).read_bytes() == path.read_bytes()


def start(run: Path, url: str) -> subprocess.Popen[str]:
    words = [sys.executable, "-W", "error", "-m", "dino_exp", "checkpoints", "backup", str(run), url]
    return subprocess.Popen(
        words, env={**os.environ, "PYTHONPATH": str(ROOT)}, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )


@pytest.mark.parametrize("num_puts", [3, 12])
def test_a_killed_backup_goes_on_where_it_was(
    run: Path, url: str, server: S3Server, s3: Any, tmp_path: Path, num_puts: int, survived: Any
) -> None:
    """A real SIGKILL of a real process, at an upload that the server holds back; none of the rest is sent twice."""
    process: list[subprocess.Popen[str]] = []
    left = [num_puts]

    def kill(method: str, path: str) -> str | None:
        left[0] -= method == "PUT"
        if left[0] > 0 or method != "PUT":
            return None
        process[0].send_signal(signal.SIGKILL)
        return "500 Internal Error"

    with server.misbehaving(kill):
        process.append(start(run, url))
        process[0].communicate(timeout=60)
    assert process[0].returncode == -signal.SIGKILL
    first = server.bytes_put()
    assert "backup.json" not in keys(s3, url)
    assert cli("restore", url, tmp_path / "early").code == 4
    again = cli("backup", run, url)
    assert (again.code, again.err) == (0, "")
    assert "3 checkpoints" in again.out
    second = server.bytes_put()
    content = sum(size for path, size in keys(s3, url).items() if path != "backup.json")
    indexes = 6 * keys(s3, url)["backup.json"]
    assert content <= first + second <= content + indexes  # indexes are small, and written more than once
    assert fetch(url, tmp_path / "back").steps == (1, 2, 3)
    survived("backups to S3 that were killed and went on", 1)


def test_server_errors_pass(run: Path, url: str, server: S3Server, tmp_path: Path) -> None:
    """Every seventh request fails, of the backup and of the restore."""
    count = [0]

    def now_and_then(method: str, path: str) -> str | None:
        count[0] += 1
        return ("503 Slow Down", "500 Internal Error")[count[0] % 2] if count[0] % 7 == 0 else None

    with server.misbehaving(now_and_then):
        assert send(run, url).steps == (1, 2, 3)
        assert fetch(url, tmp_path / "back").steps == (1, 2, 3)
    assert count[0] > 40


def test_a_server_that_stays_broken_is_given_up(run: Path, url: str, server: S3Server) -> None:
    said: list[str] = []
    with (
        server.misbehaving(lambda method, path: "400 Internal Error" if method == "PUT" else None),
        pytest.raises(BackupError, match="The same command goes on where this one stopped"),
    ):
        send(run, url, target=target_of(url, said))
    assert len(said) == 3
    assert all("trying again" in line for line in said)


def test_a_server_that_does_not_answer_is_given_up_and_told(run: Path, url: str, server: S3Server) -> None:
    said: list[str] = []
    patience = Patience(num_tries=2, answer_secs=0.2, first_secs=0.01)
    with server.misbehaving(slowly(3)), pytest.raises(BackupError, match=r"2 times: TimeoutError: no answer within"):
        send(run, url, target=target_of(url, said, patience))
    assert [line.partition(": ")[0] for line in said] == [url]


def test_a_wrong_bucket_is_told_at_once_and_never_made(run: Path, s3: Any, server: S3Server, tmp_path: Path) -> None:
    done = cli("backup", run, "s3://no-such-bucket/x")
    assert (done.code, done.out) == (1, "")
    assert "bucket does not exist" in done.err
    assert "trying again" not in done.err
    assert cli("restore", "s3://no-such-bucket/x", tmp_path / "back").code == 4
    assert "no-such-bucket" not in [bucket["Name"] for bucket in s3.list_buckets()["Buckets"]]


def test_missing_credentials_are_told_at_once(run: Path, url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    done = cli("backup", run, url)
    assert (done.code, done.out, len(done.err.splitlines())) == (1, "", 1)
    assert "NoCredentialsError" in done.err
    assert "docs/backup.md" in done.err


def test_missing_rights_are_told_at_once(run: Path, url: str, server: S3Server) -> None:
    with server.misbehaving(lambda method, path: "403 Access Denied" if method == "PUT" else None):
        done = cli("backup", run, url)
    assert (done.code, done.out, len(done.err.splitlines())) == (1, "", 1)
    assert "PermissionError" in done.err
    assert "must be allowed" in done.err


def test_credentials_show_nowhere(run: Path, server: S3Server, url: str, s3: Any, tmp_path: Path) -> None:
    with server.misbehaving(lambda method, path: "403 Access Denied"):
        printed = cli("backup", run, url.replace("s3://", "s3://somebody:s3cr3t-of-ours@"))
    assert "s3cr3t" not in printed.out + printed.err
    assert cli("backup", run, url).code == 0
    cli("restore", url, tmp_path / "back")
    assert not [path for path in (tmp_path / "back").rglob("*") if path.is_file() and b"s3cr3t" in path.read_bytes()]


def test_an_object_of_the_same_size_and_other_content_is_noticed(run: Path, url: str, s3: Any, tmp_path: Path) -> None:
    send(run, url)
    path = next(path for path in keys(s3, url) if path.startswith("picture3"))
    bucket, _, prefix = url.removeprefix("s3://").partition("/")
    s3.put_object(Bucket=bucket, Key=f"{prefix}/{path}", Body=b"x" * NUM_BYTES)
    back = cli("restore", url, tmp_path / "back")
    assert back.code == 4
    assert any("picture3.png" in line and "was changed" in line for line in back.lines)
    done = cli("backup", run, url, "--json")
    assert (done.code, done.json["spoiled"]) == (4, [f"{path} was changed"])
    assert cli("backup", run, url).code == 0


def test_large_files_go_in_parts_and_a_failed_one_leaves_none(
    run: Path, url: str, s3: Any, server: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import fsspec.config

    monkeypatch.setitem(fsspec.config.conf, "s3", {"default_block_size": 5 << 20})
    (run / "large.bin").write_bytes(os.urandom(12 << 20))
    bucket = url.removeprefix("s3://").partition("/")[0]
    parts = [0]

    def deny_second_part(method: str, path: str) -> str | None:
        parts[0] += method == "PUT" and "large" in path
        return "403 Access Denied" if parts[0] == 2 and method == "PUT" else None

    with server.misbehaving(deny_second_part), pytest.raises(BackupError, match="PermissionError"):
        send(run, url)
    assert "Uploads" not in s3.list_multipart_uploads(Bucket=bucket)
    assert not [path for path in keys(s3, url) if path.startswith("large")]
    send(run, url)
    fetch(url, tmp_path / "back")
    assert (tmp_path / "back" / "large.bin").read_bytes() == (run / "large.bin").read_bytes()
