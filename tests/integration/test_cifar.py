"""Trainings on CIFAR by the real command, on files of the published sizes; and on images without labels."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from support.pictures import small_tree
from support.runs import Lab, record, rows

from dino_exp.data.cifar import CIFAR10

SMALL = (
    "augment=dino", "augment.num_local_crops=1", "train.batch_size=8", "train.epochs=1", "loss.out_dim=16",
    "loss.hidden_dim=16", "loss.bottleneck_dim=8", "scheduler.warmup_epochs=0", "loss.warmup_teacher_temp_epochs=0",
    "logger.report=false", "runtime.threads=1", "runtime.workers=0",
)  # fmt: skip
FEW = ("evaluation.train_images=40", "evaluation.val_images=10", "evaluation.labels_per_class=1")


@pytest.fixture
def cifar(lab: Lab) -> Path:
    """Black images, all of the first class, in files that take no place on the disk."""
    lab.settings = (*SMALL, "data=cifar10", *FEW[:2])
    folder = lab.directory / "data" / CIFAR10.folder
    folder.mkdir(parents=True)
    for file in CIFAR10.files:
        with (folder / file.name).open("wb") as empty:
            os.truncate(empty.fileno(), file.num_rows * CIFAR10.row_bytes)
    return folder.parent


def test_a_run_on_cifar_is_moved_continued_and_evaluated(lab: Lab, cifar: Path) -> None:
    lab.train("train.stop_after_steps=1")
    run = lab.only_run()
    (baselines,) = rows(run)
    assert baselines["pixel_knn_top1"] == baselines["init_knn_1shot"] == 1.0
    cifar.rename(lab.directory / "moved")
    lab.settings = ()
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    told = lab.train(f"resume={run}", "train.stop_after_steps=2", code=2)
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before
    assert f"CIFAR-10 is not in data.root={cifar}" in told
    assert "data.download=true" in told
    lab.train(f"resume={run}", "data.root=moved", "train.stop_after_steps=2")
    assert record(run)["attempts"][-1]["why_not_exact"] == []
    words = ("of=last", *FEW, "runtime.threads=1")
    assert "is not in root=" in lab.evaluate(*words, code=2)  # where it was at the beginning
    lab.evaluate(*words, "root=moved")
    (found,) = (lab.outputs / "evaluations" / run.name).rglob("knn.json")
    assert json.loads(found.read_text())["metrics"]["knn_top1"] == 1.0
    assert json.loads(found.read_text())["data"]["same_as_in_training"] is True


def test_without_the_data_there_is_no_run(lab: Lab) -> None:
    lab.settings = (*SMALL, "data=cifar100")
    told = lab.train(code=2)
    assert "cifar-100-binary.tar.gz" in told
    assert not lab.outputs.exists()
    (lab.directory / "file").write_text("")
    assert "is no folder" in lab.train("data.root=file", "data.download=true", code=2)
    assert not lab.outputs.exists()


@pytest.fixture
def no_labels(lab: Lab) -> Path:
    lab.settings = (
        *SMALL, "data=folder", "data.root=images", "data.labels=none", "data.image_size=16", "data.local_size=8",
        "data.patch_size=8", "data.decode_size=48", "data.val_share=0.3",
    )  # fmt: skip
    return small_tree(lab.directory / "images", 40)


def test_without_labels_the_loss_alone_is_measured_and_nothing_is_the_best(lab: Lab, no_labels: Path) -> None:
    printed = lab.train()
    run = lab.only_run()
    first, *_, last = rows(run)
    assert first == {"step": 0, "epoch": 0.0}
    assert not any("knn" in name for row in rows(run) for name in row)
    assert last["val_loss"] > 0
    assert record(run)["best"] is None
    assert printed.count("folder/train has no labels: there is no k-NN") == 1
    assert printed.count("checkpoint.keep.metric=knn_top1 is not among what is measured (val_loss)") == 1
    assert "no labels; evaluation=attention and evaluation=features need no labels" in lab.evaluate("of=last", code=2)
    assert "attention of the teacher" in lab.evaluate("of=last", "evaluation=attention", "evaluation.images=2")


@pytest.mark.slow
def test_without_labels_the_loss_may_rank_and_a_page_is_drawn(lab: Lab, no_labels: Path) -> None:
    by_loss = ("checkpoint.keep.metric=val_loss", "checkpoint.keep.mode=min", "checkpoint.keep.best=1")
    printed = lab.train(*by_loss, "logger.report=true")
    run = lab.only_run()
    assert "is not among what is measured" not in printed
    assert record(run)["best"]["metric"] == "val_loss"
    assert record(run)["best"]["value"] == rows(run)[-1]["val_loss"] == record(run)["metrics"]["val_loss"]
    assert "val_loss" in (run / "report.html").read_text()
