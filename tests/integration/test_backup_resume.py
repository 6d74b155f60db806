"""A run that comes back from its backup goes on bit for bit, and a training that is under way may be backed up."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from support.backups import fetch, send
from support.runs import Lab, assert_same_end, manifests, record, rows


@pytest.mark.slow
def test_a_restored_run_resumes_bit_for_bit(lab: Lab, tmp_path: Path) -> None:
    """From the middle of an epoch, with nothing left of the run but its backup."""
    lab.train("run.variant=reference")
    reference = lab.only_run()
    lab.train("run.variant=lost", "train.stop_after_steps=17")
    lost = reference.with_name(reference.name.replace("reference", "lost"))
    assert send(lost, tmp_path / "there").steps == tuple(sorted(manifests(lost)))
    shutil.rmtree(lost)
    restored = lab.outputs / "runs" / "restored"
    assert not fetch(tmp_path / "there", restored).left_out
    assert record(restored)["state"] == "stopped"
    lab.settings = ()
    lab.train(f"resume={restored}")
    assert_same_end(restored, reference)
    assert [attempt["resumed_from"] for attempt in record(restored)["attempts"]] == [None, 17]


@pytest.mark.slow
def test_a_training_is_backed_up_again_and_again_while_it_runs(lab: Lab, tmp_path: Path) -> None:
    """It saves and drops all the time. Each backup restores, and the last one of them ends in the same bits."""
    save = "checkpoint.save.every_steps=2"
    lab.train("run.variant=reference", save)
    reference = lab.only_run()
    attempt = lab.fork("run.variant=live", save, "checkpoint.keep.last=1")
    run = reference.with_name(reference.name.replace("reference", "live"))
    there, num = tmp_path / "there", 0
    while not attempt.ends_within(0.05):
        if (run / "run.json").exists():
            done = json.loads(lab.cli("checkpoints", "backup", str(run), str(there), "--json"))
            assert done["verified"] is True
            num += 1
            last = tmp_path / f"back{num}"
            back = json.loads(lab.cli("checkpoints", "restore", str(there), str(last), "--json"))
            assert back["checkpoints"] == done["checkpoints"]
    assert attempt.wait() == 0, attempt.output()
    assert num >= 2
    for back in tmp_path.glob("back*"):
        assert len(rows(back)) >= max((one["aside"]["metrics_rows"] for one in manifests(back).values()), default=0)
    lab.settings = ()
    lab.train(f"resume={last}")
    assert_same_end(last, reference)
    assert_same_end(run, reference)
