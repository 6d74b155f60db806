import json
import math
import subprocess
import sys

import pytest

from dino_exp.fsio import DamagedFileError
from dino_exp.runs.events import EventLog
from dino_exp.runs.jsonl import JsonLines, read_lines
from dino_exp.runs.rows import START, RowPosition, RowWriter, last_step


def test_events_are_whole_lines_with_time_and_kind(tmp_path):
    path = tmp_path / "events.jsonl"
    log = EventLog(path, clock=lambda: 0.25)
    log.append("saved", step=3, reasons=("interval", "best"), metric=math.nan)
    log.append("dropped", step=1)
    assert list(read_lines(path)) == [
        {"time": "1970-01-01T00:00:00.250000Z", "kind": "saved", "step": 3, "reasons": ["interval", "best"],
         "metric": "nan"},
        {"time": "1970-01-01T00:00:00.250000Z", "kind": "dropped", "step": 1},
    ]  # fmt: skip
    log.close()


@pytest.mark.parametrize("torn", [b"{", b'{"kind": "x"}', b"\0" * 70_000, b"x" * 70_000])
def test_a_line_torn_by_a_killed_writer_is_cut_at_opening(tmp_path, torn):
    path = tmp_path / "events.jsonl"
    first = EventLog(path, clock=lambda: 0.0)
    first.append("one")
    first.close()
    whole = path.read_bytes()
    path.write_bytes(whole + torn)
    assert [event["kind"] for event in read_lines(path)] == ["one"]  # readers meanwhile
    second = EventLog(path, clock=lambda: 0.0)
    assert path.read_bytes() == whole
    second.append("two")
    second.close()
    assert [event["kind"] for event in read_lines(path)] == ["one", "two"]


def test_a_log_of_one_torn_line_only_starts_anew(tmp_path):
    path = tmp_path / "events.jsonl"
    path.write_bytes(b'{"kind"')
    EventLog(path, clock=lambda: 0.0).close()
    assert path.read_bytes() == b""


@pytest.mark.parametrize("long", [0, 70_000, 200_000])
def test_the_step_of_the_last_whole_row(tmp_path, long):
    path = tmp_path / "metrics.jsonl"
    assert last_step(path) is None
    path.write_bytes(b'{"step": 9')
    assert last_step(path) is None
    rows = [json.dumps({"step": step, "text": "x" * long}) + "\n" for step in (1, 2)]
    path.write_text(rows[0])
    assert last_step(path) == 1
    path.write_text("".join(rows) + '{"step": 3')
    assert last_step(path) == 2
    writer = RowWriter(path)
    writer.open_at(1, len(rows[0]))
    assert (writer.reached, last_step(path)) == (2, 1)
    writer.close()


@pytest.mark.parametrize("line", ["[1]", '{"step": "x"}', '{"step": -1}', "{}", "{"])
def test_a_last_row_that_says_no_step(tmp_path, line):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n' + line + "\n")
    assert last_step(path) is None


def test_a_damaged_line_is_named(tmp_path):
    path = tmp_path / "events.jsonl"
    path.write_bytes(b'{"kind": "a"}\n[1]\n')
    with pytest.raises(DamagedFileError, match="line 2: found list"):
        list(read_lines(path))
    path.write_bytes(b'{"kind": "a"}\n{"kind": NaN}\n')
    with pytest.raises(DamagedFileError, match="line 2"):
        list(read_lines(path))


def test_long_files_read_back_across_blocks(tmp_path):
    rows = [{"step": step, "text": "ü" * (step % 997)} for step in range(500)]
    lines = JsonLines(tmp_path / "rows", 0)
    for row in rows:
        lines.append(row)
    lines.close()
    assert list(read_lines(tmp_path / "rows")) == rows
    assert list(read_lines(tmp_path / "missing")) == []


def _written(path, num_rows):
    writer = RowWriter(path)
    writer.open_at(0, 0)
    positions = [START]
    for step in range(num_rows):
        writer.append({"step": step, "loss": 1 / (step + 1), "wall": {"secs": step}})
        positions.append(writer.sync())
    writer.close()
    return positions


@pytest.mark.parametrize("kept", range(6))
def test_a_resume_cuts_the_rows_and_writes_the_same_again(tmp_path, kept):
    path = tmp_path / "metrics.jsonl"
    positions = _written(path, 5)
    whole = path.read_bytes()
    path.write_bytes(whole + b'{"step": 5, "lo')  # a row torn by a kill
    writer = RowWriter(path)
    writer.open_at(positions[kept].num_rows, positions[kept].num_bytes)
    assert path.read_bytes() == whole[: positions[kept].num_bytes]
    for step in range(kept, 5):
        writer.append({"step": step, "loss": 1 / (step + 1), "wall": {"secs": step}})
    assert writer.sync() == positions[5]
    writer.close()
    assert path.read_bytes() == whole


def test_rows_spell_what_json_cannot(tmp_path):
    path = tmp_path / "metrics.jsonl"
    writer = RowWriter(path)
    writer.open_at(0, 0)
    writer.append({"loss": math.nan, "norm": math.inf, "wall": {"low": -math.inf}})
    writer.close()
    assert json.loads(path.read_text(), parse_constant=pytest.fail) == {
        "loss": "nan", "norm": "inf", "wall": {"low": "-inf"},
    }  # fmt: skip


def test_rows_that_are_gone_are_named_and_nothing_is_touched(tmp_path):
    path = tmp_path / "metrics.jsonl"
    positions = _written(path, 5)
    whole = path.read_bytes()
    wrong = {
        "100 bytes": lambda: path.write_bytes(whole[:100]),
        "0 bytes": path.unlink,
        "4 rows": lambda: path.write_bytes(whole.replace(b"\n", b" ", 1)),
        "a torn one": lambda: path.write_bytes(whole[:-1] + b"xx"),
    }
    for found, damage in wrong.items():
        path.write_bytes(whole)
        damage()
        before = path.read_bytes() if path.exists() else None
        with pytest.raises(DamagedFileError, match=f"found .*{found}.*after 5 rows") as caught:
            RowWriter(path).open_at(positions[5].num_rows, positions[5].num_bytes)
        assert "fork=" in str(caught.value)
        assert (path.read_bytes() if path.exists() else None) == before


def test_a_position_cannot_be_impossible():
    for rows, size in ((-1, 0), (2, 1)):
        with pytest.raises(ValueError, match="num_rows"):
            RowPosition(num_rows=rows, num_bytes=size)


FULL_DISK = """
import resource, signal, sys
from pathlib import Path
from dino_exp.runs.rows import RowWriter
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
path = Path(sys.argv[1])
writer = RowWriter(path)
writer.open_at(0, 0)
writer.append({"step": 0})
resource.setrlimit(resource.RLIMIT_FSIZE, (40, resource.RLIM_INFINITY))
try:
    writer.append({"step": 1, "text": "x" * 100})
except OSError as error:
    print(error.errno)
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
writer.append({"step": 1})
print(writer.sync())
"""


def test_a_row_that_did_not_fit_leaves_no_half_line(tmp_path):
    path = tmp_path / "metrics.jsonl"
    done = subprocess.run(
        [sys.executable, "-c", FULL_DISK, str(path)], capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stdout.splitlines() == ["27", "RowPosition(num_rows=2, num_bytes=24)"]  # 27 is EFBIG
    assert [row["step"] for row in read_lines(path)] == [0, 1]
