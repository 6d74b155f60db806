"""Output that does not take everything, and a training's console that goes on all the same."""

from __future__ import annotations

import io
import logging
import sys
from pathlib import Path

import pytest

from dino_exp.loggers.console import SteadyConsole
from dino_exp.streams import steady_streams


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_what_an_encoding_lacks_is_escaped(encoding: str, monkeypatch: pytest.MonkeyPatch) -> None:
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding=encoding))
    steady_streams()
    SteadyConsole(width=60).print("step 1 · – ┏ \udcff")
    sys.stdout.flush()
    assert raw.getvalue().decode(encoding).startswith("step 1 ")
    assert b"\\u2013" in raw.getvalue()


def test_streams_that_were_closed_are_there_again(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("stdout", "stderr"):
        monkeypatch.setattr(sys, name, None)
    steady_streams()
    print("nobody hears it")
    print("nor this", file=sys.stderr)
    for stream in (sys.stdout, sys.stderr):
        stream.close()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
def test_a_full_disk_below_the_output_is_said_once_and_nothing_more_is_printed(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(sys, "stdout", sys.stdout)
    full = open("/dev/full", "w", encoding="utf-8")  # noqa: SIM115, PTH123 (closing it fails)
    console = SteadyConsole(file=full)
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            console.print("step")
    assert [record.getMessage() for record in caplog.records] == [
        "standard output: No space left on device; nothing more is printed there"
    ]
    sys.stdout.close()  # what the console put in its place
    with pytest.raises(OSError, match="No space"):
        full.close()
