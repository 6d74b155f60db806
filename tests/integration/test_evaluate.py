"""Evaluations of a real run: the numbers that its training logged, and all kinds by the command as it is typed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from support.runs import Lab, manifests, record, rows

KINDS = ("knn", "linear", "attention", "features", "crops")
METRICS = ("knn_top1", "knn5_top1", "knn_10shot", "knn_1shot")


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Lab:
    made = Lab(tmp_path_factory.mktemp("lab"))
    made.train()
    return made


def results(lab: Lab, kind: str, step: int = 44) -> dict[str, Any]:
    run = lab.only_run()
    found: dict[str, Any] = json.loads(
        (lab.outputs / "evaluations" / run.name / f"step-{step:09d}" / f"{kind}.json").read_text()
    )
    return found


def contents(run: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}


def test_all_kinds_by_one_command(lab: Lab) -> None:
    run = lab.only_run()
    before = contents(run)
    printed = lab.evaluate("--multirun", "of=last", f"evaluation={','.join(KINDS)}")
    assert contents(run) == before
    assert [line.split()[0] for line in printed.splitlines() if " of the teacher of " in line] == list(KINDS)
    last, manifest = rows(run)[-1], manifests(run)[44]
    assert results(lab, "knn")["metrics"] == {name: last[name] for name in METRICS}
    for kind in KINDS:
        found = results(lab, kind)
        assert found["evaluation"] == found["settings"]["name"] == kind
        assert (found["run_key"], found["step"], found["epoch"]) == (run.name, 44, 2)
        assert found["state_digest"] == manifest["state_digest"]
        for name in ("config_hash", "code_id", "git_commit", "data_fingerprint"):
            assert found[name] == manifest["record"][name]
        assert found["data"]["same_as_in_training"] is True
        assert found["numerics"]["threads"] == record(run)["numerics"]["threads"] == 1
        assert found["versions"]["torch"]
    probe = results(lab, "linear")
    assert 0.1 < probe["metrics"]["linear_top1"] <= probe["metrics"]["linear_best_top1"] <= 1
    assert probe["details"]["features"] == {"num_blocks": 1, "mean_patch": False, "num_features": 16}
    assert len(results(lab, "attention")["details"]["images"]) == 8


def test_any_checkpoint_has_the_numbers_of_its_row_and_the_probe_repeats(lab: Lab) -> None:
    run = lab.only_run()
    (row,) = (row for row in rows(run) if row["step"] == 22 and "knn_top1" in row)
    assert lab.evaluate(f"of={run}@22")
    assert results(lab, "knn", 22)["metrics"] == {name: row[name] for name in METRICS}
    words = (
        "of=last@44", "evaluation=linear", "evaluation.epochs=5", "evaluation.lr=[0.1,1]",
        "evaluation.labels_per_class=10", "evaluation.draws=2",
    )  # fmt: skip
    lab.evaluate(*words)
    first = results(lab, "linear")
    lab.evaluate(*words)
    second = results(lab, "linear")
    assert first["metrics"] == second["metrics"]
    assert first["details"] == second["details"]
    assert set(first["metrics"]) == {"linear_top1", "linear_best_top1", "linear_10shot"}
    assert first["details"]["chosen_by"] == "the held-out images"
    assert first["metrics"]["linear_top1"] == max(probe["top1"] for probe in first["details"]["probes"])


def test_with_few_images_measured_too_and_all_of_them_later(tmp_path: Path) -> None:
    lab = Lab(tmp_path)
    few = ("evaluation.train_images=500", "evaluation.val_images=100")
    lab.train(*few, "run.variant=few", "train.stop_after_epochs=1", "evaluation.every_epochs=1")
    run = lab.only_run()
    row = rows(run)[-1]
    step = row["step"]
    assert "for the numbers of its rows" not in lab.evaluate(f"of={run}", *few)
    found = results(lab, "knn", step)
    assert found["metrics"] == {name: row[name] for name in METRICS}
    assert (found["details"]["train_images"], found["details"]["val_images"]) == (500, 100)
    printed = lab.evaluate(f"of={run}")
    assert "for the numbers of its rows: evaluation.train_images=500 evaluation.val_images=100" in printed
    found = results(lab, "knn", step)
    assert (found["details"]["train_images"], found["details"]["val_images"]) == (1437, 360)
    assert found["metrics"]["knn_top1"] != row["knn_top1"]


def test_a_training_refuses_the_choices_of_an_evaluation(lab: Lab) -> None:
    assert "belongs to `python -m dino_exp.evaluate of=<run>`" in lab.train("evaluation=linear", code=2)
    assert "--multirun of=last@best evaluation=knn" in lab.cli("evaluate", "--help")
