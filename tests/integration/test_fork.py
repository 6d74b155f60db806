"""`fork=`: a new run from another run's state, its parent recorded."""

from __future__ import annotations

import pytest
from support.runs import Lab, manifests, record, rows


def test_a_fork_goes_on_with_other_settings_and_is_found_again(lab: Lab) -> None:
    lab.train("run.tags=[parent]", "train.stop_after_steps=20")
    parent = lab.only_run()
    before = {path: path.read_bytes() for path in parent.rglob("*") if path.is_file()}
    fork = (f"fork={parent.name}@latest", "optimizer.lr=1e-3", "train.epochs=3")
    lab.settings = ()
    lab.train(*fork, "train.stop_after_steps=21")
    child = next(run for run in lab.runs() if run != parent)
    assert {path: path.read_bytes() for path in parent.rglob("*") if path.is_file()} == before
    made = record(child)
    assert made["parent"]["run_key"] == parent.name
    assert made["parent"]["step"] == 20
    assert (
        manifests(child)[20]["state_digest"] == manifests(parent)[20]["state_digest"] == made["parent"]["state_digest"]
    )
    assert [row["step"] for row in rows(child)] == list(range(21, 22))
    assert made["schedule"]["horizon_steps"] == 66

    lab.train(f"resume={parent}", "train.stop_after_steps=30")  # the parent goes on: latest is another state now
    lab.train(*fork)
    assert len(lab.runs()) == 2
    assert record(child)["state"] == "completed"
    assert record(child)["step"] == 66


@pytest.mark.slow
def test_a_fork_that_changes_nothing_ends_like_its_parent(lab: Lab) -> None:
    lab.train()
    parent = lab.only_run()
    step = min(manifests(parent))
    lab.settings = ()
    lab.train(f"fork={parent}@{step}", "run.variant=again")
    child = next(run for run in lab.runs() if run != parent)
    assert rows(child) == [row for row in rows(parent) if row["step"] > step]
    ours, theirs = manifests(child)[44]["tensors"], manifests(parent)[44]["tensors"]
    assert {name: [c["content_digest"] for c in entry["chunks"]] for name, entry in ours.items()} == {
        name: [c["content_digest"] for c in entry["chunks"]] for name, entry in theirs.items()
    }


def test_forks_that_cannot_be(lab: Lab) -> None:
    lab.train("train.stop_after_steps=3")
    lab.settings = ()
    assert "no checkpoint of step 99" in lab.train("fork=last@99", code=4)
    assert "train.batch_size" in lab.train("fork=last", "train.batch_size=32", code=2)
    assert "model.embed_dim" in lab.train("fork=last", "model=vit_t", code=2)
    assert "optimizer.name" in lab.train("fork=last", "optimizer=sgd", code=2)
    assert len(lab.runs()) == 1
    assert "origin is set by a fork" in lab.train(f"origin=s1:{'0' * 64}", code=2)
    assert "resume and fork" in lab.train("fork=last", "resume=last", code=2)


def test_fork_of_last_typed_again_finds_its_child(lab: Lab) -> None:
    lab.train("train.stop_after_steps=22")
    lab.settings = ()
    lab.train("fork=last", "train.epochs=3", "train.stop_after_steps=23")
    lab.train("fork=last", "train.epochs=3", "train.stop_after_steps=24")
    assert len(lab.runs()) == 2
    assert sorted(record(run)["step"] for run in lab.runs()) == [22, 24]


def test_a_damaged_run_beside_does_not_stop_a_fork(lab: Lab) -> None:
    lab.train("train.stop_after_steps=3")
    run = lab.only_run()
    (lab.outputs / "runs" / "other").mkdir()
    (lab.outputs / "runs" / "other" / "run.json").write_text('{"a": 1}')
    lab.settings = ()
    assert "passed over" in lab.train(f"fork={run}", "optimizer.lr=1e-3", "train.stop_after_steps=4")
