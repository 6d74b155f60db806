"""`dino-exp runs reproduce`: recorded code, settings and state give the same bits, or the first other one is named."""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
from pathlib import Path

import pytest
from support.runs import Lab, manifests, record

from dino_exp.errors import RefusedError
from dino_exp.fsio import DamagedFileError
from dino_exp.runs.code_rebuild import rebuild_code, recorded_code
from dino_exp.runs.record import CodeRef, load_record

ROOT = Path(__file__).parents[2]


def reproduce(lab: Lab, *words: str, code: int = 0) -> str:
    return lab.cli("runs", "reproduce", "last", *words, "--outputs", str(lab.outputs), code=code)


@pytest.mark.slow
def test_from_the_start_and_from_a_checkpoint(lab: Lab) -> None:
    lab.train("train.stop_after_steps=30", "model.depth=2", "model.drop_path_rate=0.2")
    run = lab.only_run()
    before = {path: path.read_bytes() for path in lab.outputs.rglob("*") if path.is_file()}
    found = json.loads(reproduce(lab, "--verify", "12", "--json"))
    assert (found["exact"], found["start"], found["stop"], found["rows"]) == (True, 0, 12, 12)
    assert found["states"] == [11]
    later = json.loads(reproduce(lab, "--at", "22", "--json"))
    assert (later["exact"], later["rows"], later["states"]) == (True, 8, [30])
    assert {path: path.read_bytes() for path in lab.outputs.rglob("*") if path.is_file()} == before
    assert "there are: 11, 22, 30" in reproduce(lab, "--at", "5", code=2)
    assert "nothing to replay" in reproduce(lab, "--at", "30", code=2)
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    rows[24]["loss"] += 1e-9
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    told = reproduce(lab, "--at", "22", "--verify", "4", code=1)
    assert "not exact: the first difference is loss at step 24" in told


@pytest.mark.slow
def test_a_fork_is_replayed_from_its_first_checkpoint(lab: Lab) -> None:
    lab.train("train.stop_after_steps=11")
    parent = lab.only_run()
    lab.settings = ()
    lab.train(f"fork={parent}@latest", "optimizer.lr=1e-3", "train.stop_after_steps=14", "checkpoint.keep.last=9")
    child = next(run for run in lab.runs() if run != parent)
    first = min(manifests(child))
    found = json.loads(lab.cli("runs", "reproduce", str(child), "--json"))
    assert (found["exact"], found["start"], found["stop"]) == (True, first, 14)


def test_a_strangers_run_is_run_only_if_one_says_so(lab: Lab) -> None:
    """Whatever a record says of its host: a stranger can write anything, but not with this user's key."""
    lab.train("train.stop_after_steps=2")
    run = lab.only_run()
    made = load_record(run / "run.json")
    assert made is not None
    assert made.attempts[0].host == socket.gethostname()
    (run / "code" / "signature").write_text("0" * 64 + "\n")
    told = reproduce(lab, "--verify", "1", code=3)
    assert "add --trust" in told
    assert f"{'commit':<12}{made.code.commit}" in told
    described = json.loads((run / "code" / "git.json").read_text())
    (run / "code" / "git.json").write_text(json.dumps({**described, "commit": "1" * 40}))
    assert "one of the two is not of this run" in reproduce(lab, "--verify", "1", "--trust", code=3)
    (run / "code" / "git.json").write_text(json.dumps(described))
    told = reproduce(lab, "--verify", "1", "--trust")
    assert "exact: 1 row and" in told
    assert "resume=" not in told  # the folder of the replay is gone
    rows = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    (run / "metrics.jsonl").write_text("".join(line for line in rows if json.loads(line)["step"] != 1))
    assert "nothing to compare in steps 0 to 1" in reproduce(lab, "--verify", "1", "--trust", code=2)


def git(*words: str, cwd: Path) -> None:
    subprocess.run(["git", *words], cwd=cwd, check=True, capture_output=True)


@pytest.mark.slow
def test_code_that_was_changed_and_not_committed_is_made_again(tmp_path: Path) -> None:
    """The program that reproduces is another version than the one that trained."""
    clone = tmp_path / "clone"
    git("clone", "--quiet", str(ROOT), str(clone), cwd=tmp_path)
    lab = Lab(tmp_path / "lab")
    lab.directory.mkdir()
    lab.environment["PYTHONPATH"] = str(clone)
    step = clone / "dino_exp" / "training" / "step.py"
    original = step.read_text()
    step.write_text(original + "\n# changed\n")
    (clone / "dino_exp" / "extra.py").write_text("NEW = 1\n")
    lab.train("train.stop_after_steps=3", "checkpoint.save.every_steps=1", "checkpoint.storage.background=false")
    step.write_text(original)
    (clone / "dino_exp" / "extra.py").unlink()
    status = subprocess.run(["git", "status", "--porcelain"], cwd=clone, capture_output=True, text=True, check=True)
    assert status.stdout == ""
    kept = tmp_path / "kept"
    printed = reproduce(lab, "--keep", str(kept))
    assert "exact: 3 rows and the states of steps 2, 3" in printed
    assert (kept / "code" / "dino_exp" / "training" / "step.py").read_text().endswith("# changed\n")
    assert (kept / "code" / "dino_exp" / "extra.py").exists()
    again = next((kept / "outputs" / "runs").iterdir())
    assert manifests(again)[3]["state_digest"] == manifests(lab.only_run())[3]["state_digest"]
    assert record(again)["attempts"][-1]["code"]["id"] == record(lab.only_run())["code"]["id"]
    assert "is there already" in reproduce(lab, "--keep", str(kept), code=2)
    shutil.rmtree(kept)
    step.write_text(original + "\n# changed again\n")
    words = ("runtime.threads=2", "logger.every_steps=2", "train.stop_after_steps=8")
    lab.settings = ()
    lab.train(f"resume={lab.only_run()}", *words)
    step.write_text(original)
    found = json.loads(reproduce(lab, "--json"))
    assert (found["exact"], found["rows"], found["states"]) == (True, 6, [7, 8])
    assert [(one["attempt"], one["start"], one["stop"]) for one in found["attempts"]] == [(1, 0, 3), (2, 3, 8)]
    assert found["attempts"][1]["settings"] == {"runtime.threads": 2, "logger.every_steps": 2}
    assert found["attempts"][0]["code_id"] != found["attempts"][1]["code_id"]
    (lab.only_run() / "code" / "code.patch").write_text("")
    assert "code.patch: is not what was recorded" in reproduce(lab, code=4)
    status = subprocess.run(["git", "status", "--porcelain"], cwd=clone, capture_output=True, text=True, check=True)
    assert status.stdout == ""


RECORD = {
    "format": 1,
    "id": "0" * 64,
    "commit": "1" * 40,
    "package": "dino_exp",
    "patch": None,
    "untracked": {"files": [], "sha256": None},
}
REF = CodeRef(id="0" * 64, commit="1" * 40, dirty=False)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"commit": "--upload-pack=touch x"}, "hex digits"),
        ({"package": "../x"}, "inside the repository"),
        ({"package": "/etc"}, "inside the repository"),
        ({"package": ".git/hooks"}, "inside the repository"),
        ({"patch": {"file": "code.patch"}}, "expected text"),
        ({"untracked": 3}, "expected an object"),
        ({"id": None}, "expected text"),
    ],
)
def test_a_record_of_code_is_believed_in_nothing(change: dict[str, object], says: str, tmp_path: Path) -> None:
    (tmp_path / "git.json").write_text(json.dumps({**RECORD, **change}))
    with pytest.raises(DamagedFileError, match=says):
        recorded_code(tmp_path, 1, REF)


def test_code_that_cannot_be_had_is_refused(tmp_path: Path) -> None:
    (tmp_path / "git.json").write_text(json.dumps(RECORD))
    with pytest.raises(RefusedError, match="does not know commit 1111"):
        rebuild_code(recorded_code(tmp_path, 1, REF), tmp_path / "code")
