"""`dino-exp runs doctor` names what is wrong and says what mends it, and changes nothing."""

from __future__ import annotations

import functools
import shlex
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

import pytest
from catalogue_samples import make
from cli_samples import cli, contents
from config_examples import config
from runs_samples import sample_attempt

from dino_exp.catalogue.catalogue import Catalogue
from dino_exp.config.stored import write_stored
from dino_exp.fsio import write_atomic
from dino_exp.runs.record import FailedSave
from dino_exp.sweeps.record import sweep_path

runs = functools.partial(cli, noun="runs")


@pytest.fixture
def outputs(tmp_path: Path) -> Path:
    outputs = tmp_path / "two words"
    (outputs / "sweeps" / "mine").mkdir(parents=True)
    write_stored(config(), make(outputs, "a", 0.5, 0.6))
    Catalogue(outputs).rebuild(lambda *_: None)
    return outputs


def only_run(outputs: Path) -> Path:
    (run,) = outputs.glob("runs/*")
    return run


def test_nothing_is_wrong(outputs: Path) -> None:
    before = contents(outputs)
    found = runs("doctor", "--outputs", outputs, "--json")
    assert {one["level"] for one in found.json} == {"fine"}
    assert found.code == 0
    assert contents(outputs) == before
    assert runs("doctor", "--outputs", outputs / "nowhere").code == 0
    assert "a file, expected the folder" in runs("doctor", "--outputs", outputs / "catalogue.sqlite").out
    assert runs("doctor", "--outputs", outputs / "catalogue.sqlite").code == 1


def change(name: str, content: bytes) -> Callable[[Path], object]:
    return lambda run: (run / name).write_bytes(content)


def truncated(run: Path) -> None:
    pack = next((run / "checkpoints" / "packs").iterdir())
    pack.write_bytes(pack.read_bytes()[:-1])


WRONG = {
    "a record": (change("run.json", b"{"), "problem", "run.json"),
    "no record": (lambda run: (run / "run.json").unlink(), "problem", "holds checkpoints and no run.json"),
    "settings": (change("config.yaml", b"a: [1"), "problem", "not plain YAML"),
    "a manifest": (change("checkpoints/step-000000001.json", b"{"), "problem", "digest"),
    "a pack": (truncated, "problem", "bytes, expected"),
    "pins": (change("checkpoints/pins.json", b"{"), "problem", "pins.json"),
    "a sweep": (
        lambda run: write_atomic(sweep_path(run.parents[1], "mine"), "{}"),
        "problem",
        "plans it anew",
    ),
    "an index": (
        lambda run: (run.parents[1] / "catalogue.sqlite").write_bytes(b"x" * 999),
        "problem",
        "cannot be used",
    ),
    "a leftover": (change("checkpoints/.step-000000009.json.tmp", b"{"), "note", "1 leftovers"),
    "an orphan": (change("checkpoints/packs/step-000000009.a001.r00000.safetensors", b""), "note", "1 leftovers"),
}


@pytest.mark.parametrize("what", WRONG)
def test_what_is_wrong_is_named(what: str, outputs: Path) -> None:
    spoil, level, says = WRONG[what]
    spoil(only_run(outputs))
    before = contents(outputs)
    found = runs("doctor", "--outputs", outputs, "--json")
    (one,) = (one for one in found.json if one["level"] != "fine")
    assert one["level"] == level
    assert says in one["says"]
    if level == "problem":
        assert any(str(outputs) in word for word in shlex.split(one["command"]))
    assert found.code == (1 if level == "problem" else 0)
    assert runs("doctor", "--outputs", outputs).code == found.code
    assert contents(outputs) == before


def test_killed_half_written_and_unsaved_runs(outputs: Path) -> None:
    failed = FailedSave(step=7, error="no space", at="2026-01-01T00:00:00Z")
    killed = make(outputs, "killed", state="running", attempts=(sample_attempt(),))
    unsaved = make(outputs, "unsaved", state="failed", failed_save=failed)
    for run in (killed, unsaved):
        write_stored(config(), run)
    (outputs / "runs" / "empty").mkdir()
    rows = {one["about"]: one for one in runs("doctor", "--outputs", outputs, "--json").json if one["level"] != "fine"}
    assert rows["empty"]["level"] == "note"
    assert "was killed at step 0 of 100" in rows[killed.name]["says"]
    assert rows[killed.name]["command"] == f"python -m dino_exp.train 'resume={killed}'"
    assert (rows[unsaved.name]["level"], "step 7 was not saved" in rows[unsaved.name]["says"]) == ("problem", True)
    low = runs("doctor", "--outputs", outputs)
    assert low.code == 1


def test_a_full_disk_and_a_missing_git(outputs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dino_exp.catalogue.doctor.LOW_DISK_BYTES", 1 << 62)
    monkeypatch.setenv("PATH", "/nowhere")
    levels = {one["about"]: one["level"] for one in runs("doctor", "--outputs", outputs, "--json").json}
    assert (levels["disk"], levels["git"]) == ("problem", "note")


VERSIONS = {
    "a pair that does not go together": ({"omegaconf": "2.4.0"}, "problem", "expected hydra-core and omegaconf of"),
    "a pair that this version does not know": ({"hydra-core": "1.5.0"}, "problem", "1.3 with 2.3 or 1.4 with 2.4"),
    "a later pair": ({"hydra-core": "1.4.0", "omegaconf": "2.4.1"}, "fine", "hydra-core 1.4.0"),
    "a sweeper that cannot keep its study": ({"hydra-optuna-sweeper": "1.3.0"}, "note", "sqlite"),
    "one that can": ({"hydra-optuna-sweeper": "1.4.0rc3"}, "fine", "hydra-core 1.3"),
}


@pytest.mark.parametrize("case", VERSIONS)
def test_versions_that_do_not_go_together(case: str, outputs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    installed, level, says = VERSIONS[case]
    real = metadata.version
    shown = {"hydra-core": "1.3.8", "omegaconf": "2.3.1", **installed}
    monkeypatch.setattr("dino_exp.catalogue.doctor.metadata.version", lambda name: shown.get(name) or real(name))
    found = [one for one in runs("doctor", "--outputs", outputs, "--json").json if one["about"] == "versions"]
    assert says in found[-1]["says"]
    assert found[-1]["level"] == level
