"""`fork=`: a new run from another run's state, its parent recorded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from support.runs import Lab, manifests, record, rows

from dino_exp.checkpoint.canonical import seal, unseal


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


def told_best(lab: Lab, run: Path) -> dict[str, tuple[int, float] | None]:
    """Which evaluation or checkpoint each command calls the best of a run: step and value."""

    def asked(*words: str) -> Any:
        return json.loads(lab.cli(*words, "--outputs", str(lab.outputs), "--json"))

    def of(best: Any) -> tuple[int, float] | None:
        return None if best is None else (best["step"], best["value"])

    listed = {name: {row["run_key"]: row for row in asked("runs", name)} for name in ("list", "best")}
    (compared,) = [row for row in asked("runs", "compare", *map(str, lab.runs())) if row["run_key"] == run.name]
    kinds = [
        (row["step"], row["metrics"]["knn_top1"])
        for row in asked("checkpoints", "list", str(run))
        if "best" in row["kinds"]
    ]
    shown = asked("checkpoints", "show", f"{run}@best") if kinds else None
    return {
        "run.json": of(record(run)["best"]),
        "runs list": of(listed["list"][run.name]["best"]),
        "runs show": of(asked("runs", "show", str(run))["best"]),
        "runs best": of(listed["best"].get(run.name, {}).get("best")),
        "runs compare": None if compared["best"] is None else (compared["best_step"], compared["best"]),
        "checkpoints list": kinds[0] if kinds else None,
        "checkpoints show @best": None if shown is None else (shown["step"], shown["metrics"]["knn_top1"]),
    }


def test_the_best_of_a_fork_is_of_a_step_that_it_has(lab: Lab) -> None:
    """Its parent's best is behind the step at which it begins, or is that step."""
    lab.train()
    parent = lab.only_run()
    values = {row["step"]: row["knn_top1"] for row in rows(parent) if "knn_top1" in row}
    assert set(told_best(lab, parent).values()) == {(22, values[22])}
    assert values[44] < values[22], "else the parent's best is not behind it"
    lab.settings = ()
    children = []
    for fork, began, ended in (
        (("fork=last", "train.epochs=3"), 44, 66),
        ((f"fork={parent}@22", "run.variant=again"), 22, 44),
    ):
        lab.train(*fork, f"train.stop_after_steps={began + 2}")
        (child,) = [run for run in lab.runs() if run not in (parent, *children)]
        children.append(child)
        assert set(told_best(lab, child).values()) == {(began, values[began])}, (
            "that it began with, before any of its own"
        )
        printed = lab.train(*fork)
        told = told_best(lab, child)
        own = {began: values[began]} | {row["step"]: row["knn_top1"] for row in rows(child) if "knn_top1" in row}
        assert own.keys() == {began, ended}
        step = max(own, key=lambda step: (own[step], -step))
        assert set(told.values()) == {(step, own[step])}, told
        assert f"knn_top1 {own[step]:.4f} at step {step}\n" in printed
        improved = "improved" in manifests(child)[ended]["reasons"]
        assert improved == (step == ended), "over the state that it began with"


def test_a_fork_of_a_collapsed_state_begins_without_a_best(lab: Lab) -> None:
    lab.train("train.stop_after_steps=22")
    parent = lab.only_run()
    manifest = parent / "checkpoints" / "step-000000022.json"
    manifest.write_bytes(seal({**unseal(manifest.read_bytes(), manifest.name), "healthy": False}))
    lab.settings = ()
    lab.train("fork=last", "optimizer.lr=1e-3", "train.stop_after_steps=23")
    (child,) = [run for run in lab.runs() if run != parent]
    assert manifests(child)[22]["healthy"]
    assert set(told_best(lab, child).values()) == {None}
