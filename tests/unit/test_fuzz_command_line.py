"""`dino-exp checkpoints ...` over the directory of a stranger: one message or plain text, never a traceback."""

from __future__ import annotations

import contextlib
import io
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import strategies as st
from runs_samples import sample_record
from support.checkpoints import save_steps
from support.hostile import NASTY_TEXTS, READ, REFUSED, amounts, fuzz, seal_text, sealed

from dino_exp.checkpoint.canonical import seal, unseal
from dino_exp.cli.app import run as run_command_line
from dino_exp.errors import DinoExpError
from dino_exp.runs.record import save_record

NAME = "step-000000002.json"
SHOWN = ("list", "show", "verify")


@pytest.fixture
def run(tmp_path: Path) -> Path:
    directory = tmp_path / "outputs" / "runs" / "vit_nano-abababab-cdcdcdcd"
    directory.mkdir(parents=True)
    save_steps(directory / "checkpoints", [1, 2])
    save_record(directory / "run.json", sample_record())
    return directory


@contextlib.contextmanager
def output() -> Iterator[list[str]]:
    """Standard output and error, in UTF-8 and strict, as they are where a terminal shows them."""
    streams, before, written = [io.BytesIO(), io.BytesIO()], (sys.stdout, sys.stderr), []
    sys.stdout, sys.stderr = (io.TextIOWrapper(stream, "utf-8") for stream in streams)
    try:
        yield written
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        (sys.stdout, sys.stderr), wrappers = before, (sys.stdout, sys.stderr)
        written += [stream.getvalue().decode() for stream in streams]
        for wrapper in wrappers:
            wrapper.close()


def command(*words: str) -> tuple[int, str, str]:
    """The exit code of a command in this process, and what it wrote. Any exception is a traceback, and passes."""
    argv = sys.argv
    sys.argv = ["dino-exp", *words]
    try:
        with output() as written:
            code = run_command_line()
    finally:
        sys.argv = argv
    return code, *written


def told(*words: str, codes: tuple[int, ...] = (0, 1, 2, 3, 4)) -> str:
    """What a command said; fails for another exit code, for characters that move a cursor, and for floods."""
    code, out, err = command(*words)
    assert code in codes, (code, err)
    assert (err != "") == (code in (1, 2, 3) or (code == 4 and out.strip() == ""))
    assert len(err) < 6000
    strange = {char for char in out + err if not char.isprintable() and char != "\n"}
    assert not strange, strange
    return out + err


@amounts(40, 1_500)
def test_every_command_over_a_hostile_manifest(num: int, run: Path) -> None:
    path = run / "checkpoints" / NAME
    body = unseal(path.read_bytes(), NAME)

    def check(data: bytes) -> None:
        path.write_bytes(data)
        (run / "checkpoints" / "registry.json").unlink(missing_ok=True)
        told("checkpoints", "list", str(run))
        told("checkpoints", "prune", str(run), "--dry-run", "--keep-last", "1")
        for verb, at in (("list", "@best"), ("list", ""), ("show", "@2"), ("verify", "")):
            printed = told("checkpoints", verb, f"{run}{at}", "--json")
            if printed.startswith(("[", "{")):
                json.loads(printed, parse_constant=pytest.fail)
        if told("checkpoints", "show", f"{run}@2").startswith("dino-exp:"):
            raise DinoExpError("refused")

    fuzz(sealed(body), check, num)


@amounts(40, 1_500)
def test_every_text_of_a_manifest_is_shown_as_text(num: int, run: Path) -> None:
    """Markup, control characters, half characters: of names, metrics, reasons and records, one after another."""
    path = run / "checkpoints" / NAME
    body = unseal(path.read_bytes(), NAME)
    places = ("created_at", "reason", "metric", "tensor", "commit", "parent")

    def check(case: tuple[str, str]) -> None:
        place, text = case
        changed: dict[str, Any] = json.loads(json.dumps(body))
        match place:
            case "created_at":
                changed["created_at"] = text
            case "reason":
                changed["reasons"] = [text]
            case "metric":
                changed["metrics"] = {text: 0.5, "knn_top1": 0.25}
                changed["policy"] = [{"rule": "best", "metric": text, "mode": "max", "num": 1}]
            case "tensor":
                changed["tensors"][text or "x"] = changed["tensors"].pop("student.weight")
            case "commit":
                changed["record"] |= {"git_commit": text, "config_hash": text}
            case _:
                changed["record"]["parent"] = {"run_key": text}
        path.write_bytes(seal(changed))
        told("checkpoints", "list", str(run), codes=(0,))
        told("checkpoints", "prune", str(run), "--dry-run", codes=(0, 3))
        told("checkpoints", "verify", str(run), codes=(0, 4))
        if told("checkpoints", "show", f"{run}@2", codes=(0, 4)).startswith("dino-exp:"):
            raise DinoExpError("refused")

    fuzz(st.tuples(st.sampled_from(places), st.sampled_from(NASTY_TEXTS)), check, num, both=False)


@amounts(40, 1_500)
def test_a_hostile_registry_and_hostile_pins(num: int, run: Path) -> None:
    folder = run / "checkpoints"
    whole = (folder / "registry.json").read_bytes()
    registry = unseal(whole, "registry.json")
    pins = {"format_version": 1, "pins": {"1": "kept"}}

    def check(case: tuple[str, bytes]) -> None:
        (folder / "registry.json").write_bytes(whole)
        (folder / "pins.json").unlink(missing_ok=True)
        (folder / case[0]).write_bytes(case[1])
        told("checkpoints", "verify", str(run), codes=(0,) if case[0] == "registry.json" else (0, 4))
        told("checkpoints", "list", str(run), "--json", codes=(0, 4))
        if told("checkpoints", "list", str(run), codes=(0, 4)).startswith("dino-exp:"):
            raise DinoExpError("refused")

    cases = st.tuples(st.just("registry.json"), sealed(registry)) | st.tuples(st.just("pins.json"), sealed(pins))
    outcomes = fuzz(cases, check, num)
    assert outcomes[READ] > 0 < outcomes[REFUSED]


WORDS = (
    *NASTY_TEXTS, "last", "last@", "@", "@best", "x@9999999999", "last@99999999999999999999", "a@b@c", "/", "/dev/null",
    "/proc/self", "-", "--", "\udcff", "vit", "vit_nano-abababab-cdcdcdcd/", "./x@best", "x/" * 3000,
)  # fmt: skip


@pytest.mark.parametrize("word", [word for word in WORDS if "\0" not in word], ids=lambda word: ascii(word)[:20])
def test_whatever_is_typed_for_a_run(word: str, run: Path) -> None:
    printed = told("checkpoints", "list", f"--outputs={run.parent.parent}", "--", word, codes=(0, 2))
    assert printed


def test_an_index_of_another_world(run: Path) -> None:
    (run / "checkpoints" / NAME).write_bytes(seal_text(b'{"format_version":3,"step":2}'))
    for verb in SHOWN:
        assert "newer version" in told("checkpoints", verb, str(run), codes=(4,))
