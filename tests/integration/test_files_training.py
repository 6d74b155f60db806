"""Trainings on images in files, by the real command: named by what they are, moved, spoilt, killed and continued."""

from __future__ import annotations

import json
import shutil
import time
from dataclasses import replace
from pathlib import Path

import pytest
from support.pictures import encoded, picture, small_tree, write
from support.runs import Lab, assert_same_end, manifests, record, rows

from dino_exp.attempts.reproduction import Span, compare_replay, prepare_copy, what_images_need
from dino_exp.data.files.decode import decoder_name
from dino_exp.runs.layout import RunPaths
from dino_exp.runs.record import load_record, save_record

TINY = (
    "data=folder", "augment=dino", "data.image_size=16", "data.local_size=8", "data.patch_size=8",
    "data.decode_size=48", "data.val_share=0.3", "augment.num_local_crops=1", "train.batch_size=4", "train.epochs=2",
    "loss.out_dim=16", "loss.hidden_dim=16", "loss.bottleneck_dim=8", "scheduler.warmup_epochs=0",
    "evaluation.every_epochs=null", "logger.every_steps=1", "logger.report=false", "runtime.threads=1",
    "runtime.workers=0",
)  # fmt: skip


@pytest.fixture
def images(lab: Lab) -> Path:
    """Twelve pictures beside the outputs, and trainings of two epochs on them."""
    lab.settings = (*TINY, "data.root=images")
    return small_tree(lab.directory / "images")


def data_of(run: Path) -> dict[str, object]:
    found: dict[str, object] = json.loads((run / "config.canonical.json").read_text())["data"]
    return found


def test_a_run_is_named_by_its_images_and_not_by_their_place(lab: Lab, images: Path) -> None:
    lab.train("train.stop_after_steps=1")
    run = lab.only_run()
    assert data_of(run)["digest"].startswith("sha256:")  # type: ignore[attr-defined]
    assert {"root", "cache"}.isdisjoint(data_of(run))
    shutil.copytree(images, lab.directory / "copy")
    begun, decoder = load_record(run / "run.json"), decoder_name()
    assert begun is not None
    assert begun.numerics["decoder"] == decoder
    save_record(run / "run.json", replace(begun, numerics={**begun.numerics, "decoder": "1 (Pillow 1.0)"}))
    assert "Attempt 2" in lab.train("data.root=copy", "data.cache=true", "train.stop_after_steps=2")
    assert lab.runs() == [run]
    assert record(run)["attempts"][-1]["why_not_exact"] == [f"decoder was 1 (Pillow 1.0), is {decoder}"]
    write(images / "a/new.jpg", encoded(picture(99), "JPEG"))
    lab.train("train.stop_after_steps=1")
    assert len(lab.runs()) == 2


def test_killed_moved_and_continued_it_ends_as_if_nothing_had_been(lab: Lab, images: Path) -> None:
    whole = Lab(lab.directory / "whole", (*TINY, f"data.root={images}"))
    whole.directory.mkdir()
    whole.train()
    attempt = lab.fork("runtime.workers=2", "checkpoint.save.every_steps=1")
    end = time.monotonic() + 60
    while not list(lab.outputs.glob("runs/*/checkpoints/step-*2.json")) and time.monotonic() < end:
        time.sleep(0.005)
    attempt.kill()
    attempt.wait()
    run = lab.only_run()
    images.rename(lab.directory / "moved")
    lab.settings = ()
    assert "there is no such folder. Where the images lie now: data.root=<folder>" in lab.train(f"resume={run}", code=2)
    lab.train(f"resume={run}", "data.root=moved", "data.cache=true")
    assert record(run)["state"] == "completed"
    assert rows(run) == rows(whole.only_run())
    assert_same_end(run, whole.only_run())
    assert list((lab.outputs / "cache").glob("*/canvases-48.bin"))


def test_other_images_in_their_place_are_refused(lab: Lab, images: Path) -> None:
    lab.train("train.stop_after_steps=1")
    run = lab.only_run()
    small_tree(lab.directory / "others", 15)
    lab.settings = ()
    printed = lab.train(f"resume={run}", "data.root=others", code=3)
    assert "data was sha256:" in printed
    assert "run.on_data_change=warn" in printed
    lab.train(f"resume={run}", "data.root=others", "run.on_data_change=warn", "train.stop_after_steps=2")
    assert record(run)["attempts"][-1]["exact"] is False


def test_a_fork_keeps_the_images_or_takes_others(lab: Lab, images: Path) -> None:
    small_tree(images, 30)
    lab.train("evaluation.every_epochs=1", "train.stop_after_epochs=1")
    parent = lab.only_run()
    forked = record(parent)["best"]["step"]
    lab.settings = ()
    lab.train(f"fork={parent}", "optimizer.lr=1e-3", f"train.stop_after_steps={forked + 1}")
    (child,) = [run for run in lab.runs() if run != parent]
    assert data_of(child) == data_of(parent)
    assert manifests(child)[forked]["metrics"] == manifests(parent)[forked]["metrics"]
    assert manifests(child)[forked + 1]["state"]["best"] == manifests(parent)[forked]["state"]["best"]
    small_tree(lab.directory / "others", 45)
    lab.train(f"fork={parent}", "data.root=others", f"train.stop_after_steps={forked + 1}")
    (other,) = [run for run in lab.runs() if run not in (parent, child)]
    assert data_of(other)["digest"] != data_of(parent)["digest"]
    assert "knn_top1" not in manifests(other)[forked]["metrics"], "what was measured on the parent's images"
    assert manifests(other)[forked + 1]["state"]["best"] is None


def test_an_unreadable_image_ends_the_training_by_its_name(lab: Lab, images: Path) -> None:
    for folder in "abc":
        for number in range(4):
            write(images / folder / f"bad{number}.jpg", b"not an image")
    printed = lab.train(code=1)
    assert "cannot be decoded: it is neither a JPEG, nor a PNG, nor a WebP image. Repair or remove it" in printed
    assert "Traceback" not in printed
    printed = lab.train("data.unreadable=skip", "train.stop_after_steps=1")
    assert "12 of 24 images cannot be decoded and are left out" in printed


def test_several_processes_prepare_the_images_once(lab: Lab, images: Path) -> None:
    write(images / "a/bad.jpg", b"not an image")
    words = ("data.unreadable=skip", "data.cache=true", "train.stop_after_steps=2")
    printed = lab.train_together(2, *words)
    assert "1 of 13 images cannot be decoded" in printed[0]
    printed = lab.train_together(2, "data.cache=true", codes=(1, 1))  # refusing again
    assert "bad.jpg: cannot be decoded" in printed[0]
    (cached,) = (lab.outputs / "cache").glob("*/canvases-48.bin")
    (run,) = [one for one in lab.runs() if (one / "run.json").exists()]
    assert record(run)["step"] == 2
    assert sorted(path.name for path in cached.parent.iterdir()) == ["canvases-48.bin", "lock", "unreadable-48.json"]


def test_a_replay_finds_the_images_and_makes_no_cache_of_its_own(lab: Lab, images: Path) -> None:
    write(images / "a/bad.jpg", b"not an image")
    lab.train("data.unreadable=skip", "data.cache=true", "train.stop_after_steps=1")
    paths = RunPaths(lab.only_run())
    made = load_record(paths.run_json)
    assert made is not None
    copy = prepare_copy(paths, made, Span(start=0, stop=1), lab.directory / "again")
    words = what_images_need(copy, lab.outputs)
    assert words == [f"paths.cache={lab.outputs}/cache", "data.cache=false"]
    lab.settings = ()
    lab.train(f"resume={copy.directory}", "train.stop_after_steps=1", *words)
    assert compare_replay(paths, copy, Span(start=0, stop=1)).difference is None
    assert not (lab.directory / "again/outputs/cache").exists()


def test_an_evaluation_finds_the_images_or_asks_for_them(lab: Lab, images: Path) -> None:
    lab.train("train.stop_after_steps=2")
    words = (f"of={lab.only_run()}", "evaluation.k=1", "evaluation.labels_per_class=[]", "runtime.threads=1")
    assert "knn1_top1" in lab.evaluate(*words)
    images.rename(lab.directory / "moved")
    assert "there is no such folder. Where the images lie now: root=<folder>" in lab.evaluate(*words, code=2)
    assert "warning" not in lab.evaluate(*words, "root=moved")
    write(lab.directory / "moved/a/new.jpg", encoded(picture(99), "JPEG"))
    assert "is not the data that" in lab.evaluate(*words, "root=moved")


def test_commands_that_cannot_work_say_what_to_type(lab: Lab, images: Path) -> None:
    def told(*overrides: str, code: int = 2) -> str:
        return lab.train(*overrides, code=code)

    assert "data.digest is found by looking through the folder" in told(f"data.digest=sha256:{'0' * 64}")
    assert "gone: there is no such folder. Where the images lie now: data.root=<folder>" in told("data.root=gone")
    assert "data=imagenet needs both" in told("data=imagenet", "data.root=images")
    assert "train.batch_size is 64" in told("train.batch_size=64")
    lab.settings = (*TINY, "augment=digits")
    assert "use augment=dino" in told("data.root=images")
    lab.settings = ()
    assert "data=folder needs the folder of its images: add data.root=<folder>" in told("data=folder", "augment=dino")
    assert "data=digits, which has no files: use data=folder" in told("data.root=images")
    lab.train("experiment=digits_smoke", "train.stop_after_steps=1", "runtime.threads=1")
    (run,) = [one for one in lab.runs() if (one / "run.json").exists()]
    assert "the data of this run is data=digits, which has no files" in told(f"resume={run}", "data.root=images")
    assert "the run is of data=digits, which has no files" in lab.evaluate(f"of={run}", "root=images", code=2)
